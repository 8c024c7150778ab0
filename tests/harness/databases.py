"""Databases for tests, of every kind: empty ones, and ones whose tables are copies.

Tables are made once per kind and session, by `create_schema`, and then copied: making them
takes a hundred times as long.
"""

from __future__ import annotations

import shutil
import uuid
from functools import cache
from pathlib import Path

import pytest
import sqlalchemy as sa

from hpo.storage.database import connect
from hpo.storage.schema import create_schema
from tests.harness.mariadb import MariaDB
from tests.harness.servers import copy_database, new_database

KINDS = ("sqlite", "postgresql", "mysql")


class Databases:
    """Makes databases; a server is started when the first of its kind is asked for."""

    def __init__(self, request: pytest.FixtureRequest, folder: Path) -> None:
        self._request = request
        self._folder = folder
        self._template = cache(self._make_template)

    def empty(self, kind: str, folder: Path, name: str = "hpo") -> str:
        """Return the URL of a new database without tables; of SQLite the file `name`.db in
        `folder`, which is not made."""
        if kind == "sqlite":
            return f"sqlite:///{folder / name}.db"
        name = f"t{uuid.uuid4().hex}"
        if kind == "mysql":
            return self._mariadb.new_database(name)
        return new_database(self._request.getfixturevalue("postgres"), name)

    def add_tables(self, url: str) -> None:
        """Give an empty database all tables of hpo and Optuna."""
        found = sa.make_url(url)
        kind = found.get_backend_name()
        template = sa.make_url(self._template(kind)).database
        assert template is not None
        assert found.database is not None
        if kind == "sqlite":
            shutil.copyfile(template, found.database)
        elif kind == "mysql":
            self._mariadb.copy_tables(template, found.database)
        else:
            copy_database(self._request.getfixturevalue("postgres"), template, found.database)

    def _make_template(self, kind: str) -> str:
        url = self.empty(kind, self._folder, "template")
        database = connect(url)
        create_schema(database)
        database.dispose()
        return url

    @property
    def _mariadb(self) -> MariaDB:
        server: MariaDB = self._request.getfixturevalue("mariadb")
        return server
