"""`hpo` that dies by SIGKILL right after the Nth call of something:

python -m tests.harness.dying {share,record} N COMMAND...
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from hpo.cli.main import main
from hpo.search.sync import Checkpoints
from hpo.storage import leases

POINTS: dict[str, tuple[Any, str]] = {
    "share": (Checkpoints, "share"),  # the checkpoint is in the artifacts, the epoch not recorded
    "record": (leases, "record_epochs"),  # recorded, and its predecessor not removed yet
}


def dies_after(owner: Any, name: str, calls: int) -> None:
    original, left = getattr(owner, name), calls

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        done = original(*args, **kwargs)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(owner, name, call)


if __name__ == "__main__":
    dies_after(*POINTS[sys.argv[1]], int(sys.argv[2]))
    main(sys.argv[3:])
