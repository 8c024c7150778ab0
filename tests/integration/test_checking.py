"""Each kind of finding: made, found, mended or left, on every database; none in a live search."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.doctor import repair, rules
from hpo.doctor.rules import Finding
from hpo.doctor.scan import Counts, check_database, repair_all
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.status import read_status
from hpo.search.study import Study
from hpo.storage import leases, records, tables
from hpo.storage.database import Database, connect
from hpo.storage.leases import ContactWindow, Lease
from hpo.storage.optuna import FencedStorage, add_waiting
from hpo.storage.records import Epoch, Outcome
from hpo.storage.tables import attempts, epochs, optuna_studies, optuna_trials
from hpo.workers.worker import Worker
from tests.harness.fakes import InstantTrials, study_file
from tests.harness.filled import MIXED, Trial, fill

pytestmark = pytest.mark.databases()

ENDED = [
    Trial("complete", (0.5, 0.6)),
    Trial("pruned", (0.2,), "behind"),
    Trial("failed", (), "why"),
    Trial("diverged", (0.4, math.nan), "not finite"),
]


@pytest.fixture
def study(database: Database) -> Study:
    """Four trials that ended in every way, of eight; one more waits."""
    found = fill(database, study_file(trials=8), ENDED)
    add_waiting(FencedStorage(database), found.row.study_id)
    return found


def change(database: Database, *statements: Any) -> None:
    """As somebody would who goes by no rules, foreign keys least of all."""
    without = {
        "sqlite": "PRAGMA foreign_keys = OFF",
        "postgresql": "SET session_replication_role = replica",
        "mysql": "SET foreign_key_checks = 0",
    }[database.url.get_backend_name()]
    engine = sa.create_engine(database.secret_url, poolclass=sa.NullPool)
    with engine.connect() as c:
        c.execute(sa.text(without))
        for statement in statements:
            c.execute(statement)
        c.commit()


def content(database: Database) -> dict[str, list[Any]]:
    """All rows of Optuna's trials and values, and of our tables."""
    metadata = sa.MetaData()
    values = sa.Table("trial_values", metadata, autoload_with=database.engine)
    found = {}
    with database.read() as c:
        for table in (optuna_studies, optuna_trials, values, *tables.OURS):
            query = sa.select(table).order_by(*table.primary_key)
            found[table.name] = [repr(tuple(row)) for row in c.execute(query)]
    return found


def only(database: Database) -> Finding:
    """The one finding that there is."""
    (found,) = check_database(database).findings
    return found


def mended(database: Database) -> None:
    """What was found is mended, and nothing else comes up."""
    checked = check_database(database)
    assert repair_all(database, checked) == checked.faults
    assert check_database(database).faults == []


def left(database: Database, says: str) -> None:
    """A repair changes nothing, and the user is told what to do."""
    before = content(database)
    checked = check_database(database)
    assert repair_all(database, checked) == []
    assert content(database) == before
    assert [says in one.advice for one in checked.faults] == [True]


def taken(study: Study, worker: str = "w-1") -> Lease:
    """The first free trial, begun by `worker`."""
    found = leases.claim(study.database, study.uuid, study.snapshot().free[0], worker)
    assert found is not None
    storage = FencedStorage(study.database)
    if not found.started:
        storage.set_trial_state_values(found.lease.trial_id, TrialState.RUNNING)
    return found.lease


def trial_id(study: Study, number: int) -> int:
    t = optuna_trials.c
    with study.database.read() as c:
        found = c.scalar(
            sa.select(t.trial_id).where(t.study_id == study.row.study_id, t.number == number)
        )
    assert isinstance(found, int)
    return found


def of(lease: Lease) -> sa.ColumnElement[bool]:
    return sa.and_(attempts.c.trial_id == lease.trial_id, attempts.c.k == lease.k)


def expire(database: Database, lease: Lease) -> None:
    change(database, sa.update(attempts).where(of(lease)).values(until=attempts.c.until - 1000))


def ended_by_others(study: Study, lease: Lease, state: TrialState) -> None:
    value = [0.9] if state == TrialState.COMPLETE else None
    FencedStorage(study.database).set_trial_state_values(lease.trial_id, state, value)


def asked(study: Study) -> optuna.Trial:
    """A trial that stock Optuna makes; it takes those that wait first."""
    return study.optuna_study(FencedStorage(study.database)).ask()


def test_nothing_is_wrong(database: Database, study: Study) -> None:
    checked = check_database(database)
    assert checked.findings == ()
    assert checked.counts == Counts(studies=1, trials=5, attempts=4, epochs=5)


def test_a_trial_that_another_tool_began_is_run_by_the_next_worker(
    database: Database, study: Study, home: Home
) -> None:
    asked(study)
    found = only(database)
    assert (found.kind, found.where) == (rules.UNATTEMPTED_TRIAL, "toy, trial 4")
    mended(database)
    assert read_status(database, "toy").trials[4].state == "interrupted"
    storage = FencedStorage(database)
    Worker(study, storage, InstantTrials(study, storage), home=home).run(threading.Event())
    status = read_status(database, "toy")
    assert (status.finished, len(status.trials)) == (8, 8)
    assert [one.outcome for one in status.trials[4].attempts] == ["handed_back", "complete"]
    assert check_database(database).findings == ()


def test_a_trial_that_another_tool_finished_is_left(database: Database, study: Study) -> None:
    view = study.optuna_study(FencedStorage(database))
    view.tell(asked(study), 0.99)
    found = only(database)
    assert (found.kind, found.where) == (rules.UNATTEMPTED_TRIAL, "toy, trial 4")
    left(database, "hpo extend toy --trials +1")


def test_a_trial_beyond_the_budget_is_left(database: Database, study: Study) -> None:
    trials = [asked(study) for _ in range(5)]
    assert trials[-1].number == 8
    assert repair_all(database, check_database(database)) != []
    found = only(database)
    assert (found.kind, found.trial) == (rules.UNATTEMPTED_TRIAL, 8)
    left(database, "hpo extend toy --trials 9")


@pytest.mark.parametrize(
    ("state", "outcome"),
    [(TrialState.FAIL, "failed"), (TrialState.PRUNED, "pruned"), (TrialState.COMPLETE, "lost")],
)
def test_an_open_attempt_of_a_trial_that_is_over(
    database: Database, study: Study, state: TrialState, outcome: str
) -> None:
    lease = taken(study)
    ended_by_others(study, lease, state)
    found = only(database)
    assert (found.kind, found.where) == (rules.UNENDED_ATTEMPT, "toy, trial 4, attempt 1")
    left(database, "w-1 holds it")
    expire(database, lease)
    assert len(repair_all(database, check_database(database))) == 1
    last = records.read_attempts(database, study.uuid)[4][-1]
    assert (last.outcome, last.reason) == (outcome, f"another tool ended its trial as {state.name}")
    assert last.ended is not None
    if outcome == "lost":
        assert only(database).kind == rules.UNATTEMPTED_TRIAL
        left(database, "only you can know")
    else:
        assert check_database(database).findings == ()


def test_an_open_attempt_with_a_successor(database: Database, study: Study) -> None:
    first = taken(study)
    leases.release(database, first, Outcome.HANDED_BACK, "for the test")
    second = taken(study, "w-2")
    change(database, sa.update(attempts).where(of(first)).values(outcome=None, ended=None))
    left(database, "w-1 holds it")
    expire(database, first)
    assert only(database).where == "toy, trial 4, attempt 1"
    mended(database)
    rows = records.read_attempts(database, study.uuid)[4]
    assert [one.outcome for one in rows] == ["lost", None]
    leases.renew(database, second)


def test_an_attempt_that_ended_its_trial_is_the_last(database: Database, study: Study) -> None:
    lease = taken(study)
    leases.release(database, lease, Outcome.HANDED_BACK, "for the test")
    taken(study, "w-2")
    change(database, sa.update(attempts).where(of(lease)).values(outcome="failed"))
    assert only(database).kind == rules.CONTRADICTION
    left(database, "the later one counts")


@pytest.mark.parametrize("number", range(4), ids=[one.outcome for one in ENDED])
def test_optuna_is_told_what_an_attempt_ended_as(
    database: Database, study: Study, number: int
) -> None:
    view = study.optuna_study(FencedStorage(database))
    before = view.trials[number]
    one = trial_id(study, number)
    change(
        database,
        sa.update(optuna_trials).where(optuna_trials.c.trial_id == one).values(state="RUNNING"),
        sa.text(f"DELETE FROM trial_values WHERE trial_id = {one}"),
        sa.text(f"UPDATE trials SET datetime_complete = NULL WHERE trial_id = {one}"),
    )
    found = only(database)
    assert (found.kind, found.where) == (
        rules.CONTRADICTION,
        f"toy, trial {number}, attempt 1",
    )
    mended(database)
    after = study.optuna_study(FencedStorage(database)).trials[number]
    assert after.state == before.state
    assert after.value == (before.value if after.state == TrialState.COMPLETE else None)
    assert before.datetime_complete is not None
    assert after.datetime_complete is not None
    assert abs((after.datetime_complete - before.datetime_complete).total_seconds()) < 10


def test_a_value_that_is_not_known_is_not_told(database: Database, study: Study) -> None:
    t, a = optuna_trials.c, attempts.c
    change(
        database,
        sa.update(optuna_trials).where(t.trial_id == trial_id(study, 0)).values(state="RUNNING"),
        sa.update(attempts).where(a.trial_id == trial_id(study, 0)).values(value=None),
    )
    assert only(database).kind == rules.CONTRADICTION
    left(database, "restore a backup")


def test_two_ends_of_one_trial(database: Database, study: Study) -> None:
    change(database, sa.update(attempts).where(attempts.c.number == 1).values(outcome="failed"))
    assert only(database).kind == rules.CONTRADICTION
    left(database, "restore a backup")


def test_a_lease_from_a_clock_that_was_wrong(database: Database, study: Study) -> None:
    lease = taken(study)
    change(database, sa.update(attempts).where(of(lease)).values(until=attempts.c.until + 1e6))
    found = only(database)
    assert (found.kind, found.where) == (rules.UNENDED_ATTEMPT, "toy, trial 4, attempt 1")
    mended(database)
    (row,) = records.read_attempts(database, study.uuid)[4]
    assert (row.outcome, row.live) == (None, True)
    leases.renew(database, lease)  # its owner has lost nothing


def test_what_the_next_worker_takes_over_is_no_fault(database: Database, study: Study) -> None:
    lease = taken(study)
    assert check_database(database).findings == ()
    expire(database, lease)
    found = only(database)
    assert (found.kind, found.fault, found.repair) == (rules.EXPIRED_LEASE, False, None)
    now = records.clock(database)
    contact = ContactWindow(now - 100, now)
    assert leases.claim(database, study.uuid, study.snapshot().free[0], "w-2", contact)
    assert check_database(database).findings == ()


def test_epochs_of_an_attempt_that_has_no_row(database: Database, study: Study) -> None:
    for worker in ("w-1", "w-2"):
        lease = taken(study, worker)
        leases.begin_epoch(database, lease, lease.k, {})
        row = Epoch(lease.k, lease.k, 0.0, {"val_top1": 0.5}, None)
        leases.record_epochs(database, lease, [row], progress={})
        leases.release(database, lease, Outcome.HANDED_BACK, "for the test")
    change(database, sa.delete(attempts).where(attempts.c.number == 4, attempts.c.k == 1))
    found = only(database)
    assert (found.kind, found.where) == (rules.ORPHAN_EPOCHS, "toy, trial 4, attempt 1")
    mended(database)
    entered, _ = records.read_attempts(database, study.uuid)[4]
    assert (entered.outcome, entered.first_epoch, entered.epoch) == ("lost", 1, 1)
    change(database, sa.delete(attempts).where(attempts.c.number == 4, attempts.c.k == 2))
    assert only(database).kind == rules.ORPHAN_EPOCHS
    left(database, "the metrics stay as they are")


def test_rows_of_no_study(database: Database, study: Study) -> None:
    before, gone = content(database), "f" * 32
    trial = {"trial_id": 10**6, "study": gone}
    lease = {"number": 0, "token": "t", "worker": "w", "started": 1.0, "until": 2.0}
    about = {"host": "h", "pid": 1, "device": "cpu", "versions": "{}", "started": 1.0, "seen": 1.0}
    change(
        database,
        attempts.insert().values(**trial, **lease, k=1),
        epochs.insert().values(**trial, epoch=1, attempt=1, finished=1.0, metrics="{}"),
        tables.workers.insert().values(id="w-gone", study=gone, **about),
        tables.enqueued.insert().values(study=gone, params="{}"),
        tables.resolved.insert().values(study=gone, key="a", value="1"),
    )
    found = check_database(database).findings
    assert [one.kind for one in found] == [rules.ORPHAN_ROWS] * 5
    mended(database)
    assert content(database) == before


def test_an_attempt_at_another_studys_trial(database: Database, study: Study) -> None:
    """As where SQLite gave an id out again; it is left while a worker holds it."""
    other = studies.create(database, study_file(name="other"))[0]
    lease = taken(study)
    change(database, sa.update(attempts).where(of(lease)).values(study=other.uuid))
    assert all(one.kind != rules.ORPHAN_ROWS for one in check_database(database).findings)
    expire(database, lease)
    assert rules.ORPHAN_ROWS in [one.kind for one in check_database(database).findings]
    repair_all(database, check_database(database))
    rows = records.read_attempts(database, study.uuid)
    assert [one.worker for one in rows.get(4, [])] == [repair.REPAIRER]
    assert records.read_attempts(database, other.uuid) == {}
    assert check_database(database).findings == ()


def test_a_study_that_optuna_does_not_have(database: Database, study: Study) -> None:
    before = content(database)
    other = fill(database, study_file(name="other"), ENDED[:1])
    own = sa.select(optuna_trials.c.trial_id).where(optuna_trials.c.study_id == other.row.study_id)
    ids = "(" + ", ".join(str(one) for one in _scalars(database, own)) + ")"
    parts = ("trial_params", "trial_values", "trial_intermediate_values", "trial_user_attributes",
             "trial_system_attributes", "trials")  # fmt: skip
    of_study = ("study_directions", "study_user_attributes", "study_system_attributes", "studies")
    change(
        database,
        *(sa.text(f"DELETE FROM {name} WHERE trial_id IN {ids}") for name in parts),
        *(sa.text(f"DELETE FROM {x} WHERE study_id = {other.row.study_id}") for x in of_study),
    )
    found = only(database)
    assert (found.kind, found.study) == (rules.ORPHAN_STUDY, "other")
    mended(database)
    assert content(database) == before


def _scalars(database: Database, query: Any) -> list[Any]:
    with database.read() as c:
        return list(c.scalars(query))


def test_a_study_that_was_renamed_is_left(database: Database, study: Study) -> None:
    change(database, sa.update(optuna_studies).values(study_name="renamed"))
    found = only(database)
    assert (found.kind, found.study) == (rules.ORPHAN_STUDY, "toy")
    assert "'renamed'" in found.message
    left(database, "give it its name again")


def test_studies_of_optunas_own_are_named_and_left(database: Database, study: Study) -> None:
    storage = FencedStorage(database)
    stock = optuna.create_study(storage=storage, study_name="theirs")
    stock.tell(stock.ask(), 1.0)
    stock.ask()  # runs for ever
    found = only(database)
    assert (found.kind, found.study, found.fault) == (rules.FOREIGN_STUDY, "theirs", False)
    before = content(database)
    assert repair_all(database, check_database(database)) == []
    assert content(database) == before
    assert check_database(database).counts.studies == 1


Case = Callable[[Study], repair.Repair]


def _renewed(study: Study) -> repair.Repair:
    lease = taken(study)
    ended_by_others(study, lease, TrialState.FAIL)
    return repair.EndAttempt(lease.trial_id, lease.k, Outcome.FAILED, "")


def _goes_on(study: Study) -> repair.Repair:
    lease = taken(study)
    expire(study.database, lease)
    return repair.EndAttempt(lease.trial_id, lease.k, Outcome.LOST, "")


def _usual_lease(study: Study) -> repair.Repair:
    lease = taken(study)
    return repair.ShortenLease(lease.trial_id, lease.k, lease.lease_s)


def _taken_meanwhile(study: Study) -> repair.Repair:
    lease = taken(study)
    return repair.HandBack(study.uuid, lease.trial_id, lease.number)


def _not_begun(study: Study) -> repair.Repair:
    return repair.HandBack(study.uuid, trial_id(study, 4), 4)


def _told_meanwhile(study: Study) -> repair.Repair:
    return repair.TellOptuna(trial_id(study, 0), 1, Outcome.COMPLETE)


def _taken_again(study: Study) -> repair.Repair:
    first = taken(study)
    leases.release(study.database, first, Outcome.HANDED_BACK, "")
    taken(study)
    return repair.TellOptuna(first.trial_id, 1, Outcome.FAILED)


def _entered_meanwhile(study: Study) -> repair.Repair:
    return repair.EnterAttempt(study.uuid, trial_id(study, 0), 0, 1)


def _no_such_rows(study: Study) -> repair.Repair:
    return repair.DropRows("hpo_attempts")


def _there_again(study: Study) -> repair.Repair:
    return repair.DropStudy(study.uuid)


CASES = (_renewed, _goes_on, _usual_lease, _taken_meanwhile, _not_begun, _told_meanwhile,
         _taken_again, _entered_meanwhile, _no_such_rows, _there_again)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_cure_looks_again(database: Database, study: Study, case: Case) -> None:
    cure = case(study)
    before = content(database)
    assert not cure.apply(database)
    assert content(database) == before


def test_a_cure_sees_who_was_quicker(url: str, database: Database, study: Study) -> None:
    """A worker takes the trial while the cure waits for its lock."""
    first = taken(study)
    leases.release(database, first, Outcome.LOST, "for the test")
    change(database, sa.update(attempts).where(of(first)).values(outcome="failed"))
    cure = repair.TellOptuna(first.trial_id, 1, Outcome.FAILED)
    asks, answers, mine = threading.Event(), [], connect(url)
    sa.event.listen(mine.engine, "before_cursor_execute", lambda *_: asks.set())
    thread = threading.Thread(target=lambda: answers.append(cure.apply(mine)))
    row = {"trial_id": first.trial_id, "k": 2, "study": study.uuid, "number": first.number}
    with database.write() as c:
        repair.lock_trial(c, database, first.trial_id)
        c.execute(attempts.insert().values(**row, token="t", worker="w", started=1.0, until=2e9))
        thread.start()
        assert asks.wait(120)
        thread.join(0.5)
        assert thread.is_alive()
    thread.join()
    mine.dispose()
    assert answers == [False]
    assert study.optuna_study(FencedStorage(database)).trials[first.number].state.name == "RUNNING"


def test_a_live_search_gives_no_finding(url: str, database: Database, home: Home) -> None:
    """CheckResult as often as it goes, while workers begin, hand back, lose and end trials."""
    study = studies.create(database, study_file(trials=40, lease_s=60.0))[0]
    fill(database, study.file, MIXED[:3])
    stop, checks = threading.Event(), []
    mine = connect(url)

    def work(number: int) -> None:
        own = connect(url)
        one = studies.load(own, "toy")
        storage = FencedStorage(own)
        trials = Restless(one, storage, epochs=2)
        worker = Worker(one, storage, trials, home=home, worker_id=f"w-{number}")
        worker.run(stop)
        own.dispose()

    workers = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for one in workers:
        one.start()
    while any(one.is_alive() for one in workers):
        checked = check_database(mine)
        assert [x for x in checked.findings if x.fault] == []
        assert repair_all(mine, checked) == []
        checks.append(checked.counts.trials)
    mine.dispose()
    assert read_status(database, "toy").finished == 40
    assert len({*checks}) > 3  # it was looked at on its way
    assert check_database(database).findings == ()


class Restless(InstantTrials):
    """Hands every other trial back before it goes on."""

    def run(self, taken: Any, control: Any) -> None:
        if taken.lease.k == 1 and taken.lease.number % 2:
            outcome = "lost" if taken.lease.number % 4 == 1 else "handed_back"
            leases.release(self.study.database, taken.lease, outcome, "for the test")
            return
        super().run(taken, control)
