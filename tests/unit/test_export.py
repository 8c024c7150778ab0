"""Trials as configurations: complete, with their provenance, and refused where they are no use."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from hpo.config.study import load_config
from hpo.errors import Conflict, DiskFull, InputError, NotFound
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.status import read_status
from hpo.storage import tables
from hpo.storage.database import Database
from hpo.trained import export as exports
from hpo.trained.export import export, export_top, git_commit, write_export, write_top
from tests.harness.fakes import study_file
from tests.harness.searches import TINY, search


@pytest.fixture
def searched(database: Database, home: Home) -> Database:
    search(database, home, study_file(trials=3, train=TINY))
    return database


def end_as(database: Database, number: int, outcome: str, reason: str = "") -> None:
    """As if the trial had ended otherwise."""
    state = {"pruned": "PRUNED", "failed": "FAIL"}.get(outcome, "COMPLETE")
    with database.write() as c:
        a, t = tables.attempts, tables.optuna_trials
        c.execute(sa.update(a).where(a.c.number == number).values(outcome=outcome, reason=reason))
        c.execute(sa.update(t).where(t.c.number == number).values(state=state))


def test_the_best_trial_is_a_complete_configuration(searched: Database) -> None:
    best = read_status(searched, "toy").best
    assert best is not None
    config, provenance = export(searched, "toy")
    assert config.optimizer.lr == best.params["optimizer.lr"]
    assert config.model.cnn.filters == (4,)
    assert config.runtime.model_dump() == best.attempts[-1].runtime
    assert config.runtime.threads == 1
    told = {key: provenance[key] for key in ("study", "trial", "metric", "value", "best_epoch")}
    assert told == {
        "study": "toy",
        "trial": best.number,
        "metric": "val_top1",
        "value": best.value,
        "best_epoch": best.best_epoch,
    }


def test_provenance_says_how_the_value_came_about(searched: Database) -> None:
    _, provenance = export(searched, "toy", number=1)
    trial = read_status(searched, "toy").trials[1]
    assert provenance["rates"] == [row.metrics["lr"] for row in trial.epochs]
    assert len(provenance["rates"]) == provenance["epochs"] == provenance["epochs_trained"] == 3
    assert provenance["stopped_epoch"] is None
    assert re.fullmatch(r"[0-9a-f]{16}", *provenance["data_fingerprints"])
    assert {"hpo", "torch", "optuna", "python"} <= provenance["versions"].keys()
    assert provenance["exported_at"].endswith("+00:00")
    assert "study of 3 finished trials" in provenance["notes"][0]


def test_early_stopping_is_recorded(database: Database, home: Home) -> None:
    # No change is an improvement, so every trial stops after epoch 2.
    stopping = 'early_stopping = {patience = 1, metric = "val_top1", min_delta = 1.0}'
    search(database, home, study_file(trials=1, train=TINY + stopping))
    _, provenance = export(database, "toy")
    assert provenance["stopped_epoch"] == provenance["epochs_trained"] == 2
    assert provenance["epochs"] == 3


def test_what_is_written_is_read_back(searched: Database, tmp_path: Path) -> None:
    config, provenance = export(searched, "toy")
    path = tmp_path / "new" / "best.toml"
    write_export(path, config, provenance)
    again, told = load_config(path)
    assert again == config
    assert told == {key: value for key, value in provenance.items() if value is not None}
    assert path.read_text().startswith(f"# Trial {provenance['trial']} of study toy: val_top1 = ")


def test_a_file_is_replaced_by_force_only(searched: Database, tmp_path: Path) -> None:
    config, provenance = export(searched, "toy")
    path = tmp_path / "best.toml"
    path.write_text("mine")
    with pytest.raises(Conflict, match=r"best\.toml exists"):
        write_export(path, config, provenance)
    assert path.read_text() == "mine"
    write_export(path, config, provenance, force=True)
    assert load_config(path)[0] == config


def test_a_failed_write_leaves_the_old_file(
    searched: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    path = tmp_path / "best.toml"
    path.write_text("mine")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DiskFull, match=r"best\.toml does not fit"):
        write_export(path, *export(searched, "toy"), force=True)
    assert path.read_text() == "mine"
    assert [one.name for one in tmp_path.glob("*.toml*")] == ["best.toml"]


def test_the_best_few_are_ranked(searched: Database, tmp_path: Path) -> None:
    found = export_top(searched, "toy", 2)
    ranked = read_status(searched, "toy").ranked()
    assert [told["trial"] for _, told in found] == [trial.number for trial in ranked[:2]]
    paths = write_top(tmp_path / "top", found)
    assert [path.name for path in paths] == [
        f"{rank}-trial-{trial.number}.toml" for rank, trial in enumerate(ranked[:2], 1)
    ]
    assert [load_config(path)[0] for path in paths] == [config for config, _ in found]
    with pytest.raises(Conflict):
        write_top(tmp_path / "top", found)
    assert len(export_top(searched, "toy", 99)) == 3
    with pytest.raises(InputError, match="at least 1"):
        export_top(searched, "toy", 0)


def test_a_pruned_trial_is_exported_and_says_so(searched: Database) -> None:
    end_as(searched, 0, "pruned", "median pruned it after epoch 3")
    _, provenance = export(searched, "toy", number=0)
    assert provenance["state"] == "pruned"
    assert "was pruned (median pruned it after epoch 3)" in provenance["notes"][1]
    assert provenance["notes"][1] in exports.comments(provenance)


@pytest.mark.parametrize("outcome", ["failed", "diverged", "infeasible"])
def test_trials_without_a_result_are_refused(searched: Database, outcome: str) -> None:
    end_as(searched, 2, outcome, "too wild")
    with pytest.raises(InputError, match=rf"trial 2 of 'toy' ended as {outcome} \(too wild\)"):
        export(searched, "toy", number=2)


def test_unknown_trials_and_studies(searched: Database) -> None:
    with pytest.raises(NotFound, match="no trial 7; its trials: 0 to 2"):
        export(searched, "toy", number=7)
    with pytest.raises(NotFound, match="toy"):
        export(searched, "toys")


def test_without_a_complete_trial(searched: Database) -> None:
    end_as(searched, 0, "pruned")
    end_as(searched, 1, "pruned")
    end_as(searched, 2, "failed")
    with pytest.raises(
        NotFound, match=r"no complete trial yet \(2 pruned, 1 failed\)\. Pruned trial 0"
    ):
        export(searched, "toy")


def test_without_any_trial(database: Database) -> None:
    studies.create(database, study_file())
    with pytest.raises(NotFound, match="none at all"):
        export_top(database, "toy", 3)
    with pytest.raises(NotFound, match="its trials: none yet"):
        export(database, "toy", number=0)


def test_the_commit_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, git: Callable[..., None]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None
    (tmp_path / "a").write_text("1")
    git("init", "-q")
    git("add", "a")
    git("commit", "-qm", "one")
    commit = git_commit()
    assert commit is not None
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "a").write_text("2")
    assert git_commit() == f"{commit}-dirty"


@pytest.fixture
def git(tmp_path: Path) -> Callable[..., None]:
    """git in `tmp_path`; the test is skipped where there is none."""
    import shutil
    import subprocess

    tool = shutil.which("git")
    if tool is None:
        pytest.skip("git is not installed")

    def run(*words: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run([tool, *who, *words], cwd=tmp_path, check=True)

    return run
