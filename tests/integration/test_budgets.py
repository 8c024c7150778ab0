"""What a study has spent of its budgets, on every database."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from hpo.search import study as studies
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage
from hpo.storage.snapshot import read_spending
from hpo.storage.tables import attempts, epochs
from tests.harness.fakes import study_file

pytestmark = pytest.mark.databases()

LIMITS = 'max_time = "1h"\nmax_full_trainings = 10\ntimeout_s = 7200'


def new_trial(storage: FencedStorage, study: studies.Study) -> int:
    return storage.create_new_trial(study.row.study_id)


def insert(database: Database, uuid: str, rows: list[dict[str, object]]) -> None:
    given = {"k": 1, "study": uuid, "number": 0, "token": "t", "worker": "w"}
    with database.write() as c:
        for row in rows:
            c.execute(attempts.insert().values(**given | row))


@pytest.mark.parametrize(
    ("spans", "elapsed", "active"),
    [
        ([], 0, 0),
        ([(0, 10)], 10, 10),
        ([(0, 10), (5, 20)], 20, 25),
        ([(0, 30), (5, 10), (20, 40)], 40, 55),  # within another, then beyond it
        ([(0, 10), (100, 110)], 20, 20),  # a pause
        ([(100, 110), (0, 10), (0, 5)], 20, 25),
        ([(0, 0), (0, 10)], 10, 10),
    ],
)
def test_time_by_the_clock_and_summed(
    database: Database, spans: list[tuple[int, int]], elapsed: float, active: float
) -> None:
    study, _ = studies.create(database, study_file(study=LIMITS))
    storage = FencedStorage(database)
    rows: list[dict[str, object]] = []
    for begin, end in spans:
        trial = new_trial(storage, study)
        rows.append({"trial_id": trial, "started": 1e6 + begin, "until": 1e6, "ended": 1e6 + end,
                     "outcome": "pruned"})  # fmt: skip
    insert(database, study.uuid, rows)
    found = study.snapshot()
    assert (found.elapsed_s, found.active_s) == (elapsed, active)
    assert (found.max_time_s, found.timeout_s) == (3600, 7200)


def test_an_attempt_without_an_end_counts_until_now_or_until_its_lease_ended(
    database: Database,
) -> None:
    study, _ = studies.create(database, study_file(study=LIMITS))
    storage = FencedStorage(database)
    with database.read() as c:
        now = float(c.scalar(sa.select(database.now())) or 0)
    dead, live = (new_trial(storage, study) for _ in range(2))
    insert(database, study.uuid, [
        {"trial_id": dead, "started": now - 1000, "until": now - 900},
        {"trial_id": live, "started": now - 50, "until": now + 1000},
    ])  # fmt: skip
    found = read_spending(database, study.uuid, max_epochs=3)
    assert 150 <= found.elapsed_s < 250
    assert found.active_s == pytest.approx(found.elapsed_s, abs=100)


def test_epochs_of_all_trials_in_full_trainings(database: Database) -> None:
    study, _ = studies.create(database, study_file(study=LIMITS, train="epochs = 4"))
    storage = FencedStorage(database)
    trials = [(new_trial(storage, study), count) for count in (4, 2, 0)]
    with database.write() as c:
        for trial, count in trials:
            row = {"trial_id": trial, "study": study.uuid, "attempt": 1, "metrics": "{}"}
            for epoch in range(1, count + 1):
                c.execute(epochs.insert().values(epoch=epoch, finished=0.0, **row))
    found = study.snapshot()
    assert (found.spent_epochs, found.max_epochs, found.full_trainings) == (6, 4, 1.5)


def test_what_has_no_limit_is_not_counted(database: Database) -> None:
    study, _ = studies.create(database, study_file())
    found = study.snapshot()
    assert (found.max_time_s, found.max_full_trainings, found.timeout_s) == (None, None, None)
    assert (found.elapsed_s, found.spent_epochs, found.active_s) == (0, 0, 0)
    assert study.spent() is None
