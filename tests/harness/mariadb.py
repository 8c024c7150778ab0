"""A private MariaDB server for tests, where mariadbd is installed."""

from __future__ import annotations

import getpass
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

READY_S = 120.0
SMALL = ("--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M", "--performance-schema=OFF")
UNSYNCED = ("--innodb-flush-log-at-trx-commit=0", "--innodb-flush-method=nosync")
"""No test takes the power away: nothing need be on the disk itself."""


class MariaDB:
    """A server with a data folder and a unix socket of its own, and no network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "socket"
        self.process: subprocess.Popen[bytes] | None = None

    def install(self) -> None:
        self._call("mariadb-install-db", "--auth-root-authentication-method=normal", *UNSYNCED)

    def _call(self, program: str, *options: str) -> None:
        where = f"--datadir={self.folder / 'data'}", f"--user={getpass.getuser()}"
        command = [program, "--no-defaults", *where, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        """Returns when it answers."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *("mariadbd", "--no-defaults", f"--datadir={self.folder / 'data'}"),
                    *(f"--user={getpass.getuser()}", f"--socket={self.socket}"),
                    *("--skip-networking", f"--pid-file={self.folder / 'pid'}", *SMALL, *UNSYNCED),
                ],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + READY_S
        while not self.socket.exists():  # it listens from then on
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, "mariadbd did not answer"
            time.sleep(0.05)

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(READY_S)

    def url(self, name: str, user: str = "root") -> str:
        return f"mysql+pymysql://{user}@/{name}?unix_socket={self.socket}"

    def execute(self, *statements: str) -> None:
        """As administrator."""
        engine = sa.create_engine(self.url(""), poolclass=sa.NullPool)
        with engine.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement.replace("%", "%%"))

    def new_database(self, name: str) -> str:
        """The URL of a new, empty database. Its character set is not the one that hpo needs."""
        self.execute(f"CREATE DATABASE `{name}` CHARACTER SET latin1")
        return self.url(name)

    def copy_tables(self, template: str, name: str) -> None:
        """Copy all tables of the database `template`, with their rows, into `name`."""
        engine = sa.create_engine(self.url(name), poolclass=sa.NullPool)
        with engine.begin() as connection:
            connection.exec_driver_sql("SET foreign_key_checks = 0")
            tables = connection.exec_driver_sql(f"SHOW TABLES FROM `{template}`").scalars().all()
            for table in tables:
                source = f"`{template}`.`{table}`"
                _, statement = connection.exec_driver_sql(f"SHOW CREATE TABLE {source}").one()
                connection.exec_driver_sql(statement.replace("%", "%%"))
                connection.exec_driver_sql(f"INSERT INTO `{table}` SELECT * FROM {source}")

    def with_login(self, url: str, user: str, password: str) -> sa.URL:
        """`url` for a user who needs `password`; without it in the URL."""
        quoted = password.replace("'", "''")
        account = f"`{user}`@localhost"
        self.execute(
            f"CREATE OR REPLACE USER {account} IDENTIFIED BY '{quoted}'",
            f"GRANT ALL ON *.* TO {account}",
        )
        return sa.make_url(url).set(username=user)


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDB]:
    """A MariaDB server of this test process; skips where there is none."""
    if shutil.which("mariadbd") is None or shutil.which("mariadb-install-db") is None:
        pytest.skip(
            "MySQL tests need MariaDB's server (Debian: mariadb-server-core, mariadb-client-core)"
        )
    pytest.importorskip("pymysql", reason="MySQL tests need PyMySQL (the mysql extra)")
    # A unix socket's path has 107 characters at most; pytest's folders may be deeper.
    with tempfile.TemporaryDirectory(prefix="hpo-mariadb-") as folder:
        server = MariaDB(Path(folder))
        server.install()
        server.start()
        try:
            yield server
        finally:
            server.stop()
