"""Control of a training in progress: continue, stop, or give it up to another worker; and the phase
that it is in, for whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

ProgressCallback = Callable[[], None]
"""Called repeatedly by long-running work outside of training to signal progress; may raise to stop
it."""


def no_progress() -> None:
    """Ignore progress."""


_HEAR: ContextVar[Callable[[str], object]] = ContextVar("_HEAR", default=len)


def enter_phase(phase: str) -> None:
    """Say what begins, or how far it is: `building the model`, `decoding 120/398`. Cheap: it may be
    called at every step."""
    _HEAR.get()(phase)


@contextmanager
def phases_heard(hear: Callable[[str], object]) -> Iterator[None]:
    """Call `hear` with each phase that code in this context enters."""
    token = _HEAR.set(hear)
    try:
        yield
    finally:
        _HEAR.reset(token)


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
