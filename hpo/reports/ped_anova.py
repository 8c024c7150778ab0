"""PED-ANOVA, fast enough for hundreds of permutations.

The same numbers as `optuna.importance.PedAnovaImportanceEvaluator` with its defaults, which a test
compares. That one goes through all trials in Python for each call; here a trial's place on each
parameter's grid is found once, and a call counts the best ones there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BEST = 0.1
"""Part of the trials whose parameters are compared with those of all."""
STEPS = 50
"""Most points of the grid of a range."""
NARROWEST = 0.5 / 1.64
"""Standard deviation of a kernel, in points of the grid: 90 % of it are at its point."""
FEWEST = 2
"""Fewest trials of a distribution."""


@dataclass(frozen=True)
class _Column:
    """One parameter under one distribution."""

    name: str
    places: Ints
    """Point of its grid of each trial; -1 of one that has it not, or by another distribution."""
    points: int
    is_range: bool

    def density(self, chosen: npt.NDArray[np.bool_]) -> Floats:
        """Return the density (points,) of a Parzen estimator of the `chosen` trials."""
        places = self.places[chosen & (self.places >= 0)]
        counts = np.bincount(places, minlength=self.points).astype(float)
        found = _smooth(counts) if self.is_range else _mixed(counts)
        return found + 1e-12


class PedAnova:
    """PED-ANOVA over the same trials for different values."""

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        """Place the parameters of `trials` on grids."""
        self.trials = len(trials)
        self.names = list(dict.fromkeys(name for one in trials for name in one.params))
        found = [column for name in self.names for column in _columns(trials, name)]
        everything = np.ones(self.trials, dtype=bool)
        self._columns = [(column, column.density(everything)) for column in found]

    def __call__(self, values: Sequence[float]) -> dict[str, float]:
        """Return {parameter: importance}, not normalized, for `values` of which less is better."""
        losses = np.asarray(values, dtype=float)
        last = math.ceil(BEST * losses.size) - 1
        best = losses <= np.partition(losses, last)[last]
        importances = dict.fromkeys(self.names, 0.0)
        for column, of_all in self._columns:
            has = column.places >= 0
            among = float((best & has).sum())
            if among:
                apart = float(of_all @ (column.density(best) / of_all - 1) ** 2)
                weight = (among / best.sum()) ** 2 / (has.sum() / self.trials)
                importances[column.name] += float(weight) * apart
        share = float(best.sum()) / self.trials
        return {name: one * share**2 for name, one in importances.items()}


def _columns(trials: Sequence[FrozenTrial], name: str) -> list[_Column]:
    """Return a column for each distribution that trials have `name` from, if it has two values."""
    having: dict[BaseDistribution, list[int]] = defaultdict(list)
    for place, trial in enumerate(trials):
        if name in trial.distributions:
            having[trial.distributions[name]].append(place)
    found = []
    for distribution, rows in having.items():
        if distribution.single() or len(rows) < FEWEST:
            continue
        places = np.full(len(trials), -1)
        own, points = _grid(distribution, [trials[row].params[name] for row in rows])
        places[rows] = own
        is_range = not isinstance(distribution, CategoricalDistribution)
        found.append(_Column(name, places, points, is_range))
    return found


def _grid(distribution: BaseDistribution, values: Sequence[object]) -> tuple[Ints, int]:
    """Return the point of each value on the distribution's grid, and the number of points."""
    if isinstance(distribution, CategoricalDistribution):
        own = [int(distribution.to_internal_repr(value)) for value in values]  # type: ignore[arg-type]
        return np.array(own), len(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, points = float(distribution.low), float(distribution.high), STEPS
    if isinstance(distribution, IntDistribution) and distribution.log:
        points = min(math.ceil(math.log2(high - low + 1)) + 1, points)
    elif distribution.step is not None:
        points = min(round((high - low) / distribution.step) + 1, points)
    given = np.asarray(values, dtype=float)
    if distribution.log:
        given, low, high = np.log(given), math.log(low), math.log(high)
    nearest = np.ceil((given - low) / ((high - low) / (points - 1)) - 0.5).astype(int)
    return np.clip(nearest, 0, points - 1), points


def _smooth(counts: Floats) -> Floats:
    """Return the density over a grid of normal kernels, of Scott's width, at counted points, and of
    a wide one in the middle."""
    points = counts.size
    at = np.flatnonzero(counts)
    weights = np.append(counts[at], 1.0)
    means = np.append(at, (points - 1) / 2)
    widths = np.append(np.full(at.size, _scott(at, counts[at])), points)
    density: Floats = (weights / weights.sum()) @ _kernels(means, widths, points)
    return density


def _scott(at: Ints, counts: Floats) -> float:
    """Return the width of kernels by Scott's rule (1992), of the points `at` with their counts."""
    count = float(counts.sum())
    mean = float(at @ counts) / count
    std = math.sqrt(float((at - mean) ** 2 @ counts) / max(1, count - 1))
    summed = np.cumsum(counts)
    first = int(np.searchsorted(summed, count // 4, side="left"))
    third = min(at.size - 1, int(np.searchsorted(summed, count * 3 // 4, side="right")))
    between = float(at[third] - at[first])
    width = 1.059 * min(between / 1.34, std) / math.pow(count, 0.2)
    return max(NARROWEST, width)


def _kernels(means: Floats, widths: Floats, points: int) -> Floats:
    """Return normal distributions (kernels, points), cut to the grid and summed at its points."""
    from scipy.special import ndtr

    edges = np.arange(points + 1) - 0.5
    below = ndtr((edges[None, :] - means[:, None]) / widths[:, None])
    kernels: Floats = np.diff(below, axis=1) / (below[:, -1:] - below[:, :1])
    return kernels


def _mixed(counts: Floats) -> Floats:
    """Return the probabilities of choices by their counts and a uniform prior."""
    at = np.flatnonzero(counts)
    choices, kernels = counts.size, at.size + 1
    rows = np.full((kernels, choices), 1 / kernels)
    rows[np.arange(at.size), at] += 1
    weights = np.append(counts[at], 1.0)
    density: Floats = (weights / weights.sum()) @ (rows / rows.sum(axis=1, keepdims=True))
    return density
