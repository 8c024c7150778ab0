"""`hpo worker` from outside: a name or a file, and the exit codes that launchers go by."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.paths import Home
from hpo.search.status import read_status
from hpo.storage.database import connect

STUDY = """\
[study]
name = "toy"
trials = {trials}
pruner = "none"
[train]
epochs = 1
[space]
optimizer.lr = {{low = 1e-4, high = 1e-1, log = true}}
"""

Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts `hpo worker STUDY` in a working directory of its own."""
    monkeypatch.chdir(tmp_path)

    def call(study: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "hpo", "worker", study, "--device", "cpu"]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    return call


@pytest.mark.slow
def test_a_study_file_makes_the_study_that_its_workers_share(start: Start) -> None:
    Path("toy.toml").write_text(STUDY.format(trials=2))
    first, second = start("toy.toml"), start("toy.toml")
    said = [one.communicate(timeout=300)[1] for one in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], said
    status = read_status(connect(f"sqlite:///{Home.default().database}"), "toy")
    assert (status.finished, len(status.workers)) == (2, 2)

    Path("toy.toml").write_text(STUDY.format(trials=3))
    other = start("toy.toml")
    assert "hpo extend toy --trials 3" in other.communicate(timeout=300)[1]
    assert other.returncode == 2


@pytest.mark.slow
def test_a_worker_that_a_signal_ends_asks_for_another_one(start: Start) -> None:
    Path("toy.toml").write_text(STUDY.format(trials=1000))
    with start("toy.toml") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "complete" in line:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(timeout=120) == 130
    assert "hpo: toy: stopped by a signal; its trial was handed back" in rest
    status = read_status(connect(f"sqlite:///{Home.default().database}"), "toy")
    assert status.count("running") == 0
