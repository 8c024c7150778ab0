"""The trials of an earlier study as the first ones of a new one, on every database."""

from __future__ import annotations

import threading

import pytest

from hpo.api.creation import Learning, open_study
from hpo.api.study import Study
from hpo.doctor.scan import check_database
from hpo.errors import Conflict, InputError
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.status import read_status
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage
from hpo.workers.worker import Worker
from tests.harness.fakes import InstantTrials, study_file
from tests.harness.filled import Trial, fill

pytestmark = pytest.mark.databases()

WIDE = """
optimizer.lr = {low = 1e-4, high = 1.0, log = true}
optimizer.name = ["sgd", "adamw"]
"""
OLD = [Trial("complete", (0.5, 0.6)), Trial("pruned", (0.1,)), Trial("diverged", (float("nan"),))]


def test_the_budget_counts_new_trials_alone(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home.root.parent)
    fill(database, study_file(name="old", trials=3), OLD)
    file = study_file(name="new", trials=5, sampler="tpe", space=WIDE)
    found = open_study(database, file, None, Learning(taken="old")).study
    storage = FencedStorage(database)

    def work() -> tuple[int, int]:
        Worker(found, storage, InstantTrials(found, storage), home=home).run(threading.Event())
        status = read_status(database, "new")
        assert status.state == "finished"
        return status.finished, len(status.trials)

    assert work() == (5, 8)
    view = found.optuna_study(storage)
    spaces = {repr(one.distributions["optimizer.name"]) for one in view.get_trials()}
    assert len(spaces) == 1  # the sampler takes none for a trial of another space
    with pytest.raises(InputError, match="--trials 5: study 'new' has 5 already"):
        Study("new", database).extend(trials=5)
    Study("new", database).extend(trials=7)
    with pytest.raises(Conflict, match="extend new --trials 8"):
        studies.create(database, study_file(name="new", trials=8, sampler="tpe", space=WIDE))
    assert work() == (7, 10)
    assert not check_database(database).findings
