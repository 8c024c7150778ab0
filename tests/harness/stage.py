"""Scenes in processes of their own, forked from one that has imported what they need: importing it
takes five seconds of a processor, most scenes take less.

    python -m tests.harness.stage

Reads orders from standard input, one JSON object a line, and answers each with the exit code of its
scene: it runs the module `module` with `arguments`, in `environment`, and leaves what that prints
in the files `out` and `err`.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def play(module: str, *arguments: str, folder: Path) -> dict[str, Any]:
    """Play `python -m tests.harness.MODULE ARGUMENTS...` with its output in files in `folder`;
    return the JSON object of its last line."""
    out, err = folder / f"{module}.out", folder / f"{module}.err"
    order = {
        "module": f"tests.harness.{module}", "arguments": arguments,
        "environment": dict(os.environ), "out": str(out), "err": str(err),
    }  # fmt: skip
    stage = _stage()
    assert stage.stdin is not None
    assert stage.stdout is not None
    try:
        print(json.dumps(order), file=stage.stdin, flush=True)
        code = stage.stdout.readline().strip()
    except BaseException:  # the time is up: the next order is not for one that still plays
        stage.kill()
        stage.wait()
        _stage.cache_clear()
        raise
    assert code == "0", err.read_text(errors="replace")[-4000:]
    found: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
    return found


@cache
def _stage() -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.harness.stage"], cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    atexit.register(started.communicate)
    return started


def serve() -> None:
    """Fork a process for each order. It is single-threaded, so that the scene is a fresh one."""
    import tests.harness.swarm
    import tests.harness.verdict  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _perform(**order)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _perform(
    module: str, arguments: list[str], environment: dict[str, str], out: str, err: str
) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment | {"OMP_NUM_THREADS": "1"})
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve()
