"""What reports are made of: studies whose trials ended as a test wishes, through the real leases
and Optuna, and trained models as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState

from hpo.config.metrics import worst
from hpo.config.study import StudyFile
from hpo.search import study as studies
from hpo.search.sampling import make_sampler
from hpo.search.study import Study
from hpo.storage import leases
from hpo.storage.database import Database
from hpo.storage.leases import Ending
from hpo.storage.optuna import (
    FencedStorage,
    add_waiting,
)
from hpo.storage.records import (
    Epoch,
    Outcome,
)

STATES = {"pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


@dataclass(frozen=True)
class Trial:
    """How a trial ended, its val_top1 by epoch, and its values of further objectives."""

    outcome: str
    curve: Sequence[float] = ()
    reason: str | None = None
    costs: tuple[float, ...] = ()

    def ending(self) -> Ending:
        value = max(self.curve, default=0.0) if self.outcome == "complete" else None
        several = (value, *self.costs) if value is not None and self.costs else None
        return Ending(Outcome(self.outcome), value, self.reason, several)


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
RICH_SPACE = """
optimizer.name = ["sgd", "adamw"]
optimizer.lr = {low = 1e-4, high = 1e-1, log = true}
optimizer.momentum = {low = 0.5, high = 0.9, when = {"optimizer.name" = "sgd"}}
model.cnn.filters = [[16, 32], [32, 64]]
batch_size = {low = 16, high = 64, step = 16}
"""
MIXED = [
    *(Trial("complete", (0.5, 0.6 + i / 100, 0.55 + i / 100)) for i in range(12)),
    Trial("pruned", (0.2, 0.3), "median pruned it after epoch 2"),
    Trial("failed", (), "out of memory"),
    Trial("diverged", (0.4, float("nan")), "loss not finite in epoch 2"),
]


def fill(database: Database, file: StudyFile, trials: Iterable[Trial]) -> Study:
    """The study of `file` with `trials` in it, from a worker named 'w'."""
    study = studies.create(database, file)[0]
    storage = FencedStorage(database)
    view = study.optuna_study(storage)
    for trial in trials:
        add_waiting(storage, study.row.study_id)
        _run(study, storage, view, trial)
    return study


def _run(study: Study, storage: FencedStorage, view: optuna.Study, wanted: Trial) -> None:
    taken = leases.take(study.database, study.uuid, study.facts().free[0], "w")
    assert taken is not None
    lease = taken.lease
    with storage.guarded(lease):
        view.get_trials()
        storage.set_trial_state_values(lease.trial_id, TrialState.RUNNING)
        view.sampler = make_sampler(study.file, lease.number)
        trial = optuna.trial.Trial(view, lease.trial_id)
        study.file.space.suggest(trial)
        for epoch, value in enumerate(wanted.curve, 1):
            _epoch(study, lease, epoch, value)
            if math.isfinite(value) and not wanted.costs:
                trial.report(value, epoch)
    ending = wanted.ending()
    with storage.guarded(lease, ending):
        state = STATES.get(wanted.outcome, TrialState.COMPLETE)
        values = ending.objectives or ending.value
        if wanted.outcome == "diverged":
            values = tuple(worst(name) for name in study.file.objectives)
        view.tell(trial, values if state == TrialState.COMPLETE else None, state=state)


def _epoch(study: Study, lease: leases.Lease, epoch: int, value: float) -> None:
    metrics = {"train_loss": 1.1 - value, "val_loss": 1.2 - value, "val_top1": value,
               "val_top5": min(1.0, value + 0.1), "lr": 0.1 / epoch, "seconds": 2.0}  # fmt: skip
    leases.begin_epoch(study.database, lease, epoch, {})
    row = Epoch(epoch, lease.k, 0.0, metrics, None)
    leases.record_epochs(study.database, lease, [row], progress={})


def result(classes: list[str], wrong: int = 1) -> dict[str, Any]:
    size = len(classes)
    rows = [{"class": c, "precision": 0.9, "recall": 0.8, "f1": 0.85, "support": 10 + wrong}
            for c in classes]  # fmt: skip
    counts = [[10 if i == j else wrong * (j == i + 1) for j in range(size)] for i in range(size)]
    macro = {"precision": 0.9, "recall": 0.8, "f1": 0.85}
    return {"loss": 0.3, "top1": 0.91, "top5": 1.0, "macro": macro, "per_class": rows,
            "confusion": counts}  # fmt: skip


def trained(split: str | None = "test", classes: list[str] | None = None) -> dict[str, Any]:
    names = classes or ["cat", "dog", "frog"]
    epochs = [{"epoch": e, "train_loss": 1 / e, "train_top1": 1 - 1 / (e + 1), "lr": 0.1}
              for e in (1, 2, 3)]  # fmt: skip
    seeds = [
        {"seed": seed, "epochs": epochs}
        | {kind: result(names) if kind == split else None for kind in ("test", "validation")}
        for seed in (0, 1)
    ]
    summary = {"top1": {"mean": 0.91, "std": 0.012, "n": 2}} if split else None
    return {"title": "best", "config": {"optimizer": {"lr": 0.01}, "epochs": 3},
            "provenance": {"study": "toy", "trial": 4}, "classes": names, "notes": ["a note"],
            "seeds": seeds, "summary": summary}  # fmt: skip
