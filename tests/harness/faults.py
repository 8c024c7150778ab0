"""Faults on purpose, each scene in an interpreter of its own (see `scenes`).

    python -m tests.harness.faults SCENE URL [TIMES]

A scene acts on the database at URL (files under HPO_HOME), TIMES over where it says so, and prints
one JSON object. Tests run them a few times, `benchmarks/faults.py` as often as the table in
docs/reliability.md says.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpo.errors import Fenced, Interrupted
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.status import read_status
from hpo.search.study import Study
from hpo.storage import leases, records
from hpo.storage.database import connect
from hpo.storage.optuna import FencedStorage, add_waiting
from hpo.storage.records import Attempt
from hpo.workers.supervisor import Supervisor
from hpo.workers.worker import Progress
from tests.harness.fakes import study_file
from tests.harness.scene import Scene, run_scene
from tests.harness.scenes import forks, killed_after, until
from tests.harness.swarm import Child, Forks
from tests.harness.verdict import METRICS, curves, late_writes

TINY = '[train.model.cnn]\nfilters = [4]\n[train.runtime]\nprecision = "float32"\n'
TINY += 'memory_format = "contiguous"\n'
STALL_S = 3.0


def hanging_study(url: str, train: str, *, lease_s: float = 60.0) -> Study:
    """One trial, whose lease does not run out meanwhile."""
    limit = f"stall_timeout_s = {STALL_S}"
    file = study_file(trials=1, lease_s=lease_s, study=limit, train=f"{train}\n{TINY}")
    return studies.create(connect(url), file)[0]


def supervise(study: Study, tick: Callable[[], None] = lambda: None) -> None:
    """One worker at a time until the study is over."""
    directory = study.directory(Home.default())
    limit_s = study.file.study.stall_timeout_s
    launcher = forks(study)
    Supervisor(study.database, study.uuid, directory, launcher, ["cpu"], limit_s).run(
        threading.Event(), tick
    )


def attempts_of(study: Study, number: int = 0) -> list[Attempt]:
    return records.read_attempts(study.database, study.uuid).get(number, [])


def hanging_training(url: str) -> dict[str, Any]:
    """Every attempt hangs in its first step."""
    study = hanging_study(url, 'epochs = 2\nloss = "tests.harness.hangs:loss"')
    supervise(study)
    return {}


def hanging_once(url: str) -> dict[str, Any]:
    """The first attempt hangs in its first step."""
    study = hanging_study(url, 'epochs = 2\nloss = "tests.harness.hangs:loss_once"')
    supervise(study)
    return {}


def hanging_loading(url: str) -> dict[str, Any]:
    """No attempt gets its images."""
    data = '{dataset = "tests.harness.hangs:load", root = ".", image_size = 8}'
    train = f"epochs = 2\ndata = {data}"
    study = hanging_study(url, train)
    supervise(study)
    return {}


def stopped_for_ever(url: str) -> dict[str, Any]:
    """SIGSTOP to a worker in its training, and never SIGCONT."""
    study = hanging_study(url, "epochs = 300")
    stopped: list[int] = []

    def stop_it() -> None:
        if not stopped and records.read_epochs(study.database, study.uuid):
            stopped.append(next(one.pid for one in study_workers(study)))
            os.kill(stopped[0], signal.SIGSTOP)

    supervise(study, stop_it)
    return {"stopped": len(stopped)}


def study_workers(study: Study) -> list[records.WorkerRow]:
    return [one for one in records.read_workers(study.database, study.uuid) if one.ended is None]


def hanging_alone(url: str) -> dict[str, Any]:
    """The first attempt hangs in a worker that no supervisor watches; another worker is there."""
    study = hanging_study(url, 'epochs = 2\nloss = "tests.harness.hangs:loss_once"')
    launcher = forks(study)
    first = launcher.start("first", "cpu")
    until(lambda: bool(attempts_of(study)))
    second = launcher.start("second", "cpu")
    code = second.wait()
    still_there = first.poll() is None
    first.kill()
    first.wait()
    return {"code": code, "still_there": still_there}


def disk_full(url: str) -> dict[str, Any]:
    """HPO_HOME is a small disk. It is filled up while a trial trains, and emptied once the worker
    waits; twice."""
    study, _ = studies.create(
        connect(url), study_file(trials=3, lease_s=60.0, train=f"epochs = 12\n{TINY}")
    )
    home = Home.default().root
    filler, told = home / "filler", []

    def fill_and_empty() -> None:
        waiting = [one.reason for one in study_workers(study) if one.reason]
        if filler.exists() and waiting:
            told.extend(waiting)
            filler.unlink()
        elif not filler.exists() and not waiting and len(told) < 2:
            epochs = records.read_epochs(study.database, study.uuid)
            if len(epochs.get(len(told), [])) > 3:
                fill(filler)

    supervise(study, fill_and_empty)
    return {"told": told}


def fill(file: Path) -> None:
    """Take all the room that its disk has."""
    with suppress(OSError), file.open("wb", buffering=0) as out:
        while True:
            out.write(bytes(4096))


SMALL = """batch_size = 32
[train.data]
image_size = 32
[train.model.cnn]
filters = [16, 32]
"""
LARGE = """batch_size = 64
[train.data]
image_size = 224
[train.model]
architecture = "mobilenet_v2"
"""
FIXED = '[train.runtime]\nprecision = "float32"\nmemory_format = "contiguous"\n'


def handed_back(url: str, times: int = 3, train: str = SMALL) -> dict[str, Any]:
    """SIGTERM to a worker in mid-epoch: seconds until its trial can be taken again, and how long
    the step took that it was in."""
    train = f"epochs = 1000\n{train}{FIXED}"
    study, _ = studies.create(connect(url), study_file(trials=1, lease_s=600.0, train=train))
    rng = random.Random(0)
    seconds, steps = [], []
    for number in range(times):
        log = Home.default().root / f"steps-{number}"
        child = NotesItsSteps(study, Home.default(), "real", log=log).start(
            f"worker-{number}", "cpu"
        )
        until(lambda log=log: len(moments(log)) > 1)  # type: ignore[misc]
        before, after = moments(log)[:2]
        time.sleep(rng.uniform(0, max(1.0, after - before)))
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        until(lambda: any(free.started for free in study.snapshot().free))
        seconds.append(time.monotonic() - began)
        assert child.wait() == Interrupted.exit_code
        before, after = moments(log)[-2:]
        steps.append(after - before)
    return {"handed_back": seconds, "steps": steps}


def handed_back_large(url: str, times: int = 3) -> dict[str, Any]:
    """The same with MobileNetV2, batches of 64 at 224 pixels."""
    return handed_back(url, times, LARGE)


class NotesItsSteps(Forks):
    """Its workers write down when they have made a step."""

    def __init__(self, *args: Any, log: Path) -> None:
        super().__init__(*args)
        self.log = log

    def start(self, worker: str, device: str) -> Child:
        step = Progress.step

        def noted(progress: Progress, *, epoch: int, images: int) -> None:
            if images:  # else it prepares, or is about to begin
                with self.log.open("a") as file:
                    file.write(f"{time.monotonic()}\n")
            step(progress, epoch=epoch, images=images)

        Progress.step = noted  # type: ignore[method-assign]
        try:
            return super().start(worker, device)  # forked with the note taken
        finally:
            Progress.step = step  # type: ignore[method-assign]


def moments(log: Path) -> list[float]:
    """What was noted so far; whole lines."""
    text = log.read_text() if log.exists() else ""
    return [float(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def stopped_at_random(url: str, times: int = 3) -> dict[str, Any]:
    """SIGSTOP to a worker at random instants until its trial was taken over, for twice its lease at
    least, then SIGCONT."""
    lease_s = 1.0
    file = study_file(trials=100_000, lease_s=lease_s, train=f"epochs = 3\n{TINY}")
    study, _ = studies.create(connect(url), file)
    refusals = Home.default().root / "refusals"
    original = leases.Lease.lost

    def counted(lease: leases.Lease) -> Fenced:
        with refusals.open("a") as out:
            out.write(f"{lease.worker}\n")
        return original(lease)

    leases.Lease.lost = counted  # type: ignore[method-assign]
    launcher, rng = forks(study), random.Random(0)
    first, *others = [launcher.start(name, "cpu") for name in ("first", "second", "third")]
    for _ in range(times):
        until(lambda: any(one.live for one in attempts_by(study, "first")))
        time.sleep(rng.uniform(0, 0.5))
        os.kill(first.pid, signal.SIGSTOP)
        # Stopped inside a transaction it would hold its locks, and nobody could take over.
        deadline = time.monotonic() + 10 * lease_s
        time.sleep(2 * lease_s)
        while is_open(attempts_by(study, "first")) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(first.pid, signal.SIGCONT)
    studies.stop(study)
    codes = [child.wait() for child in (first, *others)]
    text = refusals.read_text().splitlines() if refusals.exists() else []
    return {"codes": codes, "refused": len(text), **after_takeovers(study)}


def is_open(attempts: list[Attempt]) -> bool:
    return any(one.outcome is None for one in attempts)


def attempts_by(study: Study, worker: str) -> list[Attempt]:
    rows = records.read_attempts(study.database, study.uuid).values()
    return [one for attempts in rows for one in attempts if one.worker == worker]


def after_takeovers(study: Study) -> dict[str, int]:
    """How many attempts were superseded, and those of them that wrote after that."""
    attempts = records.read_attempts(study.database, study.uuid).values()
    lost = sum(one.outcome == "lost" for rows in attempts for one in rows)
    late = list(late_writes(study.database, read_status(study.database, study.row.name)))
    return {"taken_over": lost, "accepted": len(late)}


def damaged_checkpoint(url: str, times: int = 3) -> dict[str, Any]:
    """A worker is killed in mid-trial, and the checkpoint that it left is cut off, emptied, or has
    a bit flipped at random; another worker goes on. `lost`: trials that are not complete; `wrong`:
    epochs with other values than those of a trial that nobody disturbed."""
    train = f"epochs = 4\n{TINY}"
    database, rng, home = connect(url), random.Random(0), Home.default()
    reference, _ = studies.create(database, study_file(trials=1, name="reference", train=train))
    supervise(reference)
    (wanted,) = curves(database, "reference").values()
    lost, wrong, noted = 0, 0, 0
    for number in range(times):
        name = f"damaged-{number}"
        study, _ = studies.create(
            database, study_file(trials=1, lease_s=1.0, name=name, train=train)
        )
        launcher = forks(study)
        after = rng.randint(1, 3)
        dying_at("record_epochs", launcher, after).wait()
        damage(study.directory(home).checkpoints(0), number, rng)
        assert launcher.start("next", "cpu").wait() == 0
        trial = read_status(database, name).trials[0]
        found = [tuple(row.metrics[one] for one in METRICS) for row in trial.epochs]
        lost += trial.state != "complete"
        wrong += sum(one != other for one, other in zip(found, wanted, strict=True))
        noted += "is damaged" in str(trial.attempts[0].reason)
        study.database.dispose()
    return {"lost": lost, "wrong": wrong, "noted": noted, "epochs": times * len(wanted)}


def damage(found: list[tuple[int, int, Path]], number: int, rng: random.Random) -> None:
    """Cut off, empty, or flip a bit of each checkpoint, by turns."""
    for _, _, path in found:
        content = bytearray(path.read_bytes())
        if number % 3 == 0:
            content = content[: rng.randrange(1, len(content) - 40)]
        elif number % 3 == 1:
            content = bytearray()
        else:
            content[rng.randrange(len(content) - 20)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


TAKEOVER = ("_end_lost", "_open_attempt", "claim")
"""What a takeover does, in its order: both writes, and their commit."""


def takeover_killed(url: str, times: int = 3) -> dict[str, Any]:
    """A lease ran out, and who takes its trial over is killed in the midst of that; then another
    worker comes."""
    killed, finished, attempts = 0, 0, []
    for number in range(times):
        name = f"takeover-{number}"
        study, _ = studies.create(connect(url), study_file(trials=1, lease_s=1.0, name=name))
        add_waiting(FencedStorage(study.database), study.row.study_id)
        owner = leases.claim(study.database, study.uuid, study.snapshot().free[0], "gone")
        assert owner is not None
        launcher = forks(study, "instant")
        killed += dying_at(TAKEOVER[number % len(TAKEOVER)], launcher).wait() == -signal.SIGKILL
        assert launcher.start("next", "cpu").wait() == 0
        finished += study.snapshot().finished == 1
        attempts.append(len(attempts_of(study)))
        study.database.dispose()
    return {"killed": killed, "lost": times - finished, "attempts": attempts}


def dying_at(write: str, launcher: Forks, calls: int = 1) -> Child:
    """A worker that dies by SIGKILL right after so many calls of `leases.WRITE`."""
    original = getattr(leases, write)
    killed_after(leases, write, calls)
    try:
        return launcher.start("dying", "cpu")  # forked with the trap set
    finally:
        setattr(leases, write, original)


CLOCKS = (("UTC", 0), ("America/New_York", 3600), ("Asia/Tokyo", -3600), ("Asia/Tokyo", 3600))


def wrong_clocks(url: str) -> dict[str, Any]:
    """Four workers whose time zones and clocks differ, on three trials of several leases each:
    one of them always looks for what the others may have left."""
    database = connect(url)
    train = f'epochs = 4\nloss = "tests.harness.hangs:slow_loss"\n{TINY}'
    study, _ = studies.create(database, study_file(trials=3, lease_s=5.0, train=train))
    if not database.is_sqlite:
        with database.engine.begin() as c:
            name = c.exec_driver_sql("SELECT current_database()").scalar()
            c.exec_driver_sql(f"ALTER DATABASE \"{name}\" SET timezone TO 'Asia/Tokyo'")
    started = []
    for number, (zone, seconds) in enumerate(CLOCKS):
        command = [sys.executable, "-m", "tests.harness.shifted", str(seconds), "worker", "toy"]
        command += ["--device", "cpu", "--threads", "1", "--worker-id", f"worker-{number}"]
        environment = os.environ | {"HPO_STORAGE": url, "TZ": zone, "PGTZ": zone}
        started.append(subprocess.Popen(command, env=environment))
    codes = [one.wait() for one in started]
    rows = records.read_attempts(database, study.uuid).values()
    lost = sum(one.outcome == "lost" for attempts in rows for one in attempts)
    return {"codes": codes, "false_deaths": lost}


SCENES: tuple[Scene, ...] = (
    hanging_training,
    hanging_once,
    hanging_loading,
    stopped_for_ever,
    hanging_alone,
    disk_full,
    handed_back,
    handed_back_large,
    stopped_at_random,
    damaged_checkpoint,
    takeover_killed,
    wrong_clocks,
)


if __name__ == "__main__":
    run_scene(SCENES)
