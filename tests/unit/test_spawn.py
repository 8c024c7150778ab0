"""Workers that start before their study is open, and wait to be called."""

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import psutil
import pytest

from hpo.workers.process import Child
from hpo.workers.spawn import EarlyWorkers

WAITS = """
import json, pathlib, sys
called = json.loads(sys.stdin.readline())
pathlib.Path(called["log"]).write_text(f"{called['worker']} on {sys.argv[1:]}")
"""


class FakeCommand:
    """Starts `script` instead of `hpo worker`."""

    def __init__(self, script: str = WAITS) -> None:
        self.script, self.started = script, list[Child]()

    def start(self, device: str, *options: str, stdin: int, output: int | IO[bytes]) -> Child:
        command = [sys.executable, "-c", self.script, device, *options]
        child = Child(command, stdin=stdin, stdout=output, stderr=output, start_new_session=True)
        self.started.append(child)
        return child


def test_one_is_called_and_the_others_end(tmp_path: Path) -> None:
    command, log = FakeCommand(), tmp_path / "w-1.log"
    with EarlyWorkers(command, ["cpu", "cuda:0", "cuda:0"]) as early:  # type: ignore[arg-type]
        called = early.call("w-1", "cuda:0", log)
        assert called is command.started[1]
        assert called.wait() == 0
        assert early.call("w-2", "cuda:1", log) is None
    assert log.read_text() == "w-1 on ['cuda:0', '--early']"
    assert [one.returncode for one in command.started] == [-9, 0, -9]


def test_one_that_died_is_not_called(tmp_path: Path) -> None:
    command = FakeCommand("raise SystemExit(3)")
    with EarlyWorkers(command, ["cpu"]) as early:  # type: ignore[arg-type]
        command.started[0].wait()
        assert early.call("w-1", "cpu", tmp_path / "w-1.log") is None
        assert early.call("w-1", "cpu", tmp_path / "w-1.log") is None


def test_a_worker_that_is_not_called_leaves_nothing(tmp_path: Path) -> None:
    """As when `hpo run` was killed before its study was open."""
    done = subprocess.run(
        [sys.executable, "-m", "hpo", "worker", "tiny", "--supervised", "--early"],
        cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        env={**os.environ, "HPO_HOME": str(tmp_path / "runs")}, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


BAD = """
[study]
name = "tiny"
trials = 1
[train]
data.dataset = "folder"
data.root = "nowhere"
[space]
optimizer.name = ["sgd", "adamw"]
"""


def test_no_worker_is_left_by_a_study_that_cannot_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hpo.cli.main import main

    started: list[EarlyWorkers] = []
    begin = EarlyWorkers.__init__

    def seen(early: EarlyWorkers, *args: object) -> None:
        begin(early, *args)  # type: ignore[arg-type]
        started.append(early)

    monkeypatch.setattr(EarlyWorkers, "__init__", seen)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "runs"))
    (tmp_path / "tiny.toml").write_text(BAD)
    with pytest.raises(SystemExit) as end:
        main(["run", "tiny.toml", "--workers", "2", "--device", "cpu"])
    assert end.value.code == 2
    assert "nowhere" in capsys.readouterr().err
    (early,) = started
    assert [device for device, _ in early.waiting] == ["cpu", "cpu"]
    assert not any(psutil.pid_exists(process.pid) for _, process in early.waiting)
    assert not (tmp_path / "runs").exists()
