"""Controls that a training asks at every step: continue, stop, or the trial is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

ProgressCallback = Callable[[], None]
"""Called now and then by what takes long outside of training, as a sign of life; may raise to end
it."""


def no_progress() -> None:
    """Do nothing: there is no watchdog."""


class Control(Protocol):
    """Asked by `train` before every optimizer step and every evaluation batch.

    `step` must be cheap and must not synchronise with the device. It raises to end the training:
    `Interrupted` (stop and hand back; the unfinished epoch is dropped) or `Fenced` (another worker
    owns the trial).
    """

    def step(self, *, epoch: int, images: int) -> None:
        """Note that `images` were processed since the last call; `epoch` counts from 1."""


class Unattended:
    """A control that never interferes."""

    def step(self, *, epoch: int, images: int) -> None:
        """Continue."""
