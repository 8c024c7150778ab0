"""A search for the best retrieval: trials through the real worker, and what is checked before."""

from __future__ import annotations

import math

import pytest

from hpo.config.study import StudyFile, parse_study
from hpo.errors import ConfigError
from hpo.paths import Home
from hpo.reports.study import study_report
from hpo.search.study import load
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage
from hpo.trained.dry_run import check
from hpo.trained.export import export
from hpo.training import learner
from tests.unit.test_objective import TRAIN, search

SPACE = """
[space]
model.trainable_blocks = [{blocks}]
retrieval.pca = [{pca}]
retrieval.k = [5, 10]
"""


def retrieval_study(
    blocks: str, *, metric: str = "", pca: str = "0, 2", trials: int = 3
) -> StudyFile:
    asked = f'metric = "{metric}"\n' if metric else ""
    head = f'[study]\nname = "toy"\ntrials = {trials}\n{asked}pruner = "none"\n[train]\n'
    space = SPACE.format(blocks=blocks, pca=pca)
    return parse_study(f'{head}task = "retrieval"\n{TRAIN}{space}', "toy.toml")


def test_frozen_trials_are_one_epoch_and_exported_as_such(database: Database, home: Home) -> None:
    status = search(database, home, retrieval_study("0"))
    assert [trial.state for trial in status.trials] == ["complete"] * 3
    for trial in status.trials:
        (row,) = trial.epochs
        assert trial.value == row.metrics["val_precision_at_k"]
    config, provenance = export(database, "toy")
    assert (config.task, config.epochs) == ("retrieval", 1)
    assert provenance["metric"] == "val_precision_at_k"
    assert "val_precision_at_k" in study_report(database, "toy")


def test_the_smallest_distance_is_best(database: Database, home: Home) -> None:
    status = search(database, home, retrieval_study('0, "all"', metric="val_mean_distance"))
    values = [trial.value for trial in status.trials]
    assert status.best is not None
    assert status.best.value == min(value for value in values if value is not None)


def test_a_trial_that_diverges_has_no_distance(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = learner.Learner.train_mode

    def broken(self: learner.Learner) -> None:
        original(self)
        next(self.model.parameters()).data.fill_(math.nan)

    monkeypatch.setattr(learner.Learner, "train_mode", broken)
    status = search(database, home, retrieval_study('"all"', metric="val_mean_distance", trials=1))
    assert [trial.state for trial in status.trials] == ["diverged"]
    assert status.trials[0].value is None
    view = load(database, "toy").optuna_study(FencedStorage(database))
    assert view.trials[0].values == [math.inf]
    assert status.best is None
    assert "not finite" in study_report(database, "toy")


def test_too_many_components_fail_the_trial_with_the_reason(database: Database, home: Home) -> None:
    status = search(database, home, retrieval_study("0", pca="5", trials=1))
    assert [trial.state for trial in status.trials] == ["failed"]
    assert "retrieval.pca: 5: more components than 100 training images of 4" in str(
        status.trials[0].reason
    )


def test_check_finds_too_many_components(home: Home) -> None:
    with pytest.raises(ConfigError, match=r"retrieval\.pca: 5: .* 0 to 4"):
        check(retrieval_study("0", pca="0, 5"), home=home, device="cpu", workers=1, threads=1)
    found = check(retrieval_study("0"), home=home, device="cpu", workers=1, threads=1)
    assert found.forecast is not None
