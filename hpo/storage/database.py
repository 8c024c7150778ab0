"""The database: how every connection is prepared, and which errors are transient.

Told by codes, not by words, which servers translate: SQLSTATE, SQLite's result codes, MySQL's error
numbers. Only where PostgreSQL refuses a new connection does its client library keep the code to
itself; there whatever is not known to be for good is taken for an outage.

SQLite: WAL, a long busy timeout, foreign keys on, and `BEGIN IMMEDIATE` for whatever writes. Stock
transactions start deferred there, so two processes can both read that a trial is theirs to take.
PostgreSQL and MySQL: UTC, READ COMMITTED, a liveness check when the pool gives out a connection,
and limits on how long a dead peer or a stopped process can hold up anybody else.

READ COMMITTED is what the claims are reasoned for, and PostgreSQL's default: each statement sees
what others have committed, so what a worker reads after it waited for a row's lock is the truth of
that moment. MySQL's own default, REPEATABLE READ, would go on showing the snapshot that the
transaction began with (an attempt that has meanwhile been superseded), and its gap locks make
workers wait for rows that they do not touch. Galera's clusters lock rows on one node only, so all
connections must go to the same one.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError, OperationalError

from hpo.errors import StorageError, StorageGone, StorageUnavailable
from hpo.extras import install_command
from hpo.io import disk_of
from hpo.storage import url as sqlite_files
from hpo.storage.url import EXTRAS, as_text, parse, show

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
    """Return `error` of the database at `url`, in words and without its password."""
    kind = StorageUnavailable if is_away(error) else StorageError
    return kind(f"{show(url)}: {words(error.orig)}; {_advice(error.orig, url)}")


def words(fault: BaseException | None) -> str:
    """Return a driver's message in one line; PyMySQL's arguments are a number and the message."""
    text = str(fault.args[-1] if fault is not None and fault.args else fault).strip()
    return next(iter(text.splitlines()), type(fault).__name__)


def in_chain(error: BaseException | None) -> DBAPIError | None:
    """Return the driver's fault behind `error`: Optuna wraps it, SQLAlchemy follows it by
    others."""
    while error is not None and not isinstance(error, DBAPIError):
        error = error.__cause__ or error.__context__
    return error


def is_away(error: DBAPIError) -> bool:
    """Return whether the same call may succeed later."""
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
    """Return the primary result code; 0 for what the module itself complains about."""
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
        return FOLDER
    return "name another file with --storage"


FOLDER = "check that its folder exists and may be written"


def _disk(url: URL) -> str:
    try:
        return disk_of(Path(url.database or "."))
    except OSError as error:
        return f"its disk cannot be asked ({error})"


BUSY_TIMEOUT_S = 60
POSTGRESQL_CONNECT = {
    # A host that swallows packets would hold up a heartbeat for minutes; ten seconds are a third of
    # the usual lease.
    "connect_timeout": 10,
    # A peer that vanished without a word (power, cable, a firewall that forgot us) is found out in
    # a minute when idle, in half a minute when it owes us an answer; the system's own defaults are
    # two hours and a quarter of one.
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # ms
}
"""Parameters of libpq, unless the URL has its own."""
POSTGRESQL_SESSION = {
    "timezone": "'UTC'",
    # Our transactions take milliseconds. A process that is stopped or put to sleep inside one must
    # not hold its row locks for ever: the server ends its session, and it tries again when it
    # wakes up.
    "idle_in_transaction_session_timeout": "'30s'",
    # Longer than that, so that who waits for such a lock gets it; and not for ever.
    "lock_timeout": "'60s'",
}
MYSQL_SESSION = {
    "time_zone": "'+00:00'",
    # What does not fit is an error, as on other databases; some servers would cut it off.
    "sql_mode": "CONCAT_WS(',', @@sql_mode, 'STRICT_TRANS_TABLES')",
    # As for PostgreSQL: an idle session is ended after so many seconds, and gives up its locks,
    # before who waits for one gives up. In the pool it is renewed.
    "wait_timeout": "30",
    "innodb_lock_wait_timeout": "60",
}
_MYSQL_TURN_S = 60
MYSQL_CONNECT = {"connect_timeout": 10, "read_timeout": 120, "write_timeout": 120}
"""PyMySQL would wait for ever for a host that is gone; no answer of ours takes as long."""
NETWORK_FILE_SYSTEMS = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "glusterfs", "beegfs", "9p"),
    *("fuse.sshfs", "fuse.glusterfs"),
}
_ADVISORY_LOCK = 0x68706F  # 'hpo': PostgreSQL's key for the one-time set-up

Pause = Callable[[float], None]
"""Waits so many seconds; raises to give up."""


class Database:
    """A database that holds studies; `read()` and `write()` give transactions."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self._mode = threading.local()
        self._file: os.stat_result | None = None
        """SQLite's, as it was first opened. The pool keeps it open, so that no other file can get
        its inode number."""
        options = engine_options(url)
        if not self.is_sqlite:
            options |= {"pool_pre_ping": True, "pool_size": 2, "max_overflow": 0}
            options["isolation_level"] = "READ COMMITTED"
        elif self.is_read_only:
            options["poolclass"] = sa.NullPool  # how it is opened depends on the moment
        try:
            self.engine: Engine = sa.create_engine(bare(url), **options)
        except ImportError as error:
            extra = EXTRAS[url.get_backend_name()]
            raise StorageError(
                f"{self.shown}: no driver for it here ({error}); {install_command(extra)}"
            ) from None
        if self.is_sqlite:
            sa.event.listen(self.engine, "do_connect", self._require_file)
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
            sa.event.listen(self.engine, "begin", self._begin)
            if "poolclass" not in options:
                sa.event.listen(self.engine, "connect", self._note_file)
        elif url.get_backend_name() == "postgresql":
            sa.event.listen(self.engine, "connect", _prepare_postgresql)
        else:
            sa.event.listen(self.engine, "connect", _prepare_mysql)

    @property
    def is_sqlite(self) -> bool:
        """True if it is SQLite."""
        return self.url.get_backend_name() == "sqlite"

    @property
    def is_read_only(self) -> bool:
        """True if it is a file that may only be read here; a server tells when it is asked."""
        return self.is_sqlite and sqlite_files.may_only_be_read(self.url)

    @property
    def shown(self) -> str:
        """The URL for messages: the password is never in it."""
        return show(self.url)

    @property
    def secret_url(self) -> str:
        """The URL with its password, for child processes' environment alone."""
        return as_text(self.url)

    @contextmanager
    def retrying(self, pause: Pause | None) -> Iterator[None]:
        """Let storage calls of this thread inside wait while the database is unavailable:
        `pause(seconds)` waits, and raises to give up. None: they raise StorageUnavailable at
        once."""
        before = self.pause
        self._mode.pause = pause
        try:
            yield
        finally:
            self._mode.pause = before

    @property
    def pause(self) -> Pause | None:
        """How this thread waits while the database is unavailable; None where it does not."""
        return getattr(self._mode, "pause", None)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let transactions that this thread begins inside write. Raises StorageError where that
        cannot be."""
        self._require_writable()
        with self._beginning(writing=True):
            yield

    @contextmanager
    def _beginning(self, *, writing: bool) -> Iterator[None]:
        """Say whether transactions that this thread begins inside will write."""
        before = self.is_writing
        self._mode.writing = writing
        try:
            yield
        finally:
            self._mode.writing = before

    def _require_writable(self) -> None:
        if self.is_read_only:
            raise StorageError(
                f"{self.shown}: may only be read here: the file or its folder cannot be written, "
                "or its URL says so; copy it, or ask its owner"
            )

    @property
    def is_writing(self) -> bool:
        """True inside a transaction of this thread that writes."""
        return getattr(self._mode, "writing", False)

    def require_file(self) -> None:
        """Raise StorageGone where SQLite's file, once it was opened, is removed, moved or replaced:
        what is written through old connections is lost, a new one would begin an empty database,
        or mix this study with whatever stands there now. A server has no such file."""
        if self._file is None:
            return
        path = Path(str(self.url.database))
        try:
            became = "replaced by another file"
            is_same = os.path.samestat(path.stat(), self._file)
        except (FileNotFoundError, NotADirectoryError):
            is_same, became = False, "removed or moved"
        if not is_same:
            raise StorageGone(
                f"{path} was {became} while it was in use, and its studies with it: what worked on "
                "them ends here and writes nothing more; if it was moved, name its new place with "
                "HPO_HOME or --storage"
            )

    def _require_file(self, *_about: Any) -> None:
        """Before a connection is made, which would make the file anew."""
        self.require_file()

    def _note_file(self, _connection: Any, _record: Any) -> None:
        if self._file is None:
            self._file = Path(str(self.url.database)).stat()

    def _begin(self, connection: Connection) -> None:
        self.require_file()
        connection.exec_driver_sql("BEGIN IMMEDIATE" if self.is_writing else "BEGIN")

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Return a transaction that only reads, also beside one of this thread that writes: SQLite
        would let it wait for that one, which waits for it."""
        reading = self._beginning(writing=False)
        with self.translated(), reading, self.engine.begin() as connection:
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """Return a transaction that reads one moment, as every one of SQLite's does."""
        reading = self._beginning(writing=False)
        with self.translated(), reading, self.engine.connect() as connection:
            if not self.is_sqlite:
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Return a transaction that writes: on SQLite it waits for its turn before it reads
        anything."""
        with self.translated(), self.writing(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raise database faults as StorageError, transient ones as StorageUnavailable: in words,
        without a password."""
        try:
            yield
        except DBAPIError as error:
            if isinstance(error, sa.exc.IntegrityError):
                raise
            raise as_storage_error(error, self.url) from error

    def now(self) -> sa.ColumnElement[float]:
        """Return the database's clock, in seconds since 1970 (SQLite has its host's), as an
        expression."""
        if self.is_sqlite:
            return sa.literal_column("(julianday('now') - 2440587.5) * 86400.0", sa.Float)
        if self.url.get_backend_name() == "postgresql":
            return sa.literal_column("extract(epoch from clock_timestamp())::float8", sa.Float)
        return sa.literal_column("unix_timestamp(sysdate(6))", sa.Float)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let one process at a time in, of all that use this database: for its one-time set-up."""
        if self.is_sqlite:
            self._require_writable()
            from filelock import FileLock

            with FileLock(f"{self.url.database}.lock"):
                yield
            return
        # A connection of its own: the small pool is for the work under the lock. Closing it gives
        # the lock up, also when this process dies; PostgreSQL's is its transaction's, since behind
        # a pooler the session outlives the connection.
        own = sa.create_engine(self.url, poolclass=sa.NullPool, **engine_options(self.url))
        with own.connect() as connection:
            if self.url.get_backend_name() == "postgresql":
                for name in ("lock_timeout", "idle_in_transaction_session_timeout"):
                    connection.execute(sa.text(f"SET LOCAL {name} = 0"))  # a role may have limits
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
            else:
                asked = sa.select(sa.func.get_lock(self._lock_name(), _MYSQL_TURN_S))
                while connection.scalar(asked) != 1:
                    pass  # the server has waited
            yield

    def _lock_name(self) -> str:
        """MySQL's locks are the whole server's, and a name has 64 characters at most."""
        return f"hpo:{hashlib.sha1(str(self.url.database).encode()).hexdigest()}"

    def dispose(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def connect(text: str) -> Database:
    """Return a database for the storage URL `text`; raises StorageError for one that cannot be
    used. Touches nothing."""
    url = parse(text)
    if url.get_backend_name() == "sqlite":
        alone = sqlite_files.may_only_be_read(url) and not sqlite_files.has_writer(url)
        if not alone:  # what nobody writes may be read from anywhere
            _refuse_network(Path(str(url.database)))
    return Database(url)


def exists(database: Database) -> bool:
    """Return whether there is anything at all to read; False only for an absent SQLite file. Raises
    StorageGone for one that was there."""
    database.require_file()
    return not database.is_sqlite or Path(database.url.database or "").exists()


def require_folder(database: Database) -> None:
    """Raise StorageError where a SQLite file cannot be made because its folder is missing."""
    if not exists(database) and not Path(database.url.database or "").parent.is_dir():
        raise StorageError(f"{database.shown}: no such folder; {FOLDER}")


def _refuse_network(path: Path) -> None:
    """Refuse a network file system: SQLite's locks do not hold there, and two hosts would corrupt
    the file."""
    mounts = sorted(psutil.disk_partitions(all=True), key=lambda m: len(m.mountpoint), reverse=True)
    for mount in mounts:
        if path.is_relative_to(mount.mountpoint):
            if mount.fstype.lower() in NETWORK_FILE_SYSTEMS:
                raise StorageError(
                    f"{path}: SQLite on a network file system ({mount.fstype} at "
                    f"{mount.mountpoint}) loses data; use a local disk, PostgreSQL or MySQL"
                )
            return


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say, in the 'begin' event
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA synchronous = NORMAL")  # safe with WAL: a power cut loses no consistency
    cursor.close()


def use_wal(database: Database) -> None:
    """Switch a SQLite file to WAL; once, alone: sixteen at a time get 'database is locked'."""
    if database.is_sqlite:
        with database.translated():
            raw, switch = database.engine.raw_connection(), "PRAGMA journal_mode = WAL"
            try:
                raw.cursor().execute(switch)  # outside of any transaction
            except sqlite3.Error as error:
                raise OperationalError(switch, None, error) from error
            finally:
                raw.close()


def bare(url: URL) -> URL:
    """Return `url` as SQLAlchemy is told it; of SQLite's options it knows others than we."""
    return url.set(query={}) if url.get_backend_name() == "sqlite" else url


def engine_options(url: URL) -> dict[str, Any]:
    """Return how SQLAlchemy connects."""
    if url.get_backend_name() == "sqlite" and sqlite_files.is_special(url):
        return {"creator": lambda: sqlite_files.connect(url, BUSY_TIMEOUT_S)}
    return {"connect_args": connect_args(url)}


def connect_args(url: URL) -> dict[str, Any]:
    """Return the driver's arguments for each connection."""
    if url.get_backend_name() == "sqlite":
        timeout = float(str(url.query.get("timeout", BUSY_TIMEOUT_S)))
        return {"timeout": timeout, "check_same_thread": False}
    if url.get_backend_name() == "postgresql":
        args: dict[str, Any] = {
            key: value for key, value in POSTGRESQL_CONNECT.items() if key not in url.query
        }
        if threshold := url.query.get("prepare_threshold"):
            args["prepare_threshold"] = None if threshold == "none" else int(str(threshold))
        return args
    return {key: value for key, value in MYSQL_CONNECT.items() if key not in url.query}


def _prepare_postgresql(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for name, value in POSTGRESQL_SESSION.items():
        cursor.execute(f"SET {name} = {value}")
    cursor.close()
    connection.commit()


def _prepare_mysql(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for name, value in MYSQL_SESSION.items():
        cursor.execute(f"SET {name} = {value}")
    cursor.close()
    connection.commit()
