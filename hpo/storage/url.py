"""Storage URLs: what they may be, where their password comes from, how they are shown.

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
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from hpo.errors import StorageError
from hpo.paths import Home
from hpo.redaction import keep_secret
from hpo.storage import sqlite_files

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
    """The URL with its driver and its password, wherever that comes from.

    Raises StorageError, never with the text itself, for what is no URL, for another database, and
    for an ambiguous password.
    """
    _remember(text)
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        if likely := sqlite_files.suggestion(text):
            raise StorageError(f"{text}: not a storage URL; write {likely}") from None
        raise StorageError(
            "the storage URL is not one (its text is not shown, it may hold a password); "
            f"examples: {EXAMPLES}"
        ) from None
    url = _with_driver(url)
    if url.get_backend_name() == "sqlite":
        return sqlite_files.with_file(text, url)
    _refuse_ambiguous(text, url)
    threshold = str(url.query.get("prepare_threshold", "none"))
    if threshold != "none" and not threshold.isdecimal():
        raise StorageError(
            f"prepare_threshold={threshold} in the storage URL: allowed are none (behind a pooler "
            "that pools by transaction) and whole numbers, of runs before a statement is prepared"
        )
    return _with_password(url)


def _remember(text: str) -> None:
    """Whatever may be a password in `text`, right or wrong, is not shown from now on."""
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
    """An @ in a password would end it, and its rest would be taken for a host and shown."""
    user_and_more = text.partition("://")[2]
    after_user = re.sub(r"^[^:/]*:", "", user_and_more)
    split = "@" in (url.host or "") or "@" in (url.database or "")
    if split or (url.password is not None and after_user.count("@") > 1):
        raise StorageError(
            "the storage URL has an @ too many (its text is not shown): inside a password write "
            f"%40 for @ and %2F for /, or leave it out and name a file with {PASSWORD_FILE}"
        )


def _with_password(url: URL) -> URL:
    """The password from the options, where some drivers accept one, or from the file."""
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
    """Whether a password stands in the URL's text itself."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        return False
    return url.password is not None or any(name in url.query for name in PASSWORD_OPTIONS)


def show(url: URL) -> str:
    """The URL for messages: without its password, and without options that may hold a secret."""
    if url.get_backend_name() == "sqlite":
        return as_text(url)
    safe = {name: value if name in HARMLESS_OPTIONS else "..." for name, value in url.query.items()}
    return url.set(query=safe).render_as_string(hide_password=True)


def as_text(url: URL) -> str:
    """The URL with its password, which `parse` understands: of SQLite with the path as it is."""
    if url.get_backend_name() != "sqlite":
        return url.render_as_string(hide_password=False)
    options = f"?{urlencode(url.query)}" if url.query else ""
    return f"{url.drivername}:///{url.database}{options}"


def for_others(url: URL) -> str:
    """The URL for machines that have the password from elsewhere. Raises StorageError for options
    that may hold a secret, which cannot go along."""
    secret = [name for name in url.query if name not in HARMLESS_OPTIONS]
    if secret:
        raise StorageError(
            f"{show(url)}: {', '.join(secret)} may hold a secret that others would see; leave it "
            "out of the URL"
        )
    return show(url._replace(password=None))  # `set` takes None for "as it is"


def usual() -> str:
    """The storage that a command uses which is not told another."""
    return os.environ.get("HPO_STORAGE") or Home.default().storage


def option(url: URL, otherwise: str) -> str:
    """What a printed command needs to reach `url`: nothing where it uses that `otherwise`, and
    never a secret."""
    if _leads_to(otherwise, url):
        return ""
    bare = show(url._replace(password=None))
    return f" --storage {shlex.quote(bare)}" if _leads_to(bare, url) else " --storage URL"


def _leads_to(text: str, url: URL) -> bool:
    try:
        return parse(text) == url
    except StorageError:
        return False
