"""Somebody removes the run directory, or the database, under live workers: real processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpo.errors import HpoError
from hpo.paths import Home
from hpo.search.status import read_status
from hpo.storage.database import connect
from tests.harness.scenes import until

pytestmark = pytest.mark.process

LEASE_S = 120.0
"""Long against all that a command does to its end, on a machine that does much else."""
STUDY = """\
[study]
name = "toy"
trials = {trials}
lease_s = 120
pruner = "none"
[train]
epochs = {epochs}
data = {{limit_train = {images}}}
model.cnn.filters = [4]
[space]
optimizer.lr = {{low = 1e-4, high = 1e-1, log = true}}
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts `hpo ...` in a folder of its own, with its run directory there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "runs"))
    Path("toy.toml").write_text(STUDY.format(trials=50, epochs=2000, images=300))
    started: list[subprocess.Popen[str]] = []

    def call(*args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "hpo", *args]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield call
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def workers_of(home: Home) -> dict[int, int]:
    """Process ids of the workers that have finished an epoch, with its number."""
    try:
        status = read_status(connect(home.storage), "toy")
    except HpoError:  # there is no study yet
        return {}
    return {one.pid: one.epoch or 0 for one in status.live_workers if (one.epoch or 0) > 2}


def training(home: Home, count: int) -> list[int]:
    until(lambda: len(workers_of(home)) >= count)
    return list(workers_of(home))


def remove(home: Home) -> None:
    """As `rm -rf` does, again where it says "not empty" because a worker was just writing."""
    for _ in range(100):
        shutil.rmtree(home.root, ignore_errors=True)
        if not home.root.exists():
            return


def epochs_of(home: Home) -> int:
    return sum(len(trial.epochs) for trial in read_status(connect(home.storage), "toy").trials)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def ended(process: subprocess.Popen[str], workers: list[int]) -> str:
    """What a command said that ended in order, its workers with it, within a lease."""
    began = time.monotonic()
    said = process.communicate(timeout=LEASE_S)[1]
    until(lambda: not any(map(is_running, workers)))
    assert time.monotonic() - began < LEASE_S
    assert process.returncode == 2
    assert said.count("was removed or moved while it was in use") == 1
    assert "Traceback" not in said
    return said


def test_the_run_directory_is_removed_under_a_run(start: Start) -> None:
    home = Home.default()
    run = start("run", "toy.toml", "--workers", "1")
    workers = training(home, 1)
    remove(home)
    assert str(home.database) in ended(run, workers).splitlines()[-1]
    assert not home.root.exists()


def test_the_run_directory_is_removed_under_plain_workers(start: Start) -> None:
    home = Home.default()
    one, other = start("worker", "toy.toml"), start("worker", "toy.toml")
    workers = training(home, 2)
    remove(home)
    for process in (one, other):
        ended(process, workers)
    assert not home.root.exists()


def test_the_run_directory_is_removed_under_an_agent(start: Start) -> None:
    home = Home.default()
    assert start("launch", "toy.toml", "--on", "local", "--workers", "1").wait(timeout=120) == 0
    workers = training(home, 1)
    remove(home)
    until(lambda: not any(map(is_running, workers)))
    time.sleep(2.0)  # an agent would start the next one
    assert not home.root.exists()


def test_a_study_that_begins_meanwhile_in_the_same_place_is_left_alone(start: Start) -> None:
    """The old worker is stopped, so that the new study is there before it notices."""
    home = Home.default()
    run = start("run", "toy.toml", "--workers", "1")
    workers = training(home, 1)
    old = home.studies()[0]
    for pid in (run.pid, *workers):
        os.kill(pid, signal.SIGSTOP)
    remove(home)
    Path("toy.toml").write_text(STUDY.format(trials=2, epochs=3, images=100))
    new = start("run", "toy.toml", "--workers", "1")
    assert new.wait(timeout=200) == 0
    for pid in (*workers, run.pid):
        os.kill(pid, signal.SIGCONT)
    said = run.communicate(timeout=LEASE_S)[1]
    until(lambda: not any(map(is_running, workers)))
    assert "was replaced by another file while it was in use" in said
    assert (run.returncode, "Traceback" in said) == (2, False)
    assert old.uuid not in [one.uuid for one in home.studies()]
    status = read_status(connect(home.storage), "toy")
    assert (status.state, status.finished, len(status.workers)) == ("finished", 2, 1)
    assert [home.study(status.row.uuid).root] == [one.root for one in home.studies()]
    check = start("storage", "check")
    assert check.wait(timeout=100) == 0, check.communicate()


def test_a_database_that_is_removed_alone_leaves_the_files(start: Start) -> None:
    home = Home.default()
    run = start("run", "toy.toml", "--workers", "1")
    workers = training(home, 1)
    home.database.unlink()
    ended(run, workers)
    assert not home.database.exists()
    assert list(home.studies()[0].trials.rglob("*.ckpt"))


def test_a_run_directory_that_is_moved_can_be_gone_on_with(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home.default()
    run = start("run", "toy.toml", "--workers", "1")
    workers = training(home, 1)
    moved = Home(home.root.rename(home.root.with_name("elsewhere")))
    ended(run, workers)
    assert not home.root.exists()
    monkeypatch.setenv("HPO_HOME", str(moved.root))
    before = epochs_of(moved)
    worker = start("worker", "toy")
    until(lambda: epochs_of(moved) > before > 0)
    worker.terminate()
    assert worker.wait(timeout=LEASE_S) == 130


def test_files_that_are_removed_alone_stop_no_study(start: Start, tmp_path: Path) -> None:
    """The database is elsewhere: training goes on from memory, and the next trial begins."""
    home, url = Home.default(), f"sqlite:///{tmp_path / 'elsewhere.db'}"
    Path("toy.toml").write_text(STUDY.format(trials=3, epochs=60, images=300))
    run = start("run", "toy.toml", "--workers", "2", "--storage", url)
    until(lambda: bool(list(home.root.glob("studies/*/trials/*/*/*.ckpt"))))
    remove(home)
    said = run.communicate(timeout=300)[1]
    assert (run.returncode, "Traceback" in said) == (0, False), said
    status = read_status(connect(url), "toy")
    assert (status.finished, status.count("complete")) == (3, 3)
    assert all(len(trial.epochs) == 60 for trial in status.trials)
    assert list(home.studies()[0].trials.rglob("weights.safetensors"))
