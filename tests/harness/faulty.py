"""A database that breaks at the worst instants: right before a commit takes effect, and right
after, when the answer is lost."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from hpo.storage.database import Database

BEFORE, AFTER = "before", "after"


class FaultyCommits:
    """Breaks commits of a database, one after the other, as `faults` say; None passes.

    A server's fault is real: it ends the session. SQLite's is a full disk, pretended.
    """

    def __init__(
        self, database: Database, faults: Iterator[str | None], *, reads_too: bool
    ) -> None:
        self.database, self.faults, self.reads_too = database, faults, reads_too
        self.struck = 0
        self._lock = threading.Lock()
        self._commit = database.engine.dialect.do_commit

    def do_commit(self, connection: Any) -> None:
        fault = self._next()
        if fault == BEFORE:
            self._strike(connection)
        self._commit(connection)
        if fault == AFTER:
            self._strike(connection)

    def _next(self) -> str | None:
        with self._lock:
            due = self.reads_too or self.database.is_writing
            fault = next(self.faults, None) if due else None
            self.struck += fault is not None
            return fault

    def _strike(self, connection: Any) -> None:
        if self.database.is_sqlite:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        mine = connection.dbapi_connection
        other = sa.create_engine(self.database.url, poolclass=sa.NullPool)
        with other.connect() as c:
            if self.database.url.get_backend_name() == "mysql":
                c.exec_driver_sql(f"KILL CONNECTION {mine.thread_id()}")
            else:
                c.execute(sa.select(sa.func.pg_terminate_backend(mine.info.backend_pid, 5000)))
        mine.cursor().execute("SELECT 1")
        raise AssertionError("the session lives")


@contextmanager
def breaking(
    database: Database, faults: Iterator[str | None], *, reads_too: bool = False
) -> Iterator[FaultyCommits]:
    """Writing commits inside (or with `reads_too` all) break as `faults` say."""
    found = FaultyCommits(database, faults, reads_too=reads_too)
    dialect: Any = database.engine.dialect
    dialect.do_commit = found.do_commit
    try:
        yield found
    finally:
        del dialect.do_commit
