"""How long the rest of a retraining takes."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from hpo.config.train import TrainConfig

RECENT = 5
"""Epochs whose median counts."""


@dataclass
class Pace:
    """Measured epochs of a training of several seeds; epochs of another phase take another time."""

    config: TrainConfig
    epochs: int
    """Most epochs of each seed."""
    clock: Callable[[], float] = time.monotonic
    _seconds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    _since: float = 0.0

    def start(self) -> None:
        """Begin to measure an epoch."""
        self._since = self.clock()

    def done(self, epoch: int) -> None:
        """Note that `epoch` has ended, and that the next one begins."""
        now = self.clock()
        self._seconds[self.config.phase_of(epoch).number].append(now - self._since)
        self._since = now

    def left(self, epoch: int, seeds: int) -> float | None:
        """Return the seconds until the end of this seed, which is after `epoch`, and of so many
        further ones; None before any epoch was measured."""
        if not self._seconds:
            return None
        lengths = [self._length(number) for number in range(1, self.epochs + 1)]
        return sum(lengths[epoch:]) + seeds * sum(lengths)

    def _length(self, epoch: int) -> float:
        """Return the seconds of an epoch: the median of its phase's last ones; before these, of all
        others."""
        own = self._seconds.get(self.config.phase_of(epoch).number)
        known = own or [one for several in self._seconds.values() for one in several]
        return statistics.median(known[-RECENT:])
