"""How many workers a device carries: a probe that trains with 1, 2, 4 and 8 processes at once.

Imports no torch: the processes that it starts do (`hpo probe`, see `hpo.workers.probed`). Each
reads lines and answers with lines of JSON:

    {"runtime": null or a table}       -> {"runtime": table} once it trains, or {"full": reason}
    {"threads": n, "seconds": s}       -> {"images_per_s": x}
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import psutil

from hpo.formatting import plural
from hpo.storage.database import Database
from hpo.workers.process import Child

COUNTS = (1, 2, 4, 8)
"""Numbers of processes that are tried."""
CLEARLY = 1.05
"""Factor by which more processes have to be faster."""
MEASURE_S = 2.5
"""Seconds that each number is measured."""
PATIENCE_S = 180.0
"""Longest wait for an answer: the first process imports torch and decides how to compute."""


@dataclass(frozen=True)
class Found:
    """What a probe found."""

    rates: Mapping[int, float]
    """Images per second of all processes together, by their number."""
    end: str = ""
    """Why no more were tried, in words."""

    @property
    def best(self) -> int:
        """The smallest number that no other beats clearly; 1 where none could be measured."""
        most = max(self.rates.values(), default=0.0)
        good = [count for count, rate in self.rates.items() if CLEARLY * rate >= most]
        return min(good, default=1)

    def say(self, device: str, *, mps: bool) -> str:
        """Return the choice and its reason in a line."""
        gpu = device.startswith("cuda")
        where = "a GPU" if gpu else "on the CPU"
        text = f"{plural(self.best, 'worker')} {where}"
        if self.rates:
            counts = ", ".join(str(count) for count in self.rates)
            rates = ", ".join(f"{rate:.0f}" for rate in self.rates.values())
            text += f": {counts} -> {rates} images/s"
        text += f"; {self.end}" if self.end else ""
        if gpu and self.best > 1 and not mps:
            text += "; without MPS they take turns (docs/gpu.md)"
        return text


def counts_for(device: str, cores: int) -> tuple[int, ...]:
    """Return the numbers of processes to try: each needs a core."""
    return tuple(count for count in COUNTS if count == 1 or count <= cores)


class Probed(Protocol):
    """A process that trains for a while when it is told to."""

    def tell(self, **message: Any) -> None:
        """Send it a line."""

    def answer(self) -> Mapping[str, Any]:
        """Return its next line; {"full": reason} where it has ended."""

    def end(self) -> None:
        """End it."""


def measure(
    start: Callable[[], Probed],
    counts: Sequence[int],
    cores: int,
    stop: threading.Event | None = None,
    *,
    all_: bool = False,
) -> Found:
    """Return the total throughput of each of `counts` processes at once, fewest first: up to the
    first number that does not fit or, unless `all_`, is no faster, or until `stop` is set."""
    running: list[Probed] = []
    rates: dict[int, float] = {}
    runtime: Any = None
    try:
        for count in counts:
            new = [start() for _ in range(count - len(running))]
            running += new
            for one in new:
                one.tell(runtime=runtime)
            answers = [one.answer() for one in new]
            if reasons := [str(answer["full"]) for answer in answers if "full" in answer]:
                return Found(rates, f"{count} did not run: {reasons[0]}")
            runtime = answers[0]["runtime"]
            if stop is not None and stop.is_set():
                return Found(rates, "interrupted")
            for one in running:
                one.tell(threads=max(1, cores // count), seconds=MEASURE_S)
            answers = [one.answer() for one in running]
            if reasons := [str(answer["full"]) for answer in answers if "full" in answer]:
                return Found(rates, f"{count} did not run: {reasons[0]}")
            before = max(rates.values(), default=0.0)
            rates[count] = sum(float(answer["images_per_s"]) for answer in answers)
            if rates[count] <= before and not all_:
                break
        return Found(rates)
    finally:
        for one in running:
            one.end()


@dataclass
class ProbedProcess:
    """`hpo probe` as a child process."""

    command: Sequence[str]
    environment: Mapping[str, str]
    _lines: queue.Queue[str] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `end`)
        self._child = Child(
            self.command,
            env=dict(self.environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        threading.Thread(target=self._read, name="probe", daemon=True).start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        with self._child.stdout as lines:
            for line in lines:
                self._lines.put(line.decode(errors="replace"))
        self._lines.put("")

    def tell(self, **message: Any) -> None:
        """Send it a line; nothing where it has ended."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(message).encode() + b"\n")
            self._child.stdin.flush()

    def answer(self) -> Mapping[str, Any]:
        """Return its next line of JSON, or why there is none."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return {"full": f"no answer within {PATIENCE_S:g} s"}
            if not line:
                return {"full": self._last_words()}
            with suppress(ValueError):
                answer = json.loads(line)
                if isinstance(answer, dict):
                    return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended ({self._child.wait()})"

    def end(self) -> None:
        """End it and what it started."""
        self._child.kill()
        self._child.wait()
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):
            self._child.stdin.close()
        self._errors.close()


def probe(
    database: Database,
    study: str,
    device: str,
    stop: threading.Event | None = None,
    *,
    all_: bool = False,
) -> Found:
    """Find the number of workers with which `device` trains the first configuration of `study`
    fastest; takes about MEASURE_S for each number, and the starts of the processes. As `measure`
    otherwise."""
    cores = len(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "hpo", "probe", study, "--device", device]
    environment = os.environ | {"HPO_STORAGE": database.secret_url}
    return measure(
        lambda: ProbedProcess(command, environment),
        counts_for(device, cores),
        cores,
        stop,
        all_=all_,
    )


def mps_is_running() -> bool:
    """Return whether NVIDIA's Multi-Process Service runs here, or a container reaches it."""
    pipes = os.environ.get("CUDA_MPS_PIPE_DIRECTORY")
    if pipes:
        return (Path(pipes) / "control").exists()
    names = (process.info["name"] or "" for process in psutil.process_iter(["name"]))
    return any(name.startswith("nvidia-cuda-mps") for name in names)
