"""Changes to a study and its trials in Optuna's tables and ours at once: all of each or nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import Conflict
from hpo.storage import tables
from hpo.storage.database import Database
from hpo.storage.leases import RAN_OUT, Ending
from hpo.storage.optuna import TRIALS, FencedStorage
from hpo.storage.records import ALIVE_S, Epoch, Outcome, StudyRow
from hpo.storage.tables import attempts


@dataclass(frozen=True)
class TakenTrial:
    """A trial of an earlier study, in the terms of the study that takes it over."""

    trial: FrozenTrial
    ending: Ending
    runtime: Mapping[str, Any] | None
    """How it computed."""
    epochs: Sequence[Epoch]


def insert_study(
    storage: FencedStorage,
    values: Mapping[str, Any],
    taken: Sequence[TakenTrial] = (),
    resolved: Mapping[str, Any] | None = None,
) -> bool:
    """Add a study's row, with the trials that it takes over as the first ones of its numbers, which
    Optuna's study is to be without, and what it keeps as `resolved`: all of that or nothing. False
    where the name stands already."""
    uuid, study_id, now = values["uuid"], values["study_id"], storage.database.now()
    kept = [{"study": uuid, "key": k, "value": json.dumps(v)} for k, v in (resolved or {}).items()]
    try:
        with storage.transaction() as session:
            c = session.connection()
            c.execute(tables.studies.insert().values(created=now, resumed=now, **values))
            if kept:
                c.execute(tables.resolved.insert(), kept)
            at = float(c.scalar(sa.select(now)) or 0.0)
            for one in taken:
                trial = storage._get_prepared_new_trial(study_id, one.trial, session)
                session.flush()
                _insert_attempt(c, uuid, trial, one, at)
    except sa.exc.IntegrityError:
        return False
    return True


def _insert_attempt(
    c: sa.Connection, uuid: str, trial: models.TrialModel, taken: TakenTrial, at: float
) -> None:
    """Write how a trial ended that was taken over, and its epochs; it took none of this study's
    time."""
    trial_id, last = trial.trial_id, len(taken.epochs)
    mine = {"trial_id": trial_id, "study": uuid}
    ran = {"first_epoch": 1, "epoch": last} if last else {}
    c.execute(
        attempts.insert().values(
            **mine,
            k=tables.TAKEN_OVER,
            number=trial.number,
            token="",
            worker=TAKER,
            started=at,
            until=at,
            ended=at,
            runtime=taken.runtime and json.dumps(taken.runtime),
            **ran,
            **taken.ending.row(),
        )
    )
    rows = [
        {**mine, "epoch": one.epoch, "attempt": tables.TAKEN_OVER, "finished": one.finished,
         "metrics": json.dumps(one.metrics)}
        for one in taken.epochs
    ]  # fmt: skip
    if rows:
        c.execute(tables.epochs.insert(), rows)


TAKER = "taken-over"
"""The worker of trials that were taken over."""


def has_begun(database: Database, row: StudyRow) -> bool:
    """Return whether an epoch of a study was finished in it, a configuration is queued for it, or
    one of its workers may be alive: it has not ended, and was seen in the last ALIVE_S and a lease.
    """
    with database.read() as c:
        return _has_begun(c, database, row)


def _has_begun(c: sa.Connection, database: Database, row: StudyRow) -> bool:
    e, w, a, q = tables.epochs.c, tables.workers.c, attempts.c, tables.enqueued.c
    seen = database.now() - (ALIVE_S + row.lease_s)
    signs = (
        (e.study == row.uuid, e.attempt > tables.TAKEN_OVER),
        (q.study == row.uuid,),
        (w.study == row.uuid, w.ended.is_(None), w.seen >= seen),
        (a.study == row.uuid, a.outcome.is_(None), a.until >= database.now()),
    )
    return any(c.scalar(sa.select(sa.exists().where(*sign))) for sign in signs)


def delete_unbegun(storage: FencedStorage, row: StudyRow) -> bool:
    """Delete a study unless it has begun (see `has_begun`); return whether that was done. Who takes
    a trial of it meanwhile waits, and then finds it gone."""
    with storage.transaction() as session:
        c = session.connection()
        locked = sa.select(tables.studies.c.uuid).where(tables.studies.c.uuid == row.uuid)
        if c.execute(locked.with_for_update()).first() is None:
            return False
        if _has_begun(c, storage.database, row):
            return False
        session.delete(models.StudyModel.find_or_raise_by_id(row.study_id, session))
    return True


def worst_values(c: sa.Connection, trial_id: int) -> tuple[float, ...]:
    """Return what Optuna is told of a worthless trial: the worst in each direction of its study."""
    way = models.StudyDirectionModel.__table__.c
    query = (
        sa.select(way.direction)
        .where(
            way.study_id
            == sa.select(TRIALS.c.study_id).where(TRIALS.c.trial_id == trial_id).scalar_subquery()
        )
        .order_by(way.objective)
    )
    minimize = optuna.study.StudyDirection.MINIMIZE
    return tuple(math.inf if one == minimize else -math.inf for one in c.scalars(query))


def end_trial(
    c: sa.Connection, trial_id: int, state: str, values: Sequence[float], ended: float
) -> None:
    """End a trial that Optuna's tables have as WAITING or RUNNING, at `ended` seconds since 1970.
    The caller holds its lock."""
    at = datetime.fromtimestamp(ended, UTC).replace(tzinfo=None)  # as Optuna stores times
    row = {"state": state, "datetime_complete": at}
    c.execute(sa.update(TRIALS).where(TRIALS.c.trial_id == trial_id).values(row))
    for objective, value in enumerate(values):
        stored, kind = models.TrialValueModel.value_to_stored_repr(value)
        row = {"trial_id": trial_id, "objective": objective, "value": stored, "value_type": kind}
        c.execute(models.TrialValueModel.__table__.insert().values(row))


def extend_study(
    database: Database,
    row: StudyRow,
    values: Mapping[str, Any],
    *,
    promotes: bool = False,
    length: int | None = None,
) -> None:
    """Set columns of a study's row, lift its stop, and let trials that are over go on, in our
    tables and Optuna's, but those that were taken over: all of that or nothing. `promotes`: pruned
    ones, as paused ones. `length`: complete ones that have so many epochs, since the new definition
    has more; paused as well where it `promotes`, else handed back. Storages that have them in
    memory as finished see it after `read_again`.

    Raises Conflict where, with `length`, a worker has a trial: it would end it after these. What
    dead ones had is free.
    """
    uuid, s, e = row.uuid, tables.studies.c, tables.epochs.c
    with database.write() as c:
        if length is not None:  # attempts before the study, as a claim does: no deadlock with one
            c.execute(sa.select(attempts.c.k).where(_is_open(uuid)).with_for_update()).all()
        # Who takes a trial meanwhile waits for this.
        c.execute(sa.select(s.uuid).where(s.uuid == uuid).with_for_update())
        if length is not None:
            _require_idle(c, database, row)
            whole = sa.exists().where(e.trial_id == attempts.c.trial_id, e.epoch >= length)
            outcome = Outcome.PAUSED if promotes else Outcome.HANDED_BACK
            reason = f"complete after epoch {length}, the last one then"
            _reopen(c, uuid, Outcome.COMPLETE, whole, outcome=outcome, reason=reason)
        if promotes:
            _reopen(c, uuid, Outcome.PRUNED, outcome=Outcome.PAUSED)
        lifted = {"stop": None, "stop_reason": None, "resumed": database.now()}
        c.execute(sa.update(tables.studies).where(s.uuid == uuid).values(**values, **lifted))


def _is_open(uuid: str) -> sa.ColumnElement[bool]:
    """Return the condition of a study's attempts that have not ended."""
    return sa.and_(attempts.c.study == uuid, attempts.c.outcome.is_(None))


def _require_idle(c: sa.Connection, database: Database, row: StudyRow) -> None:
    """End attempts whose lease has run out; raise Conflict where one holds."""
    a, open_ = attempts.c, _is_open(row.uuid)
    lost = {"outcome": Outcome.LOST, "ended": a.until, "reason": RAN_OUT}
    c.execute(sa.update(attempts).where(open_, a.until < database.now()).values(**lost))
    holders = list(c.scalars(sa.select(a.worker).where(open_).distinct()))
    if holders:
        raise Conflict(
            f"study {row.name!r} is being worked on by {', '.join(holders)}, with the epochs that "
            f"it has now: hpo stop {row.name} first"
        )


def _reopen(
    c: sa.Connection, uuid: str, ended: Outcome, *where: sa.ColumnElement[bool], **values: Any
) -> None:
    """Let trials of a study go on whose last attempt `ended` so: that gets `values`."""
    a = attempts.c
    mine = sa.and_(a.study == uuid, a.k > tables.TAKEN_OVER, a.outcome == ended, *where)
    ids = list(c.scalars(sa.select(a.trial_id).where(mine).order_by(a.trial_id).with_for_update()))
    for some in (ids[first : first + 500] for first in range(0, len(ids), 500)):
        here = a.trial_id.in_(some)
        c.execute(sa.update(attempts).where(here, a.outcome == ended).values(**values))
        running = {"state": TrialState.RUNNING.name, "datetime_complete": None}
        c.execute(sa.update(TRIALS).where(TRIALS.c.trial_id.in_(some)).values(running))
        told = models.TrialValueModel.__table__
        c.execute(sa.delete(told).where(told.c.trial_id.in_(some)))
