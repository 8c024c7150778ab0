"""A supervisor without a terminal: what every launcher places.

It runs on the host of its workers and imports no torch: what kills a worker (out
of memory, a CUDA error, `kill -9`) leaves it alive to set the trial free and to start the next one
at once. What kills it makes its workers hand back and end (`hpo worker --supervised`), and is the
launcher's business.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpo.config.study import StudyFile
from hpo.errors import HpoError, NotFound, StorageError, StorageGone
from hpo.paths import Home, StudyDir
from hpo.search import scheduling
from hpo.storage import records
from hpo.storage.database import Database, connect
from hpo.storage.snapshot import read_snapshot
from hpo.workers.process import Process, ProcessSpawner
from hpo.workers.spawn import LocalProcesses, WorkerCommand
from hpo.workers.supervisor import Supervisor

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""Between two looks for a database that does not answer."""
LARGEST_READ = 1 << 20
"""Bytes of one log that are read at a time."""


@dataclass(frozen=True)
class AgentSpec:
    """The task of an agent: to keep one worker on each of `devices` of its host alive."""

    study: str
    uuid: str
    storage: str = field(repr=False)
    """The database's URL, with its password."""
    home: Home
    devices: Sequence[str]
    threads: int

    @property
    def directory(self) -> StudyDir:
        """Return the study's run directory."""
        return self.home.study(self.uuid)


@dataclass
class Agent:
    """Keeps the workers of its spec alive. Other threads may look at it meanwhile."""

    spec: AgentSpec
    note: str = ""
    """Why no worker can be started now, in words."""
    started: dict[str, Process] = field(default_factory=dict)
    """All workers so far, by id."""
    spawner: ProcessSpawner | None = None

    @property
    def running(self) -> list[str]:
        """Return the ids of the workers that run now."""
        return [worker for worker, process in list(self.started.items()) if process.poll() is None]

    def run(self, stop: threading.Event) -> bool:
        """Keep workers alive until the study is over or stopped (True), or `stop` is set before
        that (False).

        A database that does not answer is waited for. Raises HpoError where no worker can work
        here; the database has the reason too, as that of a worker that has ended. Raises
        StorageGone where the database's file was removed.
        """
        database = connect(self.spec.storage)
        try:
            while not stop.is_set():
                try:
                    return self._keep(database, stop)
                except StorageGone:
                    raise
                except StorageError as error:
                    self.note = str(error)
                    log.warning("tried again in %g s: %s", RETRY_S, error)
                    stop.wait(RETRY_S)
            return False
        finally:
            database.dispose()

    def _keep(self, database: Database, stop: threading.Event) -> bool:
        spec = self.spec
        row = records.get_study(database, spec.study)
        if row.uuid != spec.uuid:
            raise NotFound(f"study {spec.study!r} was deleted and made again: launch the new one")
        self.note = ""
        file = StudyFile.from_definition(row.definition)
        command = WorkerCommand(database, spec.study, spec.threads)
        self.spawner = LocalProcesses(command, spec.directory)
        supervisor = Supervisor(
            database, spec.uuid, spec.directory, self, spec.devices, file.study.stall_timeout_s
        )
        try:
            supervisor.run(stop)
        except StorageError:
            raise
        except HpoError as error:
            self._record_reason(database, str(error))
            raise
        maximize = file.direction == "maximize"
        snapshot = read_snapshot(database, spec.uuid, maximize=maximize, max_epochs=file.max_epochs)
        rule = snapshot.stop_reason if snapshot.stop == "rule" else None
        return isinstance(scheduling.decide(snapshot, rule), scheduling.Over)

    def start(self, worker: str, device: str) -> Process:
        """Start a worker for the supervisor, and remember it."""
        assert self.spawner is not None
        process = self.spawner.start(worker, device)
        self.started[worker] = process
        log.info("%s started on %s; log: %s", worker, device, self.spec.directory.log(worker))
        return process

    def _record_reason(self, database: Database, reason: str) -> None:
        """Record why no worker can run here, where `hpo workers` shows it."""
        host = socket.gethostname()
        name = f"{host[:32]}-agent-{secrets.token_hex(3)}"
        about: dict[str, Any] = {"host": host, "pid": os.getpid(), "device": self.spec.devices[0]}
        with suppress(StorageError):
            records.add_worker(database, name, self.spec.uuid, versions={}, process="", **about)
            records.end_worker(database, name, reason)


def logs_after(
    directory: StudyDir, seen: Mapping[str, int], workers: Iterable[str] | None = None
) -> dict[str, bytes]:
    """Return the logs of this host after the first `seen` bytes, by worker, oldest log first; of a
    long one the next part alone. None: of all workers of the study."""
    paths = [directory.log(worker) for worker in workers or ()]
    if workers is None:
        paths = list(directory.logs.glob("*.log"))
    logs = {}
    for path in sorted((path for path in paths if path.exists()), key=_written):
        with path.open("rb") as file:
            file.seek(seen.get(path.stem, 0))
            logs[path.stem] = file.read(LARGEST_READ)
    return logs


def _written(path: Path) -> float:
    return path.stat().st_mtime
