"""Workers in the background of this host, under a keeper that outlives the shell.

Nothing is written down about them: the process table tells which keepers there are, so there is no
file to be stale after a crash or a reboot.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from hpo.errors import InputError
from hpo.paths import Home
from hpo.workers.agent import logs_after
from hpo.workers.launchers.base import (
    Order,
    Placed,
    Size,
    Target,
)
from hpo.workers.process import (
    spread,
    threads_for,
    visible_gpus,
)


class _Keeper(subprocess.Popen[bytes]):
    """A child that is to outlive us."""

    def __del__(self) -> None:
        """No warning that it runs."""


@dataclass
class Local:
    """This host."""

    home: Home
    has_our_files: bool = True
    children: list[_Keeper] = field(default_factory=list)

    def check(self, size: Size) -> None:
        _devices(size)

    def start(self, order: Order) -> None:
        target, directory = order.target, order.home.study(order.target.uuid)
        log = directory.log(f"keeper-{secrets.token_hex(3)}")
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "hpo", *keep(target, "local")]
        command += ["--threads", str(order.size.cpus or threads_for(order.size.workers))]
        command += [part for device in _devices(order.size) for part in ("--device", device)]
        settings = {"HPO_STORAGE": order.storage, "HPO_HOME": str(order.home.root)}
        with log.open("ab") as output:
            child = _Keeper(
                command,
                env=os.environ | settings,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # neither Ctrl-C nor the end of the terminal reaches it
            )
        self.children.append(child)

    def placed(self, target: Target) -> list[Placed]:
        found, host = [], socket.gethostname()
        for keeper in self._keepers(target):
            name, workers = f"keeper {keeper.pid}", []
            with suppress(psutil.Error):
                workers = [one for child in keeper.children() if (one := _worker_id(child))]
            found += [Placed(worker, "running", host, name) for worker in workers]
            if not workers:
                found.append(Placed(name, "starting", host))
        return found

    def stop(self, target: Target) -> None:
        for keeper in self._keepers(target):
            with suppress(psutil.NoSuchProcess):
                keeper.terminate()

    def logs(self, target: Target, seen: Mapping[str, int]) -> dict[str, bytes]:
        return logs_after(self.home.study(target.uuid), seen)

    def _keepers(self, target: Target) -> Iterator[psutil.Process]:
        words = keep(target, "local")
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if any(line[i : i + len(words)] == words for i in range(len(line))):
                yield process
        for child in self.children:  # last: none that was not there any more is left unasked
            child.poll()


def keep(target: Target, engine: str) -> list[str]:
    """The arguments of `hpo` that begin a keeper's command line."""
    return ["keep", target.study, "--uuid", target.uuid, "--engine", engine]


def _devices(size: Size) -> list[str]:
    """A device for each worker; raises InputError where there is not room for all."""
    if size.gpus is None:
        return spread(size.workers, 1, None)
    if size.gpus == 0:
        return ["cpu"] * size.workers
    gpus = visible_gpus()
    room = len(gpus) * size.per_gpu
    if size.workers > room:
        raise InputError(
            f"--workers {size.workers} with {size.gpus:g} of a GPU each: this host has {len(gpus)} "
            f"GPUs, room for {room}; give fewer --workers, or less --gpus-per-worker (0: train on "
            "the CPU)"
        )
    return [gpus[i % len(gpus)] for i in range(size.workers)]


def _worker_id(process: psutil.Process) -> str | None:
    """The id of a `hpo worker`; None of another process."""
    try:
        line = process.cmdline()
    except psutil.Error:
        return None
    return line[line.index("--worker-id") + 1] if "--worker-id" in line[:-1] else None
