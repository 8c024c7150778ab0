"""Versions of our tables: which one a database has, and whether this hpo can work with it.

`hpo_schema` has a row for the version that a database was made with and one for each that it was
upgraded to; the highest is the one it has. A new schema of Optuna's comes with a version of ours.
"""

from __future__ import annotations

import sqlalchemy as sa

from hpo.errors import StorageError
from hpo.storage import tables
from hpo.storage.db import Database
from hpo.storage.url import option, usual


def version(database: Database) -> int | None:
    """The version of our tables in a database, None where there are none. Raises StorageError for
    one that a newer hpo has written."""
    with database.read() as connection:
        if not sa.inspect(connection).has_table(tables.schema.name):
            return None
        found: int | None = connection.scalar(sa.select(sa.func.max(tables.schema.c.version)))
    if found is not None and found > tables.VERSION:
        raise StorageError(
            f"{database.shown}: written by a newer hpo (schema {found}, this one knows "
            f"{tables.VERSION}); upgrade hpo"
        )
    return found


def is_current(database: Database) -> bool:
    """Whether our tables are there; raises StorageError for those of an older or newer hpo."""
    found = version(database)
    if found is not None and found < tables.VERSION:
        what = f"made by an older hpo (schema {found}, this one needs {tables.VERSION})"
        raise needs_upgrade(database, what)
    return found is not None


def needs_upgrade(database: Database, what: str) -> StorageError:
    flag = option(database.url, usual())
    return StorageError(
        f"{database.shown}: {what}; stop its workers, then: hpo storage upgrade{flag}"
    )
