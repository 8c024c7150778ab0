"""Where workers are placed: as processes of this machine."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from hpo.paths import StudyDir
from hpo.storage.db import Database
from hpo.workers.alive import host


class Process(Protocol):
    """A started worker."""

    def poll(self) -> int | None:
        """Its exit code (negative: the signal that ended it), None while it runs."""

    def send_signal(self, sig: int) -> None:
        """Send a signal; nothing where it has ended."""

    def kill(self) -> None:
        """End it now, with all that it has started; nothing where they have ended."""

    def wait(self) -> int:
        """Wait for its end."""


class Launcher(Protocol):
    """Starts workers of one study."""

    def start(self, worker: str, device: str) -> Process:
        """Start the worker with the id `worker` on `device`."""


def new_worker_id() -> str:
    """host-suffix: readable in status, and never seen twice (process ids are, in containers)."""
    return f"{host()}-{secrets.token_hex(3)}"


class Child(subprocess.Popen[bytes]):
    """A process in a session of its own, with what it starts: loaders of images, above all."""

    def kill(self) -> None:
        """End all of them now; what does not stop by itself outlives its parent otherwise."""
        with suppress(ProcessLookupError, PermissionError):  # macOS says so of what has ended
            os.killpg(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class LocalProcesses:
    """`hpo worker` as child processes, each with a log file of its own; never a fork, since CUDA
    does not survive one."""

    database: Database
    name: str
    directory: StudyDir
    threads: int
    force: bool = False
    """Whether workers join with other code or images too."""

    def start(self, worker: str, device: str) -> Process:
        path = self.directory.log(worker)
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "hpo", "worker", self.name, "--device", device]
        command += ["--force"] if self.force else []
        command += ["--worker-id", worker, "--threads", str(self.threads), "--supervised"]
        # The URL may hold a password: it travels in the environment, never in argv. A session of
        # its own keeps the terminal's Ctrl-C from a worker; the supervisor passes it on, once.
        environment = os.environ | {
            "HPO_STORAGE": self.database.secret_url,
            "OMP_NUM_THREADS": str(self.threads),
        }
        with path.open("ab") as output:
            return Child(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
