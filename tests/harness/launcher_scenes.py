"""Launchers at work, each scene in an interpreter of its own, with real workers and real training.

    python -m tests.harness.launcher_scenes SCENE URL

`contract` is what every launcher keeps; it runs over the fake, this host, Ray and Slurm alike. A
scene prints one JSON object: the seconds that its steps took.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import psutil

from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.status import StudyStatus, read_status
from hpo.storage import records
from hpo.storage.database import Database, connect
from hpo.storage.records import WorkerRow
from hpo.workers.launchers import open_launcher
from hpo.workers.launchers.base import (
    LaunchedWorker,
    Launcher,
    LaunchRequest,
    Size,
    Target,
)
from tests.harness.clusters import RayCluster, ray_cluster, slurm_cluster, until
from tests.harness.fake_launcher import FakeLauncher
from tests.harness.fakes import study_file
from tests.harness.gate import LOSS, gate

QUICK_HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""Ray takes a silent node for dead after some seconds, instead of about a minute."""
TRAIN = f"""
epochs = 8
loss = "{LOSS}"
model.cnn.filters = [4]
runtime = {{precision = "float32", memory_format = "contiguous"}}
"""
RUNNING = "running"


@dataclass
class Scene:
    """A study of six trials, and the launcher that its workers are placed with."""

    database: Database
    launcher: Launcher
    seconds: dict[str, float] = field(default_factory=dict)
    study: studies.Study = field(init=False)

    def begin(self, name: str, trials: int = 6) -> None:
        gate().unlink(missing_ok=True)
        file = study_file(name=name, trials=trials, train=TRAIN)
        self.study, _ = studies.create(self.database, file)

    @property
    def target(self) -> Target:
        return Target(self.study.row.name, self.study.uuid)

    def place(self, workers: int) -> None:
        size = Size(workers, gpus=0)
        self.launcher.check(size)
        request = LaunchRequest(self.target, size, self.database.secret_url, Home.default())
        self.launcher.start(request)

    @property
    def placed(self) -> list[LaunchedWorker]:
        return self.launcher.launched(self.target)

    def states(self) -> list[str]:
        return [one.state for one in self.placed]

    @property
    def workers(self) -> list[WorkerRow]:
        return records.read_workers(self.database, self.study.uuid)

    @property
    def status(self) -> StudyStatus:
        return read_status(self.database, self.study.row.name)

    def outcomes(self, worker: str) -> list[str | None]:
        """How the attempts of a worker ended."""
        attempts = [a for trial in self.status.trials for a in trial.attempts]
        return [a.outcome for a in attempts if a.worker == worker]

    def training(self) -> list[WorkerRow]:
        """Workers that have begun an epoch, and live."""
        attempts = [a for trial in self.status.trials for a in trial.attempts]
        begun = {a.worker for a in attempts if a.live and a.epoch}
        return [one for one in self.workers if one.id in begun and psutil.pid_exists(one.pid)]

    def new_training(self, old: set[str]) -> set[str]:
        return {one.id for one in self.training()} - old

    def kill(self, worker: WorkerRow) -> None:
        if isinstance(self.launcher, FakeLauncher):
            self.launcher.kill(worker.id)
        else:
            os.kill(worker.pid, signal.SIGKILL)

    def timed(self, step: str, action: Callable[[], None]) -> None:
        began = time.monotonic()
        action()
        self.seconds[step] = round(time.monotonic() - began, 1)

    def finish(self) -> None:
        """Let training go at full speed, to the study's end; its budget must be exact."""
        gate().touch()
        until(lambda: self.status.state == "finished")
        until(lambda: not self.placed)
        status = self.status
        assert len(status.trials) == status.count("complete") == status.row.trials
        for trial in status.trials:
            assert [a.outcome for a in trial.attempts].count("complete") == 1
            assert [row.epoch for row in trial.epochs] == list(range(1, 9))


def contract(scene: Scene) -> None:
    """What every launcher keeps."""
    scene.begin("contract")
    scene.timed("placed", lambda: starts_and_lists(scene))
    scene.timed("replaced", lambda: replaces_a_killed_one(scene))
    gives_logs_once(scene)
    scene.timed("stopped", lambda: stops_with_hand_back(scene))
    studies.resume(scene.study)
    scene.place(2)
    scene.timed("finished", scene.finish)


def starts_and_lists(scene: Scene) -> None:
    assert scene.placed == []
    scene.place(2)
    until(lambda: len(scene.training()) == 2)
    assert scene.states() == [RUNNING] * 2
    scene.place(1)
    until(lambda: len(scene.training()) == 3)
    assert scene.states() == [RUNNING] * 3
    assert all(one.host for one in scene.placed)
    assert len({one.name for one in scene.placed}) == len(scene.workers) == 3


def replaces_a_killed_one(scene: Scene) -> None:
    old = {one.id for one in scene.workers}
    scene.kill(scene.training()[0])
    until(lambda: bool(scene.new_training(old)))
    until(lambda: scene.states() == [RUNNING] * 3)
    (new,) = {one.id for one in scene.workers} - old
    taken = [a for trial in scene.status.trials for a in trial.attempts if a.worker == new]
    assert [a.k for a in taken] == [2]  # it went on with the trial of the one that was killed


def gives_logs_once(scene: Scene) -> None:
    logs = scene.launcher.logs(scene.target, {})
    for worker in scene.training():
        assert b": attempt " in logs[worker.id]
    rest = scene.launcher.logs(scene.target, {name: len(text) for name, text in logs.items()})
    assert not any(rest[worker.id] for worker in scene.training())


def stops_with_hand_back(scene: Scene) -> None:
    workers = scene.training()
    assert len(workers) == 3
    studies.stop(scene.study)
    scene.launcher.stop(scene.target)
    until(lambda: not scene.placed)
    assert not scene.training()
    assert [scene.outcomes(one.id)[-1] for one in workers] == ["handed_back"] * 3


def over_fake(database: Database) -> dict[str, float]:
    scene = Scene(database, FakeLauncher(lambda: 0.0 if gate().exists() else 1.0))
    contract(scene)
    return scene.seconds


def over_local(database: Database) -> dict[str, float]:
    with open_launcher("local", Home.default()) as launcher:
        scene = Scene(database, launcher)
        contract(scene)
    return scene.seconds


def over_slurm(database: Database) -> dict[str, float]:
    with slurm_cluster(), open_launcher("slurm", Home.default()) as launcher:
        scene = Scene(database, launcher)
        contract(scene)
        scene.timed("requeued", lambda: requeues_by_signal(scene))
    return scene.seconds


def requeues_by_signal(scene: Scene) -> None:
    """Four tasks: one gets the signal that its time runs out, of another the worker is killed."""
    scene.begin("signal", trials=8)
    scene.place(4)
    until(lambda: len(scene.training()) == 4)
    task = next(one for one in scene.placed if one.name.endswith("_3"))  # the array's own number

    def state() -> str:
        return next((one.state for one in scene.placed if one.name == task.name), "gone")

    subprocess.run(["scancel", "--batch", "--signal=TERM", task.name], check=True)
    until(lambda: state() == "waiting")
    handed_back = [one for one in scene.workers if scene.outcomes(one.id) == ["handed_back"]]
    assert len(handed_back) == 1
    old = {one.id for one in scene.workers}
    scene.kill(scene.training()[0])
    # Slurm lets a requeued task wait for two minutes, unless it is told otherwise; in the second
    # of the requeue it would refuse the start by the credential that it has just revoked.
    subprocess.run(["scontrol", "update", f"JobId={task.name}", "StartTime=now+5"], check=True)
    until(lambda: len(scene.new_training(old)) == 2)
    assert state() == RUNNING
    scene.finish()
    assert len(scene.workers) == 6


def over_ray(database: Database) -> dict[str, float]:
    with ray_cluster(2, QUICK_HEALTH) as cluster, joined(cluster, database) as scene:
        contract(scene)
        nodes_fail(cluster, scene)
    return scene.seconds


def ray_failures(database: Database) -> dict[str, float]:
    """Nodes fail under Ray's own settings: takes minutes, for figures outside of the suite."""
    with ray_cluster(2, {}) as cluster, joined(cluster, database) as scene:
        nodes_fail(cluster, scene)
    return scene.seconds


@contextmanager
def joined(cluster: RayCluster, database: Database) -> Iterator[Scene]:
    os.environ["RAY_AUTH_TOKEN"] = cluster.token
    with open_launcher(cluster.address, Home.default()) as launcher:
        yield Scene(database, launcher)


def nodes_fail(cluster: RayCluster, scene: Scene) -> None:
    """Four workers on two nodes: one node is killed; then, on its successor, the raylet of the
    other one is stopped, and later goes on."""
    first, second = cluster.nodes[1:3]
    scene.begin("nodes", trials=8)
    scene.place(4)
    until(lambda: len(scene.training()) == 4)
    places = {one.host for one in scene.placed}
    assert len(places) == 2, places
    shows_no_password(cluster, scene.database)

    def lost(node_fails: Callable[[], None], moved: int) -> Callable[[], None]:
        def act() -> None:
            old = {one.id for one in scene.workers}
            node_fails()
            until(lambda: len(scene.new_training(old)) == moved)

        return act

    scene.timed("node killed", lost(first.raylet.kill, 2))
    cluster.start_node()
    scene.timed("raylet stopped", lost(second.raylet.suspend, 4))
    scene.seconds["training twice"] = len(scene.training()) - 4
    second.raylet.resume()
    until(lambda: scene.states() == [RUNNING] * 4)
    scene.timed("finished after failures", scene.finish)


def shows_no_password(cluster: RayCluster, database: Database) -> None:
    """Neither in a file of Ray's nor in a command line."""
    secret = urlsplit(database.secret_url).password
    if secret is None:
        return
    files = [path for path in cluster.folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    lines = [" ".join(one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if secret in line]


SCENES = (over_fake, over_local, over_slurm, over_ray, ray_failures)


def main() -> None:
    scene = {scene.__name__: scene for scene in SCENES}[sys.argv[1]]
    database = connect(os.environ.pop("SCENE_URL"))
    print(json.dumps(scene(database)))


if __name__ == "__main__":
    main()
