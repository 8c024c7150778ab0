"""Whole studies from one database to another, of any kind: Optuna's rows and ours.

What a row belongs to is read off its table's foreign keys, so a new table or column comes along by
itself. Ids that the database counts are given out anew; the study's uuid, under which its files
lie, stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from hpo.errors import Conflict
from hpo.storage import leases, records, tables
from hpo.storage.database import Database
from hpo.storage.records import Outcome, StudyRow
from hpo.storage.schema import optuna_tables

CHUNK = 1000
NOT_COPIED = {"version_info", tables.schema.name}
"""What describes the database, not its studies."""
STUDY, TRIAL, UUID = "studies.study_id", "trials.trial_id", "hpo_studies.uuid"

Ids = dict[str, dict[int, int]]
"""For STUDY and TRIAL the new id of each old one."""


def copied_tables() -> list[sa.Table]:
    """Return every table with rows of a study, each after those that it refers to."""
    both = [*optuna_tables().sorted_tables, *tables.OURS]
    return [table for table in both if table.name not in NOT_COPIED]


def refuse(
    source: Database, target: Database, rows: Sequence[StudyRow], *, force: bool = False
) -> None:
    """Raise Conflict where a study of such a name is in `target`, or one is being worked on."""
    name = tables.optuna_studies.c.study_name
    with target.read() as c:
        there = set(c.scalars(sa.select(name).where(name.in_([row.name for row in rows]))))
    if there:
        named = ", ".join(map(repr, sorted(there)))
        raise Conflict(f"{target.shown} has a study of that name already: {named}")
    for row in rows:
        holders = leases.live_leases(source, row.uuid)
        if holders and not force:
            raise Conflict(
                f"study {row.name!r} is being worked on by {', '.join(holders)}; hpo stop "
                f"{row.name} first, or --force: trials that run go on from their last checkpoint "
                "in the copy"
            )


def copy_study(source: Database, target: Database, row: StudyRow) -> int:
    """Copy a study whole or not at all; the number of its trials. An attempt that is open is ended
    as lost in the copy, so that its trial can be taken there. Raises Conflict where `target` has
    such a study."""
    records.purge_orphans(target)
    try:
        with source.snapshot() as read, target.write() as write:
            return _copy(source, read, write, row)
    except IntegrityError as error:
        raise Conflict(
            f"{target.shown} has study {row.name!r} or its uuid already; it was left as it is"
        ) from error


def _copy(source: Database, read: sa.Connection, write: sa.Connection, row: StudyRow) -> int:
    ids: Ids = {STUDY: {}, TRIAL: {}}
    now = float(read.scalar(sa.select(source.now())) or 0)
    for table in copied_tables():
        counted = table.autoincrement_column
        found = read.execution_options(yield_per=CHUNK).execute(_rows_of(table, row))
        for part in found.partitions(CHUNK):
            new = [_renewed(table, one._asdict(), ids, now) for one in part]
            mapping = ids.get(f"{table.name}.{counted.name}") if counted is not None else None
            if mapping is None:
                write.execute(sa.insert(table), new)
                continue
            assert counted is not None
            for old, values in zip(part, new, strict=True):
                done = write.execute(sa.insert(table).values(values))
                mapping[old._mapping[counted.name]] = _only(done.inserted_primary_key)
    return len(ids[TRIAL])


def _only(key: Sequence[int] | None) -> int:
    assert key is not None
    return key[0]


def _refers(table: sa.Table) -> dict[str, sa.Column[Any]]:
    """Return the columns that refer to a study or trial, by what they refer to."""
    return {key.target_fullname: key.parent for key in table.foreign_keys}


def _rows_of(table: sa.Table, row: StudyRow) -> sa.Select[Any]:
    """Return the study's rows in the order in which they were written."""
    refers, query = _refers(table), sa.select(table).order_by(*table.primary_key)
    if table.name == tables.optuna_studies.name:
        return query.where(table.c.study_id == row.study_id)
    if STUDY in refers:
        return query.where(refers[STUDY] == row.study_id)
    if UUID in refers:
        return query.where(refers[UUID] == row.uuid)
    trials = tables.optuna_trials.c
    own = sa.select(trials.trial_id).where(trials.study_id == row.study_id)
    return query.where(refers[TRIAL].in_(own))


def _renewed(table: sa.Table, row: Mapping[str, Any], ids: Ids, now: float) -> dict[str, Any]:
    """Return the row as the target gets it."""
    values: dict[str, Any] = {
        # MySQL has no NaN; what today's hpo writes has none either.
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    if table.autoincrement_column is not None:
        del values[table.autoincrement_column.name]
    for target, column in _refers(table).items():
        if target in ids:
            values[column.name] = ids[target][values[column.name]]
    if table is tables.studies:
        values |= {"filler": None, "filler_until": None}
    if table is tables.attempts and values["outcome"] is None:
        values |= {"outcome": Outcome.LOST, "ended": min(values["until"], now)}
        values["reason"] = "its study was copied"
    return values
