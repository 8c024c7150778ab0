"""User code named as `module:function`, imported from the user's own folders alone."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from hpo.errors import ConfigError


def load(name: str, key: str) -> Callable[..., Any]:
    """Return the function called `module:function` (see `find`). Raises ConfigError for the field
    `key` if it cannot be imported."""
    try:
        return find(name)
    except Exception as error:  # whatever the user's module raises
        message = f"{name!r} cannot be imported ({describe_error(error)}); it is {search_hint()}"
        raise ConfigError(message, key=key) from error


def find(name: str) -> Callable[..., Any]:
    """Return the function called `module:function`, from the working directory or PYTHONPATH: a
    configuration file must not name a function of the standard library or of an installed package.

    Raises ImportError and TypeError with a message for users, and whatever the module raises while
    it is imported.
    """
    module, _, function = name.partition(":")
    _require_own(module.partition(".")[0])
    value = getattr(importlib.import_module(module), function)
    if not callable(value):
        raise TypeError(f"it is {type(value).__name__}, not a function")
    return value  # type: ignore[no-any-return]


def module_file(module: str) -> Path | None:
    """Return the file of the user's `module`, found as by `find` without running it (except for the
    packages that contain it); None for a package without a file. Raises as `find` does."""
    _require_own(module.partition(".")[0])
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise ModuleNotFoundError(f"there is no {module}")
    return Path(spec.origin) if spec.has_location and spec.origin else None


def _require_own(top: str) -> None:
    """Raise ImportError unless `top` is a module in one of the user's own folders."""
    own = PathFinder.find_spec(top, _folders())
    if own is None:
        raise ModuleNotFoundError(f"there is no {top}.py, and no folder {top}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: nothing of Python's is to be hidden
    importlib.invalidate_caches()
    imported = importlib.util.find_spec(top)
    if imported is None or _places(imported) != _places(own):
        raise ImportError(f"{top} is also the name of an installed module; rename yours")


def describe_error(error: Exception) -> str:
    """Return an exception raised by user code as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def search_hint() -> str:
    """Return in words where `find` searches."""
    return f"looked for in the working directory {Path.cwd()} and on PYTHONPATH"


def _folders() -> list[str]:
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [*(str(Path(one).absolute()) for one in given if one), str(Path.cwd())]


def _places(spec: ModuleSpec) -> set[str]:
    """Return the files of a module; the folders of a package without a file."""
    places = [spec.origin] if spec.has_location else [*(spec.submodule_search_locations or ())]
    return {os.path.realpath(one) for one in places if one}
