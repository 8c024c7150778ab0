"""Many real worker processes over one database, quickly started: forked from a process that has
imported everything but has not touched CUDA or started a thread.

    python -m tests.harness.swarm URL STUDY WORKERS {instant,real} [KILLS] [SEED] [PAUSE_S]

Runs the product's own supervisor and workers until the study is over. With KILLS, a random worker
is killed with SIGKILL at a random instant, that often, PAUSE_S apart at most. Prints one JSON
object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import sklearn.datasets  # noqa: F401  (imported here so that a fork need not: two seconds)
import torch

import hpo.search.trial  # noqa: F401  (likewise)
from hpo.errors import Interrupted, StorageUnavailable
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.study import Study
from hpo.search.trial import TrialRunner
from hpo.storage.database import connect
from hpo.storage.optuna import FencedStorage
from hpo.workers.process import stop_on_signal
from hpo.workers.supervisor import Supervisor
from hpo.workers.worker import Worker
from tests.harness.fakes import InstantTrials


@dataclass
class Child:
    """A forked worker, as the supervisor wants to see it."""

    pid: int
    code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def forked(task: Callable[[], None]) -> Child:
    """A process that does `task`, and ends as the command line does."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            task()
            code = 0
        except (Interrupted, StorageUnavailable) as error:
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return Child(pid)


@dataclass
class Forks:
    """A launcher that forks; `kind` says whether trials are instant or really trained."""

    study: Study
    home: Home
    kind: str
    supervised: bool = True
    """Whether they end with their parent: a scene that breaks leaves none behind."""
    children: list[Child] = field(default_factory=list)

    def start(self, worker: str, device: str) -> Child:
        # A SQLite connection must not cross a fork: the child would count on locks that its parent
        # alone holds, and that are gone with it.
        self.study.database.dispose()
        self.children.append(forked(lambda: self.work(worker)))
        return self.children[-1]

    def work(self, worker: str) -> None:
        """What one worker process does."""
        url, name = self.study.database.secret_url, self.study.row.name
        work(url, name, self.home, self.kind, worker, self.supervised)


def work(url: str, name: str, home: Home, kind: str, worker: str, supervised: bool = False) -> None:
    """What one worker process does."""
    database = connect(url)
    study = studies.load(database, name)
    storage = FencedStorage(database)
    if kind == "instant":
        trials: InstantTrials | TrialRunner = InstantTrials(study, storage)
    else:
        view = study.optuna_study(storage)
        trials = TrialRunner(study, storage, view, home, torch.device("cpu"), threads=1)
    with stop_on_signal() as stop:
        reason = Worker(study, storage, trials, home=home, worker_id=worker).run(
            stop, supervised=supervised
        )
    if stop.is_set():
        raise Interrupted(reason)


def main() -> None:
    url, name, workers, kind = sys.argv[1:5]
    kills = int(sys.argv[5]) if len(sys.argv) > 5 else 0
    rng = random.Random(int(sys.argv[6]) if len(sys.argv) > 6 else 0)
    pause_s = float(sys.argv[7]) if len(sys.argv) > 7 else 0.8
    torch.set_num_threads(1)
    home = Home(Path(os.environ["HPO_HOME"]))
    database = connect(url)
    study = studies.load(database, name)
    forks = Forks(study, home, kind)
    supervisor = Supervisor(
        database, study.uuid, study.directory(home), forks, ["cpu"] * int(workers), 600.0
    )
    killed, due = 0, time.monotonic() + rng.uniform(0.3, 1.0)

    def tick() -> None:
        nonlocal killed, due
        alive = [child for child in forks.children if child.poll() is None]
        if killed < kills and alive and time.monotonic() > due:
            rng.choice(alive).kill()
            killed += 1
            due = time.monotonic() + rng.uniform(pause_s / 8, pause_s)

    supervisor.run(threading.Event(), tick)
    print(json.dumps({"killed": killed, "started": len(forks.children)}))


if __name__ == "__main__":
    main()
