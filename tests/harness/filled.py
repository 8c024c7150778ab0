"""What reports are made of: studies whose trials ended or paused as a test wishes, through the real
leases and Optuna, and trained runs."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import optuna
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.config.metrics import worst_value
from hpo.config.study import StudyFile
from hpo.config.train import TrainConfig
from hpo.io import write_text
from hpo.search import study as studies
from hpo.search.sampling import make_sampler
from hpo.search.study import Study
from hpo.storage import leases
from hpo.storage.database import Database, exists
from hpo.storage.leases import Ending
from hpo.storage.optuna import FencedStorage, add_waiting
from hpo.storage.records import Epoch, Outcome
from hpo.trained.retrain import curves
from hpo.trained.run import RunDir, RunMetadata, SeedDir, SeedResult, TrainedRun

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


_copies: dict[str, sqlite3.Connection] = {}
"""Databases in memory of studies that were filled before, by what was put in."""


def fill(database: Database, file: StudyFile, trials: Iterable[Trial]) -> Study:
    """The study of `file` with `trials` in it, from a worker named 'w'. In a new SQLite database it
    is the copy of one that was filled before, if there is one: filling takes a hundred times as
    long."""
    trials = list(trials)
    if not database.is_sqlite or _has_studies(database):
        return fill_anew(database, file, trials)
    key = repr((file, file.text, file.automatic, trials))
    if key not in _copies:
        study = fill_anew(database, file, trials)
        _copies[key] = sqlite3.connect(":memory:", check_same_thread=False)
        with _sqlite(database) as ours:
            ours.backup(_copies[key])
        return study
    with _sqlite(database) as ours:
        _copies[key].backup(ours)
    return studies.load(database, file.name)


def _has_studies(database: Database) -> bool:
    """Whether anybody's studies are there, Optuna's own included."""
    if not exists(database) or not sa.inspect(database.engine).has_table("studies"):
        return False
    with database.read() as c:
        return bool(c.scalar(sa.text("SELECT count(*) FROM studies")))


@contextmanager
def _sqlite(database: Database) -> Iterator[sqlite3.Connection]:
    raw = database.engine.raw_connection()
    try:
        yield cast(sqlite3.Connection, raw.driver_connection)
    finally:
        raw.close()


def fill_anew(database: Database, file: StudyFile, trials: Iterable[Trial]) -> Study:
    """The same, whatever was filled before."""
    study = studies.create(database, file)[0]
    storage = FencedStorage(database)
    view = study.optuna_study(storage)
    for trial in trials:
        add_waiting(storage, study.row.study_id)
        _run(study, storage, view, trial)
    return study


def _run(study: Study, storage: FencedStorage, view: optuna.Study, wanted: Trial) -> None:
    taken = leases.claim(study.database, study.uuid, study.snapshot().free[0], "w")
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
    if wanted.outcome == "paused":
        assert leases.release(study.database, lease, Outcome.PAUSED, wanted.reason or "")
        return
    ending = wanted.ending()
    with storage.guarded(lease, ending):
        state = STATES.get(wanted.outcome, TrialState.COMPLETE)
        values = ending.objectives or ending.value
        if wanted.outcome == "diverged":
            values = tuple(worst_value(name) for name in study.file.objectives)
        view.tell(trial, values if state == TrialState.COMPLETE else None, state=state)


def _epoch(study: Study, lease: leases.Lease, epoch: int, value: float) -> None:
    metrics = {"train_loss": 1.1 - value, "val_loss": 1.2 - value, "val_top1": value,
               "val_top5": min(1.0, value + 0.1), "lr": 0.1 / epoch, "seconds": 2.0}  # fmt: skip
    leases.begin_epoch(study.database, lease, epoch, {})
    row = Epoch(epoch, lease.k, 0.0, metrics, None)
    leases.record_epochs(study.database, lease, [row], progress={})


def trained(
    path: Path,
    part: str | None = "test",
    classes: Sequence[str] = ("cat", "dog", "frog"),
    note: str = "a note",
) -> TrainedRun:
    """A run of two seeds under `path` that was measured on `part`; `note` names its folder, too."""
    name = note.rpartition("/")[2]
    files = RunDir(path / "run")
    metadata = RunMetadata(
        tuple(classes), (0.5,), (0.5,), "f00d", part == "val", part == "test", 3, (note,)
    )
    seeds = [_seed(files.seed(seed), part, classes, top1) for seed, top1 in ((0, 0.9), (1, 0.92))]
    config = TrainConfig.parse({"optimizer": {"lr": 0.01}, "epochs": 3})
    return TrainedRun(path / name, config, {"study": "toy", "trial": 4}, metadata, tuple(seeds))


def _seed(files: SeedDir, part: str | None, classes: Sequence[str], top1: float) -> SeedResult:
    epochs = [{"train_loss": 1 / e, "train_top1": 1 - 1 / (e + 1), "lr": 0.1} for e in (1, 2, 3)]
    write_text(files.curves, curves(epochs))
    metrics = {kind: scores(classes, top1) if kind == part else None for kind in ("test", "val")}
    training = {"loss": 0.3, "top1": 0.7}
    return SeedResult(int(files.root.name[-1]), files, {**metrics, "train": training})


def scores(classes: Sequence[str], top1: float, wrong: int = 1) -> dict[str, Any]:
    """Scores of a network that takes some images of each class for the next one's."""
    size = len(classes)
    row = {"precision": 0.9, "recall": 0.8, "f1": 0.85, "support": 10 + wrong}
    counts = [[10 if i == j else wrong * (j == i + 1) for j in range(size)] for i in range(size)]
    rates = {"macro_precision": 0.9, "macro_recall": 0.8, "macro_f1": 0.85}
    per_class = dict.fromkeys(classes, row)
    return {**rates, "loss": 0.3, "top5": 1.0, "top1": top1, "per_class": per_class,
            "confusion": counts}  # fmt: skip
