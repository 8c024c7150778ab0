"""Learning curves as tables of configurations, on which searches are replayed.

A folder holds any of

- `curves-lcbench.npz`: `val_accuracy` (tasks, settings, epochs), `X` (settings, parameters) in
  0..1, `names` (tasks);
- `curves-taskset.npz`: `taskset_valid_loss`, `taskset_X`, `taskset_names` likewise;
- `curves-digits.jsonl`: a line {"params": {...}, "epochs": [{"val_top1": ...}, ...]} for each of
  some configurations of `studies/digits.toml`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.config.parameters import Choice, Float
from hpo.config.space import Space
from hpo.config.study import StudyFile

Floats = NDArray[np.float64]
KINDS = ("lcbench", "taskset", "digits")
DIGITS = Path(__file__).parents[1] / "studies" / "digits.toml"


@dataclass(frozen=True)
class Table:
    """All configurations of one task with their curves."""

    kind: str
    name: str
    space: Space
    params: Sequence[Mapping[str, Any]]
    """Optuna's values of each configuration."""
    points: Floats
    """(configurations, features): where each lies, in 0..1 a feature."""
    values: Floats
    """(configurations, epochs) of a metric of which more is better."""
    chance: float | None = None
    """What guessing reaches, where it is known."""

    @property
    def epochs(self) -> int:
        return self.values.shape[1]

    @property
    def bests(self) -> Floats:
        """The best epoch's value of each configuration."""
        best: Floats = self.values.max(1)
        return best

    def regret(self, value: Any) -> Any:
        """0 for the best configuration's `value`, 1 for that of the median configuration."""
        best = self.bests.max()
        return (best - value) / (best - np.median(self.bests))

    def nearest(self, params: Mapping[str, Any], taken: set[int]) -> int:
        """The configuration nearest to `params` that is not `taken`; of equals the first."""
        distances = ((self.points - embed(self.space, params)) ** 2).sum(1)
        distances[list(taken)] = np.inf
        return int(distances.argmin())

    def shortened(self, epochs: int) -> Table:
        """The same with so many epochs, evenly from the curves, the last included."""
        kept = np.linspace(0, self.epochs, epochs + 1)[1:].round().astype(int) - 1
        return replace(self, values=self.values[:, kept])

    def stressed(self) -> Table:
        """The same with an epoch before training put first, which tells nothing of the others."""
        noise = np.random.default_rng(0).random(len(self.values))
        chance = float(self.values.min()) if self.chance is None else self.chance
        first = chance - 1e-3 * np.ptp(self.values) * noise
        return replace(self, values=np.column_stack([first, self.values]), chance=chance)


def embed(space: Space, params: Mapping[str, Any]) -> Floats:
    """Where `params` (Optuna's values) lie: a range in 0..1, a choice as one feature a value, so
    that two are 1 apart; what is not active lies in the middle."""
    features: list[float] = []
    for name, parameter in space.items():
        if isinstance(parameter, Choice):
            given = params[name]
            features += [
                math.sqrt(0.5) * (parameter.encode(one) == given) for one in parameter.choices
            ]
        elif name not in params:
            features.append(0.5)
        else:
            low, high, value = parameter.low, parameter.high, params[name]  # type: ignore[attr-defined]
            if parameter.log:  # type: ignore[attr-defined]
                low, high, value = math.log(low), math.log(high), math.log(value)
            features.append((value - low) / (high - low))
    return np.array(features)


def load(folder: Path, kinds: Sequence[str] = KINDS) -> dict[str, list[Table]]:
    """The tables in `folder` by kind; raises FileNotFoundError where there is none."""
    readers = {
        "lcbench": ("curves-lcbench.npz", _lcbench),
        "taskset": ("curves-taskset.npz", _taskset),
        "digits": ("curves-digits.jsonl", _digits),
    }
    wanted = {kind: (folder / readers[kind][0], readers[kind][1]) for kind in kinds}
    found = {kind: read(path) for kind, (path, read) in wanted.items() if path.exists()}
    if not found:
        names = ", ".join(path.name for path, _ in wanted.values())
        raise FileNotFoundError(f"{folder}: none of {names}")
    return found


def _lcbench(path: Path) -> list[Table]:
    with np.load(path, allow_pickle=False) as data:
        x, names, values = data["X"], data["names"], data["val_accuracy"].astype(float)
    return [_table("lcbench", str(name), x, one) for name, one in zip(names, values, strict=True)]


def _taskset(path: Path) -> list[Table]:
    with np.load(path, allow_pickle=False) as data:
        x, names = data["taskset_X"], data["taskset_names"]
        values = -data["taskset_valid_loss"].astype(float)
    # Reviews are good or bad, half of them each.
    return [
        _table("taskset", str(name), x, one, chance=-math.log(2))
        for name, one in zip(names, values, strict=True)
    ]


def _table(
    kind: str, name: str, x: NDArray[Any], values: Floats, chance: float | None = None
) -> Table:
    points = x.astype(float)
    space = Space({f"x{i}": Float(low=0.0, high=1.0) for i in range(points.shape[1])})
    params = [dict(zip(space, map(float, row), strict=True)) for row in points]
    return Table(kind, name, space, params, points, values, chance)


def _digits(path: Path) -> list[Table]:
    space = StudyFile.load(DIGITS).space
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    params = [row["params"] for row in rows]
    values = np.array([[epoch["val_top1"] for epoch in row["epochs"]] for row in rows])
    points = np.array([embed(space, one) for one in params])
    return [Table("digits", "digits", space, params, points, values)]


def recommend(others: Sequence[Table], count: int) -> list[int]:
    """`count` configurations that together do well on `others`: each the one that lowers most the
    mean over tasks of the best's regret. All tables have the same configurations."""
    regrets = np.array([one.regret(one.bests) for one in others])
    chosen: list[int] = []
    best = np.full(len(others), np.inf)
    for _ in range(count):
        means = np.minimum(best[:, None], regrets).mean(0)
        means[chosen] = np.inf
        chosen.append(int(means.argmin()))
        best = np.minimum(best, regrets[:, chosen[-1]])
    return chosen
