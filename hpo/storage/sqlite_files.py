"""SQLite's files: how a storage URL names one, and how it is opened where it may only be read.

What stands after `sqlite:///` is the path as it is, also with a % in it. A file in WAL mode is read
with the help of two others, -wal and -shm, which SQLite makes beside it: where it may make none, it
reads those of a process that is writing there, and where there are none, nobody writes.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode

from sqlalchemy.engine import URL

from hpo.errors import StorageError

PREFIX = "sqlite:///"
MODES = ("ro", "rw", "rwc")
OPTIONS = ("timeout", "mode", "immutable", "uri")
"""What may stand after `?`; `mode` and `immutable` as in SQLite's own URIs."""
TRUE = ("1", "true", "yes", "on")
LIKE_A_FILE = re.compile(r"[/.~]|[^:]*\.(db\d?|sqlite\d?)$")
WINDOWS = re.compile(r"[A-Za-z]:[\\/]")


def with_file(text: str, url: URL) -> URL:
    """`url`, which `text` was parsed to, with the absolute path of its file, as it stands there.

    Raises StorageError for memory, which no two processes share, for options that are unknown, and
    for what names another file than one would think.
    """
    rest = text.partition("://")[2]
    before, _, path = rest.partition("?")[0].partition("/")
    if before:
        meant = "" if "@" in before else f"; write {PREFIX}{before}{'/' * bool(path)}{path}"
        raise StorageError(f"{PREFIX}... has three slashes: there is no host{meant}")
    options = _options(rest.partition("?")[2])
    if path.startswith("file:"):
        path, options = _of_uri(path, options)
    if not path or path == ":memory:" or options.get("mode") == "memory":
        raise StorageError(f"{text}: a database in memory cannot be shared by workers; name a file")
    for name in options.keys() - set(OPTIONS):
        raise StorageError(f"{text}: unknown option {name!r}; allowed: {', '.join(OPTIONS)}")
    if not re.fullmatch(r"\d+(\.\d+)?", options.get("timeout", "0")):
        raise StorageError(f"{text}: timeout={options['timeout']}: seconds are needed")
    if options.get("mode", "rwc") not in MODES:
        raise StorageError(f"{text}: mode={options['mode']}: allowed: {', '.join(MODES)}")
    _refuse_elsewhere(path)
    kept = {name: value for name, value in options.items() if name != "uri"}
    return url.set(database=str(Path(path).absolute()), query=kept)


def _options(text: str) -> dict[str, str]:
    return dict(parse_qsl(text, keep_blank_values=True))


def _of_uri(path: str, options: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Path and options of SQLite's `file:PATH?OPTIONS`, where % is an escape."""
    plain = unquote(re.sub(r"^file:(//(localhost)?(?=/))?", "", path))
    if options.get("uri", "").lower() not in TRUE:
        raise StorageError(
            f"{PREFIX}{path}: a URI of SQLite's ends with uri=true after ? or &; or write "
            f"{PREFIX}{plain}"
        )
    return plain, dict(options)


def _refuse_elsewhere(path: str) -> None:
    """Raise StorageError for paths that only a shell, or another system, knows."""
    if path.startswith("~"):
        home = Path(path).expanduser()
        raise StorageError(f"{PREFIX}{path}: ~ is a shell's; write {PREFIX}{home}")
    if os.name != "nt" and WINDOWS.match(path):
        raise StorageError(f"{PREFIX}{path}: a path of Windows, and this is not; name a file here")
    if path.endswith("/") or Path(path).is_dir():
        inside = path.rstrip("/") + "/hpo.db"
        raise StorageError(f"{PREFIX}{path}: a folder; name a file, such as {PREFIX}{inside}")


def suggestion(text: str) -> str | None:
    """A URL for `text`, which is none, where it is the path of a file or nearly a URL of one; None
    where it may be anything else, with a password in it."""
    if "@" in text:
        return None
    found = re.fullmatch(r"(?:sqlite3?|file):/*(.*)", text)
    path = found[1] if found else text
    if found and re.match(r"(?:sqlite3?|file):/(?!//)", text):
        path = f"/{path}"  # an absolute one
    if not path or not (found or WINDOWS.match(path) or LIKE_A_FILE.match(path)):
        return None
    return PREFIX + (str(Path(path).expanduser()) if path.startswith("~") else path)


def may_only_be_read(url: URL) -> bool:
    """Whether the file is there and this process may not write it, or nothing beside it."""
    if url.query.get("mode") == "ro" or url.query.get("immutable") in TRUE:
        return True
    path = Path(str(url.database))
    return path.exists() and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK))


def is_special(url: URL) -> bool:
    """Whether SQLite is told more than the path."""
    return "mode" in url.query or may_only_be_read(url)


def has_writer(url: URL) -> bool:
    """Whether a process has the file open that may write, or left changes beside it."""
    wal = Path(f"{url.database}-wal")
    return wal.exists() and (wal.stat().st_size > 0 or Path(f"{url.database}-shm").exists())


def connect(url: URL, timeout_s: float) -> sqlite3.Connection:
    """A connection, which waits so long for others unless the URL says otherwise; to a file that
    may only be read as it stands there at this moment.

    Raises StorageError where that is not the whole of it."""
    asked = {key: str(value) for key, value in url.query.items() if key in ("mode", "immutable")}
    if may_only_be_read(url):
        asked["mode"] = "ro"
        if not has_writer(url):
            asked["immutable"] = "1"
        elif not Path(f"{url.database}-shm").exists():
            raise StorageError(
                f"{url.database}: its newest changes are in {url.database}-wal, which cannot be "
                "read without writing; copy both files to a folder of yours"
            )
    return sqlite3.connect(
        f"file:{quote(str(url.database))}?{urlencode(asked)}",
        uri=True,
        timeout=float(str(url.query.get("timeout", timeout_s))),
        check_same_thread=False,
    )
