"""Workers in the background of this host, under an agent that outlives the shell.

Nothing is written down about them: the process table tells which agents there are, so there is no
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
from hpo.workers.launchers.base import LaunchedWorker, LaunchRequest, Size, Target
from hpo.workers.process import spread, threads_for, visible_gpus


class _Agent(subprocess.Popen[bytes]):
    """A child that is to outlive us."""

    def __del__(self) -> None:
        """No warning that it runs."""


@dataclass
class Local:
    """This host."""

    home: Home
    has_our_files: bool = True
    children: list[_Agent] = field(default_factory=list)

    def check(self, size: Size) -> None:
        """Raise InputError for a size that can never be placed here."""
        _devices(size)

    def start(self, request: LaunchRequest) -> None:
        """Start an agent in the background, with a log of its own."""
        target, directory = request.target, request.home.study(request.target.uuid)
        log = directory.log(f"agent-{secrets.token_hex(3)}")
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "hpo", *agent_command(target, "local")]
        command += ["--threads", str(request.size.cpus or threads_for(request.size.workers))]
        command += [part for device in _devices(request.size) for part in ("--device", device)]
        settings = {"HPO_STORAGE": request.storage, "HPO_HOME": str(request.home.root)}
        with log.open("ab") as output:
            child = _Agent(
                command,
                env=os.environ | settings,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # neither Ctrl-C nor the end of the terminal reaches it
            )
        self.children.append(child)

    def launched(self, target: Target) -> list[LaunchedWorker]:
        """Return what is placed for the study now."""
        found, host = [], socket.gethostname()
        for agent in self._agents(target):
            name, workers = f"agent {agent.pid}", []
            with suppress(psutil.Error):
                workers = [one for child in agent.children() if (one := _worker_id(child))]
            found += [LaunchedWorker(worker, "running", host, name) for worker in workers]
            if not workers:
                found.append(LaunchedWorker(name, "starting", host))
        return found

    def stop(self, target: Target) -> None:
        """Ask the agents to end their workers and themselves."""
        for agent in self._agents(target):
            with suppress(psutil.NoSuchProcess):
                agent.terminate()

    def logs(self, target: Target, seen: Mapping[str, int]) -> dict[str, bytes]:
        """Return each worker's log after its first `seen` bytes."""
        return logs_after(self.home.study(target.uuid), seen)

    def _agents(self, target: Target) -> Iterator[psutil.Process]:
        words = agent_command(target, "local")
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if any(_is_agent(line[i : i + len(words)], words) for i in range(len(line))):
                yield process
        for child in self.children:  # last: none that was not there any more is left unasked
            child.poll()


def agent_command(target: Target, launcher: str) -> list[str]:
    """Return the arguments of `hpo` that begin an agent's command line."""
    return ["agent", target.study, "--uuid", target.uuid, "--launcher", launcher]


def _is_agent(line: list[str], words: list[str]) -> bool:
    """Compare with an agent's `words`, and with those of an earlier version that still runs."""
    return line in (words, ["keep", *words[1:4], "--engine", words[5]])


def _devices(size: Size) -> list[str]:
    """Return a device for each worker; raise InputError where there is not room for all."""
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
    """Return the id of a `hpo worker`; None of another process."""
    try:
        line = process.cmdline()
    except psutil.Error:
        return None
    return line[line.index("--worker-id") + 1] if "--worker-id" in line[:-1] else None
