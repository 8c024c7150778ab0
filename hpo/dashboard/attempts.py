"""Who has to wait before the next password: wrong ones cost time, and block no thread.

A client has FREE wrong ones, then waits 1, 2, 4, ... seconds. All clients together have a budget
that fills up again slowly, against guesses from many addresses; while it is spent, nobody new gets
in by password. Sessions and the token go on.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

FREE = 5
LONGEST_S = 300.0
FORGOTTEN_S = 3600.0
TOGETHER = 60
TOGETHER_S = 5.0  # until one of TOGETHER comes back
MOST = 10_000  # clients remembered


@dataclass
class _Client:
    wrong: int
    tried: float

    def wait_s(self, now: float) -> float:
        if self.wrong < FREE:
            return 0.0
        pause_s = min(LONGEST_S, 2.0 ** min(self.wrong - FREE, 10))
        return max(0.0, self.tried + pause_s - now)


class Attempts:
    """Counts tries; `begin` before a password is looked at, `succeeded` after a right one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._clients: dict[str, _Client] = {}  # the latest last
        self._left, self._filled = float(TOGETHER), clock()

    def begin(self, address: str) -> float:
        """Seconds that `address` has to wait; 0: it may try, and that counts as wrong for now."""
        key = client_of(address)
        with self._lock:
            now = self._clock()
            self._refill(now)
            client = self._clients.pop(key, None)
            if client is None or now - client.tried > FORGOTTEN_S:
                client = _Client(0, now)
            wait_s = client.wait_s(now) or max(0.0, 1.0 - self._left) * TOGETHER_S
            if not wait_s:
                client.wrong, client.tried = client.wrong + 1, now
                self._left -= 1.0
            if client.wrong:
                self._clients[key] = client
            if len(self._clients) > MOST:
                del self._clients[next(iter(self._clients))]
            return wait_s

    def succeeded(self, address: str) -> None:
        with self._lock:
            self._clients.pop(client_of(address), None)
            self._left = min(TOGETHER, self._left + 1.0)

    def _refill(self, now: float) -> None:
        self._left = min(TOGETHER, self._left + (now - self._filled) / TOGETHER_S)
        self._filled = now


def client_of(address: str) -> str:
    """Whom an address stands for: of IPv6 the /64, which one client has to itself."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
