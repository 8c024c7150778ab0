"""Workers as a Slurm array job: one agent a task, one whole GPU (or none) an agent.

Slurm ends a task ahead of its time limit by a signal to its first process, and every process of it
on preemption, `scancel` or `scontrol requeue`; it starts a task again only where a node has failed
or it took the task away itself. So an agent whose time runs out hands back, then has its own task
requeued. It does not where the study is over, and not where Slurm ends the task anyway.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpo.errors import InputError, LauncherError
from hpo.paths import Home
from hpo.workers.agent import Agent, logs_after
from hpo.workers.launchers.base import LaunchedWorker, LaunchRequest, Size, Target
from hpo.workers.launchers.local import agent_command
from hpo.workers.process import event_on_signal

log = logging.getLogger(__name__)

AHEAD_S = 120
"""Seconds from the warning to the time limit of a task: for a step, a checkpoint, a hand-back."""
STATES = {"PENDING": "waiting", "CONFIGURING": "starting", "COMPLETING": "ending"}
TIMEOUT_S = 60


@dataclass
class Slurm:
    """The cluster that this host's `sbatch` talks to. Its hosts are taken to share the files."""

    home: Home
    sbatch: Sequence[str] = ()
    """Further options of sbatch, such as `partition=gpu`."""
    has_our_files: bool = True

    def check(self, size: Size) -> None:
        """Raise InputError for a size that can never be placed here."""
        if size.workers % size.per_gpu:
            raise InputError(
                f"--workers {size.workers} with {size.gpus:g} of a GPU each: Slurm gives whole "
                f"GPUs, so {size.per_gpu} workers share one; give a multiple of {size.per_gpu}"
            )

    def start(self, request: LaunchRequest) -> None:
        """Submit the array job."""
        request.home.study(request.target.uuid).logs.mkdir(parents=True, exist_ok=True)
        # The script goes in through a pipe, the database's URL in the environment that sbatch
        # passes on: neither a file nor a command line holds a password.
        settings = {"HPO_STORAGE": request.storage}
        _call(["sbatch", "--parsable", "--export=ALL"], script=self.script(request), env=settings)

    def script(self, request: LaunchRequest) -> str:
        """Return the text that is submitted: an array job with a task for each GPU."""
        size = request.size
        gpus = _has_gpus() if size.gpus is None else size.gpus
        tasks, cpus = size.workers // size.per_gpu, size.cpus or 1
        directory, label = request.home.study(request.target.uuid), request.target.label
        options = {
            "job-name": label,
            "array": f"0-{tasks - 1}",
            "requeue": None,
            "open-mode": "append",
            "signal": f"B:TERM@{AHEAD_S}",
            "output": str(directory.logs / "slurm-%A_%a.log"),
            "chdir": str(Path.cwd()),
            "cpus-per-task": str(cpus * size.per_gpu),
            **({"gres": "gpu:1"} if gpus else {}),
        }
        for extra in self.sbatch:
            name, equals, value = extra.removeprefix("--").partition("=")
            if name.startswith("-") or not name.replace("-", "").isalpha() or "\n" in value:
                raise InputError(f"--sbatch {extra!r}: a long option, such as partition=gpu")
            options[name] = value if equals else None
        device = "cuda:0" if gpus else "cpu"
        command = [sys.executable, "-m", "hpo", *agent_command(request.target, "slurm")]
        command += ["--threads", str(cpus), *(["--device", device] * size.per_gpu)]
        return "\n".join(
            [
                "#!/bin/bash",
                *(f"#SBATCH --{k}" + ("" if v is None else f"={v}") for k, v in options.items()),
                "",
                f"# Workers of the study {request.target.study!r}: {size.workers}. The database's",
                "# URL comes from HPO_STORAGE in the environment of sbatch.",
                f"export HPO_HOME={shlex.quote(str(request.home.root))}",
                f"exec {shlex.join(command)}",
                "",
            ]
        )

    def launched(self, target: Target) -> list[LaunchedWorker]:
        """Return what is placed for the study now."""
        columns = "%i|%T|%N|%r"
        text = _call(["squeue", "--noheader", "--array", "--me", f"--name={target.label}",
                      f"--format={columns}"])  # fmt: skip
        tasks = []
        for line in text.splitlines():
            name, state, host, reason = line.split("|", 3)
            note = "" if reason == "None" else reason
            tasks.append(LaunchedWorker(name, STATES.get(state, state.lower()), host, note))
        return tasks

    def stop(self, target: Target) -> None:
        """Cancel pending tasks, and interrupt running ones."""
        mine = ["--me", f"--name={target.label}"]
        _call(["scancel", *mine, "--state=PENDING"])
        _call(["scancel", *mine, "--state=RUNNING", "--batch", "--signal=INT"])

    def logs(self, target: Target, seen: Mapping[str, int]) -> dict[str, bytes]:
        """Return each worker's log after its first `seen` bytes."""
        return logs_after(self.home.study(target.uuid), seen)


def _has_gpus() -> int:
    """Return 1 where some node has GPUs for jobs, else 0; a script may be wanted where no Slurm
    is."""
    if shutil.which("sinfo") is None:
        return 0
    return int("gpu" in _call(["sinfo", "--noheader", "--format=%G"]))


def run_in_task(agent: Agent) -> None:
    """Run the agent as the first process of a task. SIGTERM: hand back, then continue in another
    run of the task; SIGINT: hand back and end."""
    signals: list[int] = []
    with event_on_signal(signals.append) as stop:
        over = agent.run(stop)
    if over or signal.SIGINT in signals:
        return
    task = _own_task()
    state = _call(["squeue", "--noheader", f"--jobs={task}", "--format=%T"]).strip()
    if state != "RUNNING":
        log.info("Slurm ends this task (%s): it is not requeued from here", state.lower())
        return
    log.info("the task is requeued")
    _call(["scontrol", "requeue", task])


def _own_task() -> str:
    """Return the id of this task alone: of one task of an array SLURM_JOB_ID is that of the whole
    array, all of whose tasks would be asked for and requeued."""
    job, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{job}_{task}" if job and task else os.environ["SLURM_JOB_ID"]


def _call(command: Sequence[str], *, script: str = "", env: Mapping[str, str] | None = None) -> str:
    """Return the output of one of Slurm's commands; raise LauncherError with its own words."""
    try:
        done = subprocess.run(
            command,
            input=script,
            env=os.environ | dict(env or {}),
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
    except FileNotFoundError:
        raise LauncherError(
            f"Slurm's {command[0]} is not on this host's PATH: run this on a login node of the "
            "cluster; to see the script alone: --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise LauncherError(
            f"Slurm's {command[0]} gave no answer for {TIMEOUT_S} s: is slurmctld up? (sinfo)"
        ) from None
    if done.returncode:
        lines = [line.partition("error: ")[2] or line for line in done.stderr.splitlines()]
        raise LauncherError(f"{command[0]}: {'; '.join(lines) or f'exit code {done.returncode}'}")
    return done.stdout
