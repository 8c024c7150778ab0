"""Who may run and write which trial: the same promises on every database."""

from __future__ import annotations

import json
import math
import random
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import Trial, TrialState

from hpo.errors import Conflict, Fenced, InputError, NotFound, StorageError, StorageUnavailable
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.study import Study
from hpo.storage import leases, records, tables
from hpo.storage.database import Database, connect
from hpo.storage.leases import Claim, ClaimableTrial, ContactWindow, Ending
from hpo.storage.optuna import FencedStorage, add_waiting
from hpo.storage.records import Epoch, Outcome
from hpo.workers.worker import Progress, Worker
from tests.harness.fakes import InstantTrials, study_file

pytestmark = pytest.mark.databases()


@pytest.fixture
def study(database: Database) -> Study:
    return studies.create(database, study_file())[0]


@pytest.fixture
def storage(study: Study) -> FencedStorage:
    return FencedStorage(study.database)


def fill(study: Study, storage: FencedStorage, count: int) -> None:
    for _ in range(count):
        add_waiting(storage, study.row.study_id)


def take(study: Study, worker: str = "w") -> Claim:
    for free in study.snapshot().free:
        taken = leases.claim(study.database, study.uuid, free, worker, long_contact())
        if taken is not None:
            return taken
    raise AssertionError("nothing to take")


def long_contact() -> ContactWindow:
    """In touch with the database since its clock began, until now."""
    return ContactWindow(since=0.0, last=time.time())


def expire(study: Study, taken: Claim) -> None:
    """As if the lease had run out."""
    with study.database.write() as c:
        c.execute(
            sa.update(tables.attempts)
            .where(tables.attempts.c.token == taken.lease.token)
            .values(until=0.0)
        )


def test_one_of_many_takes_a_trial(study: Study, storage: FencedStorage) -> None:
    fill(study, storage, 3)
    start = threading.Barrier(8)

    def rush(worker: int) -> list[int]:
        start.wait()
        found = [leases.claim(study.database, study.uuid, f, f"w{worker}") for f in free]
        return [taken.lease.number for taken in found if taken is not None]

    free = study.snapshot().free
    with ThreadPoolExecutor(8) as pool:
        numbers = [n for rows in pool.map(rush, range(8)) for n in rows]
    assert sorted(numbers) == [0, 1, 2]


def test_a_trial_at_the_budget_is_never_taken(study: Study, storage: FencedStorage) -> None:
    fill(study, storage, 9)
    taken = [take(study).lease.number for _ in range(6)]
    assert taken == [0, 1, 2, 3, 4, 5]
    assert study.snapshot().free == ()
    with storage.database.read() as c:
        ids = list(c.scalars(sa.select(tables.optuna_trials.c.trial_id)))
    assert leases.claim(study.database, study.uuid, ClaimableTrial(ids[6], 6, False), "w") is None


def test_an_expired_owner_without_a_successor_writes_on(
    study: Study, storage: FencedStorage
) -> None:
    fill(study, storage, 1)
    taken = take(study)
    expire(study, taken)
    leases.renew(study.database, taken.lease)
    with storage.guarded(taken.lease):
        storage.set_trial_state_values(taken.lease.trial_id, TrialState.RUNNING)
    assert study.snapshot().free == ()


def test_every_write_of_a_superseded_owner_is_refused(study: Study, storage: FencedStorage) -> None:
    fill(study, storage, 1)
    old = take(study, "old")
    study_view = study.optuna_study(storage)
    with storage.guarded(old.lease):
        storage.set_trial_state_values(old.lease.trial_id, TrialState.RUNNING)
        stale = Trial(study_view, old.lease.trial_id)
        study_view.get_trials()
    expire(study, old)
    new = take(study, "new")
    assert (new.lease.number, new.lease.k, new.started) == (0, 2, True)
    database, lease = study.database, old.lease
    writes = {
        "renew": lambda: leases.renew(database, lease),
        "begin": lambda: leases.begin_epoch(database, lease, 1, {}),
        "record": lambda: leases.record_epochs(
            database, lease, [Epoch(1, 1, 0.0, {"val_top1": 0.1}, None)], progress={}
        ),
        "runtime": lambda: leases.keep_runtime(database, lease, {}),
        "suggest": lambda: stale.suggest_float("optimizer.lr", 1e-4, 1e-1, log=True),
        "report": lambda: stale.report(0.1, 1),
        "attribute": lambda: stale.set_user_attr("a", 1),
        "tell": lambda: study_view.tell(stale, 0.1),
    }
    refused: list[str] = []
    for name, write in writes.items():
        with storage.guarded(lease, Ending(Outcome.COMPLETE, 0.1)), pytest.raises(Fenced):
            write()
        refused.append(name)
    assert refused == list(writes)
    assert not leases.release(database, lease, Outcome.HANDED_BACK, "late")
    frozen = storage.get_trial(lease.trial_id)
    assert (frozen.params, frozen.intermediate_values, frozen.user_attrs) == ({}, {}, {})
    assert records.read_epochs(database, study.uuid) == {}

    with storage.guarded(new.lease, Ending(Outcome.COMPLETE, 0.7)):
        owner = Trial(study_view, new.lease.trial_id)
        value = owner.suggest_float("optimizer.lr", 1e-4, 1e-1, log=True)
        owner.report(0.7, 1)
        study_view.tell(owner, 0.7)
    frozen = storage.get_trial(lease.trial_id)
    assert (frozen.state, frozen.value) == (TrialState.COMPLETE, 0.7)
    assert frozen.params == {"optimizer.lr": value}
    outcomes = [row.outcome for row in records.read_attempts(database, study.uuid)[0]]
    assert outcomes == ["lost", "complete"]


def test_of_two_workers_that_suggest_for_one_trial_one_is_refused(
    study: Study, storage: FencedStorage
) -> None:
    """Stock Optuna lets the loser train with one value and record another."""
    fill(study, storage, 1)
    old = take(study, "old")
    mine, theirs = study.optuna_study(storage), study.optuna_study(FencedStorage(study.database))
    storage.set_trial_state_values(old.lease.trial_id, TrialState.RUNNING)
    with storage.guarded(old.lease):
        mine.get_trials()
        slow = Trial(mine, old.lease.trial_id)
    expire(study, old)
    new = take(study, "new")
    other = FencedStorage(study.database)
    theirs = study.optuna_study(other)
    with other.guarded(new.lease):
        theirs.get_trials()
        kept = Trial(theirs, new.lease.trial_id).suggest_float("optimizer.lr", 1e-4, 1e-1, log=True)
    with storage.guarded(old.lease), pytest.raises(Fenced):
        slow.suggest_float("optimizer.lr", 1e-4, 1e-1, log=True)
    assert storage.get_trial(old.lease.trial_id).params == {"optimizer.lr": kept}


def test_told_once_however_many_tell(study: Study) -> None:
    fill(study, FencedStorage(study.database), 1)
    taken = take(study)
    FencedStorage(study.database).set_trial_state_values(taken.lease.trial_id, TrialState.RUNNING)
    start = threading.Barrier(4)

    def tell(value: float) -> bool:
        storage = FencedStorage(study.database)
        view = study.optuna_study(storage)
        start.wait()
        try:
            with storage.guarded(taken.lease, Ending(Outcome.COMPLETE, value)):
                view.tell(0, value)
        except (Fenced, ValueError, optuna.exceptions.UpdateFinishedTrialError):
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(tell, [0.1, 0.2, 0.3, 0.4])) == 1
    row = records.read_attempts(study.database, study.uuid)[0][0]
    trial = FencedStorage(study.database).get_trial(taken.lease.trial_id)
    assert (row.outcome, row.value) == ("complete", trial.value)


def test_dead_attempts_count_until_an_epoch_and_hand_backs_do_not(
    study: Study, storage: FencedStorage
) -> None:
    fill(study, storage, 1)
    fruitless = []
    for end in ["lost", "handed_back", "lost", "epoch", "lost", "expired", "lost"]:
        taken = take(study)
        fruitless.append(len(taken.fruitless))
        if end == "epoch":
            row = Epoch(1, taken.lease.k, 0.0, {"val_top1": 0.1}, taken.lease.k)
            leases.record_epochs(study.database, taken.lease, [row], progress={})
            end = "lost"
        if end == "expired":
            expire(study, taken)
        else:
            leases.release(study.database, taken.lease, end, "test")
    assert fruitless == [0, 1, 1, 2, 0, 1, 2]


def test_what_is_enqueued_goes_to_the_next_trial_that_starts(
    study: Study, storage: FencedStorage
) -> None:
    fill(study, storage, 4)
    assert take(study).enqueued is None
    studies.enqueue(study, {"optimizer.lr": 0.05})
    studies.enqueue(study, {"optimizer.lr": 0.06})
    second, third, fourth = take(study), take(study), take(study)
    assert (second.enqueued, second.enqueued_before) == ({"optimizer.lr": 0.05}, 0)
    assert (third.enqueued, third.enqueued_before) == ({"optimizer.lr": 0.06}, 1)
    assert (fourth.enqueued, fourth.enqueued_before) == (None, 2)
    expire(study, second)
    again = leases.claim(study.database, study.uuid, study.snapshot().free[0], "w", long_contact())
    assert again is not None
    assert again.enqueued == {"optimizer.lr": 0.05}


def test_enqueue_refuses_what_cannot_be_tried(study: Study, storage: FencedStorage) -> None:
    with pytest.raises(InputError, match=r"optimizer\.lr.*0\.1"):
        studies.enqueue(study, {"optimizer.lr": 5.0})
    with pytest.raises(InputError, match=r"optimizer\.lrr.*optimizer\.lr"):
        studies.enqueue(study, {"optimizer.lrr": 0.01})
    for _ in range(6):
        studies.enqueue(study, {"optimizer.lr": 0.01})
    with pytest.raises(InputError, match="hpo extend toy --trials"):
        studies.enqueue(study, {"optimizer.lr": 0.01})


def test_enqueue_refuses_what_does_not_go_together(database: Database) -> None:
    space = "epochs = [20, 2]\nschedule.warmup_epochs = [0.0, 5.0]"
    study, _ = studies.create(database, study_file(train="", space=space))
    with pytest.raises(InputError, match=r"enqueue: schedule\.warmup_epochs: 5\.0: less than"):
        studies.enqueue(study, {"epochs": 2, "schedule.warmup_epochs": 5.0})
    for values in ({"epochs": 2}, {"epochs": 20, "schedule.warmup_epochs": 5.0}):
        studies.enqueue(study, values)
    assert len(records.read_enqueued(database, study.uuid)) == 2


def test_a_study_deleted_and_made_again_refuses_the_old_worker(
    study: Study, storage: FencedStorage, home: Home
) -> None:
    """SQLite gives ids out again: the new study's trial has the old one's id."""
    fill(study, storage, 1)
    old = take(study)
    with pytest.raises(Conflict, match="is being worked on by w"):
        studies.delete(study, home)
    studies.delete(study, home, force=True)
    new, made = studies.create(study.database, study_file())
    assert made
    assert new.uuid != study.uuid
    fill(new, FencedStorage(study.database), 1)
    fresh = take(new)
    view = new.optuna_study(storage)
    view.get_trials()
    with storage.guarded(old.lease), pytest.raises(Fenced):
        storage.set_trial_state_values(fresh.lease.trial_id, TrialState.RUNNING)
    with pytest.raises(Fenced):
        leases.renew(study.database, old.lease)
    with pytest.raises(NotFound, match="deleted"):
        study.snapshot()
    studies.delete(new, home, force=True)
    with pytest.raises(NotFound, match="deleted"):
        new.optuna_study(storage)


def test_our_rows_go_when_optuna_or_the_dashboard_deletes_a_study(
    study: Study, storage: FencedStorage
) -> None:
    fill(study, storage, 1)
    taken = take(study)
    optuna.delete_study(study_name="toy", storage=storage)
    with pytest.raises(Fenced):
        leases.renew(study.database, taken.lease)
    assert records.list_studies(study.database) == []


def test_a_study_deleted_by_stock_optuna_can_be_made_again(study: Study) -> None:
    """Without foreign keys our rows stay behind; they must not stand in the way."""
    stock = RDBStorage(study.database.secret_url)
    stock.delete_study(study.row.study_id)
    stock.engine.dispose()
    assert records.find_study(study.database, "toy") is None
    again, made = studies.create(study.database, study_file())
    assert made
    assert again.uuid != study.uuid


def test_create_says_what_differs(study: Study) -> None:
    same, made = studies.create(study.database, study_file())
    assert (same.uuid, made) == (study.uuid, False)
    with pytest.raises(Conflict, match=r"study\.trials: 6 -> 9\n.*hpo extend toy --trials 9"):
        studies.create(study.database, study_file(trials=9))
    with pytest.raises(Conflict, match=r"(?s)batch_size.*choose another study\.name"):
        studies.create(study.database, study_file(train="epochs = 3\nbatch_size = 64"))


def test_a_foreign_study_of_that_name_is_left_alone(database: Database) -> None:
    studies.create(database, study_file())
    foreign = optuna.create_study(storage=FencedStorage(database), study_name="other")
    foreign.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(Conflict, match="not made by hpo"):
        studies.create(database, study_file(name="other"))


def test_a_stop_rule_drains_what_is_abandoned(database: Database, home: Home) -> None:
    study, _ = studies.create(database, study_file(study="target = 0.00001"))
    storage = FencedStorage(database)
    fill(study, storage, 3)
    orphan = take(study, "dead")
    storage.set_trial_state_values(orphan.lease.trial_id, TrialState.RUNNING)
    worker = Worker(study, storage, InstantTrials(study, storage), home=home)
    done = take(study, worker.id)
    worker.runner.run(done, control(home))
    expire(study, orphan)
    worker.contact = long_contact()
    reason = worker.run(threading.Event())
    assert "target" in reason
    facts = study.snapshot()
    assert (facts.finished, facts.running, facts.stop) == (2, 0, "rule")
    trial = storage.get_trial(orphan.lease.trial_id)
    assert trial.state == TrialState.PRUNED
    with pytest.raises(InputError, match="would stop at once"):
        studies.resume(study)


class Overtaken(InstantTrials):
    """The first trial is finished by another worker meanwhile, and its files are gone then."""

    missing: Exception
    overtaken = False

    def run(self, taken: Claim, control: Progress) -> None:
        if self.overtaken:
            return super().run(taken, control)
        self.overtaken = True
        expire(self.study, taken)
        super().run(take(self.study, "other"), control)
        raise self.missing


@pytest.mark.parametrize(
    "missing",
    [FileNotFoundError("epoch-1.ckpt"), NotFound("epoch-1.ckpt"), KeyError("no such record")],
)
def test_a_worker_goes_on_whose_trial_another_one_finished_and_tidied(
    database: Database, home: Home, missing: Exception
) -> None:
    study, _ = studies.create(database, study_file(lease_s=60.0))  # it does not beat meanwhile
    storage = FencedStorage(database)
    trials = Overtaken(study, storage)
    trials.missing = missing
    reason = Worker(study, storage, trials, home=home).run(threading.Event())
    assert reason == "all 6 trials are finished"
    attempts = records.read_attempts(study.database, study.uuid)
    assert [one.outcome for one in attempts[0]] == ["lost", "complete"]
    assert all(len(rows) == 1 for number, rows in attempts.items() if number)


class DeletedMeanwhile(InstantTrials):
    """Somebody deletes the study while a trial of it begins."""

    def run(self, taken: Claim, control: Progress) -> None:
        self.storage.delete_study(self.study.row.study_id)
        super().run(taken, control)


def test_a_worker_ends_whose_study_is_deleted_while_a_trial_begins(
    study: Study, home: Home
) -> None:
    storage = FencedStorage(study.database)
    worker = Worker(study, storage, DeletedMeanwhile(study, storage), home=home)
    assert worker.run(threading.Event()) == "the study was deleted"


def test_a_worker_ends_whose_study_is_deleted_before_it_adds_trials(
    study: Study, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = FencedStorage(study.database)

    def add(*args: Any) -> None:
        storage.delete_study(study.row.study_id)
        add_waiting(*args)

    monkeypatch.setattr("hpo.workers.worker.add_waiting", add)
    worker = Worker(study, storage, InstantTrials(study, storage), home=home)
    assert worker.run(threading.Event()) == "the study was deleted"


def test_a_reason_that_is_no_text_is_stored(study: Study, storage: FencedStorage) -> None:
    """Names of files are bytes: a message may have what cannot be encoded, or a NUL."""
    fill(study, storage, 2)
    reason, stored = "caf\udce9\0.jpg cannot be read", r"caf\udce9\x00.jpg cannot be read"
    leases.release(study.database, take(study).lease, Outcome.HANDED_BACK, reason)
    taken = take(study)
    storage.set_trial_state_values(taken.lease.trial_id, TrialState.RUNNING)
    with storage.guarded(taken.lease, Ending(Outcome.FAILED, reason=reason)):
        study.optuna_study(storage).tell(taken.lease.number, state=TrialState.FAIL)
    rows = records.read_attempts(study.database, study.uuid)[0]
    assert [row.reason for row in rows] == [stored, stored]


def test_stop_resume_and_extend(study: Study, home: Home) -> None:
    storage = FencedStorage(study.database)

    def work() -> str:
        worker = Worker(study, storage, InstantTrials(study, storage), home=home)
        return worker.run(threading.Event())

    studies.stop(study)
    assert work() == "stopped by hpo stop"
    assert study.snapshot().finished == 0
    studies.resume(study)
    assert work() == "all 6 trials are finished"
    with pytest.raises(InputError, match="has 6 already"):
        studies.extend(study, trials=6)
    studies.extend(study, trials=8)
    assert work() == "all 8 trials are finished"
    assert study.snapshot().finished == 8


def fail(study: Study, storage: FencedStorage, reason: str) -> None:
    """Let the next trial fail, with the parameters that it was to try."""
    taken = take(study)
    lease, view = taken.lease, study.optuna_study(storage)
    fixed = study.file.space.encode(taken.enqueued or {"optimizer.lr": 0.01})
    storage.set_trial_system_attr(lease.trial_id, "fixed_params", fixed)
    storage.set_trial_state_values(lease.trial_id, TrialState.RUNNING)
    view.get_trials()
    trial = Trial(view, lease.trial_id)
    study.file.space.suggest(trial)
    with storage.guarded(lease, Ending(Outcome.FAILED, reason=reason)):
        view.tell(trial, state=TrialState.FAIL)


def test_what_failed_is_tried_again_as_often_as_that_is_asked(
    study: Study, storage: FencedStorage, home: Home
) -> None:
    fill(study, storage, 6)
    fail(study, storage, "no space left")
    assert studies.extend(study, retry_failed=True) == 1
    assert studies.extend(study, retry_failed=True) == 0  # it is queued
    fail(study, storage, "no space left")
    assert studies.extend(study, retry_failed=True) == 1
    InstantTrials(study, storage).run(take(study), control(home))
    assert studies.extend(study, retry_failed=True) == 0  # it was tried with success


def test_several_failures_in_a_row_stop_a_study(study: Study, storage: FencedStorage) -> None:
    fill(study, storage, 3)
    for _ in range(3):
        fail(study, storage, "no such layer")
    rule = study.rule(study.snapshot())
    assert rule == "3 trials in a row failed for the same reason: no such layer"
    studies.resume(study)
    assert study.rule(study.snapshot()) is None


def test_as_many_failures_as_the_file_says_stop_a_study(database: Database) -> None:
    study, _ = studies.create(database, study_file(trials=40, study="max_failures = 33"))
    storage = FencedStorage(database)
    fill(study, storage, 33)
    for _ in range(33):
        lease = take(study).lease
        storage.set_trial_state_values(lease.trial_id, TrialState.RUNNING)
        with storage.guarded(lease, Ending(Outcome.FAILED, reason="no such layer")):
            storage.set_trial_state_values(lease.trial_id, TrialState.FAIL)
    rule = study.rule(study.snapshot())
    assert rule == "33 trials in a row failed for the same reason: no such layer"


def test_a_late_owner_and_its_successor_do_not_block_each_other(
    study: Study, storage: FencedStorage
) -> None:
    """Both lock the attempt, then the trial. In different orders each would wait for the other:
    PostgreSQL and MySQL end such a pair by an error to one of the two."""
    fill(study, storage, 1)
    late = take(study, "late")
    expire(study, late)
    free = study.snapshot().free[0]
    other = connect(study.database.secret_url)
    at_the_lock = threading.Event()

    @sa.event.listens_for(other.engine, "before_cursor_execute")
    def watch(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        # SQLite has one lock for all, taken where the transaction begins.
        if tables.attempts.name in statement or other.is_sqlite:
            at_the_lock.set()

    with ThreadPoolExecutor(1) as pool:
        with study.database.write() as c:
            leases._renew(c, study.database, late.lease)
            successor = pool.submit(leases.claim, other, study.uuid, free, "successor")
            assert at_the_lock.wait(120)
            metrics = json.dumps({"val_top1": 0.5})
            row = {"trial_id": free.trial_id, "epoch": 1, "study": study.uuid, "attempt": 1}
            c.execute(tables.epochs.insert().values(finished=1.0, metrics=metrics, **row))
        assert successor.result(30) is None  # the late owner has renewed its lease
    other.dispose()


def test_a_worker_with_a_long_name_fills(study: Study) -> None:
    worker = "a-host-with-a-name-as-kubernetes-" + "f" * 31
    assert leases.claim_enqueuer(study.database, study.uuid, worker)


def test_the_fill_turn_is_one_worker_s(study: Study) -> None:
    assert leases.claim_enqueuer(study.database, study.uuid, "a")
    assert not leases.claim_enqueuer(study.database, study.uuid, "b")
    leases.release_enqueuer(study.database, study.uuid, "b")
    assert not leases.claim_enqueuer(study.database, study.uuid, "b")
    leases.release_worker(study.database, "a", "dead")
    assert leases.claim_enqueuer(study.database, study.uuid, "b")


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Tokyo"])
def test_the_clock_is_utc_in_fractions_of_a_second(
    kind: str, url: str, request: pytest.FixtureRequest, zone: str
) -> None:
    """Also where the server's own zone is another."""
    database = connect(url)
    if kind == "postgresql":
        with database.write() as c:
            c.exec_driver_sql(f"ALTER DATABASE \"{database.url.database}\" SET timezone = '{zone}'")
    if kind == "mysql":
        hours = {"America/New_York": "-05:00", "Asia/Tokyo": "+09:00"}[zone]
        request.getfixturevalue("mariadb").execute(f"SET GLOBAL time_zone = '{hours}'")
    database.dispose()
    readings = []
    for _ in range(20):
        before, now, after = time.time(), records.clock(database), time.time()
        assert before - 0.002 <= now <= after + 0.002
        readings.append(now)
    database.dispose()
    assert sum(now % 1 > 0 for now in readings) > 15


def test_a_study_file_of_a_megabyte_and_every_character_are_kept(database: Database) -> None:
    file = study_file(study=f"# {'ä€😀' * 100_000}")
    studies.create(database, file)
    row = records.get_study(database, "toy")
    assert row.source == file.text
    records.enqueue(database, row.uuid, {"ü€😀": "ü€😀"})
    assert records.read_enqueued(database, row.uuid) == [({"ü€😀": "ü€😀"}, None)]


def test_names_that_differ_in_case_are_two(database: Database) -> None:
    for name in ("toy", "Toy"):
        studies.create(database, study_file(name=name))
    assert records.find_study(database, "TOY") is None
    study = studies.load(database, "Toy")
    assert study.row.name == "Toy"
    for key in ("a", "A"):
        assert records.resolve_once(database, study.uuid, key, key) == key


def test_every_number_comes_back_as_it_was(study: Study, storage: FencedStorage) -> None:
    fill(study, storage, 1)
    lease = take(study).lease
    storage.set_trial_state_values(lease.trial_id, TrialState.RUNNING)
    rng = random.Random(0)
    numbers = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 2**53 + 0.0]
    numbers += [rng.uniform(-1, 1) * 10.0 ** rng.randint(-30, 30) for _ in range(50)]
    for step, number in enumerate(numbers):
        storage.set_trial_intermediate_value(lease.trial_id, step, number)
        records.update_study(study.database, study.uuid, target=number)
        assert records.get_study(study.database, "toy").target == number
    seen = storage.get_trial(lease.trial_id).intermediate_values
    assert list(seen.values()) == numbers


def test_a_metric_that_is_no_number_is_recorded(study: Study, storage: FencedStorage) -> None:
    """MySQL has no NaN: a worker whose trial diverged would fail at its own progress."""
    fill(study, storage, 1)
    lease = take(study).lease
    about = {"host": "h", "pid": 1, "device": "cpu"}
    records.add_worker(study.database, "w", study.uuid, versions={}, process="p", **about)
    row = Epoch(1, lease.k, 0.0, {"val_loss": math.nan, "train_loss": math.inf}, None)
    progress = {"value": math.nan, "images_per_s": math.inf, "epoch": 1}
    leases.record_epochs(study.database, lease, [row], progress=progress)
    found = records.read_epochs(study.database, study.uuid)[0][0].metrics
    assert math.isnan(found["val_loss"])
    assert found["train_loss"] == math.inf
    worker = records.read_workers(study.database, study.uuid)[0]
    assert (worker.value, worker.images_per_s, worker.epoch) == (None, None, 1)


def test_resolved_once_for_all(study: Study) -> None:
    assert records.resolve_once(study.database, study.uuid, "k", {"a": 1}) == {"a": 1}
    assert records.resolve_once(study.database, study.uuid, "k", {"a": 2}) == {"a": 1}


def test_every_storage_method_that_writes_begins_as_a_writer() -> None:
    names = [n for n in dir(RDBStorage) if n.startswith(("set_", "create_", "delete_", "record_"))]
    for name in names:
        assert getattr(FencedStorage, name) is not getattr(RDBStorage, name), name


def test_the_columns_that_we_read_are_optuna_s() -> None:
    from optuna.storages._rdb import models

    for ours, theirs in (
        (tables.optuna_trials, models.TrialModel.__table__),
        (tables.optuna_studies, models.StudyModel.__table__),
        (tables.optuna_params, models.TrialParamModel.__table__),
    ):
        for column in ours.columns:
            assert column.name in theirs.columns
    assert [state.name for state in TrialState] == list(tables.optuna_trials.c.state.type.enums)


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("nonsense", "the storage URL is not one"),
        ("sqlite://", "in memory"),
        ("nosuch://u:secret@host/db", "no driver"),
        ("mysql+nosuch://u:secret@127.0.0.1:1/db", "no driver"),
        ("sqlite:////no/such/folder/x.db", "check that its folder exists"),
    ],
)
def test_a_storage_that_cannot_be_used_is_named_without_its_password(url: str, part: str) -> None:
    with pytest.raises(StorageError, match=part) as caught:
        studies.create(connect(url), study_file())
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("step", ["_init_version_info_model", "_init_alembic"])
def test_a_database_that_is_away_when_a_worker_comes(
    study: Study, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Optuna asks it for its versions in two ways, whose faults differ."""

    def away(versions: Any) -> None:
        @sa.event.listens_for(versions.engine, "do_connect")
        def refuse(*_: Any) -> None:
            raise error

        original(versions)

    driver = study.database.engine.dialect.loaded_dbapi
    error = driver.OperationalError("server closed the connection unexpectedly")
    if study.database.is_sqlite:
        error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    elif study.database.url.get_backend_name() == "mysql":
        error.args = (2013, *error.args)
    versions = optuna.storages._rdb.storage._VersionManager
    original = getattr(versions, step)
    monkeypatch.setattr(versions, step, away)
    with pytest.raises(StorageUnavailable, match="server closed the connection"):
        FencedStorage(study.database)


def test_a_newer_database_is_refused(study: Study) -> None:
    with study.database.write() as c:
        c.execute(tables.schema.insert().values(version=tables.VERSION + 1))
    with pytest.raises(StorageError, match="newer hpo"):
        studies.create(study.database, study_file())


def test_grid_points_are_tried_once_each(database: Database, home: Home) -> None:
    file = study_file(
        trials=6, sampler="grid", space="batch_size = [8, 16, 32]\noptimizer.lr = [0.1, 0.2]"
    )
    study, _ = studies.create(database, file)
    storage = FencedStorage(database)
    worker = Worker(study, storage, InstantTrials(study, storage), home=home)
    assert worker.run(threading.Event()) == "all 6 trials are finished"
    tried = [json.dumps(t.params, sort_keys=True) for t in study.optuna_study(storage).trials]
    assert len(tried) == len(set(tried)) == 6


def control(home: Home) -> Progress:
    path = home.root / "alive"
    path.parent.mkdir(parents=True, exist_ok=True)
    return Progress(threading.Event(), path)
