"""The command that installs an extra of hpo into the Python at hand."""

from __future__ import annotations

import json
import os
import shlex
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

DISTRIBUTION = "hpo-vision"
"""The name of the distribution; the package and the command are called hpo."""


def install_command(extra: str) -> str:
    """Return the shell command that adds `extra` to this installation, from where hpo itself was
    installed: a clone, a folder, a repository, or the package index."""
    return f"{_pip()} install {_requirement(extra, _origin())}"


def _pip() -> str:
    """Return pip as the user can call it: by its bare name in an active virtual environment."""
    active = os.environ.get("VIRTUAL_ENV")
    if active and Path(active).resolve() == Path(sys.prefix).resolve():
        return "pip"
    return f"{shlex.quote(sys.executable)} -m pip"


def _origin() -> dict[str, Any]:
    """Return what the installer has recorded about the origin (direct_url.json of PEP 610); empty
    for the package index. A clone that is run without being installed counts as one in place."""
    try:
        recorded = distribution(DISTRIBUTION).read_text("direct_url.json")
    except PackageNotFoundError:
        root = Path(__file__).resolve().parents[1]
        return {"url": root.as_uri(), "dir_info": {"editable": True}}
    origin: dict[str, Any] = json.loads(recorded) if recorded else {}
    return origin


def _requirement(extra: str, origin: dict[str, Any]) -> str:
    url = origin.get("url", "")
    if "vcs_info" in origin:
        return f"'{DISTRIBUTION}[{extra}] @ {origin['vcs_info']['vcs']}+{url}'"
    folder = Path(unquote(urlsplit(url).path))
    if "dir_info" not in origin or not folder.is_dir():
        return f"'{DISTRIBUTION}[{extra}]'"
    place = "." if folder == Path.cwd() else str(folder)
    in_place = "-e " if origin["dir_info"].get("editable") else ""
    return in_place + shlex.quote(f"{place}[{extra}]")
