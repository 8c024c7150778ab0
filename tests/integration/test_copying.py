"""A study that moves between databases of different kinds is the same study, and goes on."""

from __future__ import annotations

import math
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import Conflict, StorageError
from hpo.paths import Home
from hpo.reports.study import study_report
from hpo.search import study as studies
from hpo.search.status import read_status
from hpo.search.study import Study
from hpo.storage import leases, records, tables, transfer
from hpo.storage.database import Database, connect
from hpo.storage.optuna import FencedStorage, add_waiting
from hpo.storage.transfer import copied_tables, copy_study, refuse
from hpo.workers.worker import Worker
from tests.harness.databases import Databases
from tests.harness.fakes import InstantTrials, study_file
from tests.harness.filled import MIXED, RICH_SPACE, Trial, fill

Make = Callable[[str], Database]


@pytest.fixture
def make(databases: Databases, tmp_path: Path) -> Iterator[Make]:
    """Makes a new database of a kind, with its tables."""
    made = []

    def new(kind: str) -> Database:
        url = databases.empty(kind, tmp_path, uuid.uuid4().hex)
        databases.add_tables(url)
        made.append(connect(url))
        return made[-1]

    yield new
    for one in made:
        one.dispose()


def rich(database: Database) -> None:
    """Another study first, so that ids differ; then one with everything in it."""
    fill(database, study_file(name="other", trials=2), [Trial("complete", (0.1,))] * 2)
    study = fill(database, study_file(trials=30, space=RICH_SPACE), MIXED)
    studies.enqueue(study, {"optimizer.lr": 0.01})
    records.resolve_once(database, study.uuid, "data digits", "abc")
    add_worker(study)
    records.end_worker(database, "w", "over")
    FencedStorage(database).set_study_user_attr(study.row.study_id, "note", {"ä": [1, "€😀"]})


def add_worker(study: Study) -> None:
    about = {"host": "h", "pid": 1, "device": "cpu"}
    records.add_worker(study.database, "w", study.uuid, versions={}, process="p", **about)


def seen(database: Database, name: str = "toy") -> dict[str, Any]:
    """All that people see of a study, and all that Optuna knows of it but its ids."""
    status = read_status(database, name)
    told = FencedStorage(database)
    optuna_study = studies.load(database, name).optuna_study(told)
    frozen = []
    for trial in optuna_study.get_trials():
        row = {key.lstrip("_"): value for key, value in vars(trial).items()}
        frozen.append({key: value for key, value in row.items() if key != "trial_id"})
    study_id = status.row.study_id
    return {
        "json": status.to_dict(),
        "trials": [trial.to_dict() for trial in status.trials],
        "workers": status.workers,
        "row": {key: v for key, v in vars(status.row).items() if key != "study_id"},
        "optuna": frozen,
        "attributes": [  # in whatever order a database has them
            sorted(told.get_study_user_attrs(study_id).items()),
            sorted(told.get_study_system_attrs(study_id).items()),
        ],
        "enqueued": records.read_enqueued(database, status.row.uuid),
        "resolved": records.read_resolved(database, status.row.uuid),
    }


def report(database: Database, name: str = "toy") -> str:
    return study_report(database, name).replace(database.shown, "")


def test_a_round_trip_changes_nothing(make: Make) -> None:
    first, second, third = make("sqlite"), make("postgresql"), make("sqlite")
    rich(first)
    count = copy_study(first, second, records.get_study(first, "toy"))
    assert count == len(MIXED)
    copy_study(second, third, records.get_study(second, "toy"))
    expected = repr(seen(first))  # NaN is equal to itself as text
    assert repr(seen(second)) == expected
    assert repr(seen(third)) == expected
    pages = [body(report(one)) for one in (first, second, third)]
    assert pages[0] == pages[1] == pages[2]


def body(page: str) -> list[str]:
    """The lines of a report but those with commands, which name the storage."""
    page = re.sub(r"nonce[-=\"]+[\w-]+", "", page)
    return [line for line in page.splitlines() if "--storage" not in line and "hpo " not in line]


@pytest.mark.parametrize(("source", "target"), [("sqlite", "mysql"), ("mysql", "postgresql")])
def test_every_kind_of_database(make: Make, source: str, target: str) -> None:
    first, second = make(source), make(target)
    rich(first)
    copy_study(first, second, records.get_study(first, "toy"))
    before, after = seen(first), seen(second)
    for one in (before, after):  # MySQL keeps Optuna's times to the second
        for trial in one["optuna"]:
            del trial["datetime_start"], trial["datetime_complete"]
    assert repr(before) == repr(after)


@pytest.mark.parametrize("target", ["sqlite", "postgresql", "mysql"])
def test_the_copy_goes_on(make: Make, home: Home, target: str) -> None:
    first, second = make("sqlite"), make(target)
    study = fill(first, study_file(trials=8), MIXED[:4])
    storage = FencedStorage(first)
    for _ in range(2):
        add_waiting(storage, study.row.study_id)
    open_one = leases.claim(first, study.uuid, study.snapshot().free[0], "w-old")
    assert open_one is not None
    storage.set_trial_state_values(open_one.lease.trial_id, TrialState.RUNNING)
    row = records.Epoch(1, 1, 0.0, {"val_top1": 0.3}, 1)
    leases.record_epochs(first, open_one.lease, [row], progress={})
    with pytest.raises(Conflict, match=r"worked on by w-old; hpo stop toy first, or --force"):
        refuse(first, second, [study.row])
    refuse(first, second, [study.row], force=True)
    copy_study(first, second, study.row)
    attempt = records.read_attempts(second, study.uuid)[4][0]
    assert (attempt.outcome, attempt.reason) == ("lost", "its study was copied")
    assert attempt.ended is not None
    assert records.read_attempts(first, study.uuid)[4][0].live  # the source is as it was
    copied = studies.load(second, "toy")
    assert copied.uuid == study.uuid
    assert copied.snapshot().free[0].number == 4
    told = FencedStorage(second)
    trials = InstantTrials(copied, told)
    assert "all 8 trials" in Worker(copied, told, trials, home=home).run(threading.Event())
    status = read_status(second, "toy")
    assert status.finished == 8
    assert [a.k for a in status.trials[4].attempts] == [1, 2]


def test_a_study_of_that_name_is_never_overwritten(make: Make) -> None:
    first, second = make("sqlite"), make("postgresql")
    study = fill(first, study_file(), MIXED[:2])
    studies.create(second, study_file(trials=9))
    before = repr(seen(second))
    with pytest.raises(Conflict, match="has a study of that name already: 'toy'"):
        refuse(first, second, [study.row])
    with pytest.raises(Conflict, match="it was left as it is"):
        copy_study(first, second, study.row)  # as if it had appeared in between
    assert repr(seen(second)) == before


@pytest.mark.databases
def test_nothing_is_half_written(make: Make, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make("sqlite"), make(kind)
    rich(first)
    original, calls = transfer._renewed, 0

    def fails(*args: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls > 100:
            raise RuntimeError("the power went out")
        return original(*args)

    monkeypatch.setattr(transfer, "_renewed", fails)
    with pytest.raises(RuntimeError):
        copy_study(first, second, records.get_study(first, "toy"))
    assert counts(second) == dict.fromkeys(counts(second), 0)
    monkeypatch.undo()
    copy_study(first, second, records.get_study(first, "toy"))


def counts(database: Database) -> dict[str, int]:
    with database.read() as c:
        return {
            table.name: c.scalar(sa.select(sa.func.count()).select_from(table)) or 0
            for table in copied_tables()
        }


def test_text_that_a_database_cannot_hold_is_told_and_leaves_nothing(make: Make) -> None:
    first, second = make("sqlite"), make("postgresql")
    study = fill(first, study_file(), MIXED[:2])
    records.update_study(first, study.uuid, stop_reason="a\0b")
    with pytest.raises(StorageError, match="NUL"):
        copy_study(first, second, study.row)
    assert counts(second)["trials"] == 0


def test_every_table_is_copied_or_named() -> None:
    names = {table.name for table in copied_tables()} | transfer.NOT_COPIED
    assert {table.name for table in tables.OURS} <= names
    assert len(names) == 12 + 6 + 1


def test_numbers_that_mysql_cannot_hold(make: Make) -> None:
    """Rows of an older hpo may have them, on PostgreSQL."""
    first, second = make("postgresql"), make("mysql")
    study = fill(first, study_file(), MIXED[:2])
    add_worker(study)
    records.update_worker(first, "w", value=math.nan)
    copy_study(first, second, study.row)
    assert records.read_workers(second, study.uuid)[0].value is None
