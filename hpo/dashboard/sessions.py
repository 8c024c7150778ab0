"""Who is logged in: random tokens, kept in memory, so that a restart logs everybody out."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable

IDLE_S = 12 * 3600.0
LONGEST_S = 7 * 24 * 3600.0
MOST = 1000


class Sessions:
    """Open sessions by a hash of their token: not even the memory holds what a cookie holds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[bytes, tuple[float, float]] = {}  # began and last seen, in this order

    def open(self) -> str:
        """A new session's token. The one not seen for longest makes room."""
        token, now = secrets.token_urlsafe(32), self._clock()
        with self._lock:
            while len(self._open) >= MOST:
                del self._open[next(iter(self._open))]
            self._open[_key(token)] = (now, now)
        return token

    def knows(self, token: str) -> bool:
        """Whether the session is open; it then stays so for another IDLE_S."""
        key, now = _key(token), self._clock()
        with self._lock:
            began, seen = self._open.pop(key, (-LONGEST_S, -IDLE_S))
            if now - seen >= IDLE_S or now - began >= LONGEST_S:
                return False
            self._open[key] = (began, now)
            return True

    def close(self, token: str) -> None:
        with self._lock:
            self._open.pop(_key(token), None)


def _key(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
