"""Workers of one host tidy up the same folders at the same time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from hpo.paths import Home, files_in, folders_in
from hpo.search import retention
from hpo.storage.database import Database
from tests.harness.fakes import study_file
from tests.harness.filled import Trial, fill


def test_tidying_does_not_mind_that_somebody_else_was_quicker(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = fill(database, study_file(trials=3), [Trial("complete", (0.5,))] * 3)
    trials = study.directory(home).trials
    for number in range(3):
        path = study.directory(home).checkpoint(number, 1, 1)
        path.parent.mkdir(parents=True)
        path.touch()
    scandir, victim = os.scandir, trials / "1" / "attempt-1"

    def removed_under_us(path: Any = ".") -> Any:
        if not isinstance(path, int) and Path(path) == victim:
            shutil.rmtree(trials / "1")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", removed_under_us)
    retention.apply_retention(study, home)
    assert not victim.exists()
    assert files_in(trials) == folders_in(trials) == []


def test_what_lies_below_a_folder(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a", target_is_directory=True)
    assert files_in(tmp_path) == [deep / "file"]
    assert folders_in(tmp_path) == [deep, tmp_path / "a"]
    assert files_in(tmp_path / "nothing") == folders_in(tmp_path / "nothing") == []
