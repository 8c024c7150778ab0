"""Workers that start before their study is open.

While `hpo run` still looks at the images and the database, each of its workers imports what it will
need, torch above all, and then waits on its standard input for a line with its id and its log. A
worker whose line never comes, because the study cannot begin or `hpo run` was killed, ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Self

from hpo.workers.process import Child, WorkerCommand

IMPORTED = ("hpo.search.trial", "hpo.workers.worker")
"""Modules that bring all that a worker imports before its first trial."""


class EarlyWorkers:
    """A process for each of some devices that waits to be called; leaving the context ends those
    that were not."""

    def __init__(self, command: WorkerCommand, devices: Sequence[str]) -> None:
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self.waiting = [
            (device, command.start(device, "--early", stdin=pipe, output=nowhere))
            for device in devices
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for _, process in self.waiting:
            process.kill()
            process.communicate()

    def call(self, worker: str, device: str, log: Path) -> Child | None:
        """Let a process that waits for `device` begin as `worker` with its output in `log`; return
        None where none is left."""
        line = json.dumps({"worker": worker, "log": str(log)}).encode() + b"\n"
        for place in [one for one in self.waiting if one[0] == device]:
            self.waiting.remove(place)
            process = place[1]
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as pipe:
                pipe.write(line)
                pipe.flush()
                return process
            process.wait()  # it died; the next one will tell why
        return None


def wait_for_call() -> str:
    """Import what a worker needs, then wait for its line; return its id, its output going to its
    log. Ends the process where no line comes."""
    for name in IMPORTED:
        import_module(name)
    line = sys.stdin.readline()
    if not line:
        raise SystemExit(0)
    called = json.loads(line)
    with Path(called["log"]).open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    return str(called["worker"])
