"""A password that tests look for in everything that can be seen."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, quote_plus

SECRET = "alpha7@beta8/gam%9"
"""Its parts are looked for as well: a URL that is cut at the wrong place shows them."""

TRACES = {SECRET, quote(SECRET), quote(SECRET, safe=""), quote_plus(SECRET)}
TRACES |= {"alpha7", "beta8", "gam%9", "gam%259"}


def traces_in(text: str) -> set[str]:
    return {trace for trace in TRACES if trace in text}


def traces_in_files(folder: Path) -> dict[str, set[str]]:
    """Files under `folder` that show something of it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = {str(path): traces_in(path.read_text(errors="replace")) for path in files}
    return {path: traces for path, traces in found.items() if traces}
