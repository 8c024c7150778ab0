"""Several processes at the same database in the same instant.

    python -m tests.harness.races SCENE URL [TIMES]

As `faults`, whose scenes are of single processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import Fenced
from hpo.search import study as studies
from hpo.storage import leases
from hpo.storage.database import connect
from hpo.storage.leases import Ending
from hpo.storage.optuna import FencedStorage, add_waiting
from hpo.storage.records import Outcome
from tests.harness.fakes import study_file
from tests.harness.scene import Scene, run_scene, together

PROCESSES, TRIALS = 8, 100


def claims(url: str, times: int = 2) -> dict[str, Any]:
    """Eight processes claim a hundred waiting trials."""
    handed_out, distinct = [], []
    for i in range(times):
        file = study_file(trials=TRIALS, name=f"claims-{i}", lease_s=3600.0)
        study, _ = studies.create(connect(url), file)
        storage = FencedStorage(study.database)
        for _ in range(TRIALS):
            add_waiting(storage, study.row.study_id)
        study.database.dispose()
        numbers = [n for one in together(PROCESSES, Claims(url, f"claims-{i}")) for n in one]
        handed_out.append(len(numbers))
        distinct.append(len(set(numbers)))
    return {"handed_out": handed_out, "distinct": distinct}


class Claims:
    """Takes free trials of a study until there are none."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name

    def __call__(self, i: int) -> list[int]:
        study = studies.load(connect(self.url), self.name)
        numbers = []
        while free := study.snapshot().free:
            for one in free:
                taken = leases.claim(study.database, study.uuid, one, f"worker-{i}")
                if taken is not None:
                    numbers.append(taken.lease.number)
        return numbers


def creates(url: str, times: int = 2) -> dict[str, Any]:
    """Eight processes make the same study in a new database."""
    survivors, alike = [], []
    for _ in range(times):
        emptied(url)

        def create(i: int) -> str:
            return studies.create(connect(url), study_file())[0].uuid

        found = [one for one in together(PROCESSES, create) if one is not None]
        survivors.append(len(found))
        alike.append(len(set(found)) == 1)
    return {"survivors": survivors, "alike": alike}


def emptied(url: str) -> None:
    """As if the database were new."""
    database = connect(url)
    if database.is_sqlite:
        for file in Path(str(database.url.database)).parent.glob("hpo.db*"):
            file.unlink()
        return
    with database.engine.begin() as c:
        c.execute(sa.text("DROP SCHEMA public CASCADE"))
        c.execute(sa.text("CREATE SCHEMA public"))
    database.dispose()


def finishes(url: str, times: int = 10) -> dict[str, Any]:
    """Two processes finish the same trial, under the same lease: the worst that can be."""
    study, _ = studies.create(connect(url), study_file(trials=times, lease_s=3600.0))
    storage = FencedStorage(study.database)
    accepted, true = [], 0
    for number in range(times):
        add_waiting(storage, study.row.study_id)
        taken = leases.claim(study.database, study.uuid, study.snapshot().free[0], "w")
        assert taken is not None
        storage.set_trial_state_values(taken.lease.trial_id, TrialState.RUNNING)
        study.database.dispose()
        told = together(2, Finishes(url, taken.lease))
        accepted.append(sum(told))
        value = storage.get_trial(taken.lease.trial_id).value
        true += told.count(True) == 1 and value == float(told.index(True))
        assert number == taken.lease.number
    return {"accepted": accepted, "true": true}


class Finishes:
    """Tells the trial of a lease its own number; whether it was accepted."""

    def __init__(self, url: str, lease: leases.Lease) -> None:
        self.url, self.lease = url, lease

    def __call__(self, i: int) -> bool:
        study = studies.load(connect(self.url), "toy")
        storage = FencedStorage(study.database)
        try:
            with storage.guarded(self.lease, Ending(Outcome.COMPLETE, float(i))):
                study.optuna_study(storage).tell(self.lease.number, float(i))
        except (Fenced, ValueError, optuna.exceptions.UpdateFinishedTrialError):
            return False
        return True


SCENES: tuple[Scene, ...] = (claims, creates, finishes)

if __name__ == "__main__":
    run_scene(SCENES)
