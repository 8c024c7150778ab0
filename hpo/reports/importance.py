"""Parameter importance by PED-ANOVA, with a permutation test.

PED-ANOVA's shares add up to 1 even if the values do not depend on the parameters. So importances
are also computed for random permutations of the values; a parameter is significant if it beats the
most important one of 95 in 100 permutations.

Where a scheduler lets few trials run to their end, the trials are compared at a rung instead.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from optuna.trial import FrozenTrial, TrialState

from hpo.formatting import plural
from hpo.reports.ped_anova import PedAnova
from hpo.search.promotion import rungs_of
from hpo.search.study import load
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage
from hpo.storage.records import WORTHLESS

MIN_TRIALS = 8
"""Fewest trials: PED-ANOVA compares the best tenth, at least two trials, with the rest."""
PERMUTATIONS = 200
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Importances:
    """Importances of a study's parameters."""

    shares: Mapping[str, float] = field(default_factory=dict)
    """{parameter: share of the whole}, largest first; empty if they cannot be computed."""
    outstanding: frozenset[str] = frozenset()
    """Significant parameters."""
    trials: int = 0
    """Number of trials that were compared."""
    epochs: int | None = None
    """They were compared by their best value in so many first epochs; None: complete trials, by
    their values."""
    having: Mapping[str, int] = field(default_factory=dict)
    """Number of trials that have a parameter, of parameters that not all trials have."""
    chance: Mapping[str, float] = field(default_factory=dict)
    """{parameter: share up to which chance alone brings it}: any of them is above its own in 5 of
    100 studies without an effect."""

    @property
    def verdict(self) -> str | None:
        """Explain why no importance is shown; None if it is."""
        if self.outstanding:
            return None
        if self.trials < MIN_TRIALS:
            few = f"there are {self.trials}"
            return f"parameter importance needs {MIN_TRIALS} complete trials, {few}"
        if not self.shares:
            return f"the {self.compared} do not tell the parameters apart"
        return f"no parameter stands out from chance in {self.compared}"

    @property
    def compared(self) -> str:
        """Return `30 complete trials`, or `30 trials by their first 3 epochs`."""
        if self.epochs is None:
            return plural(self.trials, "complete trial")
        first = "epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        return f"{plural(self.trials, 'trial')} by their first {first}"

    @property
    def basis(self) -> str:
        """Return what the importances are of, for a line below them."""
        return f"importance of {self.compared}, against permutations of their values"

    def note(self, name: str) -> str:
        """Return what limits the importance of a parameter, or an empty string."""
        few = f"in {self.having[name]} of {self.trials} trials" if name in self.having else ""
        limit = f"chance: up to {min(1.0, self.chance[name]):.0%}" if name in self.chance else ""
        chance = limit if name in self.outstanding else "within chance"
        return ", ".join(part for part in (chance, few) if part)


def importances(database: Database, name: str) -> Importances:
    """Compute importances by PED-ANOVA (Watanabe et al., 2023, https://arxiv.org/abs/2304.10255)
    over the complete trials but WORTHLESS ones, for the first objective. Under a scheduler, where
    those are too few, over all that reached a rung, the deepest one with enough trials. Raises
    NotFound."""
    study = load(database, name)
    found = study.optuna_study(FencedStorage(database))
    trials = [
        trial
        for trial in found.get_trials(deepcopy=False)
        if trial.user_attrs.get("outcome") not in WORTHLESS
    ]
    sign = -1.0 if study.maximize else 1.0
    values = {
        place: sign * trial.values[0]
        for place, trial in enumerate(trials)
        if trial.state == TrialState.COMPLETE and math.isfinite(trial.values[0])
    }
    epochs = None
    if len(values) < MIN_TRIALS and study.file.study.scheduler is not None:
        for rung in rungs_of(study.file).epochs:
            reached = _values_at(trials, rung, sign)
            if len(reached) >= MIN_TRIALS:
                values, epochs = reached, rung
    compared = [trials[place] for place in values]
    return replace(importances_of(compared, list(values.values())), epochs=epochs)


def _values_at(trials: Sequence[FrozenTrial], epochs: int, sign: float) -> dict[int, float]:
    """Return the best value in the first `epochs` of each trial that had as many, `sign` times the
    reported ones so that less is better, by its place in `trials`."""
    found = {}
    for place, trial in enumerate(trials):
        first = [sign * one for epoch, one in trial.intermediate_values.items() if epoch <= epochs]
        known = [one for one in first if math.isfinite(one)]
        if len(first) == epochs and known:
            found[place] = min(known)
    return found


def importances_of(trials: Sequence[FrozenTrial], values: Sequence[float]) -> Importances:
    """Compute importances over trials with `values`, of which less is better."""
    if len(trials) < MIN_TRIALS or len(set(values)) < 2:
        return Importances(trials=len(trials))
    evaluate = PedAnova(trials)
    measured = evaluate(values)
    whole = sum(measured.values())
    if not whole:
        return Importances(trials=len(trials))
    shares = sorted(((n, one / whole) for n, one in measured.items()), key=lambda item: -item[1])
    counts = {n: sum(n in trial.params for trial in trials) for n in measured}
    limits = _limits([measured, *_permuted(evaluate, values)])
    return Importances(
        shares=dict(shares),
        outstanding=frozenset(n for n, one in measured.items() if one > limits[n]),
        trials=len(trials),
        having={n: count for n, count in counts.items() if count < len(trials)},
        chance={n: limits[n] / whole for n in measured},
    )


def _permuted(evaluate: PedAnova, values: Sequence[float]) -> list[dict[str, float]]:
    """Return importances for permutations of `values`: of the same values the same every time, of
    others other ones."""
    permuted = list(values)
    generator = random.Random(repr(permuted))
    found = []
    for _ in range(PERMUTATIONS):
        generator.shuffle(permuted)
        found.append(evaluate(permuted))
    return found


def _limits(by_chance: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the importance above which each parameter is significant: family-wise error 5 %. Each
    has its own permutations, since parameters of many values get more by chance. The values as they
    are count as one of the permutations, which makes the test exact."""
    usual = {name: _quantile([one[name] for one in by_chance]) for name in by_chance[0]}
    ratios = [
        max((one[name] / own for name, own in usual.items() if own), default=0.0)
        for one in by_chance
    ]
    return {name: _quantile(ratios) * own for name, own in usual.items()}


def _quantile(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(CONFIDENCE * len(ordered)))]
