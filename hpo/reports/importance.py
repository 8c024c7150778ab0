"""Parameter importance by PED-ANOVA, and which of it stands out from chance.

PED-ANOVA's shares add up to 1 even where the values have nothing to do with the parameters. So the
same is computed for values dealt out anew to the trials, and a parameter stands out where it
beats what chance gives to any parameter in 95 of 100 such deals.
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
from hpo.storage.optuna import FencedStorage
from hpo.storage.records import WORTHLESS

MIN_COMPLETE = 8
"""Complete trials below which importances would be noise: PED-ANOVA compares the best tenth, two
trials at the least, with the rest."""
DEALS, FEWEST_DEALS = 100, 20
LONGEST_S = 4.0
"""No further deals after so many seconds, once there are FEWEST_DEALS."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Importances:
    """What the complete trials of a study tell about its parameters."""

    shares: Mapping[str, float] = field(default_factory=dict)
    """{parameter: share of the whole}, largest first; empty where nothing can be told."""
    outstanding: frozenset[str] = frozenset()
    """Those that stand out from chance."""
    trials: int = 0
    """Complete trials."""
    having: Mapping[str, int] = field(default_factory=dict)
    """How many of them have a parameter that not all of them have."""

    @property
    def verdict(self) -> str | None:
        """Why there is no importance to show, in words; None where there is."""
        if self.outstanding:
            return None
        if self.trials < MIN_COMPLETE:
            few = f"there are {self.trials}"
            return f"parameter importance needs {MIN_COMPLETE} complete trials, {few}"
        if not self.shares:
            return f"the {self.trials} complete trials do not tell the parameters apart"
        return f"no parameter stands out from chance in {self.trials} complete trials"

    def note(self, name: str) -> str:
        """What limits the importance of a parameter; empty where nothing does."""
        few = f"in {self.having[name]} of {self.trials} trials" if name in self.having else ""
        chance = "" if name in self.outstanding else "within chance"
        return ", ".join(part for part in (chance, few) if part)


def importances(database: Database, name: str) -> Importances:
    """Importances by PED-ANOVA (Watanabe et al., 2023, https://arxiv.org/abs/2304.10255) over the
    complete trials, none of WORTHLESS; of several objectives of the first. Raises NotFound."""
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
    """Importances over trials with `values`, less of which is better."""
    if len(complete) < MIN_COMPLETE or len(set(values)) < 2:
        return Importances(trials=len(complete))
    judge = _Judge(complete)
    measured = judge(values)
    whole = sum(measured.values())
    if not whole:
        return Importances(trials=len(complete))
    shares = sorted(((n, one / whole) for n, one in measured.items()), key=lambda item: -item[1])
    counts = {n: sum(n in trial.params for trial in complete) for n in measured}
    return Importances(
        shares=dict(shares),
        outstanding=_outstanding(measured, _by_chance(judge, values)),
        trials=len(complete),
        having={n: count for n, count in counts.items() if count < len(complete)},
    )


class _Judge:
    """PED-ANOVA over the same trials, for any values of theirs (less is better)."""

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
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
        """{parameter: importance}, not normalized."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of conditional parameters that few trials have
            return self._evaluator.evaluate(
                self._study, target=lambda trial: values[int(trial.value or 0)]
            )


def _by_chance(judge: _Judge, values: Sequence[float]) -> list[dict[str, float]]:
    """Importances where `values` are dealt out to the trials at random, the same every time."""
    generator, dealt = random.Random(0), list(values)
    found: list[dict[str, float]] = []
    began = time.monotonic()
    while len(found) < DEALS:
        if len(found) >= FEWEST_DEALS and time.monotonic() - began > LONGEST_S:
            break
        generator.shuffle(dealt)
        found.append(judge(dealt))
    return found


def _outstanding(
    measured: Mapping[str, float], by_chance: Sequence[Mapping[str, float]]
) -> frozenset[str]:
    """Those of `measured` that chance gives to no parameter but in 5 of 100 cases. Each is held
    against what chance gives to itself, since a parameter of many values gets more of it."""
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
