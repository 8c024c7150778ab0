"""A driver's exception as an error of ours: is the database away for now, or is this for good?

Told by codes, not by words, which servers translate: SQLSTATE, SQLite's result codes, MySQL's error
numbers. Only where PostgreSQL refuses a new connection does its client library keep the code to
itself; there whatever is not known to be for good is taken for an outage.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, OperationalError

from hpo.errors import StorageAway, StorageError
from hpo.files import disk_of
from hpo.storage.url import show

AWAY_CLASSES = {
    "08",  # connection exception
    "40",  # transaction rollback: deadlock, serialization failure
    "53",  # insufficient resources: disk full, out of memory, too many connections
    "57",  # operator intervention: shut down, starting up, crashed, cancelled
    "58",  # system error: input and output
}
"""Classes of SQLSTATE, its first two characters."""
AWAY_STATES = {
    "25006",  # read-only transaction: after a fail-over, until the new server takes writes
    "25P03",  # we were idle in a transaction for too long (stopped, or asleep)
    "25P04",  # transaction timeout
    "55P03",  # lock timeout
}
AWAY_SQLITE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_PROTOCOL,
}
"""Primary result codes; the byte above has the details. A full disk is FULL or IOERR."""
AWAY_MYSQL = {
    *(1021, 1037, 1041, 1114),  # disk or table full, out of memory
    *(1040, 1203, 1226),  # too many connections
    *(1053, 1077, 1079, 1080),  # shutting down
    *(1205, 1213),  # lock timeout, deadlock
    *(1290, 1792, 1836),  # read-only, as after a fail-over
    *(2002, 2003, 2005, 2006, 2012, 2013, 2055),  # cannot connect, gone away, connection lost
    *(1152, 1158, 1159, 1160, 1161, 1927, 3024, 4031),  # connection broken, killed or too slow
}
REFUSED_FOR_GOOD = (
    "does not exist",
    "authentication failed",
    "no password supplied",
    "pg_hba.conf",
    "not permitted to log in",
)
"""What PostgreSQL says to a newcomer whom it will not let in later either (in English)."""


PREPARED = {"26000", "42P05"}
"""A prepared statement is not there, or is there already: the session is not the one it was."""


def as_storage_error(error: DBAPIError, url: URL) -> StorageError:
    """`error` of the database at `url`, in words and without its password."""
    kind = StorageAway if is_away(error) else StorageError
    return kind(f"{show(url)}: {words(error.orig)}; {_advice(error.orig, url)}")


def words(fault: BaseException | None) -> str:
    """A driver's message in one line; PyMySQL's arguments are a number and the message."""
    text = str(fault.args[-1] if fault is not None and fault.args else fault).strip()
    return next(iter(text.splitlines()), type(fault).__name__)


def in_chain(error: BaseException | None) -> DBAPIError | None:
    """The driver's fault behind `error`: Optuna wraps it, SQLAlchemy follows it by others."""
    while error is not None and not isinstance(error, DBAPIError):
        error = error.__cause__ or error.__context__
    return error


def is_away(error: DBAPIError) -> bool:
    """Whether the same call may succeed later."""
    if error.connection_invalidated:
        return True
    orig: Any = error.orig
    if isinstance(orig, sqlite3.Error):
        return _sqlite_code(orig) in AWAY_SQLITE
    state = getattr(orig, "sqlstate", None)
    if state is not None:
        return state in AWAY_STATES or state[:2] in AWAY_CLASSES
    number = orig.args[0] if orig is not None and orig.args else None
    if isinstance(number, int):
        return number in AWAY_MYSQL
    refused = any(words in str(orig) for words in REFUSED_FOR_GOOD)
    return isinstance(error, OperationalError) and not refused


def _sqlite_code(error: sqlite3.Error) -> int:
    """The primary result code; 0 for what the module itself complains about."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _advice(error: BaseException | None, url: URL) -> str:
    if getattr(error, "sqlstate", None) in PREPARED:
        return "behind a pooler that pools by transaction end its URL with ?prepare_threshold=none"
    if not isinstance(error, sqlite3.Error):
        return "check --storage or HPO_STORAGE, and that the database is running"
    code = _sqlite_code(error)
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return f"{_disk(url)}: free some space there, nothing is lost"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "another process is writing, or was stopped while it wrote"
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        return "check that its folder exists and may be written"
    return "name another file with --storage"


def _disk(url: URL) -> str:
    try:
        return disk_of(Path(url.database or "."))
    except OSError as error:
        return f"its disk cannot be asked ({error})"
