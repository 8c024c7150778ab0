"""Worker processes: how they are identified, stopped and watched.

It imports no torch: in a supervisor that would cost memory, seconds, and a CUDA context of its own.

A process id alone does not identify a worker: ids are given out again, and in a container or on
another host they are other processes. So it goes with the boot of the machine, the namespace of the
ids, the user (whom the system may not let see others' processes), and when the process started.
Linux knows all of them. Elsewhere no process is ever known to be gone, and the trials of dead ones
are free when their lease runs out. The start is in ticks since the boot. psutil's `create_time()`
adds the time of the boot, which moves when the clock is set: a living worker would look gone.
"""

from __future__ import annotations

import gc
import os
import secrets
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from hpo.errors import InputError
from hpo.workers.healthcheck import host


@contextmanager
def starting() -> Iterator[None]:
    """Pause Python's garbage collector while a process starts: a seventh of the time of its imports
    would go into looking through objects that all stay. Later collections leave them out, too."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def visible_gpus() -> list[str]:
    """Return `cuda:0`, ... of the NVIDIA devices that a torch process here would see."""
    limited = os.environ.get("CUDA_VISIBLE_DEVICES")
    if limited is not None:
        named = [name for name in limited.split(",") if name.strip() and name.strip() != "-1"]
        return [f"cuda:{i}" for i in range(len(named))]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True, check=False)
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [f"cuda:{i}" for i in range(count)]


def first_device(device: str | None) -> str:
    """Return `device`, else the first visible GPU, else the CPU."""
    return device or next(iter(visible_gpus()), "cpu")


def require_device(device: str | None) -> None:
    """Raise InputError for a device that this machine does not have. The usual ones are known
    without torch, which a supervisor must not load."""
    gpus = visible_gpus()
    if device in (None, "cpu", *gpus) or (device == "cuda" and gpus):
        return
    from hpo.training.device import torch_device

    torch_device(str(device))


def spread(workers: int | None, per_device: int, device: str | None) -> list[str]:
    """Return a device for each worker: all visible GPUs in turn, else the CPU.

    `workers` None: `per_device` on each device. Raises InputError for numbers below 1.
    """
    for name, value in (("workers", workers), ("workers_per_device", per_device)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: at least 1")
    devices = [device] if device else visible_gpus() or ["cpu"]
    count = workers if workers is not None else per_device * len(devices)
    return [devices[i % len(devices)] for i in range(count)]


AUTO = "auto"


def require_count(workers: int | None, per_device: int | str) -> None:
    """Raise InputError unless `per_device` is a number, or "auto" without `workers`."""
    if per_device != AUTO and not isinstance(per_device, int):
        raise InputError(f"workers_per_device {per_device!r}: a number from 1, or {AUTO!r}")
    if per_device == AUTO and workers is not None:
        raise InputError(
            f"workers {workers}: with workers_per_device {AUTO!r} it is measured how many; give one"
        )


def threads_for(workers: int) -> int:
    """Return the CPU threads of each of `workers` on this machine: its cores, shared; at least
    1."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, workers))


HARD_EXIT = 130


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that the first SIGTERM or SIGINT sets; a SIGINT after it ends the process at
    once.

    A SIGTERM after it changes nothing: Slurm and others send one to every process of a job, and
    the supervisor, which got it too, passes it on.
    """
    asked = False

    def hear(number: int) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            os._exit(HARD_EXIT)
        asked = True

    with event_on_signal(hear) as event:
        yield event


@contextmanager
def event_on_signal(hear: Callable[[int], object]) -> Iterator[threading.Event]:
    """Yield an event that the first SIGTERM or SIGINT sets. `hear` is called within the handler,
    with the number of each, and must take no lock."""
    event, signalled = threading.Event(), False
    source, sink = os.pipe()

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal signalled
        hear(number)
        if not signalled:
            signalled = True
            # The event's own lock may be held by the very code that this interrupts, so that
            # setting it here could wait for ever; a pipe takes none.
            os.write(sink, b"!")

    def relay() -> None:
        if os.read(source, 1):
            event.set()

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(sink)
        thread.join()
        os.close(source)


PROC = Path("/proc")


def process_identity() -> str:
    """Return the identity of this process, for its worker's row; empty where the system does not
    say."""
    place, started = _place(), _started(os.getpid())
    return f"{place} {os.getpid()} {started}" if place and started else ""


def is_gone(process: str) -> bool:
    """Return whether the process of that identity lived on this boot of this machine, where we
    would see it, and does not live any more."""
    fields = process.rsplit(" ", 2)
    if len(fields) != 3 or fields[0] != _place():
        return False
    _, pid, started = fields
    return _started(int(pid)) != started


def _place() -> str | None:
    """Return the boot of this machine, the namespace of process ids, and the user."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {(PROC / 'self/ns/pid').readlink()} {os.getuid()}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return the start of a living process in ticks since the boot; None for one that is gone."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The name, in brackets, may hold anything; after it come state (3rd field), ..., start (22nd).
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


LONGEST_LOOK_S = 5.0
"""At most so much of the time between two looks counts: a watcher that did not look for longer was
stopped, suspended with the machine or waiting itself, and cannot tell what others did meanwhile."""


@dataclass
class Watchdog:
    """How long the signs of life of somebody else have stopped changing.

    Signs are only compared with each other, and time is the watcher's own and monotonic: a clock
    that is set, and another host's clock in the time of a file, change nothing.
    """

    idle_s: float = 0.0
    sign: object = None
    looked: float | None = None

    def look(self, sign: object, now: float) -> float:
        """Return the seconds without a new sign, at `now` of a monotonic clock."""
        since = 0.0 if self.looked is None else now - self.looked
        self.looked = now
        if sign != self.sign:
            self.sign, self.idle_s = sign, 0.0
        else:
            self.idle_s += min(since, LONGEST_LOOK_S)
        return self.idle_s


def no_step(stall_timeout_s: float) -> str:
    """Return the reason of an attempt that was ended, in words."""
    return f"made no step for {stall_timeout_s:g} s (study.stall_timeout_s)"


class Process(Protocol):
    """A started worker."""

    def poll(self) -> int | None:
        """Return its exit code (negative: the signal that ended it), None while it runs."""

    def send_signal(self, sig: int) -> None:
        """Send a signal; nothing where it has ended."""

    def kill(self) -> None:
        """End it now, with all that it has started; nothing where they have ended."""

    def wait(self) -> int:
        """Wait for its end."""


class ProcessSpawner(Protocol):
    """Starts workers of one study."""

    def start(self, worker: str, device: str) -> Process:
        """Start the worker with the id `worker` on `device`."""


def new_worker_id() -> str:
    """Return host-suffix: readable in status, and never seen twice (process ids are, in
    containers)."""
    return f"{host()}-{secrets.token_hex(3)}"


class Child(subprocess.Popen[bytes]):
    """A process in a session of its own, with what it starts: loaders of images, above all."""

    def kill(self) -> None:
        """End all of them now; what does not stop by itself outlives its parent otherwise."""
        with suppress(ProcessLookupError, PermissionError):  # macOS says so of what has ended
            os.killpg(self.pid, signal.SIGKILL)
