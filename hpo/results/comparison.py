"""What a comparison shows, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SCORES = ("top1", "top5", "macro_precision", "macro_recall", "macro_f1")
MOST_FREQUENT = 20


@dataclass(frozen=True)
class Entry:
    """The trials of one architecture in one study."""

    study: str
    architecture: str
    metric: str
    best: float | None
    best_trial: int | None
    mean_top: float | None
    """Mean value of the best `top` complete trials, of fewer where there are fewer."""
    top: int
    trials: int
    """All that ran, also pruned and failed ones."""
    complete: int
    pruned: int
    epochs: int
    seconds: float
    """Training time of all its epochs."""
    parameters: float | None = None
    flops: float | None = None
    latency_ms: float | None = None
    """Of the best trial's network, as its study measured it, else as measured now, else None."""
    curve: tuple[dict[str, float], ...] = ()
    """The best trial's epochs: {"epoch", metric: value, ...}."""

    @property
    def name(self) -> str:
        return f"{self.study}: {self.architecture}"


@dataclass(frozen=True)
class RunEntry:
    """A trained run, means over its seeds."""

    name: str
    architecture: str
    part: str
    """The most honest images that it was measured on: test, else val, else train."""
    seeds: int
    epochs: int
    seconds: float
    """Training time of all seeds."""
    scores: dict[str, float | None]
    std: dict[str, float | None]
    """Sample standard deviations (n - 1) over the seeds; None of a single one."""
    f1_by_class: dict[str, float]
    """Of the MOST_FREQUENT classes with the most images, most first."""
    parameters: float | None = None
    flops: float | None = None
    latency_ms: float | None = None
    curve: tuple[dict[str, float], ...] = ()
    """The first seed's epochs."""


@dataclass(frozen=True)
class Comparison:
    """What `hpo compare` shows."""

    entries: tuple[Entry, ...]
    runs: tuple[RunEntry, ...]
    notes: tuple[str, ...]
    """What could not be found out, and why."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "studies": [asdict(one) for one in self.entries],
            "runs": [asdict(one) for one in self.runs],
            "notes": list(self.notes),
        }
