"""The promise from the user's end: a search on digits by the commands of the README."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.search.status import read_status
from hpo.storage import records
from hpo.storage.database import Database, connect
from tests.integration.test_scenes import check_exact, computed_twice

STUDY = Path(__file__).parents[2] / "studies" / "digits.toml"
DEADLINE_S = 240.0


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hpo", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something has happened while `process` runs; fail when it ends before."""
    deadline = time.monotonic() + DEADLINE_S
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def end(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a command that succeeds; return what it printed."""
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err
    return out


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    found = f"sqlite:///{tmp_path / 'runs' / 'hpo.db'}"
    monkeypatch.setenv("HPO_STORAGE", found)
    return found


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Digits, cut down to seconds, every parameter fixed but the learning rate."""
    text = STUDY.read_text(encoding="utf-8").partition("# What is searched")[0]
    text += "[space]\noptimizer.lr = {low = 1e-3, high = 1e-1, log = true}\n"
    path = tmp_path / "digits.toml"
    path.write_text(text, encoding="utf-8")
    return path


def small(trials: int) -> list[str]:
    values = [f"study.trials={trials}", "epochs=6", "data.limit_train=200", "model.cnn.filters=[8]"]
    return [word for value in values for word in ("--set", value)]


def epochs_done(database: Database) -> int:
    if records.is_empty(database) or not records.list_studies(database):
        return 0
    return sum(len(trial.epochs) for trial in read_status(database, "digits").trials)


def test_a_search_survives_the_kill_of_its_worker(url: str, study: Path) -> None:
    """hpo run; kill -9 of its worker in the middle of a trial; the budget is exact all the same."""
    process = start("run", study, *small(5), "--workers", 1, "--quiet")
    (study.parent / "runs").mkdir(exist_ok=True)
    database = connect(url)
    wait_for(lambda: epochs_done(database) >= 3, process)
    uuid = records.get_study(database, "digits").uuid
    (worker,) = [one for one in records.read_workers(database, uuid) if one.ended is None]
    os.kill(worker.pid, signal.SIGKILL)
    end(process)
    status = check_exact(database, "digits", 5)
    assert computed_twice(status) <= 1
    assert len({one.worker for trial in status.trials for one in trial.attempts}) == 2
    report = json.loads(end(start("status", "digits", "--json")))
    assert report["state"] == "finished"
    assert "no faults" in end(start("storage", "check"))


def test_two_workers_share_a_study(url: str, study: Path) -> None:
    """hpo run --workers 2: both work, no trial and no epoch twice."""
    told = end(start("run", study, *small(12), "--workers", 2))
    assert "12/12" in told
    status = check_exact(connect(url), "digits", 12)
    attempts = [one for trial in status.trials for one in trial.attempts]
    assert len(attempts) == 12
    assert len({one.worker for one in attempts}) == 2
    assert computed_twice(status) == 0
