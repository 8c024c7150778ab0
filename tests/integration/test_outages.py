"""A database that breaks before or after a commit: every write of a worker is repeated, and none
counts twice."""

from __future__ import annotations

import itertools
import random
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import optuna
import pytest
import sqlalchemy as sa
import torch
from optuna.trial import TrialState

from hpo.errors import Fenced, Interrupted, StorageUnavailable
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.status import read_status
from hpo.search.study import Study
from hpo.search.trial import TrialRunner
from hpo.storage import database as db
from hpo.storage import leases, records, retry, tables
from hpo.storage.database import Database, connect
from hpo.storage.leases import Claim, Ending, Lease
from hpo.storage.optuna import FencedStorage, add_waiting
from hpo.storage.records import FINAL, Epoch, Outcome
from hpo.workers.worker import Worker
from tests.harness.fakes import study_file
from tests.harness.faulty import AFTER, BEFORE, breaking

pytestmark = pytest.mark.databases()


@pytest.fixture
def study(database: Database) -> Study:
    return studies.create(database, study_file(trials=40, lease_s=60.0))[0]


def no_pause(_seconds: float) -> None:
    """Try again at once."""


def patient(study: Study, pause: retry.Pause) -> AbstractContextManager[None]:
    return study.database.retrying(pause)


@dataclass
class Life:
    """Each write of a worker, once, in the order of its life; see the table in `patience`."""

    study: Study
    storage: FencedStorage
    view: optuna.Study
    worker: str
    taken: Claim | None = None
    trial: optuna.trial.Trial = field(init=False)

    @property
    def database(self) -> Database:
        return self.study.database

    @property
    def lease(self) -> Lease:
        assert self.taken is not None
        return self.taken.lease

    def add_worker(self) -> None:
        records.add_worker(
            self.database, self.worker, self.study.uuid,
            host="h", pid=1, device="cpu", versions={}, process="",
        )  # fmt: skip

    def fill_turn(self) -> None:
        assert leases.claim_enqueuer(self.database, self.study.uuid, self.worker)

    def fill(self) -> None:
        add_waiting(self.storage, self.study.row.study_id)

    def release_enqueuer(self) -> None:
        leases.release_enqueuer(self.database, self.study.uuid, self.worker)

    def claim(self) -> None:
        free = self.study.snapshot().free[0]
        taken = leases.claim(self.database, self.study.uuid, free, self.worker)
        assert taken is not None
        assert (taken.lease.k, taken.fruitless) == (1, ())
        self.taken = taken

    def plan(self) -> None:
        self.view.get_trials()
        self.storage.set_trial_system_attr(
            self.lease.trial_id, "fixed_params", {"optimizer.lr": 0.01}
        )

    def start(self) -> None:
        self.storage.set_trial_state_values(self.lease.trial_id, TrialState.RUNNING)

    def suggest(self) -> None:
        self.trial = optuna.trial.Trial(self.view, self.lease.trial_id)
        self.study.file.space.suggest(self.trial)

    def resolve(self) -> None:
        found = records.resolve_once(self.database, self.study.uuid, self.worker, [1])
        assert found == [1]

    def runtime(self) -> None:
        leases.keep_runtime(self.database, self.lease, {"threads": 1})

    def begin(self) -> None:
        leases.begin_epoch(self.database, self.lease, 1, {"epoch": 1})

    def record(self) -> None:
        rows = [Epoch(n, 1, 0.0, {"val_top1": n / 10}, 1) for n in (1, 2)]
        leases.record_epochs(self.database, self.lease, rows, progress={"epoch": 2})

    def renew(self) -> None:
        leases.renew(self.database, self.lease, {"images_per_s": 5.0})

    def report(self) -> None:
        self.trial.report(0.2, 2)

    def attribute(self) -> None:
        self.trial.set_user_attr("outcome", "complete")

    def tell(self) -> None:
        with self.storage.guarded(self.lease, Ending(Outcome.COMPLETE, 0.2)):
            self.view.tell(self.trial, 0.2)

    def end_worker(self) -> None:
        records.end_worker(self.database, self.worker, "over")

    def do(self, write: str) -> None:
        lease = self.taken.lease if self.taken else None
        with self.storage.guarded(lease) if lease else nullcontext():
            getattr(self, write)()

    def check(self) -> None:
        """Every write counts, once."""
        number = self.lease.number
        trial = read_status(self.database, "toy").trials[number]
        assert [(a.outcome, a.value) for a in trial.attempts] == [("complete", 0.2)]
        assert [(row.epoch, row.metrics["val_top1"]) for row in trial.epochs] == [
            (1, 0.1),
            (2, 0.2),
        ]
        frozen = self.storage.get_trial(self.lease.trial_id)
        assert (frozen.state, frozen.value) == (TrialState.COMPLETE, 0.2)
        assert frozen.params == {"optimizer.lr": 0.01}
        assert frozen.intermediate_values == {2: 0.2}
        assert frozen.user_attrs == {"outcome": "complete"}
        workers = records.read_workers(self.database, self.study.uuid)
        assert [w.reason for w in workers if w.id == self.worker] == ["over"]


WRITES = ("add_worker", "fill_turn", "fill", "release_enqueuer", "claim", "plan", "start",
          "suggest", "resolve", "runtime", "begin", "record", "renew", "report", "attribute",
          "tell", "end_worker")  # fmt: skip


@pytest.mark.parametrize("when", [BEFORE, AFTER])
def test_every_write_is_repeated_and_counts_once(study: Study, when: str) -> None:
    storage = FencedStorage(study.database)
    view = study.optuna_study(storage)
    for broken in WRITES:
        life = Life(study, storage, view, f"w-{broken}")
        for write in WRITES:
            faults = [when] if write == broken else []
            with breaking(study.database, iter(faults)) as found, patient(study, no_pause):
                life.do(write)
            assert found.struck == len(faults), (broken, write)
        life.check()
    status = read_status(study.database, "toy")
    assert status.count("complete") == len(WRITES)
    # Adding a trial is the one write that may happen twice.
    assert status.count("waiting") == (1 if when == AFTER else 0)


@pytest.mark.parametrize("when", [BEFORE, AFTER])
def test_a_trial_is_handed_back_once(study: Study, when: str) -> None:
    storage = FencedStorage(study.database)
    add_waiting(storage, study.row.study_id)
    taken = leases.claim(study.database, study.uuid, study.snapshot().free[0], "w")
    assert taken is not None
    with breaking(study.database, iter([when])) as found, patient(study, no_pause):
        leases.release(study.database, taken.lease, Outcome.HANDED_BACK, "test")
    assert found.struck == 1
    (attempt,) = records.read_attempts(study.database, study.uuid)[0]
    assert (attempt.outcome, attempt.reason) == ("handed_back", "test")


def test_what_a_worker_reads_is_read_again(study: Study) -> None:
    reads = (records.read_enqueued, records.read_outcomes, records.read_epoch_marks,
             records.read_epochs, records.count_epochs, records.read_resolved)  # fmt: skip
    for read in reads:
        broken = breaking(study.database, iter([BEFORE]), reads_too=True)
        with broken as found, patient(study, no_pause):
            assert not read(study.database, study.uuid)
        assert found.struck == 1, read


def test_without_patience_the_fault_is_told_at_once(study: Study) -> None:
    with breaking(study.database, iter([BEFORE])), pytest.raises(StorageUnavailable) as caught:
        leases.claim_enqueuer(study.database, study.uuid, "w")
    assert caught.value.exit_code == 75


def test_a_late_write_is_refused_as_ever(study: Study) -> None:
    """While it waits, another worker takes the trial over."""
    storage = FencedStorage(study.database)
    add_waiting(storage, study.row.study_id)
    taken = leases.claim(study.database, study.uuid, study.snapshot().free[0], "old")
    assert taken is not None

    def taken_over(_seconds: float) -> None:
        leases.release_worker(study.database, "old", "test")
        assert leases.claim(study.database, study.uuid, study.snapshot().free[0], "new") is not None

    row = Epoch(1, 1, 0.0, {"val_top1": 0.1}, None)
    broken = breaking(study.database, iter([BEFORE]))
    with broken, patient(study, taken_over), pytest.raises(Fenced):
        leases.record_epochs(study.database, taken.lease, [row], progress={})
    assert records.read_epochs(study.database, study.uuid) == {}


def test_a_signal_ends_the_waiting(study: Study) -> None:
    def stopped(_seconds: float) -> None:
        raise Interrupted("stopped")

    broken = breaking(study.database, itertools.repeat(BEFORE))
    with broken, patient(study, stopped), pytest.raises(Interrupted):
        leases.claim_enqueuer(study.database, study.uuid, "w")


def test_a_worker_in_a_storm(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One commit in eight breaks, of reads too, of the heartbeat too."""
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(retry, "LARGEST_DELAY_S", 0.01)
    train = "epochs = 3\ndata = {limit_train = 100}\nmodel.cnn.filters = [4]\n"
    study, _ = studies.create(database, study_file(trials=3, lease_s=1.0, train=train))
    storage = FencedStorage(database)
    view = study.optuna_study(storage)
    runner = TrialRunner(study, storage, view, home, torch.device("cpu"), threads=1)
    rng = random.Random(0)
    storm = (
        rng.choice([BEFORE, AFTER]) if rng.random() < 0.125 else None for _ in itertools.count()
    )
    with breaking(database, storm, reads_too=True) as found:
        reason = Worker(study, storage, runner, home=home).run(threading.Event())
    assert reason == "all 3 trials are finished"
    assert found.struck > 10
    status = read_status(database, "toy")
    assert status.count(*FINAL) == status.count("complete") == 3
    for trial in status.trials:
        assert [a.outcome for a in trial.attempts] == ["complete"]
        assert [row.epoch for row in trial.epochs] == [1, 2, 3]
        assert trial.attempts[0].epoch == 3
    assert all(set(t.intermediate_values) == {1, 2, 3} for t in view.trials[:3])


@pytest.mark.databases("postgresql", "mysql")
def test_a_session_that_stops_inside_a_transaction_loses_its_locks(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a process under SIGSTOP. On SQLite others wait until it goes on or dies."""
    monkeypatch.setitem(db.POSTGRESQL_SESSION, "idle_in_transaction_session_timeout", "'1s'")
    monkeypatch.setitem(db.MYSQL_SESSION, "wait_timeout", "1")
    stopped = connect(url)
    study, _ = studies.create(stopped, study_file())
    other = connect(url)
    row = sa.update(tables.studies).where(tables.studies.c.uuid == study.uuid)
    told = ""
    try:
        with stopped.write() as c:
            c.execute(row.values(stop_reason="stopped"))
            records.update_study(other, study.uuid, stop_reason="other")  # waits for the lock
            c.execute(row.values(stop_reason="stopped"))
    except StorageUnavailable as error:
        told = str(error)
    assert told
    assert records.get_study(other, "toy").stop_reason == "other"
    stopped.dispose()
    other.dispose()
