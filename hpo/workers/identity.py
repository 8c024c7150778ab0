"""Which process a worker is, so that a later run can tell for certain that it is gone.

A process id alone says nothing: ids are given out again, and in a container or on another host they
are other processes. So it goes with the boot of the machine, the namespace of the ids, the user
(whom the system may not let see others' processes), and when the process started. Linux tells all
of them. Elsewhere nobody is ever known to be gone, and what the dead held is free when their lease
runs out.
"""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")


def identity() -> str:
    """This process, for its worker's row; empty where the system does not say."""
    place, started = _place(), _started(os.getpid())
    return f"{place} {os.getpid()} {started}" if place and started else ""


def is_gone(process: str) -> bool:
    """Whether the process of that identity lived on this boot of this machine, where we would see
    it, and does not live any more."""
    found = process.rsplit(" ", 2)
    if len(found) != 3 or found[0] != _place():
        return False
    _, pid, started = found
    return _started(int(pid)) != started


def _place() -> str | None:
    """The boot of this machine, the namespace of process ids, and the user."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {(PROC / 'self/ns/pid').readlink()} {os.getuid()}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a living process started, in ticks since the boot; None for one that is gone."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The name, in brackets, may hold anything; after it come state (3rd field), ..., start (22nd).
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
