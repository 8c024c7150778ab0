"""The schema: Optuna's tables and ours, made, checked and upgraded together."""

from __future__ import annotations

import logging
import re
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.storages._rdb import models
from sqlalchemy import orm

from hpo.errors import StorageError
from hpo.storage import tables
from hpo.storage.database import Database, use_wal
from hpo.storage.optuna import FencedStorage, optuna_url, translated
from hpo.storage.tables import is_current, needs_upgrade, version

MYSQL_TABLES = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",
}
"""How tables are made there, Optuna's too: with transactions, every character, and names kept apart
that differ in case alone, as on the other databases."""

ALEMBIC = sa.table("alembic_version", sa.column("version_num", sa.String))
"""Where Optuna keeps the version of its schema, and every other tool that uses alembic does."""

OPTUNA_REVISION = re.compile(r"v\d+\.\d+\.\d+")
"""How the names of Optuna's versions begin; alembic itself makes 12 hex digits."""

OWN = "give hpo a database of its own"


def create_schema(database: Database) -> None:
    """Create Optuna's tables and ours, once and alone. Raises StorageError for those of an older or
    newer hpo or Optuna.

    Eight processes that let Optuna create its tables in a new database at the same time crash all
    but a few of each other, so it happens under a lock.
    """
    if is_current(database):
        return
    with translated(database), database.alone():
        if is_current(database):
            return
        if not _is_optuna_current(database):
            raise needs_upgrade(database, "its tables were made by an older Optuna")
        _create(database)


def upgrade_schema(database: Database) -> str:
    """Create Optuna's tables and ours, or bring them up to date; return what was done.

    Safe to call again, and from many processes at once. Raises StorageError for a database that a
    newer hpo or Optuna has written.
    """
    version(database)  # an error that needs no lock
    with translated(database), database.alone():
        found, done = version(database), []
        if not _is_optuna_current(database):
            _upgrade_optuna(database)
            done.append("Optuna's tables upgraded")
        if found is None:
            _create(database)
            done.append(f"schema {tables.VERSION} made")
        elif found < tables.VERSION:
            from hpo.storage.migrations import migrate

            migrate(database, found)
            done.append(f"schema {found} upgraded to {tables.VERSION}")
    return ", ".join(done) or f"schema {tables.VERSION} already"


def _create(database: Database) -> None:
    """Create the tables, alone. What a process that died here has made stays and is completed."""
    use_wal(database)
    for table in (*models.BaseModel.metadata.tables.values(), *tables.OURS):
        table.dialect_kwargs.update(MYSQL_TABLES)
    with database.writing():
        optuna_tables().create_all(database.engine)
    _versions(database)  # nests two connections, so it cannot begin as a writer; it is alone here
    with database.writing():
        tables.metadata.create_all(database.engine, tables=tables.OURS)
    with database.write() as connection:
        connection.execute(tables.schema.insert().values(version=tables.VERSION))


def optuna_tables() -> sa.MetaData:
    """Return Optuna's tables, in which SQLite counts on after a delete, as the others do. Else it
    gives the highest ids out again, and a page open on a deleted study mixes it with the next
    one."""
    found = sa.MetaData()
    for table in models.BaseModel.metadata.sorted_tables:
        copied = table.to_metadata(found)
        if table in (models.StudyModel.__table__, models.TrialModel.__table__):
            copied.dialect_options["sqlite"]["autoincrement"] = True
    return found


def _is_optuna_current(database: Database) -> bool:
    """Return whether Optuna's tables are those of the Optuna here, or still to be made. Raises
    StorageError for those of a newer one, and for another tool's."""
    with database.read() as connection:
        there = sa.inspect(connection)
        begun = there.has_table(models.VersionInfoModel.__tablename__)
        _refuse_other_tools(database, connection, there, begun=begun)
        if not begun:
            return True
    versions = _versions(database)
    found = versions.get_current_version()
    if found not in versions.get_all_versions():
        raise StorageError(
            f"{database.shown}: its tables were made by a newer Optuna ({found}, this one knows "
            f"{versions.get_head_version()}); upgrade hpo"
        )
    return bool(found == versions.get_head_version())


def _refuse_other_tools(
    database: Database, connection: sa.Connection, there: sa.Inspector, *, begun: bool
) -> None:
    """Raise StorageError where tables that Optuna would use are another tool's. `begun`: Optuna's
    table of versions is there; it is made before alembic's."""
    if there.has_table(ALEMBIC.name):
        found = list(connection.scalars(sa.select(ALEMBIC.c.version_num)))
        others = [one for one in found if not OPTUNA_REVISION.match(one)]
        if others or not begun:
            shown = f" (found: {', '.join(others)})" if others else ""
            raise StorageError(
                f"{database.shown}: alembic_version holds another tool's version: {OWN}{shown}"
            )
    for table in () if begun else models.BaseModel.metadata.sorted_tables:
        if there.has_table(table.name):
            missing = set(table.columns.keys()) - {
                one["name"] for one in there.get_columns(table.name)
            }
            if missing:
                raise StorageError(
                    f"{database.shown}: its table {table.name!r} is another tool's (without "
                    f"{', '.join(sorted(missing))}): {OWN}"
                )


def _upgrade_optuna(database: Database) -> None:
    root, quiet = logging.getLogger(), logging.NullHandler()
    root.addHandler(quiet)  # without any handler there, Optuna's migrations configure all logging
    try:
        FencedStorage(database).upgrade()
    finally:
        root.removeHandler(quiet)


def _versions(database: Database) -> Any:
    """Return Optuna's version of its schema; write its version where none stands, for its own
    tools."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.storages._rdb.storage._VersionManager(
        optuna_url(database),
        database.engine,
        orm.scoped_session(orm.sessionmaker(bind=database.engine)),
    )
