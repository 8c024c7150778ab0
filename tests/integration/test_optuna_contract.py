"""Optuna's own suite for storages, over ours.

On MySQL and MariaDB four of its tests fail with Optuna's own storage, too: its columns there keep
no fractions of a second.
"""

from __future__ import annotations

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import TrialState

from hpo.storage import database as db
from hpo.storage.database import Database, connect
from hpo.storage.optuna import FencedStorage
from hpo.storage.schema import create_schema

pytestmark = pytest.mark.databases("sqlite", "postgresql")


@pytest.fixture
def storage(database: Database, monkeypatch: pytest.MonkeyPatch) -> FencedStorage:
    monkeypatch.setattr(db, "BUSY_TIMEOUT_S", 5)  # who waits for itself is told sooner
    create_schema(database)
    return FencedStorage(database)


class TestFencedStorage(StorageTestCase):
    """Every test of Optuna's, but for one."""

    @pytest.mark.xfail(
        raises=TypeError,
        strict=True,
        reason="a storage of ours holds the leases of its threads and perhaps a password: another "
        "process opens the URL itself",
    )
    def test_pickle_storage(self, storage: optuna.storages.BaseStorage) -> None:
        super().test_pickle_storage(storage)


def test_a_late_write_to_a_finished_trial_blocks_nobody(
    storage: FencedStorage, database: Database
) -> None:
    """Optuna reads the trial for its message while its own transaction, which writes, is open."""
    study = storage.create_new_study([StudyDirection.MINIMIZE])
    trial = storage.create_new_trial(study)
    storage.set_trial_state_values(trial, TrialState.COMPLETE, [0.5])
    number = FloatDistribution(0, 1)
    other = connect(database.secret_url)
    for late in (
        lambda: storage.set_trial_param(trial, "x", 0.5, number),
        lambda: storage.set_trial_intermediate_value(trial, 1, 0.5),
        lambda: storage.set_trial_user_attr(trial, "key", 1),
        lambda: storage.set_trial_system_attr(trial, "key", 1),
        lambda: storage.set_trial_state_values(trial, TrialState.FAIL),
    ):
        with pytest.raises(UpdateFinishedTrialError):
            late()
        FencedStorage(other).set_study_user_attr(study, "key", 1)  # the lock is given up
    other.dispose()
