"""The launcher interface: what is asked of it, and what it places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from hpo.errors import InputError
from hpo.paths import Home


@dataclass(frozen=True)
class Target:
    """The study whose workers a launcher is asked about."""

    study: str
    uuid: str

    @property
    def label(self) -> str:
        """Return their name in the launcher's own tools: readable, and unique to the study."""
        return f"hpo-{self.study}-{self.uuid[:8]}"


@dataclass(frozen=True)
class Size:
    """Number of workers, and the GPUs and CPUs of each."""

    workers: int
    gpus: float | None = None
    """1, a share of one, or 0 for the CPU. None: 1 if there are any."""
    cpus: int | None = None
    """CPU threads of each. None: the launcher's default."""

    def __post_init__(self) -> None:
        if self.gpus is not None and not 0 <= self.gpus <= 1:
            raise InputError(
                f"--gpus-per-worker {self.gpus:g}: a worker trains on one GPU; allowed: 0 (the "
                "CPU) to 1, such as 0.5 for two workers on each GPU"
            )

    @property
    def per_gpu(self) -> int:
        """Return the number of workers that share a GPU; 1 on the CPU."""
        return int(1 / self.gpus + 1e-9) if self.gpus else 1


@dataclass(frozen=True)
class LaunchRequest:
    """Workers to be placed."""

    target: Target
    size: Size
    storage: str = field(repr=False)
    """The database's URL, with its password: it may be in an environment or an argument of a call,
    never in argv, in a file, or in what a launcher shows."""
    home: Home


@dataclass(frozen=True)
class LaunchedWorker:
    """One thing that a launcher has placed: a worker, or the agent of some."""

    name: str
    """The launcher's own name: a worker's id, an actor's name, a job's id."""
    state: str
    """waiting (for a place), starting, running or ending."""
    host: str
    """Host name; empty while pending."""
    note: str = ""


class Launcher(Protocol):
    """A way to place workers."""

    has_our_files: bool
    """Whether its hosts see the files of this one, so that images can be looked for here."""

    def check(self, size: Size) -> None:
        """Raise InputError for what can never be placed here, however long it waits."""

    def start(self, request: LaunchRequest) -> None:
        """Place more workers. Raises LauncherError where that fails; then none of them is left."""

    def launched(self, target: Target) -> list[LaunchedWorker]:
        """Return what is placed for the study now."""

    def stop(self, target: Target) -> None:
        """Make all of them hand back and end, and take back what waits; returns at once."""

    def logs(self, target: Target, seen: Mapping[str, int]) -> dict[str, bytes]:
        """Return each worker's log after its first `seen` bytes; of a long one the next part
        alone."""
