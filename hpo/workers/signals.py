"""Signals as a context manager around a stop event."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HARD_EXIT = 130


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; a SIGINT after it ends the process at once.

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
    """An event that the first SIGTERM or SIGINT sets. `hear` is called within the handler, with the
    number of each, and must take no lock."""
    event, told = threading.Event(), False
    source, sink = os.pipe()

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal told
        hear(number)
        if not told:
            told = True
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
