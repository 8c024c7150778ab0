"""Workers as child processes of this host, started at once or before their study is open.

While `hpo run` still looks at the images and the database, each of its workers imports what it will
need, torch above all, and then waits on its standard input for a line with its id and its log. A
worker whose line never comes, because the study cannot begin or `hpo run` was killed, ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from hpo.paths import StudyDir
from hpo.workers.process import Child, Process

if TYPE_CHECKING:
    from hpo.storage.database import Database

IMPORTED = ("hpo.search.trial", "hpo.workers.worker")
"""Modules that bring all that a worker imports before its first trial."""


@dataclass(frozen=True)
class WorkerCommand:
    """`hpo worker` for one study, as a supervisor on this host starts it."""

    database: Database
    name: str
    threads: int
    force: bool = False
    """Whether workers join with other code or images too."""

    def start(self, device: str, *options: str, stdin: int, output: int | IO[bytes]) -> Child:
        """Start it on `device` with further `options`."""
        command = [sys.executable, "-m", "hpo", "worker", self.name, "--device", device]
        command += ["--force"] if self.force else []
        command += [*options, "--threads", str(self.threads), "--supervised"]
        # The URL may hold a password: it travels in the environment, never in argv. A session of
        # its own keeps the terminal's Ctrl-C from a worker; the supervisor passes it on, once.
        environment = os.environ | {
            "HPO_STORAGE": self.database.secret_url,
            "OMP_NUM_THREADS": str(self.threads),
        }
        return Child(
            command,
            env=environment,
            stdin=stdin,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


class EarlyWorkers:
    """A process for each of some devices that waits to be called; leaving the context ends those
    that were not."""

    def __init__(self, command: WorkerCommand, devices: Sequence[str]) -> None:
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self.waiting = [
            (device, command.start(device, "--early", stdin=pipe, output=nowhere))
            for device in devices
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for _, process in self.waiting:
            process.kill()
            process.communicate()

    def call(self, worker: str, device: str, log: Path) -> Child | None:
        """Let a process that waits for `device` begin as `worker` with its output in `log`; return
        None where none is left."""
        line = json.dumps({"worker": worker, "log": str(log)}).encode() + b"\n"
        for place in [one for one in self.waiting if one[0] == device]:
            self.waiting.remove(place)
            process = place[1]
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as pipe:
                pipe.write(line)
                pipe.flush()
                return process
            process.wait()  # it died; the next one will tell why
        return None


@dataclass(frozen=True)
class LocalProcesses:
    """Workers as child processes, each with a log file of its own; never a fork, since CUDA does
    not survive one. Those that have started early are taken first."""

    command: WorkerCommand
    directory: StudyDir
    early: EarlyWorkers | None = None

    def start(self, worker: str, device: str) -> Process:
        """Start `hpo worker` with the id `worker` on `device`."""
        path = self.directory.log(worker)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as output:
            called = self.early.call(worker, device, path) if self.early else None
            return called or self.command.start(
                device, "--worker-id", worker, stdin=subprocess.DEVNULL, output=output
            )


def wait_for_call() -> str:
    """Import what a worker needs, then wait for its line; return its id, its output going to its
    log. Ends the process where no line comes."""
    for name in IMPORTED:
        import_module(name)
    line = sys.stdin.readline()
    if not line:
        raise SystemExit(0)
    called = json.loads(line)
    with Path(called["log"]).open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    return str(called["worker"])
