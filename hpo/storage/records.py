"""Records of studies, trials, attempts, epochs and workers, as plain data."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from hpo.errors import (
    NotFound,
    nearest,
)
from hpo.storage.database import (
    Database,
    exists,
)
from hpo.storage.retry import storage_call
from hpo.storage.tables import (
    attempts,
    enqueued,
    epochs,
    is_current,
    optuna_params,
    optuna_studies,
    optuna_trials,
    resolved,
    studies,
    workers,
)


def read_params(database: Database, study_id: int) -> dict[int, dict[str, Any]]:
    """{trial number: {name: Optuna's value}} in the order in which they were suggested."""
    p, t = optuna_params.c, optuna_trials.c
    query = (
        sa.select(t.number, p.param_name, p.param_value, p.distribution_json)
        .join(optuna_trials, t.trial_id == p.trial_id)
        .where(t.study_id == study_id)
        .order_by(p.param_id)
    )
    rows: dict[int, dict[str, Any]] = defaultdict(dict)
    with database.read() as c:
        for number, name, value, distribution in c.execute(query):
            rows[number][name] = _external(value, json.loads(distribution))
    return dict(rows)


def _external(value: float, distribution: dict[str, Any]) -> Any:
    """As Optuna's `to_external_repr`: a choice is stored by its place in the list."""
    if distribution["name"] == "CategoricalDistribution":
        return distribution["attributes"]["choices"][int(value)]
    return int(value) if distribution["name"] == "IntDistribution" else value


def finite(value: object) -> object:
    """`value`; None for a metric that is no number, which a column of MySQL's cannot hold (the
    epoch's row has it as text)."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


_PROCESS = "process"


@dataclass(frozen=True)
class StudyRow:
    """One study as the database has it; limits are the current ones, after `extend`."""

    uuid: str
    study_id: int
    name: str
    definition: dict[str, Any]
    source: str
    created: float
    trials: int
    timeout_s: float | None
    target: float | None
    patience_trials: int | None
    lease_s: float
    stop: str | None
    stop_reason: str | None


@dataclass(frozen=True)
class EpochRow:
    """One finished epoch of a trial."""

    epoch: int
    attempt: int
    finished: float
    metrics: dict[str, float]
    checkpoint: int | None


@dataclass(frozen=True)
class AttemptRow:
    """One worker's try at a trial."""

    number: int
    k: int
    worker: str
    started: float
    ended: float | None
    outcome: str | None
    reason: str | None
    value: float | None
    first_epoch: int | None
    epoch: int | None
    runtime: dict[str, Any] | None
    live: bool
    objectives: tuple[float, ...] | None = None
    """The values of all objectives, where there are several."""


@dataclass(frozen=True)
class WorkerRow:
    """One worker process, alive or not. Times in seconds since 1970 by the database's clock."""

    id: str
    host: str
    pid: int
    device: str
    versions: dict[str, str]
    started: float
    seen: float
    ended: float | None
    reason: str | None
    number: int | None
    epoch: int | None
    epochs: int | None
    value: float | None
    images_per_s: float | None
    process: str = ""
    """Which process it is, where its system says (`hpo.workers.process`)."""


def is_empty(database: Database) -> bool:
    """True where no study can be: an absent SQLite file, or a database without our tables. Raises
    StorageError for those of an older or newer hpo."""
    return not exists(database) or not is_current(database)


def insert_study(database: Database, values: Mapping[str, Any]) -> bool:
    """Add a study's row; False where the name stands already."""
    now = database.now()
    try:
        with database.write() as c:
            c.execute(studies.insert().values(created=now, resumed=now, **values))
    except IntegrityError:
        return False
    return True


def purge_orphans(database: Database) -> None:
    """Remove our rows of studies that are gone from Optuna's tables (deleted by a tool that does
    not know ours, on SQLite without foreign keys)."""
    gone = ~sa.exists().where(optuna_studies.c.study_id == studies.c.study_id)
    with database.write() as c:
        c.execute(sa.delete(studies).where(gone))


def find_study(database: Database, name: str) -> StudyRow | None:
    if is_empty(database):
        return None
    with database.read() as c:
        query = (
            sa.select(studies)
            .join(optuna_studies, optuna_studies.c.study_id == studies.c.study_id)
            .where(studies.c.name == name, optuna_studies.c.study_name == name)
        )
        row = c.execute(query).one_or_none()
        return _study(row) if row else None


def get_study(database: Database, name: str) -> StudyRow:
    """Raises NotFound naming the nearest studies."""
    row = find_study(database, name)
    if row is None:
        names = [study.name for study in list_studies(database)]
        known = nearest(name, names) if names else "there are no studies yet: hpo run STUDY.toml"
        raise NotFound(f"no study {name!r} in {database.shown}; {known}")
    return row


def list_studies(database: Database) -> list[StudyRow]:
    if is_empty(database):
        return []
    with database.read() as c:
        query = sa.select(studies).join(
            optuna_studies, optuna_studies.c.study_id == studies.c.study_id
        )
        return [_study(row) for row in c.execute(query.order_by(studies.c.created))]


def study_identities(database: Database) -> dict[int, str]:
    """Which study each of Optuna's ids is now: the uuid of one of ours, the name of another."""
    mine = sa.and_(
        studies.c.study_id == optuna_studies.c.study_id,
        studies.c.name == optuna_studies.c.study_name,
    )
    which = sa.func.coalesce(studies.c.uuid, optuna_studies.c.study_name).label("which")
    query = sa.select(optuna_studies.c.study_id, which).outerjoin_from(
        optuna_studies, studies, mine
    )
    with database.read() as c:
        return {row.study_id: row.which for row in c.execute(query)}


def _study(row: sa.Row[Any]) -> StudyRow:
    fields = {name: row._mapping[name] for name in StudyRow.__dataclass_fields__}
    return StudyRow(**(fields | {"definition": json.loads(row.definition)}))


def update_study(database: Database, uuid: str, **values: Any) -> None:
    with database.write() as c:
        c.execute(sa.update(studies).where(studies.c.uuid == uuid).values(**values))


@storage_call
def stop_study(database: Database, uuid: str, stop: str, reason: str) -> bool:
    """Set how the study stops, unless it stops already; whether this call did it."""
    with database.write() as c:
        done = c.execute(
            sa.update(studies)
            .where(studies.c.uuid == uuid, studies.c.stop.is_(None))
            .values(stop=stop, stop_reason=reason)
        )
        return done.rowcount == 1


def resume_study(database: Database, uuid: str) -> None:
    update_study(database, uuid, stop=None, stop_reason=None, resumed=database.now())


def enqueue(database: Database, uuid: str, params: Mapping[str, Any]) -> None:
    with database.write() as c:
        c.execute(enqueued.insert().values(study=uuid, params=json.dumps(dict(params))))


def read_enqueued(database: Database, uuid: str) -> list[tuple[dict[str, Any], int | None]]:
    """Configurations put in by hand, oldest first, each with the trial that took it or None."""
    with database.read() as c:
        query = sa.select(enqueued).where(enqueued.c.study == uuid).order_by(enqueued.c.id)
        return [(json.loads(row.params), row.number) for row in c.execute(query)]


def assign_enqueued(c: sa.Connection, uuid: str, number: int) -> None:
    """Give the oldest configuration that no trial has to trial `number`. Trials are first taken in
    the order of their numbers, so the oldest waiting one is next."""
    e = enqueued.c
    oldest = c.scalar(sa.select(sa.func.min(e.id)).where(e.study == uuid, e.number.is_(None)))
    if oldest is not None:
        c.execute(sa.update(enqueued).where(e.id == oldest).values(number=number))


def enqueued_for(c: sa.Connection, uuid: str, number: int) -> tuple[dict[str, Any] | None, int]:
    """What trial `number` has got, and how many trials before it got something."""
    e = enqueued.c
    mine = c.scalar(sa.select(e.params).where(e.study == uuid, e.number == number))
    before = c.scalar(sa.select(sa.func.count()).where(e.study == uuid, e.number < number))
    return (json.loads(mine) if mine else None), int(before or 0)


@storage_call
def resolve_once(database: Database, uuid: str, key: str, value: Any) -> Any:
    """Store what the first worker found; return what stands there: its value, or this one."""
    try:
        with database.write() as c:
            c.execute(resolved.insert().values(study=uuid, key=key, value=json.dumps(value)))
        return value
    except IntegrityError:
        found = read_resolved(database, uuid, key)
        if key not in found:
            raise NotFound("the study was deleted") from None
        return found[key]


@storage_call
def read_resolved(database: Database, uuid: str, prefix: str = "") -> dict[str, Any]:
    """What workers found once for all, by key; of keys that begin with `prefix`."""
    here = resolved.c.study == uuid
    wanted = resolved.c.key.startswith(prefix, autoescape=True)
    with database.read() as c:
        rows = c.execute(sa.select(resolved).where(here, wanted).order_by(resolved.c.key))
        return {row.key: json.loads(row.value) for row in rows}


@storage_call
def read_epochs(
    database: Database, uuid: str, trial_id: int | None = None, *, first: int = 0
) -> dict[int, list[EpochRow]]:
    """Finished epochs in order, by trial number; of trial `first` and those after it."""
    t = optuna_trials
    query = (
        sa.select(epochs, t.c.number)
        .join(t, t.c.trial_id == epochs.c.trial_id)
        .where(epochs.c.study == uuid, t.c.number >= first)
        .order_by(t.c.number, epochs.c.epoch)
    )
    if trial_id is not None:
        query = query.where(epochs.c.trial_id == trial_id)
    rows: dict[int, list[EpochRow]] = defaultdict(list)
    with database.read() as c:
        for row in c.execute(query):
            metrics = json.loads(row.metrics)
            rows[row.number].append(
                EpochRow(row.epoch, row.attempt, row.finished, metrics, row.checkpoint)
            )
    return dict(rows)


@storage_call
def read_attempts(database: Database, uuid: str) -> dict[int, list[AttemptRow]]:
    """All attempts in order, by trial number."""
    a = attempts.c
    live = sa.and_(a.outcome.is_(None), a.until >= database.now())
    columns = [live if name == "live" else a[name] for name in AttemptRow.__dataclass_fields__]
    query = sa.select(*columns).where(a.study == uuid).order_by(a.number, a.k)
    rows: dict[int, list[AttemptRow]] = defaultdict(list)
    with database.read() as c:
        for found in c.execute(query):
            # Of a large study there are thousands: the columns stand in the order of the fields.
            *plain, runtime, is_live, objectives = found
            parsed = json.loads(runtime) if runtime else None
            values = tuple(json.loads(objectives)) if objectives else None
            rows[found.number].append(AttemptRow(*plain, parsed, bool(is_live), values))  # type: ignore[call-arg]
    return dict(rows)


@storage_call
def read_states(database: Database, study_id: int) -> dict[int, str]:
    """Optuna's state of each trial (WAITING, RUNNING, ...), by number in order."""
    t = optuna_trials.c
    query = sa.select(t.number, t.state).where(t.study_id == study_id).order_by(t.number)
    with database.read() as c:
        return {row.number: str(row.state) for row in c.execute(query)}


@storage_call
def add_worker(
    database: Database,
    /,
    worker: str,
    uuid: str,
    *,
    versions: Mapping[str, str],
    process: str,
    **values: Any,
) -> None:
    """Add a worker's row; nothing where it stands, or where the study is gone."""
    now = database.now()
    # Which process it is stands with the versions: that is not worth a migration.
    stored = json.dumps({**versions, _PROCESS: process})
    row = workers.insert().values(
        id=worker, study=uuid, started=now, seen=now, versions=stored, **values
    )
    with suppress(IntegrityError), database.write() as c:
        c.execute(row)


@storage_call
def update_worker(database: Database, /, worker: str, **values: Any) -> None:
    with database.write() as c:
        c.execute(
            sa.update(workers).where(workers.c.id == worker).values(seen=database.now(), **values)
        )


@storage_call
def end_worker(database: Database, worker: str, reason: str) -> None:
    update_worker(database, worker, ended=database.now(), reason=reason, number=None)


@storage_call
def read_workers(database: Database, uuid: str) -> list[WorkerRow]:
    with database.read() as c:
        query = sa.select(workers).where(workers.c.study == uuid).order_by(workers.c.started)
        rows = []
        for row in c.execute(query):
            versions = json.loads(row.versions)
            fields = dict(row._mapping) | {"process": versions.pop(_PROCESS, "")}
            del fields["study"]
            rows.append(WorkerRow(**(fields | {"versions": versions})))
        return rows


@storage_call
def clock(database: Database) -> float:
    """Now, by the database's clock."""
    with database.read() as c:
        return float(c.scalar(sa.select(database.now())) or 0.0)
