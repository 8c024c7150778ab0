"""Parameter importance by PED-ANOVA, with a permutation test.

PED-ANOVA's shares add up to 1 even if the values do not depend on the parameters. So importances
are also computed for random permutations of the values; a parameter is significant if it beats the
most important one of 95 in 100 permutations.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.search.study import load
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage, quiet_optuna
from hpo.storage.records import WORTHLESS

MIN_COMPLETE = 8
"""Fewest complete trials: PED-ANOVA compares the best tenth, at least two trials, with the rest."""
PERMUTATIONS, FEWEST_PERMUTATIONS = 100, 20
LONGEST_S = 4.0
"""Seconds after which FEWEST_PERMUTATIONS are enough."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Importances:
    """Importances of a study's parameters."""

    shares: Mapping[str, float] = field(default_factory=dict)
    """{parameter: share of the whole}, largest first; empty if they cannot be computed."""
    outstanding: frozenset[str] = frozenset()
    """Significant parameters."""
    trials: int = 0
    """Number of complete trials."""
    having: Mapping[str, int] = field(default_factory=dict)
    """Number of trials that have a parameter, of parameters that not all trials have."""

    @property
    def verdict(self) -> str | None:
        """Explain why no importance is shown; None if it is."""
        if self.outstanding:
            return None
        if self.trials < MIN_COMPLETE:
            few = f"there are {self.trials}"
            return f"parameter importance needs {MIN_COMPLETE} complete trials, {few}"
        if not self.shares:
            return f"the {self.trials} complete trials do not tell the parameters apart"
        return f"no parameter stands out from chance in {self.trials} complete trials"

    def note(self, name: str) -> str:
        """Return what limits the importance of a parameter, or an empty string."""
        few = f"in {self.having[name]} of {self.trials} trials" if name in self.having else ""
        chance = "" if name in self.outstanding else "within chance"
        return ", ".join(part for part in (chance, few) if part)


def importances(database: Database, name: str) -> Importances:
    """Compute importances by PED-ANOVA (Watanabe et al., 2023, https://arxiv.org/abs/2304.10255)
    over the complete trials but WORTHLESS ones, for the first objective. Raises NotFound."""
    study = load(database, name)
    found = study.optuna_study(FencedStorage(database))
    complete = [
        trial
        for trial in found.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if trial.user_attrs.get("outcome") not in WORTHLESS and math.isfinite(trial.values[0])
    ]
    sign = -1.0 if study.maximize else 1.0
    return importances_of(complete, [sign * trial.values[0] for trial in complete])


def importances_of(complete: Sequence[FrozenTrial], values: Sequence[float]) -> Importances:
    """Compute importances over trials with `values`, of which less is better."""
    if len(complete) < MIN_COMPLETE or len(set(values)) < 2:
        return Importances(trials=len(complete))
    evaluate = _PedAnova(complete)
    measured = evaluate(values)
    whole = sum(measured.values())
    if not whole:
        return Importances(trials=len(complete))
    shares = sorted(((n, one / whole) for n, one in measured.items()), key=lambda item: -item[1])
    counts = {n: sum(n in trial.params for trial in complete) for n in measured}
    return Importances(
        shares=dict(shares),
        outstanding=_outstanding(measured, _permuted(evaluate, values)),
        trials=len(complete),
        having={n: count for n, count in counts.items() if count < len(complete)},
    )


class _PedAnova:
    """PED-ANOVA over the same trials for different values (less is better)."""

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        with quiet_optuna():
            self._study = optuna.create_study(storage=optuna.storages.InMemoryStorage())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        for number, one in enumerate(trials):
            self._study.add_trial(
                optuna.trial.create_trial(
                    params=one.params, distributions=one.distributions, value=float(number)
                )
            )

    def __call__(self, values: Sequence[float]) -> dict[str, float]:
        """Return {parameter: importance}, not normalized."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of conditional parameters that few trials have
            return self._evaluator.evaluate(
                self._study, target=lambda trial: values[int(trial.value or 0)]
            )


def _permuted(evaluate: _PedAnova, values: Sequence[float]) -> list[dict[str, float]]:
    """Return importances for permutations of `values`, which are the same every time."""
    generator, permuted = random.Random(0), list(values)
    found: list[dict[str, float]] = []
    began = time.monotonic()
    while len(found) < PERMUTATIONS:
        if len(found) >= FEWEST_PERMUTATIONS and time.monotonic() - began > LONGEST_S:
            break
        generator.shuffle(permuted)
        found.append(evaluate(permuted))
    return found


def _outstanding(
    measured: Mapping[str, float], by_chance: Sequence[Mapping[str, float]]
) -> frozenset[str]:
    """Return the significant parameters of `measured`: family-wise error 5 %. Each is compared with
    its own permutations, since parameters of many values get more by chance."""
    usual = {name: _quantile([one[name] for one in by_chance]) for name in measured}
    ratios = [
        max((one[name] / usual[name] for name in measured if usual[name]), default=0.0)
        for one in by_chance
    ]
    limit = _quantile(ratios)
    return frozenset(name for name, one in measured.items() if one > limit * usual[name])


def _quantile(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(CONFIDENCE * len(ordered)))]
