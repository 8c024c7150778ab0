"""`hpo` on a host whose clock is wrong.

    python -m tests.harness.shifted SECONDS ARGUMENTS...

The clock is shifted for everything in this process that asks Python for the time, Optuna included.
A time zone is set by TZ and PGTZ, as on any host.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from datetime import tzinfo

with contextlib.suppress(ImportError):  # its compiled modules die of a replaced datetime
    import pandas  # noqa: F401

SECONDS = float(sys.argv[1])
_time, _time_ns = time.time, time.time_ns


class Shifted(datetime.datetime):
    """datetime, by the wrong clock."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Shifted:
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls) -> Shifted:
        return cls.now(datetime.UTC).replace(tzinfo=None)


time.time = lambda: _time() + SECONDS
time.time_ns = lambda: _time_ns() + int(SECONDS * 1e9)
datetime.datetime = Shifted  # type: ignore[misc]

from hpo.cli.main import main  # noqa: E402  (after the clock)

if __name__ == "__main__":
    main(sys.argv[2:])
