"""Storage URLs: what they may be, where their password comes from, how they are shown.

What stands after `sqlite:///` is the path as it is, also with a % in it. A file in WAL mode is read
with the help of two others, -wal and -shm, which SQLite makes beside it: where it may make none, it
reads those of a process that is writing there, and where there are none, nobody writes.

A password never needs to stand in argv, which every user of a machine can read: it may be in
HPO_STORAGE, in a file named by HPO_STORAGE_PASSWORD_FILE (as Docker and Kubernetes hand secrets
out), or where the drivers look by themselves (PostgreSQL: PGPASSWORD, ~/.pgpass; MySQL:
`?read_default_file=`).
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from hpo.errors import StorageError
from hpo.paths import Home
from hpo.redaction import keep_secret

PREFIX = "sqlite:///"
MODES = ("ro", "rw", "rwc")
OPTIONS = ("timeout", "mode", "immutable", "uri")
"""What may stand after `?`; `mode` and `immutable` as in SQLite's own URIs."""
TRUE = ("1", "true", "yes", "on")
LIKE_A_FILE = re.compile(r"[/.~]|[^:]*\.(db\d?|sqlite\d?)$")
WINDOWS = re.compile(r"[A-Za-z]:[\\/]")


def with_file(text: str, url: URL) -> URL:
    """Return `url`, which `text` was parsed to, with the absolute path of its file, as it stands
    there.

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
    """Return path and options of SQLite's `file:PATH?OPTIONS`, where % is an escape."""
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
    """Return a URL for `text`, which is none, where it is the path of a file or nearly a URL of
    one; None where it may be anything else, with a password in it."""
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
    """Return whether the file is there and this process may not write it, or nothing beside it."""
    if url.query.get("mode") == "ro" or url.query.get("immutable") in TRUE:
        return True
    path = Path(str(url.database))
    return path.exists() and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK))


def is_special(url: URL) -> bool:
    """Return whether SQLite is told more than the path."""
    return "mode" in url.query or may_only_be_read(url)


def has_writer(url: URL) -> bool:
    """Return whether a process has the file open that may write, or left changes beside it."""
    wal = Path(f"{url.database}-wal")
    return wal.exists() and (wal.stat().st_size > 0 or Path(f"{url.database}-shm").exists())


def connect(url: URL, timeout_s: float) -> sqlite3.Connection:
    """Return a connection, which waits so long for others unless the URL says otherwise; to a file
    that may only be read as it stands there at this moment.

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


DRIVERS = {
    **dict.fromkeys(("sqlite", "sqlite+pysqlite"), "sqlite"),
    **dict.fromkeys(("postgresql", "postgres", "postgresql+psycopg"), "postgresql+psycopg"),
    **dict.fromkeys(("mysql", "mariadb", "mysql+pymysql", "mariadb+pymysql"), "mysql+pymysql"),
}
"""What a URL may begin with, and the driver that is used: one for each database."""

EXTRAS = {"postgresql": "postgres", "mysql": "mysql"}
EXAMPLES = "sqlite:///hpo.db, postgresql+psycopg://USER@HOST/NAME, mysql+pymysql://USER@HOST/NAME"
PASSWORD_FILE = "HPO_STORAGE_PASSWORD_FILE"

PASSWORD_OPTIONS = ("password", "passwd")
SECRET_OPTIONS = (*PASSWORD_OPTIONS, "sslpassword")
HARMLESS_OPTIONS = {
    *("host", "port", "unix_socket", "charset", "connect_timeout", "application_name", "service"),
    *("sslmode", "sslrootcert", "sslcert", "sslkey", "ssl_ca", "ssl_cert", "ssl_key"),
    *("read_default_file", "read_default_group", "target_session_attrs", "timeout", "mode", "uri"),
    "prepare_threshold",
}
"""Options after `?` that may be shown; others may hold a secret."""


def parse(text: str) -> URL:
    """Return the URL with its driver and its password, wherever that comes from.

    Raises StorageError, never with the text itself, for what is no URL, for another database, and
    for an ambiguous password.
    """
    _remember(text)
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        if likely := suggestion(text):
            raise StorageError(f"{text}: not a storage URL; write {likely}") from None
        raise StorageError(
            "the storage URL is not one (its text is not shown, it may hold a password); "
            f"examples: {EXAMPLES}"
        ) from None
    url = _with_driver(url)
    if url.get_backend_name() == "sqlite":
        return with_file(text, url)
    _refuse_ambiguous(text, url)
    threshold = str(url.query.get("prepare_threshold", "none"))
    if threshold != "none" and not threshold.isdecimal():
        raise StorageError(
            f"prepare_threshold={threshold} in the storage URL: allowed are none (behind a pooler "
            "that pools by transaction) and whole numbers, of runs before a statement is prepared"
        )
    return _with_password(url)


def _remember(text: str) -> None:
    """Hide from now on whatever may be a password in `text`, right or wrong."""
    scheme, _, rest = text.partition("://")
    if scheme.startswith("sqlite"):
        return
    userinfo = rest.rpartition("@")[0]
    _, _, password = userinfo.partition(":")
    found = [password, password.partition("@")[0]]
    found += [value for name, value in parse_qsl(rest.partition("?")[2]) if name in SECRET_OPTIONS]
    for secret in found:
        if secret:
            keep_secret(secret)


def _with_driver(url: URL) -> URL:
    driver = DRIVERS.get(url.drivername)
    if driver is None:
        near = difflib.get_close_matches(url.drivername, DRIVERS, n=1)
        write = f"write {near[0]}://..., or another of" if near else "the storage URL may be"
        raise StorageError(f"no driver for {url.drivername!r} in hpo; {write}: {EXAMPLES}")
    return url.set(drivername=driver)


def _refuse_ambiguous(text: str, url: URL) -> None:
    """Refuse an @ in a password: its rest would be taken for a host and shown."""
    user_and_more = text.partition("://")[2]
    after_user = re.sub(r"^[^:/]*:", "", user_and_more)
    split = "@" in (url.host or "") or "@" in (url.database or "")
    if split or (url.password is not None and after_user.count("@") > 1):
        raise StorageError(
            "the storage URL has an @ too many (its text is not shown): inside a password write "
            f"%40 for @ and %2F for /, or leave it out and name a file with {PASSWORD_FILE}"
        )


def _with_password(url: URL) -> URL:
    """Return the password from the options, where some drivers accept one, or from the file."""
    for name in PASSWORD_OPTIONS:
        if name in url.query:
            given = url.query[name]
            url = url.set(password=given if isinstance(given, str) else given[-1])
    url = url.difference_update_query(PASSWORD_OPTIONS)
    if url.password is None and os.environ.get(PASSWORD_FILE):
        url = url.set(password=_read_password(Path(os.environ[PASSWORD_FILE])))
    if url.password is not None:
        keep_secret(str(url.password))
    return url


def _read_password(path: Path) -> str:
    try:
        password = path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise StorageError(f"{PASSWORD_FILE}={path}: {reason}") from None
    if not password:
        raise StorageError(f"{PASSWORD_FILE}={path}: empty; it is to hold the password")
    return password


def has_password(text: str) -> bool:
    """Return whether a password stands in the URL's text itself."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        return False
    return url.password is not None or any(name in url.query for name in PASSWORD_OPTIONS)


def show(url: URL) -> str:
    """Return the URL for messages: without its password, and without options that may hold a
    secret."""
    if url.get_backend_name() == "sqlite":
        return as_text(url)
    safe = {name: value if name in HARMLESS_OPTIONS else "..." for name, value in url.query.items()}
    return url.set(query=safe).render_as_string(hide_password=True)


def as_text(url: URL) -> str:
    """Return the URL with its password, which `parse` understands: of SQLite with the path as it
    is."""
    if url.get_backend_name() != "sqlite":
        return url.render_as_string(hide_password=False)
    options = f"?{urlencode(url.query)}" if url.query else ""
    return f"{url.drivername}:///{url.database}{options}"


def for_others(url: URL) -> str:
    """Return the URL for machines that have the password from elsewhere. Raises StorageError for
    options that may hold a secret, which cannot go along."""
    secret = [name for name in url.query if name not in HARMLESS_OPTIONS]
    if secret:
        raise StorageError(
            f"{show(url)}: {', '.join(secret)} may hold a secret that others would see; leave it "
            "out of the URL"
        )
    return show(url._replace(password=None))  # `set` takes None for "as it is"


def usual() -> str:
    """Return the storage that a command uses which is not told another."""
    return os.environ.get("HPO_STORAGE") or Home.default().storage


def option(url: URL, otherwise: str) -> str:
    """Return what a printed command needs to reach `url`: nothing where it uses that `otherwise`,
    and never a secret."""
    if _leads_to(otherwise, url):
        return ""
    bare = show(url._replace(password=None))
    return f" --storage {shlex.quote(bare)}" if _leads_to(bare, url) else " --storage URL"


def _leads_to(text: str, url: URL) -> bool:
    try:
        return parse(text) == url
    except StorageError:
        return False
