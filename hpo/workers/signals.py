"""Signals as a context manager around a stop event."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HARD_EXIT = 130


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; a SIGINT after it ends the process at once.

    A SIGTERM after it changes nothing: Slurm and others send one to every process of a job, and
    the supervisor, which got it too, passes it on.
    """
    event = threading.Event()

    def handle(number: int, _frame: FrameType | None) -> None:
        if event.is_set() and number == signal.SIGINT:
            os._exit(HARD_EXIT)
        event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
