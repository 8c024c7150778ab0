"""A PostgreSQL server as its clients and its machine see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import sqlalchemy as sa

from hpo.storage.database import connect_args
from tests.harness.servers import Postgres

MAX_CONNECTIONS = 400


class Server:
    """The server of the database at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url
        settings = connect_args(sa.make_url(url))
        self.engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args=settings)

    def rows(self, text: str) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.exec_driver_sql(text))

    def sessions(self) -> int:
        """Sessions of clients on this database, our own left out."""
        text = "SELECT count(*) - 1 FROM pg_stat_activity WHERE datname = current_database()"
        return int(self.rows(text)[0][0])

    def cpu_s(self) -> float:
        """Seconds of the processor that its processes have used so far, ended ones too; nan for one
        on another machine."""
        with self.engine.connect() as connection:
            backend = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
            try:
                postmaster = psutil.Process(int(backend or 0)).parent()
            except psutil.NoSuchProcess:
                postmaster = None
        if postmaster is None or postmaster.name() != "postgres":
            return float("nan")
        ended = postmaster.cpu_times()
        live = sum(map(cpu_s, [postmaster, *postmaster.children()]))
        return live + ended.children_user + ended.children_system

    def copy_trials(self, study: str, times: int) -> None:
        """Add all rows of the finished trials of `study` so many times more, as new trials."""
        with self.engine.begin() as c:
            c.exec_driver_sql(
                "CREATE TEMP TABLE copies ON COMMIT DROP AS SELECT t.trial_id AS old, "
                "(SELECT max(trial_id) FROM trials) + row_number() OVER () AS new, "
                "(SELECT max(number) FROM trials WHERE study_id = t.study_id) + row_number() "
                "OVER () AS number FROM trials t JOIN studies s USING (study_id), "
                f"generate_series(1, {times}) WHERE s.study_name = '{study}' "
                "AND t.state = 'COMPLETE'"
            )
            tables = sa.inspect(c).get_table_names()
            for table in sorted(tables, key=lambda one: (one != "trials", one)):
                _copy(c, table)
            c.exec_driver_sql(
                "SELECT setval(pg_get_serial_sequence('trials', 'trial_id'), max(trial_id)) "
                "FROM trials"
            )
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as c:
            c.exec_driver_sql("VACUUM ANALYZE")


def _copy(c: sa.Connection, table: str) -> None:
    """Rows of `table` that belong to a trial, again for each copy of the trial."""
    inspector = sa.inspect(c)
    names = [column["name"] for column in inspector.get_columns(table)]
    if "trial_id" not in names:
        return
    keys = inspector.get_pk_constraint(table)["constrained_columns"]
    if keys != ["trial_id"] and len(keys) == 1:
        names.remove(keys[0])  # a number of its own, which the database gives
    new = {"trial_id": "c.new", "number": "c.number"}
    values = ", ".join(new.get(name, f't."{name}"') for name in names)
    columns = ", ".join(f'"{name}"' for name in names)
    c.exec_driver_sql(
        f"INSERT INTO {table} ({columns}) SELECT {values} FROM {table} t JOIN copies c "
        "ON t.trial_id = c.old"
    )


def cpu_s(process: psutil.Process) -> float:
    """Seconds of the processor that it has used; 0 once it has ended."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


@contextmanager
def own_server() -> Iterator[Server]:
    """A server with an empty database, which lives as long."""
    server = Postgres()
    try:
        url = server.url("benchmark")
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as c:
            c.exec_driver_sql(f"ALTER SYSTEM SET max_connections = {MAX_CONNECTIONS}")
        server.stop("fast")
        server.start()
        yield Server(url)
    finally:
        server.stop("fast")
