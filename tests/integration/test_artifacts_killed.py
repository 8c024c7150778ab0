"""A trial that moves between hosts: real workers with a run directory each, and artifacts between
them in a folder and in an object store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpo.paths import Home
from hpo.search import study as studies
from hpo.search import sync
from hpo.search.status import read_status
from hpo.storage.artifacts import open_store
from hpo.storage.database import Database
from hpo.storage.records import Trial
from tests.harness.scenes import small_study
from tests.harness.searches import search

pytestmark = pytest.mark.process

DEADLINE_S = 200.0
EPOCHS = 6
ROOT = Path(__file__).parents[2]


class Host:
    """A machine of its own: its run directory, and workers on it."""

    def __init__(self, url: str, folder: Path) -> None:
        self.home, self.url = Home(folder), url
        self.log = folder.with_suffix(".log")

    def work(self, *dying: str) -> int:
        """Run a worker until it ends, or until it dies as `dying` says (see `tests.harness.dying`);
        its exit code."""
        own = {"HPO_HOME": str(self.home.root), "HPO_STORAGE": self.url, "OMP_NUM_THREADS": "1"}
        module = ["tests.harness.dying", *dying] if dying else ["hpo"]
        command = [sys.executable, "-m", *module, "worker", "toy", "--device", "cpu"]
        with self.log.open("ab") as log:
            return subprocess.run(
                [*command, "--threads", "1"], cwd=ROOT, env=os.environ | own,
                stdout=log, stderr=log, timeout=DEADLINE_S, check=False,
            ).returncode  # fmt: skip


@pytest.fixture
def hosts(url: str, tmp_path: Path) -> tuple[Host, Host]:
    return Host(url, tmp_path / "host-1"), Host(url, tmp_path / "host-2")


@pytest.fixture
def whole(database: Database, home: Home) -> Trial:
    """The same trial, undisturbed."""
    search(database, home, small_study("whole", trials=1, epochs=EPOCHS))
    return read_status(database, "whole").trials[0]


def check_equal(trial: Trial, whole: Trial) -> None:
    """Bit for bit."""
    assert trial.params == whole.params
    assert [row.epoch for row in trial.epochs] == list(range(1, EPOCHS + 1))
    for row, expected in zip(trial.epochs, whole.epochs, strict=True):
        for metric in ("train_loss", "val_loss", "val_top1"):
            assert row.metrics[metric] == expected.metrics[metric], row.epoch


def begun(database: Database, place: str | None, home: Home) -> str:
    """A study of one trial, with artifacts in `place`; its uuid."""
    file = small_study("toy", trials=1, epochs=EPOCHS, lease_s=2.0)
    study, _ = studies.create(database, file)
    if place is not None:
        sync.keep(database, study.row, sync.check(place, study.row, database), home)
    return study.uuid


@pytest.mark.parametrize(
    ("kind", "point", "attempts"),
    [
        ("folder", "record", [1, 1, 2, 2, 3, 3]),
        ("s3", "share", [1, 2, 3, 3, 3, 3]),
    ],
)
def test_another_host_goes_on_where_the_first_one_died(
    database: Database, home: Home, hosts: tuple[Host, Host], whole: Trial, tmp_path: Path,
    kind: str, point: str, attempts: list[int], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """There, and back again to the first one, which has an old checkpoint of its own."""
    place = str(tmp_path / "store") if kind == "folder" else request.getfixturevalue("s3")
    uuid = begun(database, place, home)
    first, second = hosts
    assert first.work(point, "2") == -signal.SIGKILL
    assert second.work(point, "2") == -signal.SIGKILL
    assert first.work() == 0, first.log.read_text()
    (trial,) = read_status(database, "toy").trials
    check_equal(trial, whole)
    assert [row.attempt for row in trial.epochs] == attempts
    kept = [f"trials/0/attempt-3/{name}" for name in ("predictions.npz", "weights.safetensors")]
    assert open_store(place).list(uuid) == [f"{uuid}/{name}" for name in ("study.toml", *kept)]
    assert list(first.home.root.rglob("*.ckpt")) == []


def test_without_artifacts_it_begins_again_and_says_so(
    database: Database, home: Home, hosts: tuple[Host, Host], whole: Trial
) -> None:
    begun(database, None, home)
    first, second = hosts
    assert first.work("record", "2") == -signal.SIGKILL
    assert second.work() == 0, second.log.read_text()
    (trial,) = read_status(database, "toy").trials
    check_equal(trial, whole)
    assert {row.attempt for row in trial.epochs} == {2}
    said = second.log.read_text()
    assert "2 epochs are finished, their checkpoint is on another host: it begins again" in said


def test_a_host_that_does_not_reach_the_artifacts_does_not_begin(
    database: Database, home: Home, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    begun(database, str(tmp_path / "store"), home)
    (tmp_path / "store").rename(tmp_path / "not mounted")
    assert hosts[0].work() == 2
    assert "mount the folder at that path" in hosts[0].log.read_text()
    assert not (tmp_path / "store").exists()
    assert read_status(database, "toy").trials == ()
