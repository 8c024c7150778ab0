"""Workers whose database goes away, each scene in an interpreter of its own (see `swarm` for why).

    python -m tests.harness.outages restarted {fast,immediate} AWAY_S {real,promoted,instant} [S]
    python -m tests.harness.outages killed_meanwhile
    python -m tests.harness.outages locked

A scene has its own database (files under HPO_HOME), runs a study to its end, and prints one JSON
object: what became of the study, its workers and its epochs, and how long after the restart results
arrived.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import psutil
import torch

from hpo.config.study import StudyFile
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.status import read_status
from hpo.search.study import Study
from hpo.storage import database as db
from hpo.storage import records, retry
from hpo.storage.database import connect
from hpo.storage.records import FINAL
from hpo.workers.supervisor import Supervisor
from hpo.workers.worker import Progress
from tests.harness.fakes import study_file
from tests.harness.scenes import until
from tests.harness.servers import Postgres
from tests.harness.swarm import Forks


def run(study: Study, workers: int, kind: str, meanwhile: Callable[[Forks], None]) -> Forks:
    """Run a study to its end under the supervisor; `meanwhile` runs beside it once workers live."""
    forks = Forks(study, Home.default(), kind)
    # The thread starts after the workers were forked.
    beside = threading.Thread(target=_or_end, args=(meanwhile, forks))
    directory = study.directory(Home.default())
    supervisor = Supervisor(study.database, study.uuid, directory, forks, ["cpu"] * workers, 600.0)

    def tick() -> None:
        if beside.ident is None and len(forks.children) == workers:
            beside.start()

    supervisor.run(threading.Event(), tick)
    beside.join()
    return forks


def _or_end(meanwhile: Callable[[Forks], None], forks: Forks) -> None:
    try:
        meanwhile(forks)
    except BaseException:
        traceback.print_exc()
        for child in forks.children:
            child.kill()
        os._exit(1)  # workers would wait for ever


def slow_study(*, trials: int, epochs: int, study: str = "") -> StudyFile:
    """Epochs of half a second that do next to nothing; `study` are lines of [study]."""
    train = (
        f"epochs = {epochs}\n"
        + """batch_size = 32
data = {limit_train = 200}
model.cnn.filters = [4]
runtime = {precision = "float32", memory_format = "contiguous"}
"""
    )
    step = Progress.step

    def slowly(self: Progress, *, epoch: int, images: int) -> None:
        step(self, epoch=epoch, images=images)
        time.sleep(0.04)

    Progress.step = slowly  # type: ignore[method-assign]
    return study_file(trials=trials, lease_s=6.0, train=train, study=study)


PROMOTED = """metric = "train_loss"
scheduler = {name = "promote", first_epochs = 2, reduction_factor = 2, finish = 2}
"""
"""A metric of which nobody knows what guessing reaches: trials pause however bad they are."""


def facts(study: Study, forks: Forks) -> dict[str, Any]:
    """What became of it."""
    status = read_status(study.database, study.row.name)
    attempts = [a for trial in status.trials for a in trial.attempts]
    epochs = [row for trial in status.trials for row in trial.epochs]
    begun = sum(a.epoch - (a.first_epoch or 0) + 1 for a in attempts if a.epoch)
    return {
        "finished": status.count(*FINAL),
        "complete": status.count("complete"),
        "shown": len(status.trials),
        "attempts": len(attempts),
        "lost": sum(a.outcome == "lost" for a in attempts),
        "epochs": len(epochs),
        "computed_twice": begun - len(epochs),
        "waited_on_disk": sum(row.checkpoint is None for row in epochs),
        "codes": [child.code for child in forks.children],
    }


def recorded(study: Study) -> dict[int, int]:
    """Epochs in the database, by trial."""
    rows = records.read_epochs(study.database, study.uuid)
    return {number: len(found) for number, found in rows.items()}


def restarted(mode: str, away_s: str, kind: str, delay_s: str = "0.1") -> dict[str, Any]:
    """The server is stopped under four workers, and started again after `away_s` seconds. Trained
    are three trials that take longer than that: the fourth worker would have time for more;
    promoted: twelve that pause at rungs, some of them while the server is away.

    Who waits tries again after `delay_s` at the latest: where that is short, whoever has nothing to
    do comes back before the owners do.
    """
    retry.LARGEST_DELAY_S = float(delay_s)
    server = Postgres()
    database = connect(server.url("hpo"))
    seconds, is_real = float(away_s), kind != "instant"
    files = {
        "real": lambda: slow_study(trials=3, epochs=round(10 + 2 * seconds)),
        "promoted": lambda: slow_study(trials=12, epochs=9, study=PROMOTED),
        "instant": lambda: study_file(trials=100, lease_s=6.0),
    }
    file = files[kind]()
    study, _ = studies.create(database, file)
    back: list[float] = []

    def meanwhile(_forks: Forks) -> None:
        until(lambda: len(recorded(study)) >= (3 if is_real else 20))
        server.stop(mode)
        threading.Event().wait(seconds)
        server.start()
        back.append(records.clock(database))

    found = facts(study, run(study, 4, kind, meanwhile))
    return found | {"first_results_after_s": first_results(study, back[0])}


def first_results(study: Study, back: float) -> list[float]:
    """For each worker the seconds from `back` to the first epoch that was recorded after it."""
    attempts = records.read_attempts(study.database, study.uuid)
    arrived: dict[str, float] = {}
    for number, rows in records.read_epochs(study.database, study.uuid).items():
        for row in rows:
            worker = attempts[number][row.attempt - 1].worker
            if row.finished > back:
                arrived[worker] = min(arrived.get(worker, math.inf), row.finished - back)
    return sorted(round(seconds, 2) for seconds in arrived.values())


def killed_meanwhile() -> dict[str, Any]:
    """A worker is killed while the database is away and its results wait on disk."""
    server = Postgres()
    url = server.url("hpo")
    study, _ = studies.create(connect(url), slow_study(trials=1, epochs=20))
    before: dict[int, int] = {}

    def furthest() -> int:
        found = study.directory(Home.default()).checkpoints(0)
        return max((epoch for epoch, _, _ in found), default=0)

    def meanwhile(forks: Forks) -> None:
        until(lambda: recorded(study).get(0, 0) >= 2)
        server.stop("fast")
        before[0] = furthest()
        until(lambda: furthest() >= before[0] + 3)
        forks.children[0].kill()
        until(lambda: len(forks.children) > 1 and forks.children[1].code is not None)
        server.start()

    forks = run(study, 1, "real", meanwhile)
    rows = records.read_epochs(study.database, study.uuid)[0]
    return facts(study, forks) | {
        "known_before": before[0],
        "by_the_dead": sum(row.attempt == 1 for row in rows),
    }


def locked() -> dict[str, Any]:
    """A process is stopped inside a transaction that holds SQLite's write lock, for much longer
    than others wait for it."""
    db.BUSY_TIMEOUT_S = 1
    file = Home.default().database
    url = f"sqlite:///{file}"
    study, _ = studies.create(connect(url), slow_study(trials=3, epochs=15))

    def meanwhile(_forks: Forks) -> None:
        until(lambda: len(recorded(study)) >= 2)
        pid = os.fork()
        if pid == 0:
            holder = sqlite3.connect(file, timeout=60.0, isolation_level=None)
            holder.execute("BEGIN IMMEDIATE")
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        threading.Event().wait(6.0)
        os.kill(pid, signal.SIGCONT)
        os.waitpid(pid, 0)

    return facts(study, run(study, 2, "real", meanwhile))


SCENES = (restarted, killed_meanwhile, locked)


def main() -> None:
    torch.set_num_threads(1)
    scene = {scene.__name__: scene for scene in SCENES}[sys.argv[1]]
    Home.default().root.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    found = scene(*sys.argv[2:])
    print(json.dumps(found | {"seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
