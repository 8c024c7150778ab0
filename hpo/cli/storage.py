"""Care of the databases themselves: upgrade, copy, check."""

from __future__ import annotations

import typer

from hpo.cli.options import Storage, database, make_home


def storage() -> None:
    """Set up a database, bring it up to date, copy its studies elsewhere, look for what is wrong.

    Example: hpo storage upgrade
    """


def upgrade(storage: Storage = None) -> None:
    """Make the tables, or bring those of an older hpo or Optuna up to date: the first step of a
    deployment, and the first one after an upgrade of hpo.

    Nothing happens where all is up to date, so it may run at every start, also from several hosts
    at once. Stop the workers of an older hpo first; a copy of the database is a good idea.

    Example: HPO_STORAGE=postgresql+psycopg://me@server/hpo hpo storage upgrade
    """
    from hpo.storage.optuna_rdb import upgrade_schema

    with database(storage) as found:
        make_home(found)
        typer.echo(f"{found.shown}: {upgrade_schema(found)}")


COMMANDS = {"upgrade": upgrade}
