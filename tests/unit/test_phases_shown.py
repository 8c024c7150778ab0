"""What a worker does between two epochs reaches whoever watches, without a write for each step."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import pytest

from hpo.control import enter_phase
from hpo.paths import Home
from hpo.search import study as studies
from hpo.storage import records
from hpo.storage.database import Database
from hpo.storage.leases import Claim
from hpo.storage.optuna import FencedStorage
from hpo.storage.records import WorkerRow
from hpo.workers import worker as workers
from hpo.workers.worker import News, Progress, Worker
from tests.harness.fakes import InstantTrials, study_file


def written(*phases: str) -> list[str]:
    """Return the phases that are written, of those at looks a second apart, without any beat."""
    news, found = News(), []
    for phase in phases:
        if news.look(phase):
            news.written = phase
            found.append(phase)
    return found


@pytest.mark.parametrize(
    ("looks", "writes"),
    [
        (["decoding 1/9", "decoding 5/9", "decoding 5/9", "decoding 9/9"],
         ["decoding 5/9", "decoding 9/9"]),
        (["step 1/31", "step 9/31", "step 17/31", "step 25/31"], ["step 9/31"]),
        (["step 1/2", "validating", "saving", "step 2/2"], []),
        (["step 9/9", "validating", "validating", "validating"], ["validating"]),
    ],
)  # fmt: skip
def test_what_lasts_is_written_and_steps_are_not(looks: list[str], writes: list[str]) -> None:
    assert written(*looks) == writes


@dataclass
class SlowStart(InstantTrials):
    """Trials that prepare until the database shows how far they are."""

    shown: list[tuple[int | None, str | None]] = field(default_factory=list)

    def run(self, taken: Claim, control: Progress) -> None:
        self.wait(None)
        enter_phase("decoding 3/9")
        self.wait("decoding 3/9")
        super().run(taken, control)

    def wait(self, phase: str | None) -> None:
        deadline = time.monotonic() + 60
        while (row := self.row()).reason != phase and time.monotonic() < deadline:
            time.sleep(0.01)
        self.shown.append((row.number, row.reason))

    def row(self) -> WorkerRow:
        (found,) = records.read_workers(self.study.database, self.study.uuid)
        return found


def test_a_trial_that_prepares_says_what_it_does(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "LOOK_S", 0.02)
    study, _ = studies.create(database, study_file(trials=2, lease_s=600.0))
    storage = FencedStorage(database)
    runner = SlowStart(study, storage)
    Worker(study, storage, runner, home=home).run(threading.Event())
    each = [(None, "decoding 3/9")] * 2
    assert [reason for _, reason in runner.shown] == [one for pair in each for one in pair]
    assert [number for number, _ in runner.shown] == [0, 0, 1, 1]
    assert runner.row().number is None
