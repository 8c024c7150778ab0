"""The supervisor and its watchdog, over processes that only pretend."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.study import Study
from hpo.storage import leases, records
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage, add_waiting
from hpo.workers.process import LONGEST_LOOK_S, Child, Watchdog
from hpo.workers.supervisor import Supervisor, last_sign
from tests.harness.fakes import study_file


@pytest.mark.parametrize(
    ("looks", "idle_s"),
    [
        ([(1, 0.0), (1, 2.0), (1, 4.0)], 4.0),
        ([(1, 0.0), (2, 2.0), (2, 3.0)], 1.0),
        ([(None, 0.0), (None, 3.0)], 3.0),  # no sign yet
        ([(None, 0.0), (1, 3.0), (None, 4.0), (None, 4.5)], 0.5),  # the file went at its end
        ([(9, 0.0), (3, 1.0), (3, 2.0)], 1.0),  # another host's clock, or one that was set back
        ([(1, 0.0), (1, 7200.0)], LONGEST_LOOK_S),  # the watcher was stopped for two hours
    ],
)
def test_how_long_there_was_no_sign(looks: list[tuple[int | None, float]], idle_s: float) -> None:
    watch = Watchdog()
    assert [watch.look(*one) for one in looks][-1] == idle_s


@dataclass
class Pretended:
    """A process that does nothing until it is killed."""

    code: int | None = None
    kills: int = 0

    def poll(self) -> int | None:
        return self.code

    def send_signal(self, sig: int) -> None:
        self.code = -sig if self.code is None else self.code

    def kill(self) -> None:
        self.kills += 1
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        assert self.code is not None
        return self.code


@dataclass
class TakesOne:
    """A launcher of two workers that take a trial as they start and make no step, and of a third
    one that ends as if the study were over."""

    study: Study
    started: list[tuple[str, Pretended]] = field(default_factory=list)

    def start(self, worker: str, device: str) -> Pretended:
        process = Pretended(code=0 if len(self.started) == 2 else None)
        if process.code is None:
            free = self.study.snapshot().free[0]
            assert leases.claim(self.study.database, self.study.uuid, free, worker)
        self.started.append((worker, process))
        return process


def test_a_worker_without_a_step_is_killed_and_its_attempt_says_so(
    database: Database, home: Home
) -> None:
    study, _ = studies.create(database, study_file(trials=1))
    add_waiting(FencedStorage(database), study.row.study_id)
    launcher = TakesOne(study)
    directory = study.directory(home)
    Supervisor(database, study.uuid, directory, launcher, ["cpu"], 0.3).run(threading.Event())
    rows = records.read_attempts(database, study.uuid)[0]
    assert [row.worker for row in rows] == [worker for worker, _ in launcher.started[:2]]
    assert {(row.outcome, row.reason) for row in rows} == {
        ("lost", "made no step for 0.3 s (study.stall_timeout_s)")
    }


def test_neither_a_set_clock_nor_the_age_of_a_file_kills(database: Database, home: Home) -> None:
    """The file's time is an hour old and jumps back and forth by another; the worker lives on."""
    study, _ = studies.create(database, study_file(trials=1))
    add_waiting(FencedStorage(database), study.row.study_id)
    directory, stop, launcher = study.directory(home), threading.Event(), TakesOne(study)
    supervisor = Supervisor(database, study.uuid, directory, launcher, ["cpu"], 1.0)
    looks = 0

    def tick() -> None:
        nonlocal looks
        alive = directory.alive(supervisor.slots[0].worker)
        alive.parent.mkdir(parents=True, exist_ok=True)
        alive.touch()
        looks += 1
        moment = 1.7e9 - 3600 * (looks % 3)
        os.utime(alive, (moment, moment))
        if looks == 8:
            stop.set()

    supervisor.run(stop, tick)
    assert [process.code for _, process in launcher.started] == [-signal.SIGTERM]


def test_the_sign_of_a_worker_that_is_not_there(tmp_path: Path) -> None:
    assert last_sign(tmp_path / "none") is None


def test_what_a_worker_started_ends_with_it() -> None:
    """A loader of images that hangs, for example: nobody else would end it."""
    sleeper = "import time; time.sleep(600)"
    script = f"import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', {sleeper!r}])\n"
    script += "print(p.pid, flush=True)\np.wait()"
    command = [sys.executable, "-c", script]
    with Child(command, stdout=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdout is not None
        grandchild = psutil.Process(int(child.stdout.readline()))
        child.kill()
        assert child.wait(60) == -signal.SIGKILL
        _, alive = psutil.wait_procs([grandchild], timeout=60)
        assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
    child.kill()  # nothing is left; says nothing
