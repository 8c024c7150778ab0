"""The supervisor with workers that end as the test wishes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from hpo.errors import HpoError, StorageUnavailable
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.study import Study
from hpo.storage import leases, records
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage, add_waiting
from hpo.workers import supervisor as module
from hpo.workers.process import process_identity
from hpo.workers.supervisor import Supervisor
from tests.harness.fakes import study_file


@dataclass
class Ended:
    """A process that has ended with `code`."""

    code: int

    def poll(self) -> int:
        return self.code

    wait = poll

    def send_signal(self, sig: int) -> None: ...

    def kill(self) -> None: ...


@dataclass
class Script:
    """A launcher whose processes end at once, with these codes in turn."""

    codes: Sequence[int]
    started: list[str] = field(default_factory=list)

    def start(self, worker: str, device: str) -> Ended:
        self.started.append(worker)
        return Ended(self.codes[len(self.started) - 1])


@pytest.fixture
def study(database: Database, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setattr(module, "TICK_S", 0.001)
    monkeypatch.setattr(module, "FIRST_BACK_OFF_S", 0.001)
    return studies.create(database, study_file())[0]


def supervise(study: Study, home: Home, *codes: int) -> Script:
    script = Script(codes)
    directory = study.directory(home)
    supervisor = Supervisor(study.database, study.uuid, directory, script, ["cpu"], 600.0)
    supervisor.run(threading.Event())
    return script


def hold(study: Study, worker: str) -> None:
    """A trial in the hands of `worker`."""
    add_waiting(FencedStorage(study.database), study.row.study_id)
    free = study.snapshot().free[-1]
    assert leases.claim(study.database, study.uuid, free, worker) is not None


def outcomes(study: Study) -> list[tuple[str | None, str | None]]:
    rows = records.read_attempts(study.database, study.uuid)
    return [(one[-1].outcome, one[-1].reason) for one in rows.values()]


def test_workers_that_die_quickly_end_the_run(study: Study, home: Home) -> None:
    with pytest.raises(HpoError, match="again and again"):
        supervise(study, home, *[1] * 9)


def test_an_absent_database_is_no_quick_death(study: Study, home: Home) -> None:
    assert len(supervise(study, home, *[75] * 9, 0).started) == 10


def test_what_a_dead_worker_held_is_set_free_once_the_database_is_back(
    study: Study, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, tries = leases.release_worker, []

    def away_at_first(database: Database, worker: str, reason: str) -> int:
        tries.append(worker)
        if len(tries) < 4:
            raise StorageUnavailable("away")
        return release(database, "w", reason)

    hold(study, "w")
    monkeypatch.setattr(module.leases, "release_worker", away_at_first)
    supervise(study, home, -9, -9, -9, -9, -9, -9, 0)
    assert len(tries) > 4
    assert outcomes(study) == [("lost", "worker died: SIGKILL")]


def test_what_an_earlier_run_left_behind_is_free_at_once(study: Study, home: Home) -> None:
    me = process_identity()
    if not me:
        pytest.skip("this system does not tell processes apart")
    dead = me.rsplit(" ", 1)[0] + " 1"
    for worker, process in {"dead": dead, "alive": me, "unknown": ""}.items():
        records.add_worker(
            study.database, worker, study.uuid,
            host="h", pid=1, device="cpu", versions={"hpo": "1"}, process=process,
        )  # fmt: skip
        hold(study, worker)
    supervise(study, home, 0)
    assert outcomes(study) == [("lost", "worker died with its run"), (None, None), (None, None)]
    rows = records.read_workers(study.database, study.uuid)
    assert {row.id: row.ended is None for row in rows} == {
        "dead": False,
        "alive": True,
        "unknown": True,
    }
    assert all(row.versions == {"hpo": "1"} for row in rows)
