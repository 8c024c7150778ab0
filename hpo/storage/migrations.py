"""The way of our tables from one version to the next.

Alembic's operations write the SQL for each database; its environment, its scripts and its table of
revisions would be for a history that branches, and ours is a line of numbers. A version is one
transaction with its row in `hpo_schema`. MySQL commits each statement that changes a table by
itself, so a step must also be right where it was done before.

To add one: change `tables`, raise `tables.VERSION`, and write the step here. SQLite's tables are
not to be rebuilt (alembic's batch mode): dropping one there deletes what refers to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations

from hpo.storage import tables
from hpo.storage.database import Database


def _long_fillers(op: Operations) -> None:
    """Allow ids of workers of 64 characters, as in hpo_workers. SQLite does not count them."""
    if op.get_context().dialect.name != "sqlite":
        op.alter_column("hpo_studies", "filler", type_=sa.String(64), existing_nullable=True)


def _budgets_of_time_and_epochs(op: Operations) -> None:
    """Add the limits of a study's time by the clock, and of its epochs."""
    there = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("hpo_studies")}
    for name in ("max_time_s", "max_full_trainings"):
        if name not in there:
            op.add_column("hpo_studies", sa.Column(name, sa.Float(53)))


MIGRATIONS: Mapping[int, Callable[[Operations], None]] = {
    2: _long_fillers,
    3: _budgets_of_time_and_epochs,
}
"""What leads to each version from the one before."""


def migrate(database: Database, version: int) -> None:
    """Bring our tables from `version` to the newest; the caller is alone."""
    for step in range(version + 1, tables.VERSION + 1):
        with database.write() as connection:
            MIGRATIONS[step](Operations(MigrationContext.configure(connection)))
            connection.execute(tables.schema.insert().values(version=step))
