"""A study's status is read while others work on it."""

from __future__ import annotations

from typing import Any

import pytest

from hpo.search import status
from hpo.search import study as studies
from hpo.search.status import read_status
from hpo.storage import records
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage, add_waiting
from tests.harness.fakes import study_file
from tests.harness.filled import Trial, fill

READS = [
    (records, "read_states"),
    (records, "read_attempts"),
    (records, "read_epochs"),
    (status, "read_params"),
]


@pytest.mark.parametrize(("module", "name"), READS, ids=[name for _, name in READS])
def test_a_trial_that_ends_meanwhile_is_whole_or_not_over(
    module: Any, name: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = study_file(trials=4)
    study, _ = studies.create(database, file)
    add_waiting(FencedStorage(database), study.row.study_id)
    read, ended = getattr(module, name), []

    def ends_meanwhile(*arguments: Any) -> Any:
        found = read(*arguments)
        if not ended:
            ended.append(True)
            fill(database, file, [Trial("diverged", (0.5, 0.75), "loss not finite")])
        return found

    monkeypatch.setattr(module, name, ends_meanwhile)
    trial = read_status(database, file.name).trials[0]
    assert trial.state in ("waiting", "diverged")
    if trial.state == "diverged":
        assert len(trial.epochs) == 2
        assert trial.reason == "loss not finite"
        assert trial.params
