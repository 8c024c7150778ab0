"""How a module of scenes is run: `python -m MODULE SCENE URL [TIMES]`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from tests.harness.swarm import Child

Scene = Callable[..., dict[str, Any]]


def run_scene(scenes: Iterable[Scene]) -> None:
    """The scene that the command line names; prints what it returns, with its seconds."""
    torch.set_num_threads(1)
    scene = {scene.__name__: scene for scene in scenes}[sys.argv[1]]
    Path(os.environ["HPO_HOME"]).mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    told = scene(sys.argv[2], *map(int, sys.argv[3:]))
    print(json.dumps({**told, "seconds": time.monotonic() - began}))


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(i)` returns, as JSON, in each of `count` processes that are let go at once; None
    of one that died."""
    gate_r, gate_w = os.pipe()
    started = []
    for i in range(count):
        answer_r, answer_w = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(gate_w)
                os.read(gate_r, 1)  # returns for all at once, when the parent closes its end
                with os.fdopen(answer_w, "w") as out:
                    json.dump(work(i), out)
                code = 0
            finally:
                os._exit(code)
        os.close(answer_w)
        started.append((Child(pid), answer_r))
    os.close(gate_r)
    os.close(gate_w)
    answers = []
    for child, answer_r in started:
        with os.fdopen(answer_r) as told:
            text = told.read()
        answers.append(json.loads(text) if child.wait() == 0 else None)
    return answers
