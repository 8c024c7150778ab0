"""Faults on purpose, each scene in an interpreter of its own (see `scenes`).

    python -m tests.process.faults SCENE URL [TIMES]

A scene acts on the database at URL (files under HPO_HOME), TIMES over where it says so, and prints
one JSON object. Tests run them a few times, `benchmarks/faults.py` as often as the README says.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.study import Study
from hpo.storage import records
from hpo.storage.db import connect
from hpo.storage.records import AttemptRow
from hpo.workers.supervisor import Supervisor
from tests.fakes import study_file
from tests.process.scenes import forks, until

TINY = '[train.model.cnn]\nfilters = [4]\n[train.runtime]\nprecision = "float32"\n'
TINY += 'memory_format = "contiguous"\n'
STALL_S = 3.0


def hanging_study(url: str, train: str, *, lease_s: float = 60.0) -> Study:
    """One trial, whose lease does not run out meanwhile."""
    limit = f"stall_timeout_s = {STALL_S}"
    file = study_file(trials=1, lease_s=lease_s, study=limit, train=f"{train}\n{TINY}")
    return studies.create(connect(url), file)[0]


def supervise(study: Study, url: str, tick: Callable[[], None] = lambda: None) -> None:
    """One worker at a time until the study is over."""
    directory = study.directory(Home.default())
    limit_s = study.file.study.stall_timeout_s
    launcher = forks(url, study)
    Supervisor(study.database, study.uuid, directory, launcher, ["cpu"], limit_s).run(
        threading.Event(), tick
    )


def attempts_of(study: Study, number: int = 0) -> list[AttemptRow]:
    return records.read_attempts(study.database, study.uuid).get(number, [])


def hanging_training(url: str) -> dict[str, Any]:
    """Every attempt hangs in its first step."""
    study = hanging_study(url, 'epochs = 2\nloss = "tests.process.hangs:loss"')
    supervise(study, url)
    return {}


def hanging_once(url: str) -> dict[str, Any]:
    """The first attempt hangs in its first step."""
    study = hanging_study(url, 'epochs = 2\nloss = "tests.process.hangs:loss_once"')
    supervise(study, url)
    return {}


def hanging_loading(url: str) -> dict[str, Any]:
    """No attempt gets its images."""
    data = '{dataset = "tests.process.hangs:load", root = ".", image_size = 8}'
    train = f"epochs = 2\ndata = {data}"
    study = hanging_study(url, train)
    supervise(study, url)
    return {}


def stopped_for_ever(url: str) -> dict[str, Any]:
    """SIGSTOP to a worker in its training, and never SIGCONT."""
    study = hanging_study(url, "epochs = 300")
    stopped: list[int] = []

    def stop_it() -> None:
        if not stopped and records.read_epochs(study.database, study.uuid):
            stopped.append(next(one.pid for one in study_workers(study)))
            os.kill(stopped[0], signal.SIGSTOP)

    supervise(study, url, stop_it)
    return {"stopped": len(stopped)}


def study_workers(study: Study) -> list[records.WorkerRow]:
    return [one for one in records.read_workers(study.database, study.uuid) if one.ended is None]


def hanging_alone(url: str) -> dict[str, Any]:
    """The first attempt hangs in a worker that no supervisor watches; another worker is there."""
    study = hanging_study(url, 'epochs = 2\nloss = "tests.process.hangs:loss_once"')
    launcher = forks(url, study)
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

    supervise(study, url, fill_and_empty)
    return {"told": told}


def fill(file: Path) -> None:
    """Take all the room that its disk has."""
    with suppress(OSError), file.open("wb", buffering=0) as out:
        while True:
            out.write(bytes(4096))


SCENES: tuple[Callable[..., dict[str, Any]], ...] = (
    hanging_training,
    hanging_once,
    hanging_loading,
    stopped_for_ever,
    hanging_alone,
    disk_full,
)


def main() -> None:
    torch.set_num_threads(1)
    scene = {scene.__name__: scene for scene in SCENES}[sys.argv[1]]
    Path(os.environ["HPO_HOME"]).mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    told = scene(sys.argv[2], *map(int, sys.argv[3:]))
    print(json.dumps({**told, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
