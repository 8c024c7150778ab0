"""Records of studies, trials, attempts, epochs and workers, as plain data."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from hpo.errors import NotFound, nearest
from hpo.storage.database import Database, exists
from hpo.storage.retry import storage_call
from hpo.storage.tables import (
    OPEN_ENDED,
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
    """Return {trial number: {name: Optuna's value}} in the order in which they were suggested."""
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
    """Return a value as `to_external_repr` does: a choice is stored by its place in the list."""
    if distribution["name"] == "CategoricalDistribution":
        return distribution["attributes"]["choices"][int(value)]
    return int(value) if distribution["name"] == "IntDistribution" else value


_PROCESS = "process"
ALIVE_S = 30.0
"""A worker that was not seen for this long, and a lease more, is shown as lost."""

UNFINISHED_STATES = ("WAITING", "RUNNING")
FINISHED_STATES = ("COMPLETE", "PRUNED", "FAIL")
"""Optuna's states of a trial."""


class Outcome(StrEnum):
    """How an attempt ended; an attempt without one owns its trial."""

    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"
    DIVERGED = "diverged"
    INFEASIBLE = "infeasible"
    PAUSED = "paused"
    HANDED_BACK = "handed_back"
    LOST = "lost"

    @property
    def is_final(self) -> bool:
        """True if it ends the trial, False if it permits a successor."""
        return self not in (Outcome.PAUSED, Outcome.HANDED_BACK, Outcome.LOST)

    @property
    def is_worthless(self) -> bool:
        """True if Optuna is told a complete trial of the worst values: samplers learn from it."""
        return self in (Outcome.DIVERGED, Outcome.INFEASIBLE)

    @property
    def optuna_state(self) -> str:
        """Optuna's state of a trial that ends so."""
        return {Outcome.PRUNED: "PRUNED", Outcome.FAILED: "FAIL"}.get(self, "COMPLETE")

    @property
    def words(self) -> str:
        """Its value in words."""
        return self.replace("_", " ")


FINAL = tuple(outcome for outcome in Outcome if outcome.is_final)
WORTHLESS = tuple(outcome for outcome in Outcome if outcome.is_worthless)


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
    max_time_s: float | None = None
    max_full_trainings: float | None = None

    @property
    def taken_over(self) -> int:
        """Number of its trials that were taken over from an earlier study, outside its budget."""
        return len(self.definition.get("taken_over", {}).get("trials", ()))

    @property
    def budget(self) -> int | None:
        """The number of trials that it ends with, without those taken over; None: no limit."""
        return None if self.is_open_ended else self.trials - self.taken_over

    @property
    def is_open_ended(self) -> bool:
        """True if time or epochs end it, not a number of trials."""
        return self.trials == OPEN_ENDED


@dataclass(frozen=True)
class Epoch:
    """One finished epoch of a trial."""

    epoch: int
    attempt: int
    finished: float
    metrics: dict[str, float]
    checkpoint: int | None


@dataclass(frozen=True)
class Attempt:
    """One worker's try at a trial."""

    number: int
    k: int
    worker: str
    started: float
    ended: float | None
    outcome: Outcome | None
    reason: str | None
    value: float | None
    first_epoch: int | None
    epoch: int | None
    runtime: dict[str, Any] | None
    live: bool
    objectives: tuple[float, ...] | None = None
    """Values of all objectives if the study has several; `value` is the first."""
    until: float = 0.0
    """End of its lease, by the database's clock."""

    @property
    def is_final(self) -> bool:
        """True if it ended its trial."""
        return self.outcome is not None and self.outcome.is_final

    @property
    def scores(self) -> tuple[float, ...]:
        """Values to rank it by; empty unless it completed its trial."""
        if self.outcome != Outcome.COMPLETE:
            return ()
        return self.objectives or (() if self.value is None else (self.value,))


@dataclass(frozen=True)
class Trial:
    """One trial: its parameters, curve, attempts and result."""

    number: int
    state: str
    """waiting, running, paused (at a rung), interrupted (no worker holds it), or its final
    outcome."""
    params: dict[str, Any]
    """Searched fields by dotted path, as config values."""
    value: float | None
    """The objective: the best epoch's metric so far; None if it diverged or is infeasible."""
    best_epoch: int | None
    epochs: tuple[Epoch, ...]
    attempts: tuple[Attempt, ...]
    reason: str | None
    values: dict[str, float] = field(default_factory=dict)
    """All objectives of a finished trial by name, if the study has several."""
    origin: str = "sampled"
    """Where its configuration comes from, such as `baseline 1` or `recommended: SOURCE`."""

    @property
    def seconds(self) -> float:
        """Training time of its finished epochs."""
        return sum(row.metrics.get("seconds", 0.0) for row in self.epochs)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self) | {"seconds": self.seconds}


@dataclass(frozen=True)
class Ranking:
    """Order of a study's trials by its objectives, each "minimize" or "maximize".

    Scores are a trial's values in the order of the objectives. Diverged and infeasible trials have
    none, so they are never best.
    """

    directions: Mapping[str, str]

    @property
    def has_several(self) -> bool:
        """True if there are several objectives."""
        return len(self.directions) > 1

    def order(self, scores: Mapping[int, Sequence[float]]) -> list[int]:
        """Return trial numbers, best first objective first; of equals the smaller number."""
        return sorted(scores, key=lambda number: (self._losses(scores[number])[0], number))

    def front(self, scores: Mapping[int, Sequence[float]]) -> list[int]:
        """Return the Pareto front, best first objective first; of one objective the best trial."""
        if not self.has_several:
            return self.order(scores)[:1]
        front: list[int] = []
        # In this order a later one cannot beat an earlier one, so one pass will do.
        for number in sorted(scores, key=lambda number: (self._losses(scores[number]), number)):
            if not any(self.beats(scores[other], scores[number]) for other in front):
                front.append(number)
        return front

    def beats(self, scores: Sequence[float], others: Sequence[float]) -> bool:
        """Return True if `scores` are no worse in any objective and better in one."""
        mine, theirs = self._losses(scores), self._losses(others)
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))

    def best_epoch(self, rows: Iterable[Epoch]) -> Epoch | None:
        """Return the epoch of the best first objective, the earlier one of equals; one where that
        is not finite is none."""
        metric = next(iter(self.directions))
        known = {row.epoch: row for row in rows if math.isfinite(row.metrics.get(metric, math.nan))}
        order = self.order({epoch: (row.metrics[metric],) for epoch, row in known.items()})
        return known[order[0]] if order else None

    def _losses(self, scores: Sequence[float]) -> tuple[float, ...]:
        """Return scores of which less is better; those that are maximized negated."""
        ways = self.directions.values()
        return tuple(x if way == "minimize" else -x for x, way in zip(scores, ways, strict=False))


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
    """Return True if there can be no study: an absent SQLite file, or a database without our
    tables. Raises StorageError for those of an older or newer hpo."""
    return not exists(database) or not is_current(database)


def purge_orphans(database: Database) -> None:
    """Remove our rows of studies that are gone from Optuna's tables (deleted by a tool that does
    not know ours, on SQLite without foreign keys)."""
    gone = ~sa.exists().where(optuna_studies.c.study_id == studies.c.study_id)
    with database.write() as c:
        c.execute(sa.delete(studies).where(gone))


def find_study(database: Database, name: str) -> StudyRow | None:
    """Return a study by name; None if there is none."""
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
    """Return a study by name; raise NotFound naming the nearest studies."""
    row = find_study(database, name)
    if row is None:
        names = [study.name for study in list_studies(database)]
        known = nearest(name, names) if names else "there are no studies yet: hpo run STUDY.toml"
        raise NotFound(f"no study {name!r} in {database.shown}; {known}")
    return row


def list_studies(database: Database) -> list[StudyRow]:
    """Return all studies, oldest first."""
    if is_empty(database):
        return []
    with database.read() as c:
        query = sa.select(studies).join(
            optuna_studies, optuna_studies.c.study_id == studies.c.study_id
        )
        return [_study(row) for row in c.execute(query.order_by(studies.c.created))]


def study_identities(database: Database) -> dict[int, str]:
    """Return which study each of Optuna's ids is now: the uuid of one of ours, the name of
    another."""
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
    """Set columns of a study's row."""
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
    """Clear the stop of a study; failures before now no longer count."""
    update_study(database, uuid, stop=None, stop_reason=None, resumed=database.now())


def enqueue(database: Database, uuid: str, params: Mapping[str, Any]) -> None:
    """Add a configuration that a coming trial shall try."""
    with database.write() as c:
        c.execute(enqueued.insert().values(study=uuid, params=json.dumps(dict(params))))


@storage_call
def read_enqueued(database: Database, uuid: str) -> list[tuple[dict[str, Any], int | None]]:
    """Return enqueued configurations, oldest first, each with the trial that took it or None."""
    with database.read() as c:
        query = sa.select(enqueued).where(enqueued.c.study == uuid).order_by(enqueued.c.id)
        return [(json.loads(row.params), row.number) for row in c.execute(query)]


def assign_enqueued(c: sa.Connection, uuid: str, number: int) -> None:
    """Give the oldest configuration that no trial has to trial `number`, to no other: of two
    workers that see the same one, the later looks again. Trials are first taken in the order of
    their numbers, so the oldest waiting one is next."""
    e = enqueued.c
    free = sa.and_(e.study == uuid, e.number.is_(None))
    while (oldest := c.scalar(sa.select(sa.func.min(e.id)).where(free))) is not None:
        taken = c.execute(sa.update(enqueued).where(e.id == oldest, free).values(number=number))
        if taken.rowcount == 1:
            return


def enqueued_for(c: sa.Connection, uuid: str, number: int) -> tuple[dict[str, Any] | None, int]:
    """Return the enqueued configuration of trial `number`, and the number of those before it."""
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
    """Return what workers resolved, by key; of keys that begin with `prefix`."""
    here = resolved.c.study == uuid
    wanted = resolved.c.key.startswith(prefix, autoescape=True)
    with database.read() as c:
        rows = c.execute(sa.select(resolved).where(here, wanted).order_by(resolved.c.key))
        return {row.key: json.loads(row.value) for row in rows}


@storage_call
def read_outcomes(database: Database, uuid: str) -> dict[int, Outcome | None]:
    """Return how the last attempt of each trial ended, by trial number; None if it goes on."""
    a = attempts.c
    query = sa.select(a.number, a.outcome).where(a.study == uuid).order_by(a.number, a.k)
    with database.read() as c:
        found = {row.number: row.outcome for row in c.execute(query)}
    return {number: Outcome(name) if name else None for number, name in found.items()}


@storage_call
def read_epoch_marks(database: Database, uuid: str) -> dict[int, tuple[int, float]]:
    """Return the last epoch of each trial that has any and when its newest was stored, by trial
    number: what changes with every epoch that is stored."""
    e, t = epochs.c, optuna_trials.c
    query = (
        sa.select(t.number, sa.func.max(e.epoch), sa.func.max(e.finished))
        .join(optuna_trials, t.trial_id == e.trial_id)
        .where(e.study == uuid)
        .group_by(t.number)
    )
    with database.read() as c:
        return {number: (int(last), float(at)) for number, last, at in c.execute(query)}


@storage_call
def read_epochs(
    database: Database, uuid: str, trial_id: int | None = None, *, first: int = 0
) -> dict[int, list[Epoch]]:
    """Return finished epochs in order, by trial number: of trial `first` and those after it, or of
    `trial_id` alone."""
    t = optuna_trials
    query = (
        sa.select(epochs, t.c.number)
        .join(t, t.c.trial_id == epochs.c.trial_id)
        .where(epochs.c.study == uuid, t.c.number >= first)
        .order_by(t.c.number, epochs.c.epoch)
    )
    if trial_id is not None:
        query = query.where(epochs.c.trial_id == trial_id)
    rows: dict[int, list[Epoch]] = defaultdict(list)
    with database.read() as c:
        for row in c.execute(query):
            metrics = json.loads(row.metrics)
            rows[row.number].append(
                Epoch(row.epoch, row.attempt, row.finished, metrics, row.checkpoint)
            )
    return dict(rows)


@storage_call
def count_epochs(database: Database, uuid: str) -> dict[int, int]:
    """Return how many finished epochs each trial has that has any, by number."""
    t = optuna_trials
    query = (
        sa.select(t.c.number, sa.func.count())
        .select_from(epochs.join(t, t.c.trial_id == epochs.c.trial_id))
        .where(epochs.c.study == uuid)
        .group_by(t.c.number)
    )
    with database.read() as c:
        return {row[0]: row[1] for row in c.execute(query)}


@storage_call
def read_attempts(database: Database, uuid: str) -> dict[int, list[Attempt]]:
    """Return all attempts in order, by trial number."""
    rows: dict[int, list[Attempt]] = defaultdict(list)
    with database.read() as c:
        for _, _, attempt in select_attempts(c, database, attempts.c.study == uuid):
            rows[attempt.number].append(attempt)
    return dict(rows)


def select_attempts(
    c: sa.Connection, database: Database, *where: sa.ColumnElement[bool]
) -> Iterator[tuple[str, int, Attempt]]:
    """Yield attempts in order of trials, each with the uuid of its study and Optuna's trial id."""
    a = attempts.c
    live = sa.and_(a.outcome.is_(None), a.until >= database.now()).label("live")
    query = sa.select(a.study, a.trial_id, *(
        live if name == "live" else a[name] for name in Attempt.__dataclass_fields__
    )).where(*where).order_by(a.study, a.number, a.k)  # fmt: skip
    for study, trial_id, *values in c.execute(query):
        # A large study has thousands: the columns are in the order of the fields.
        number, k, worker, started, ended, outcome, reason, value, first, last, *rest = values
        runtime, is_live, objectives, until = rest
        yield study, trial_id, Attempt(
            number, k, worker, started, ended, Outcome(outcome) if outcome else None, reason, value,
            first, last, json.loads(runtime) if runtime else None, bool(is_live),
            tuple(json.loads(objectives)) if objectives else None, until,
        )  # fmt: skip


@storage_call
def read_states(database: Database, study_id: int) -> dict[int, str]:
    """Return Optuna's state of each trial (WAITING, RUNNING, ...), by number in order."""
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
    """Set columns of a worker's row, and that it was seen now."""
    with database.write() as c:
        c.execute(
            sa.update(workers).where(workers.c.id == worker).values(seen=database.now(), **values)
        )


@storage_call
def end_worker(database: Database, worker: str, reason: str) -> None:
    """Record that a worker ended, and why."""
    update_worker(database, worker, ended=database.now(), reason=reason, number=None)


@storage_call
def read_workers(database: Database, uuid: str) -> list[WorkerRow]:
    """Return a study's workers, oldest first."""
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
    """Return the time now, by the database's clock."""
    with database.read() as c:
        return float(c.scalar(sa.select(database.now())) or 0.0)
