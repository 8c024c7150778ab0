"""What a training asks at every step: go on, stop now, or not mine any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

ProgressCallback = Callable[[], None]
"""Called now and then by what takes long outside of training, to show that it goes on; may raise to
end it."""


def no_progress() -> None:
    """Nobody waits for a sign."""


class Control(Protocol):
    """Asked by `train` before every optimizer step and every evaluation batch.

    `step` must be cheap and must not synchronise with the device. It raises to end the training:
    `Interrupted` (stop and hand back; the unfinished epoch is dropped) or `Fenced` (another worker
    owns the trial).
    """

    def step(self, *, epoch: int, images: int) -> None:
        """`epoch` counts from 1; `images` were processed since the last call."""


class Unattended:
    """A control that never interferes."""

    def step(self, *, epoch: int, images: int) -> None:
        """Go on."""
