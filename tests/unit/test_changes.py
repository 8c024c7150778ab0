"""Changes to a study that exists: higher limits extend it, and one that never began is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo.api.creation import open_study
from hpo.api.study import Study
from hpo.cli.search import _extend
from hpo.errors import Conflict, LimitsRaised
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.status import read_status
from hpo.storage import leases, records
from hpo.storage.database import Database, connect
from hpo.storage.optuna import FencedStorage, add_waiting
from tests.harness.commands import Hpo, calls
from tests.harness.fakes import study_file
from tests.harness.filled import Trial, fill

FILE = """
[study]
name = "toy"
trials = {trials}
lease_s = 5.0
sampler = "random"
pruner = "none"
defaults = false
[train]
epochs = 3
[space]
optimizer.lr = {{low = 1e-4, high = 1e-1, log = true}}
"""


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.chdir(tmp_path)
    return connect(f"sqlite:///{tmp_path / 'x.db'}")


def test_higher_limits_are_agreed_to_and_lower_ones_explained(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(database, study_file(trials=2), [Trial("complete", (0.5,))] * 2)
    hpo: Hpo = calls(monkeypatch, capsys)
    Path("toy.toml").write_text(FILE.format(trials=2))
    code, _, err = hpo("run", "toy.toml", "--trials", "4", "--storage", database.secret_url)
    assert code == 2
    assert "hpo extend toy --trials 4, or the same command with --yes" in err
    for file, message in (
        (study_file(trials=2, study="timeout_s = 7200"), "hpo extend toy --timeout-s 2h"),
        (study_file(trials=1), "--trials 1: study 'toy' has 2 .* 2 trials of it were begun"),
        (study_file(trials=4, train="epochs = 4"), "another definition"),
    ):
        with pytest.raises(Conflict, match=message):
            open_study(database, file, None)
    with pytest.raises(LimitsRaised) as raised:
        open_study(database, study_file(trials=4), None)
    _extend(Study("toy", database), raised.value, yes=True)
    assert open_study(database, study_file(trials=4), None).is_new is False
    assert read_status(database, "toy").budget == 4


def test_a_study_of_which_nothing_was_trained_is_replaced(database: Database) -> None:
    before = fill(database, study_file(trials=2), [Trial("failed", (), "no weights")])
    found = open_study(database, study_file(trials=2, train="epochs = 5"), None)
    assert (found.is_new, found.replaced) == (True, True)
    assert found.study.uuid != before.uuid
    assert read_status(database, "toy").count("failed") == 0
    same = open_study(database, study_file(trials=2, train="epochs = 5"), None)
    assert (same.is_new, same.replaced) == (False, False)


@pytest.mark.parametrize("sign", ["epoch", "worker", "lease", "queue"])
def test_one_that_has_begun_is_not(database: Database, sign: str) -> None:
    study = fill(database, study_file(), [Trial("failed", (0.5,))] if sign == "epoch" else [])
    if sign == "worker":
        records.add_worker(database, "w", study.uuid, versions={}, process="", host="h", pid=1,
                           device="cpu")  # fmt: skip
    elif sign == "lease":
        add_waiting(FencedStorage(database), study.row.study_id)
        leases.claim(database, study.uuid, study.snapshot().free[0], "w")
    elif sign == "queue":
        studies.enqueue(study, {"optimizer.lr": 0.01})
    with pytest.raises(Conflict, match=r"train\.epochs: 3 -> 5"):
        open_study(database, study_file(train="epochs = 5"), None)
    assert studies.replace_unbegun(database, study.row, Home.default()) is False
    assert studies.load(database, "toy").uuid == study.uuid
