"""The dashboard in a process of its own, beside a search."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import IO, Any

from hpo.dashboard.credentials import from_environment
from hpo.dashboard.rules import Settings
from hpo.dashboard.serve import serve
from hpo.errors import HpoError, InputError
from hpo.storage.db import Database, connect
from hpo.storage.optuna_rdb import create_schema

STOP_S = 10.0


def start_beside(database: Database, port: int = 0) -> tuple[str, Callable[[], None]]:
    """Serve from a process of its own, on loopback; returns the address and what ends it.

    The process ends with this one, however that dies: it reads a pipe that closes then. The storage
    URL goes there by its environment, since it may hold a password; so do the dashboard's own
    password and token. Raises InputError as `serve` and `from_environment`.
    """
    create_schema(database)
    log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
    child = subprocess.Popen(
        [sys.executable, "-m", "hpo.dashboard", str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, "HPO_STORAGE": database.secret_url},
        start_new_session=True,  # Ctrl-C in the terminal is for the search
    )
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        reason = _last_line(log) or "it ended without a word"
        _end(child, log)
        raise HpoError(f"the dashboard did not start: {reason}")
    answer = json.loads(line)
    if "error" in answer:
        _end(child, log)
        raise InputError(answer["error"])
    return answer["address"], lambda: _end(child, log)


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _end(child: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """Close the pipe that it waits on; kill it if it does not heed that."""
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        pipe.close()
    try:
        child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    log.close()


def main(port: int) -> None:
    """The process of `start_beside`: one line of JSON says the address or the error."""

    def say(**answer: Any) -> None:
        print(json.dumps(answer), flush=True)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        database = connect(os.environ["HPO_STORAGE"])
        settings = Settings(from_environment(os.environ))
        serve(database, settings, port=port, ready=lambda address: say(address=address))
    except HpoError as error:
        say(error=str(error))
