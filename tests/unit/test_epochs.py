"""Epochs that end while the database is away, with real training on a few of the digits."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch

from hpo.errors import StorageUnavailable
from hpo.paths import Home, StudyDir
from hpo.search import study as studies
from hpo.search import trial as objective
from hpo.search.journal import _is_same, continues
from hpo.search.status import read_status
from hpo.search.study import Study
from hpo.search.trial import TrialRunner
from hpo.storage import leases, tables
from hpo.storage.database import Database
from hpo.storage.leases import Lease
from hpo.storage.optuna import FencedStorage
from hpo.storage.records import Epoch, Trial
from hpo.training.checkpoint import Checkpoint
from hpo.workers.worker import Worker
from tests.harness.fakes import study_file

TRAIN = """epochs = 6
data = {limit_train = 100}
model = {cnn = {filters = [4]}, dropout = 0.2}
runtime = {precision = "float32", memory_format = "contiguous"}
"""


class Killed(BaseException):
    """As if by SIGKILL: nothing is handed back."""


@pytest.fixture
def study(database: Database) -> Study:
    return studies.create(database, study_file(trials=1, train=TRAIN))[0]


@pytest.fixture
def directory(study: Study, home: Home) -> StudyDir:
    return study.directory(home)


def work(study: Study, home: Home) -> Trial:
    storage = FencedStorage(study.database)
    view = study.optuna_study(storage)
    runner = TrialRunner(study, storage, view, home, torch.device("cpu"), threads=1)
    Worker(study, storage, runner, home=home, worker_id=None).run(threading.Event())
    return read_status(study.database, "toy").trials[0]


def away_in(
    monkeypatch: pytest.MonkeyPatch, *epochs: int, then: Callable[[int], None] = lambda _: None
) -> list[list[tuple[int, int, int | None]]]:
    """The database is away when these epochs end; `then` is called when any ends. What was
    recorded: (epoch, attempt, pointer) call by call."""
    record, recorded = leases.record_epochs, []

    def call(database: Database, lease: Lease, rows: Any, **others: Any) -> str | None:
        then(rows[-1].epoch)
        if rows[-1].epoch in epochs:
            raise StorageUnavailable("away")
        recorded.append([(row.epoch, row.attempt, row.checkpoint) for row in rows])
        return record(database, lease, rows, **others)

    monkeypatch.setattr(objective.leases, "record_epochs", call)
    return recorded


def check_whole(trial: Trial, *attempts: str) -> None:
    assert trial.state == "complete"
    assert [a.outcome for a in trial.attempts] == list(attempts)
    assert [row.epoch for row in trial.epochs] == [1, 2, 3, 4, 5, 6]


def test_training_goes_on_and_delivers_all_of_it_at_once(
    study: Study, home: Home, directory: StudyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[list[int]] = []

    def look(_epoch: int) -> None:
        files.append(sorted(epoch for epoch, _, _ in directory.checkpoints(0)))

    recorded = away_in(monkeypatch, 2, 3, 4, then=look)
    trial = work(study, home)
    check_whole(trial, "complete")
    assert recorded == [
        [(1, 1, 1)],
        [(2, 1, None), (3, 1, None), (4, 1, None), (5, 1, 1)],
        [(6, 1, 1)],
    ]
    # The one that the database names, and the last one: no more.
    assert files == [[1], [1, 2], [1, 3], [1, 4], [1, 5], [5, 6]]
    assert (trial.attempts[0].first_epoch, trial.attempts[0].epoch) == (1, 6)
    view = study.optuna_study(FencedStorage(study.database))
    assert set(view.trials[0].intermediate_values) == {1, 2, 3, 4, 5, 6}


def test_a_successor_delivers_what_a_dead_worker_left_on_disk(
    study: Study, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(epoch: int) -> None:
        if epoch == 5:
            raise Killed

    away_in(monkeypatch, 3, 4, then=die)
    with pytest.raises(Killed):
        work(study, home)
    leases.release_worker(study.database, _owner(study), "died")
    monkeypatch.undo()
    recorded = away_in(monkeypatch)
    trial = work(study, home)
    check_whole(trial, "lost", "complete")
    assert recorded == [[(3, 1, None), (4, 1, None), (5, 1, 1)], [(6, 2, 2)]]
    begun = [(a.first_epoch, a.epoch) for a in trial.attempts]
    assert begun == [(1, 5), (6, 6)]  # not one of them twice


def _owner(study: Study) -> str:
    return read_status(study.database, "toy").trials[0].attempts[-1].worker


def killed_after_checkpoint(study: Study, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs 1 and 2 are recorded, 3 is on disk only."""

    def die(epoch: int) -> None:
        if epoch == 3:
            raise Killed

    away_in(monkeypatch, then=die)
    with pytest.raises(Killed):
        work(study, home)
    leases.release_worker(study.database, _owner(study), "died")
    monkeypatch.undo()


def test_nothing_is_delivered_that_does_not_go_on_from_what_is_stored(
    study: Study, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after_checkpoint(study, home, monkeypatch)
    with study.database.write() as c:
        c.execute(
            sa.update(tables.epochs)
            .where(tables.epochs.c.epoch == 1)
            .values(metrics=json.dumps({"val_top1": 0.5, "seconds": 1.0}))
        )
    recorded = away_in(monkeypatch)
    check_whole(work(study, home), "lost", "complete")
    assert recorded[0] == [(3, 2, 2)]


@pytest.mark.parametrize("broken", [b"", b"no checkpoint"])
def test_a_file_that_is_no_checkpoint_is_left_alone(
    study: Study, home: Home, directory: StudyDir, monkeypatch: pytest.MonkeyPatch, broken: bytes
) -> None:
    killed_after_checkpoint(study, home, monkeypatch)
    directory.checkpoint(0, 1, 3).write_bytes(broken)
    recorded = away_in(monkeypatch)
    check_whole(work(study, home), "lost", "complete")
    assert recorded[0] == [(3, 2, 2)]


def test_what_was_taken_over_meanwhile_is_dropped_and_counted(
    study: Study, home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def supersede(epoch: int) -> None:
        if epoch == 4 and len(read_status(study.database, "toy").trials[0].attempts) == 1:
            leases.release_worker(study.database, _owner(study), "thought dead")

    recorded = away_in(monkeypatch, 2, 3, then=supersede)
    trial = work(study, home)
    assert recorded[1] == [(2, 1, None), (3, 1, None), (4, 1, 1)]  # and that was refused
    assert recorded[2] == recorded[1]  # on the same host its successor has them
    assert "trial 0: attempt 1 leaves 3 epoch(s) unrecorded" in caplog.text
    check_whole(trial, "lost", "complete")


def row(epoch: int, **metrics: float) -> Epoch:
    return Epoch(epoch, 1, 0.0, metrics, None)


NAN = float("nan")


@pytest.mark.parametrize(
    ("metrics", "rows", "expected"),
    [
        ([], [], True),
        ([{"a": 0.1}], [], True),
        ([{"a": 0.1, "b": 1.0}, {"a": 0.2}], [row(1, b=1.0, a=0.1)], True),
        ([{"a": 0.1}, {"a": 0.2}], [row(1, a=0.1), row(2, a=0.3)], False),
        ([{"a": 0.1}], [row(1, a=0.1), row(2, a=0.2)], False),
        ([{"a": NAN}], [row(1, a=NAN)], True),
        ([{"a": 0.1 + 0.2}], [row(1, **json.loads(json.dumps({"a": 0.1 + 0.2})))], True),
        ([{"a": 0.3}], [row(1, a=0.1 + 0.2)], False),
    ],
)
def test_continues(metrics: Any, rows: list[Epoch], expected: bool) -> None:
    assert continues(metrics, rows) is expected


def die_in(epoch: int) -> Callable[[int], None]:
    def die(now: int) -> None:
        if now == epoch:
            raise Killed

    return die


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.find(b"data/0") + 200] ^= 4
    path.write_bytes(content)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def of_another_epoch(path: Path) -> None:
    found = Checkpoint.load(path)
    replace(found, metrics=found.metrics[:1]).save(path)


def of_another_trial(path: Path) -> None:
    found = Checkpoint.load(path)
    replace(found, config=found.config | {"seed": 77}).save(path)


@pytest.mark.parametrize(
    "damage", [emptied, cut, flipped, a_folder, of_another_epoch, of_another_trial]
)
def test_a_damaged_checkpoint_fails_no_trial(
    study: Study,
    home: Home,
    directory: StudyDir,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
) -> None:
    """Epochs 1 to 3 are recorded: they stay while they are computed again, and are the same."""
    away_in(monkeypatch, then=die_in(4))
    with pytest.raises(Killed):
        work(study, home)
    leases.release_worker(study.database, _owner(study), "died")
    monkeypatch.undo()
    before = read_status(study.database, "toy").trials[0].epochs
    directory.checkpoint(0, 1, 4).unlink()
    damage(directory.checkpoint(0, 1, 3))
    seen: list[int] = []

    def count(_epoch: int) -> None:
        seen.append(len(read_status(study.database, "toy").trials[0].epochs))

    recorded = away_in(monkeypatch, then=count)
    trial = work(study, home)
    check_whole(trial, "lost", "complete")
    assert [rows[0][0] for rows in recorded] == [1, 2, 3, 4, 5, 6]
    assert seen == [3, 3, 3, 3, 4, 5]
    for old, new in zip(before, trial.epochs, strict=False):
        assert (old.attempt, new.attempt) == (1, 2)
        assert _is_same(old.metrics, new.metrics)
    assert trial.attempts[0].reason == "died; epoch-3.ckpt is damaged: attempt 2 begins again"
    assert "trial 0 begins again: checkpoint " in caplog.text
    view = study.optuna_study(FencedStorage(study.database))
    assert view.trials[0].intermediate_values == {
        row.epoch: row.metrics["val_top1"] for row in trial.epochs
    }


def test_the_checkpoint_before_is_gone_on_from(
    study: Study, home: Home, directory: StudyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epoch 1 is recorded; of those after it the last one's file is there."""
    away_in(monkeypatch, 2, 3, then=die_in(4))
    with pytest.raises(Killed):
        work(study, home)
    leases.release_worker(study.database, _owner(study), "died")
    monkeypatch.undo()
    flipped(directory.checkpoint(0, 1, 4))
    recorded = away_in(monkeypatch)
    check_whole(work(study, home), "lost", "complete")
    assert recorded[0] == [(2, 2, 2)]


def test_what_is_damaged_at_the_end_counts_for_the_attempt_alone(
    study: Study, home: Home, directory: StudyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights could not be kept: the next attempt computes them again."""
    is_kept = objective.retention.is_kept
    damaged: list[Path] = []

    def once(*given: Any) -> bool:
        if not damaged:
            damaged.append(directory.checkpoint(0, 1, 6))
            flipped(damaged[0])
        return is_kept(*given)

    monkeypatch.setattr(objective.retention, "is_kept", once)
    trial = work(study, home)
    check_whole(trial, "lost", "complete")
    assert "its checksum differs" in str(trial.attempts[0].reason)
    assert "epoch-6.ckpt is damaged: attempt 2 begins again" in str(trial.attempts[0].reason)
    assert trial.reason is None
