"""Stand-ins for training, over the real database, leases and Optuna."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import TrialState

from hpo.config.study import StudyFile, parse_study
from hpo.search.sampling import open_trial
from hpo.search.study import Study
from hpo.storage import leases
from hpo.storage.leases import Claim, Ending
from hpo.storage.optuna import FencedStorage
from hpo.storage.records import Epoch, Outcome
from hpo.workers.worker import Progress

STUDY = """
[study]
name = "{name}"
trials = {trials}
lease_s = {lease_s}
sampler = {sampler}
pruner = {pruner}
defaults = false
{study}
[train]
{train}
[space]
{space}
"""


def study_file(
    *,
    trials: int = 6,
    lease_s: float = 5.0,
    name: str = "toy",
    sampler: str = "random",
    pruner: str = "none",
    study: str = "",
    train: str = "epochs = 3",
    space: str = "optimizer.lr = {low = 1e-4, high = 1e-1, log = true}",
) -> StudyFile:
    """A small study over digits; the arguments are TOML lines of its tables, `sampler` and `pruner`
    names or tables."""
    fields = {"trials": trials, "lease_s": lease_s, "name": name, "sampler": _quoted(sampler)}
    text = STUDY.format(**fields, pruner=_quoted(pruner), study=study, train=train, space=space)
    return parse_study(text, f"{name}.toml")


def _quoted(strategy: str) -> str:
    return strategy if strategy.startswith("{") else f'"{strategy}"'


@dataclass
class InstantTrials:
    """Trials whose value is the learning rate, or what `value` makes of their parameters, at once:
    suggested, reported and told for real."""

    study: Study
    storage: FencedStorage
    epochs: int = 1
    seconds: float = 0.0
    value: Callable[[Mapping[str, Any]], float] = lambda params: params.get("optimizer.lr", 0.5)
    optuna_study: optuna.Study = field(init=False)

    def __post_init__(self) -> None:
        self.optuna_study = self.study.optuna_study(self.storage)

    def run(self, taken: Claim, control: Progress) -> None:
        lease, file = taken.lease, self.study.file
        with self.storage.guarded(lease):
            trial = open_trial(file, self.optuna_study, self.storage, taken)
            file.space.suggest(trial)
            value = float(self.value(trial.params))
            for epoch in range(1, self.epochs + 1):
                leases.begin_epoch(self.study.database, lease, epoch, {})
                time.sleep(self.seconds)
                control.step(epoch=epoch, images=1)
                row = Epoch(epoch, lease.k, 0.0, {"val_top1": value}, None)
                leases.record_epochs(self.study.database, lease, [row], progress={})
                trial.report(value, epoch)
            self._tell(trial, taken, Ending(Outcome.COMPLETE, value))

    def drain(self, taken: Claim, reason: str, control: object) -> None:
        with self.storage.guarded(taken.lease):
            trial = optuna.trial.Trial(self.optuna_study, taken.lease.trial_id)
            self._tell(trial, taken, Ending(Outcome.PRUNED, reason=reason))

    def _tell(self, trial: optuna.Trial, taken: Claim, ending: Ending) -> None:
        state = TrialState.PRUNED if ending.outcome == "pruned" else TrialState.COMPLETE
        value = ending.value if state == TrialState.COMPLETE else None
        with self.storage.guarded(taken.lease, ending):
            self.optuna_study.tell(trial, value, state=state)
