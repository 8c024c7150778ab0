"""Versions of the tables: new, old, newer, half made, many processes; on every database."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from sqlalchemy.dialects import mysql
from sqlalchemy.schema import CreateTable

from hpo.errors import StorageError
from hpo.search import study as studies
from hpo.search.status import read_status
from hpo.storage import leases, migrations, records, tables
from hpo.storage.database import Database, connect
from hpo.storage.schema import create_schema, upgrade_schema
from tests.harness.fakes import study_file
from tests.harness.filled import MIXED
from tests.harness.filled import fill_anew as fill  # its tables are not those of today

pytestmark = pytest.mark.databases()

VERSION_1 = Path(__file__).parents[1] / "data" / "schema_1.sql"
LONG_NAME = "a-host-with-a-name-as-kubernetes-" + "f" * 31


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """An empty database: here tables are made, not copied."""
    found = connect(url)
    yield found
    found.dispose()


def test_mysql_has_room_for_long_texts() -> None:
    made = str(CreateTable(tables.studies).compile(dialect=mysql.dialect()))
    assert "definition MEDIUMTEXT" in made


def make_version_1(database: Database) -> object:
    """A database with the tables of version 1 and a study in them, whose trials are returned."""
    RDBStorage(database.secret_url).engine.dispose()
    is_mysql = database.url.get_backend_name() == "mysql"
    if is_mysql:  # which came with version 2
        create_schema(database)
    else:
        text = "".join(x for x in VERSION_1.read_text().splitlines(True) if not x.startswith("--"))
        if not database.is_sqlite:
            text = text.replace("FLOAT", "FLOAT(53)").replace("    id INTEGER", "    id BIGSERIAL")
        execute(database, *filter(str.strip, text.split(";\n")))
        set_version(database, 1)
        upgrade_schema(database)  # without it nothing can be put in
    fill(database, study_file(trials=len(MIXED)), MIXED)
    trials = read_status(database, "toy").trials
    if not database.is_sqlite:
        length = "MODIFY filler" if is_mysql else "ALTER COLUMN filler TYPE"
        execute(database, f"ALTER TABLE hpo_studies {length} VARCHAR(32)")
    for name in ("max_time_s", "max_full_trainings"):
        execute(database, f"ALTER TABLE hpo_studies DROP COLUMN {name}")
    set_version(database, 1)
    return trials


def execute(database: Database, *statements: str) -> None:
    with database.write() as c:
        for statement in statements:
            c.exec_driver_sql(statement)


def set_version(database: Database, version: int) -> None:
    with database.write() as c:
        c.execute(sa.delete(tables.schema))
        c.execute(tables.schema.insert().values(version=version))


def drift(database: Database) -> list[Any]:
    """Differences of our tables in the database to those that this hpo wants. SQLite does not count
    characters, so the types of its columns may differ."""
    options = {
        "compare_type": not database.is_sqlite and is_other_type,
        "include_name": lambda name, kind, _: kind != "table" or str(name).startswith("hpo_"),
        "include_object": lambda _, name, kind, *__: kind != "table" or name.startswith("hpo_"),
    }
    with database.read() as c:
        context = MigrationContext.configure(c, opts=options)
        return list(compare_metadata(context, tables.metadata))


def is_other_type(_context: Any, _: Any, __: Any, found: Any, wanted: Any) -> bool | None:
    """None: compare them. MySQL calls FLOAT(53) a DOUBLE."""
    same = isinstance(found, sa.Double) and isinstance(wanted, sa.Float) and wanted.precision == 53
    return False if same else None


def test_a_new_database_has_the_tables_of_today(database: Database) -> None:
    assert upgrade_schema(database) == f"schema {tables.VERSION} made"
    assert drift(database) == []
    assert upgrade_schema(database) == f"schema {tables.VERSION} already"
    assert tables.is_current(database)


def test_every_version_has_its_step() -> None:
    assert list(migrations.MIGRATIONS) == list(range(2, tables.VERSION + 1))


def test_an_old_database_is_upgraded_and_loses_nothing(database: Database) -> None:
    trials = make_version_1(database)
    assert drift(database) != []
    assert upgrade_schema(database) == f"schema 1 upgraded to {tables.VERSION}"
    assert drift(database) == []
    assert read_status(database, "toy").trials == trials
    assert leases.claim_enqueuer(database, studies.load(database, "toy").uuid, LONG_NAME)
    assert upgrade_schema(database) == f"schema {tables.VERSION} already"


def test_an_old_database_is_met_with_the_command_that_upgrades_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_version_1(database)
    monkeypatch.setenv("HPO_STORAGE", database.secret_url)
    meetings: list[Callable[[], object]] = [
        lambda: records.list_studies(database),
        lambda: studies.load(database, "toy"),
        lambda: studies.create(database, study_file(name="other")),
    ]
    for meet in meetings:
        with pytest.raises(StorageError, match=r"schema 1, this one needs .*hpo storage upgrade$"):
            meet()
    monkeypatch.delenv("HPO_STORAGE")
    with pytest.raises(StorageError, match="hpo storage upgrade --storage "):
        records.list_studies(database)


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
def test_many_processes_upgrade_at_once(url: str, database: Database, old: bool) -> None:
    trials = make_version_1(database) if old else None
    command = [sys.executable, "-m", "hpo", "storage", "upgrade"]
    children = [
        subprocess.Popen(
            command, env=os.environ | {"HPO_STORAGE": url}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) for _ in range(4)
    ]  # fmt: skip
    said = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0] * 4, said
    done = f"schema 1 upgraded to {tables.VERSION}" if old else f"schema {tables.VERSION} made"
    assert sorted(line.rpartition(": ")[2].strip() for line in said) == sorted(
        [done] + [f"schema {tables.VERSION} already"] * 3
    )
    assert drift(database) == []
    assert not old or read_status(database, "toy").trials == trials


def test_a_step_that_failed_is_done_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = make_version_1(database)
    fails = True

    def step(op: Operations) -> None:
        """A new column; on MySQL it may be there already."""
        found = sa.inspect(op.get_bind()).get_columns("hpo_studies")
        if all(column["name"] != "notes" for column in found):
            op.add_column("hpo_studies", sa.Column("notes", sa.Text))
        if fails:
            raise RuntimeError("the power went out")

    newest = tables.VERSION + 1
    monkeypatch.setattr(tables, "VERSION", newest)
    monkeypatch.setattr(migrations, "MIGRATIONS", {**migrations.MIGRATIONS, newest: step})
    with pytest.raises(RuntimeError):
        upgrade_schema(database)
    assert tables.version(database) == newest - 1
    columns = sa.inspect(database.engine).get_columns("hpo_studies")
    is_mysql = database.url.get_backend_name() == "mysql"
    assert any(column["name"] == "notes" for column in columns) == is_mysql
    fails = False
    assert upgrade_schema(database) == f"schema {newest - 1} upgraded to {newest}"
    execute(database, "UPDATE hpo_studies SET notes = 'here'")
    assert read_status(database, "toy").trials == trials


def test_a_database_of_an_older_optuna(database: Database) -> None:
    stock = RDBStorage(database.secret_url)
    stock.engine.dispose()
    if database.url.get_backend_name() != "mysql":  # which needs the index for a foreign key
        execute(database, "DROP INDEX ix_trials_study_id")
    execute(database, "UPDATE alembic_version SET version_num = 'v3.0.0.d'")
    with pytest.raises(StorageError, match=r"older Optuna.*hpo storage upgrade"):
        studies.create(database, study_file())
    done = upgrade_schema(database)
    assert done == f"Optuna's tables upgraded, schema {tables.VERSION} made"
    RDBStorage(database.secret_url).engine.dispose()  # it accepts the tables now
    indexes = [one["name"] for one in sa.inspect(database.engine).get_indexes("trials")]
    assert "trials_study_id_key" in indexes
    studies.create(database, study_file())


def test_a_database_of_a_newer_optuna_is_refused(database: Database) -> None:
    RDBStorage(database.secret_url).engine.dispose()
    execute(database, "UPDATE alembic_version SET version_num = 'v99.0.0.a'")
    for meet in (upgrade_schema, create_schema):
        with pytest.raises(StorageError, match=r"newer Optuna \(v99\.0\.0\.a"):
            meet(database)


def names(database: Database) -> set[str]:
    return set(sa.inspect(database.engine).get_table_names())


@pytest.mark.parametrize("meet", [create_schema, upgrade_schema])
@pytest.mark.parametrize(
    "versions",
    [
        ["bd07f7e963c5"],  # MLflow, Airflow: alembic's own names
        ["22ed6efa9da2", "e83e1f2a3b4c"],  # several branches
        ["2024_01_05-add_users"],
        [],  # before its first migration
    ],
)
def test_a_database_of_another_tool_is_refused_before_anything_is_made(
    database: Database, versions: list[str], meet: Callable[[Database], object]
) -> None:
    execute(
        database,
        "CREATE TABLE alembic_version (version_num varchar(32) NOT NULL PRIMARY KEY)",
        *(f"INSERT INTO alembic_version VALUES ('{one}')" for one in versions),
    )
    wanted = "alembic_version holds another tool's version: give hpo a database of its own"
    with pytest.raises(StorageError, match=wanted) as caught:
        meet(database)
    assert all(one in str(caught.value) for one in versions)
    assert names(database) == {"alembic_version"}


def test_another_tool_that_came_into_a_database_of_optuna(database: Database) -> None:
    RDBStorage(database.secret_url).engine.dispose()
    before = names(database)
    execute(database, "INSERT INTO alembic_version VALUES ('bd07f7e963c5')")
    for meet in (create_schema, upgrade_schema):
        with pytest.raises(StorageError, match="holds another tool's version"):
            meet(database)
    assert names(database) == before


def test_a_table_of_another_tool_with_a_name_of_optunas(database: Database) -> None:
    execute(database, "CREATE TABLE trials (id int, drug varchar(20))")
    with pytest.raises(StorageError, match=r"'trials' is another tool's .*a database of its own"):
        create_schema(database)
    assert names(database) == {"trials"}


def test_a_half_made_database_is_completed(database: Database) -> None:
    """A process died after some of Optuna's tables; other tools' tables beside are no matter."""
    models.StudyModel.__table__.create(database.engine)
    execute(database, "CREATE TABLE photographs (id int)")
    create_schema(database)
    assert tables.is_current(database)
    assert "photographs" in names(database)
