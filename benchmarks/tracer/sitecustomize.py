"""Notes when a process passes the functions in MARKS; Python imports this module at its start.

`benchmarks/startup.py` puts this folder on PYTHONPATH and a folder for the notes into TRACE. Each
process leaves a file there, named by its id: its command, then a line each with a name, the wall
clock (seconds since 1970) and the processor time of the process (seconds).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

MARKS = {
    "hpo.cli.main": ("main",),
    "hpo.api.creation": ("open_study",),
    "hpo.workers.process": ("Child.__init__",),
    "hpo.workers.spawn": ("EarlyWorkers.call",),
    "hpo.workers.worker": ("Worker.run",),
    "hpo.data.dataset": ("open_data",),
    "hpo.training.device": ("resolve",),
    "hpo.training.learner": ("Learner.step",),
}
"""Functions by module; a module itself is noted when it has been imported."""


def note(name: str) -> None:
    path = Path(os.environ["TRACE"]) / str(os.getpid())
    with path.open("a") as file:
        file.write(json.dumps([name, time.time(), time.process_time()]) + "\n")


def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        note(f"> {name}")
        try:
            return function(*args, **options)
        finally:
            note(f"< {name}")

    return call


def first_noted(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
    """Of a training, not of a measurement, which counts no means."""
    seen = False

    @wraps(step)
    def call(*args: Any, **options: Any) -> Any:
        nonlocal seen
        if seen or not (len(args) > 3 or options.get("means")):
            return step(*args, **options)
        seen = True
        return noted(name, step)(*args, **options)

    return call


class Tracing:
    """Wraps functions of a module as soon as it is imported."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if name not in MARKS:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def traced(module: ModuleType) -> None:
            execute(module)
            for mark in MARKS[name]:
                owner: Any = module
                *parts, last = mark.split(".")
                for part in parts:
                    owner = getattr(owner, part, None)
                if hasattr(owner, last):
                    wrap = first_noted if mark == "Learner.step" else noted
                    setattr(owner, last, wrap(mark, getattr(owner, last)))
            note(f"< {name}")

        spec.loader.exec_module = traced  # type: ignore[method-assign]
        return spec


if "TRACE" in os.environ and "hpo" in sys.orig_argv:
    note(" ".join(sys.orig_argv))
    sys.meta_path.insert(0, Tracing)  # type: ignore[arg-type]
