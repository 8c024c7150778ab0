"""A fake launcher: its workers are threads of this process, over the real database and leases."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hpo.errors import InputError
from hpo.search import study as studies
from hpo.storage import leases
from hpo.storage.database import connect
from hpo.storage.leases import Claim
from hpo.storage.optuna import FencedStorage
from hpo.workers.launchers.base import LaunchedWorker, LaunchRequest, Size, Target
from hpo.workers.worker import Progress, Worker
from tests.harness.fakes import InstantTrials

ROOM = 8


@dataclass
class Told(InstantTrials):
    """Trials that write a log, each as fast as `pace` says at its start."""

    log: bytearray = field(default_factory=bytearray)
    pace: Callable[[], float] = float

    def run(self, taken: Claim, control: Progress) -> None:
        self.seconds = self.pace()
        self.log += f"trial {taken.lease.number}: attempt {taken.lease.k}\n".encode()
        super().run(taken, control)


@dataclass
class Hired:
    """One worker."""

    request: LaunchRequest
    thread: threading.Thread
    stop: threading.Event
    log: bytearray


@dataclass
class FakeLauncher:
    """Places up to ROOM workers; each epoch of theirs takes `pace()` seconds."""

    pace: Callable[[], float] = float
    has_our_files: bool = True
    hired: dict[str, Hired] = field(default_factory=dict)
    requests: list[LaunchRequest] = field(default_factory=list)

    def check(self, size: Size) -> None:
        if size.workers > ROOM:
            raise InputError(f"--workers {size.workers}: there is room for {ROOM}")

    def start(self, request: LaunchRequest) -> None:
        self.requests.append(request)
        for _ in range(request.size.workers):
            self._hire(request)

    def launched(self, target: Target) -> list[LaunchedWorker]:
        return [
            LaunchedWorker(name, "ending" if one.stop.is_set() else "running", "here")
            for name, one in self.hired.items()
            if one.request.target == target and one.thread.is_alive()
        ]

    def stop(self, target: Target) -> None:
        for one in self.hired.values():
            if one.request.target == target:
                one.stop.set()

    def logs(self, target: Target, seen: Mapping[str, int]) -> dict[str, bytes]:
        return {
            name: bytes(one.log[seen.get(name, 0) :])
            for name, one in self.hired.items()
            if one.request.target == target
        }

    def kill(self, worker: str) -> None:
        """End one without a word of its own, and do what a launcher does about that."""
        one = self.hired[worker]
        one.stop.set()
        leases.release_worker(connect(one.request.storage), worker, "killed")
        self._hire(one.request)

    def _hire(self, request: LaunchRequest) -> None:
        worker, stop, log = f"fake-{secrets.token_hex(3)}", threading.Event(), bytearray()

        def work() -> None:
            database = connect(request.storage)
            study = studies.load(database, request.target.study)
            storage = FencedStorage(database)
            epochs = study.file.train["epochs"]
            trials = Told(study, storage, epochs=epochs, log=log, pace=self.pace)
            Worker(study, storage, trials, home=request.home, worker_id=worker).run(stop)
            database.dispose()

        thread = threading.Thread(target=work, name=worker, daemon=True)
        self.hired[worker] = Hired(request, thread, stop, log)
        thread.start()
