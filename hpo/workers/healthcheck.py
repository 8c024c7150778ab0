"""Health check of a container: is the worker of this host alive?

    python -m hpo.workers.healthcheck [SECONDS]

Exit code 0 if a worker of this host has left a sign within SECONDS, else 1. Every step of a
training leaves one, and so does every look for a trial. 900 unless given: more than a study's own
`stall_timeout_s`, after which others may continue the trial of a worker that hangs.
"""

from __future__ import annotations

import re
import socket
import sys
import time

from hpo.paths import Home

USUAL_S = 900.0


def host() -> str:
    """Return this host's name as the ids of its workers begin; in a container its own name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname()[:32]).strip("-") or "host"


def is_alive(home: Home, name: str, now: float, within_s: float) -> bool:
    """Return whether a worker of the host `name` left a sign in the `within_s` seconds before
    `now`."""
    return any(now - sign.stat().st_mtime <= within_s for sign in home.signs(name))


def main(arguments: list[str]) -> int:
    """Return the exit code: 0 where a worker is alive, else 1."""
    within_s = float(arguments[0]) if arguments else USUAL_S
    return 0 if is_alive(Home.default(), host(), time.time(), within_s) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
