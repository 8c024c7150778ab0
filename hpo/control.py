"""Control of a training in progress: continue, stop, or give it up to another worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

ProgressCallback = Callable[[], None]
"""Called repeatedly by long-running work outside of training to signal progress; may raise to stop
it."""


def no_progress() -> None:
    """Ignore progress."""


class Control(Protocol):
    """Called by `train` before every optimizer step and every evaluation batch.

    `step` must be cheap and must not synchronise with the device. To end the training it raises
    `Interrupted` (stop and hand back; the unfinished epoch is dropped) or `Fenced` (another worker
    owns the trial).
    """

    def step(self, *, epoch: int, images: int) -> None:
        """Return to continue, or raise to end the training. `epoch` counts from 1; `images` is the
        number processed since the last call."""


class NullControl:
    """A control that never interferes."""

    def step(self, *, epoch: int, images: int) -> None:
        """Continue."""
