"""What is told of a database that is away, and how it is waited for."""

from __future__ import annotations

import itertools
import logging
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError, ProgrammingError

from hpo.errors import Fenced, Interrupted, StorageError, StorageGone, StorageUnavailable
from hpo.io import mount_of
from hpo.storage import database as db
from hpo.storage import database as faults
from hpo.storage import retry
from hpo.storage.database import connect
from hpo.storage.leases import NO_CONTACT, ContactWindow

AWAY = StorageUnavailable("gone")


class Sent(Exception):
    """A driver's exception with a SQLSTATE, or with an error number as its first argument."""

    def __init__(self, *args: Any, sqlstate: str | None = None) -> None:
        super().__init__(*args)
        self.sqlstate = sqlstate


def wrapped(orig: Exception, kind: type[DBAPIError] = OperationalError) -> DBAPIError:
    return kind("SELECT 1", None, orig)


def sqlite(code: int) -> sqlite3.Error:
    error = sqlite3.OperationalError("words")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("error", "away"),
    [
        # PostgreSQL on a connection that stands
        (wrapped(Sent("ends", sqlstate="57P01")), True),  # shut down
        (wrapped(Sent("locked", sqlstate="55P03")), True),  # lock timeout
        (wrapped(Sent("deadlock", sqlstate="40P01")), True),
        (wrapped(Sent("full", sqlstate="53100")), True),
        (wrapped(Sent("many", sqlstate="53300")), True),
        (wrapped(Sent("idle", sqlstate="25P03"), InternalError), True),
        (wrapped(Sent("standby", sqlstate="25006"), InternalError), True),
        (wrapped(Sent("no table", sqlstate="42P01"), ProgrammingError), False),
        (wrapped(Sent("no right", sqlstate="42501"), ProgrammingError), False),
        # PostgreSQL to a newcomer: no code
        (wrapped(Sent("connection failed: Connection refused")), True),
        (wrapped(Sent("FATAL:  the database system is starting up")), True),
        (wrapped(Sent("FATAL:  das Datenbanksystem startet")), True),
        (wrapped(Sent('FATAL:  database "x" does not exist')), False),
        (wrapped(Sent('FATAL:  password authentication failed for user "x"')), False),
        (wrapped(Sent("fe_sendauth: no password supplied")), False),
        (wrapped(Sent("missing =", ()), ProgrammingError), False),
        # SQLite
        (wrapped(sqlite(sqlite3.SQLITE_BUSY)), True),
        (wrapped(sqlite(sqlite3.SQLITE_BUSY_SNAPSHOT)), True),
        (wrapped(sqlite(sqlite3.SQLITE_FULL)), True),
        (wrapped(sqlite(sqlite3.SQLITE_IOERR_WRITE)), True),
        (wrapped(sqlite(sqlite3.SQLITE_CANTOPEN)), False),
        (wrapped(sqlite(sqlite3.SQLITE_READONLY)), False),
        (wrapped(sqlite(sqlite3.SQLITE_NOTADB)), False),
        (wrapped(sqlite(sqlite3.SQLITE_ERROR)), False),
        (wrapped(sqlite3.ProgrammingError("misuse"), ProgrammingError), False),
        # MySQL
        (wrapped(Sent(2003, "cannot connect")), True),
        (wrapped(Sent(2006, "gone away")), True),
        (wrapped(Sent(1205, "lock wait timeout")), True),
        (wrapped(Sent(1045, "access denied")), False),
        (wrapped(Sent(1049, "unknown database")), False),
    ],
)
def test_what_passes_and_what_does_not(error: DBAPIError, away: bool) -> None:
    assert faults.is_away(error) is away
    told = faults.as_storage_error(error, sa.make_url("sqlite:////tmp/a.db"))
    assert isinstance(told, StorageUnavailable) is away
    assert isinstance(told, StorageError)
    assert str(told).startswith("sqlite:////tmp/a.db: ")
    assert told.exit_code == (75 if away else 2)


def test_a_connection_that_broke_is_away_whatever_it_said() -> None:
    error = wrapped(Sent("internal", sqlstate="XX000"))
    assert not faults.is_away(error)
    error.connection_invalidated = True
    assert faults.is_away(error)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    database = connect(f"sqlite:///{tmp_path / 'a.db'}")
    mount = mount_of(tmp_path)
    told = rf"database or disk is full; the disk mounted at {mount} has .+ of .+ free: free some"
    with database.write() as c:
        c.execute(sa.text("PRAGMA max_page_count = 2"))
        c.execute(sa.text("CREATE TABLE a (b)"))
        with pytest.raises(StorageUnavailable, match=told), database.translated():
            c.execute(sa.text("INSERT INTO a VALUES (zeroblob(100000))"))
    database.dispose()


def test_a_new_database_that_another_process_holds_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "BUSY_TIMEOUT_S", 0.05)
    holder = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    database = connect(f"sqlite:///{tmp_path / 'a.db'}")
    with pytest.raises(StorageUnavailable, match="locked"):
        db.use_wal(database)
    holder.close()
    db.use_wal(database)
    with database.read() as c:
        assert c.scalar(sa.text("PRAGMA journal_mode")) == "wal"
    database.dispose()


def test_a_real_lock_and_a_real_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "BUSY_TIMEOUT_S", 0.05)
    path = tmp_path / "a.db"
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    database = connect(f"sqlite:///{path}")
    with (
        pytest.raises(StorageUnavailable, match=r"locked.*another process is writing"),
        database.write(),
    ):
        pass
    holder.execute("COMMIT")
    holder.close()
    database.dispose()
    path.write_text("no database" * 100)
    with pytest.raises(StorageError, match="name another file") as caught, database.read() as c:
        c.execute(sa.text("SELECT * FROM sqlite_master"))
    assert not isinstance(caught.value, StorageUnavailable)
    database.dispose()


def test_no_patience_unless_asked_for() -> None:
    tries = itertools.count(1)

    def call() -> int:
        if next(tries) < 4:
            raise AWAY
        return 7

    with pytest.raises(StorageUnavailable):
        retry.retry_while_unavailable(None, call)
    pauses: list[float] = []
    assert retry.retry_while_unavailable(pauses.append, call) == 7
    assert len(pauses) == 2


def test_delays_double_up_to_a_limit_and_differ() -> None:
    first = list(itertools.islice(retry.delays(), 12))
    for n, delay in enumerate(first):
        full = min(0.2 * 2**n, 5.0)
        assert full / 2 <= delay <= full
    assert first != list(itertools.islice(retry.delays(), 12))


def test_patience_is_the_thread_s_and_ends_with_its_block(tmp_path: Path) -> None:
    import threading

    database = connect(f"sqlite:///{tmp_path / 'a.db'}")
    elsewhere: list[object] = []
    with database.retrying(print):
        thread = threading.Thread(target=lambda: elsewhere.append(database.pause))
        thread.start()
        thread.join()
        with database.retrying(None):
            assert database.pause is None
        assert database.pause is print
    assert database.pause is None
    assert elsewhere == [None]


def test_an_outage_is_said_once_and_once_a_minute_and_when_it_is_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(retry.time, "monotonic", lambda: now[0])
    outage = retry.Outage("we wait")
    caplog.set_level(logging.INFO, logger="hpo")
    for _ in range(125):
        with outage.noted():
            now[0] += 0.25
            raise AWAY
        now[0] += 0.75
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "database unavailable, retrying; we wait: gone",
        "database unavailable for 60 s, retrying: gone",
        "database unavailable for 120 s, retrying: gone",
    ]
    for _ in range(2):
        with outage.noted():
            pass
    assert caplog.messages[3:] == ["database available again after 124.8 s"]


def test_a_slow_try_is_followed_by_as_long_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(retry.time, "monotonic", lambda: now[0])
    outage = retry.Outage("we wait")
    assert outage.is_due
    with outage.noted():
        now[0] += 10.0
        raise AWAY
    assert not outage.is_due
    now[0] += 9.9
    assert not outage.is_due
    now[0] += 0.2
    assert outage.is_due


@pytest.mark.parametrize("error", [Fenced("no"), Interrupted("no"), StorageError("no")])
def test_only_an_outage_is_swallowed(error: Exception) -> None:
    with pytest.raises(type(error)), retry.Outage("we wait").noted():
        raise error


LEASE_S = 30.0


@pytest.mark.parametrize(
    ("clocks", "spans"),
    [
        ([], False),
        ([1000], False),  # new
        (range(1000, 1030, 5), False),  # for 25 s
        (range(1000, 1031, 5), True),
        ([1000, 1015, 1030], True),  # half a lease apart
        ([1000, 1016, 1031], False),  # an outage, or asleep
        ([*range(1000, 1100, 5), 1130], False),
        ([*range(1000, 1100, 5), *range(1130, 1160, 5)], False),
        ([*range(1000, 1100, 5), *range(1130, 1161, 5)], True),
        ([*range(1000, 1100, 5), *range(4700, 4730, 5)], False),  # the clock went an hour on
        ([*range(1000, 1100, 5), *range(-2500, -2480, 5)], False),  # and back
        ([1000, 1010, 1009, 1020, 1019.5, 1030], True),  # two threads
        ([1010, 1000, 1039], False),  # the later one counts from the first
    ],
)
def test_whoever_takes_over_was_in_touch_for_a_lease(clocks: Any, spans: bool) -> None:
    contact = NO_CONTACT
    for now in clocks:
        contact = contact.heard(now, LEASE_S)
    assert contact.spans(LEASE_S) is spans


def test_a_contact_is_a_value() -> None:
    contact = ContactWindow(0.0, 100.0)
    assert contact.heard(101.0, LEASE_S) == ContactWindow(0.0, 101.0)
    assert contact == ContactWindow(0.0, 100.0)


def test_a_file_that_is_removed_or_replaced_is_no_outage(tmp_path: Path) -> None:
    path = tmp_path / "hpo.db"
    database = connect(f"sqlite:///{path}")
    with database.write() as connection:
        connection.exec_driver_sql("CREATE TABLE old (x)")
    path.rename(tmp_path / "moved.db")
    calls = (database.read, database.write, database.snapshot)
    for call in calls:
        with database.retrying(lambda _s: pytest.fail("waits")), pytest.raises(StorageGone) as told:
            call().__enter__()
        assert f"{path} was removed or moved" in str(told.value)
    database.engine.pool.dispose()  # so that a new connection is needed
    with pytest.raises(StorageGone), database.read():
        pass
    with pytest.raises(StorageGone):
        db.exists(database)
    assert not path.exists()

    connect(f"sqlite:///{path}").engine.connect().close()
    with pytest.raises(StorageGone, match="replaced by another file"), database.write():
        pass
    path.unlink()
    (tmp_path / "moved.db").rename(path)  # the same file again: all is as before
    with database.read() as connection:
        assert connection.exec_driver_sql("SELECT * FROM old").all() == []


def test_a_folder_above_the_file_may_be_gone_or_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    database = connect(f"sqlite:///{folder / 'hpo.db'}")
    with database.read():
        pass
    shutil.rmtree(folder)
    folder.write_text("")
    with pytest.raises(StorageGone, match="removed or moved"), database.read():
        pass
