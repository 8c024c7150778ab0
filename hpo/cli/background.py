"""A search that leaves its terminal, and goes on in the background.

A shell waits for the process that it started, and workers belong to the one that supervises them.
So on a terminal `hpo run` forks before anything else: the child searches, and the process that the
shell knows waits for it. To leave, the child takes a session of its own and lets the other end.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

KEY = b"q"
KEYS = "q: leave it running in the background   Ctrl-C: pause it"


@dataclass
class Terminal:
    """The terminal of a search, and the process there that waits for it."""

    front: int
    """Its process id."""
    pipe: int
    """Tells it that the search has left."""
    left: bool = False
    reads_keys: bool = False

    def follow(self, stop: threading.Event) -> bool:
        """Return whether the user wants the search to leave. Sets `stop` where the process in front
        was killed."""
        if self.left:
            return False
        if os.getppid() != self.front:
            stop.set()
            return False
        if not _is_in_front():
            return False
        if self.reads_keys:
            _read_single_keys()
        return _pressed()

    def leave(self, log: Path) -> None:
        """Go on in the background, all output going to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os.setsid()
        with log.open("ab") as output, Path(os.devnull).open("rb") as nothing:
            os.dup2(nothing.fileno(), 0)
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
        os.write(self.pipe, KEY)
        self.left = True

    @contextmanager
    def keys_read(self) -> Iterator[None]:
        """Let single keys be read, without their echo, as long as the search is in front."""
        import termios

        before = termios.tcgetattr(0)
        _read_single_keys()
        self.reads_keys = True
        try:
            yield
        finally:
            self.reads_keys = False
            if not self.left and _is_in_front():
                termios.tcsetattr(0, termios.TCSANOW, before)


def fork() -> Terminal | None:
    """Go on in a child process that can leave the terminal; None, in this process, where there is
    none, or it belongs to another one."""
    if not _has_terminal() or threading.active_count() > 1:
        return None
    source, sink = os.pipe()
    front = os.getpid()
    child = os.fork()
    if child:
        os.close(sink)
        _wait(child, source)
    os.close(source)
    return Terminal(front, sink)


def _has_terminal() -> bool:
    return hasattr(os, "fork") and os.isatty(0) and os.isatty(1) and _is_in_front()


def _is_in_front() -> bool:
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # the terminal was closed
        return False


def _read_single_keys() -> None:
    """Have the terminal pass keys on at once. A shell that lets a suspended search go on leaves its
    own mode."""
    import termios
    import tty

    if termios.tcgetattr(0)[3] & termios.ICANON:
        tty.setcbreak(0, termios.TCSANOW)


def _pressed() -> bool:
    ready, _, _ = select.select([0], [], [], 0)
    return bool(ready) and KEY in os.read(0, 64).lower()


def _wait(child: int, pipe: int) -> None:
    """End as the child does, or with 1 once it has left: there is no result yet."""
    import termios

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    before = termios.tcgetattr(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the child, too
    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGHUP, pass_on)
    has_left = os.read(pipe, 1) == KEY
    code = 1 if has_left else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(termios.error):
        termios.tcsetattr(0, termios.TCSANOW, before)
    os._exit(code if code >= 0 else 128 - code)
