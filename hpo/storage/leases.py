"""Who may run which trial now.

A trial is free if it waits, or runs without a live lease. Taking it is one transaction: the
predecessor's attempt is ended (a conditional update that must change its one row), then attempt
k + 1 is inserted under its primary key; both decide exactly who won. A trial whose number is not
below the budget is never taken: that alone makes the budget exact. Expiry only permits a successor:
an owner without one writes on, however late.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from hpo.errors import Fenced
from hpo.redaction import redact
from hpo.storage.db import Database
from hpo.storage.tables import attempts, enqueued, epochs, optuna_trials, studies, workers

FINAL = ("complete", "pruned", "failed", "diverged")
"""Outcomes that end a trial; handed_back and lost permit a successor."""
MAX_FRUITLESS = 5
"""Attempts in a row that died without one more epoch, after which a trial fails."""
RAN_OUT = "its lease ran out"
FILLER_LEASE_S = 5.0


@dataclass(frozen=True)
class Lease:
    """The right to write one trial: attempt `k` of it, proved by a token of its own."""

    study: str
    trial_id: int
    number: int
    k: int
    token: str
    worker: str
    lease_s: float

    def holds(self) -> sa.ColumnElement[bool]:
        """The condition under which this lease's owner may write."""
        return sa.and_(
            attempts.c.trial_id == self.trial_id,
            attempts.c.k == self.k,
            attempts.c.token == self.token,
            attempts.c.outcome.is_(None),
        )

    def lost(self) -> Fenced:
        return Fenced(f"trial {self.number}: attempt {self.k} is not its owner any more")


@dataclass(frozen=True)
class Ending:
    """How an attempt ends its trial: one of FINAL, the objective's value, a reason in words."""

    outcome: str
    value: float | None = None
    reason: str | None = None
    objectives: tuple[float, ...] | None = None
    """The values of all objectives, where there are several; `value` is the first."""


@dataclass(frozen=True)
class Free:
    """A trial that may be taken."""

    trial_id: int
    number: int
    started: bool


@dataclass(frozen=True)
class Taken:
    """A lease just taken, and what the trial has so far."""

    lease: Lease
    started: bool
    fruitless: tuple[str, ...]
    """Why attempts in a row, before this one, died without finishing an epoch; newest first."""
    enqueued: dict[str, Any] | None
    enqueued_before: int
    """Enqueued configurations that trials of smaller numbers took."""
    runtime: dict[str, Any] | None


def take(database: Database, uuid: str, free: Free, worker: str) -> Taken | None:
    """Take `free` for `worker`; None where somebody else was quicker or it is not free any more."""
    try:
        with database.write() as c:
            return _take(c, database, uuid, free, worker)
    except IntegrityError:
        return None  # another worker inserted the same attempt first (PostgreSQL, MySQL)


def _take(c: sa.Connection, database: Database, uuid: str, free: Free, worker: str) -> Taken | None:
    t, a = optuna_trials.c, attempts.c
    study = c.execute(
        sa.select(studies.c.trials, studies.c.stop, studies.c.lease_s, studies.c.study_id).where(
            studies.c.uuid == uuid
        )
    ).one_or_none()
    if study is None or study.stop == "user" or free.number >= study.trials:
        return None
    # The attempt first, then the trial, as every write of an owner: in another order a late owner
    # and its successor would wait for each other.
    history = c.execute(
        sa.select(attempts)
        .where(a.trial_id == free.trial_id)
        .order_by(a.k.desc())
        .with_for_update()
    ).all()
    trial = c.execute(
        sa.select(t.state)
        .where(t.trial_id == free.trial_id, t.study_id == study.study_id, t.number == free.number)
        .with_for_update()
    ).one_or_none()
    if trial is None or trial.state not in ("WAITING", "RUNNING"):
        return None
    now = float(c.scalar(sa.select(database.now())) or 0)
    if history and history[0].outcome is None and not _end_lost(c, database, history[0]):
        return None
    lease = Lease(
        study=uuid,
        trial_id=free.trial_id,
        number=free.number,
        k=history[0].k + 1 if history else 1,
        token=secrets.token_hex(16),
        worker=worker,
        lease_s=study.lease_s,
    )
    runtime = next((row.runtime for row in history if row.runtime), None)
    c.execute(
        attempts.insert().values(
            trial_id=lease.trial_id,
            k=lease.k,
            study=uuid,
            number=lease.number,
            token=lease.token,
            worker=worker,
            started=now,
            until=now + study.lease_s,
            runtime=runtime,
        )
    )
    if not history:
        _assign_enqueued(c, uuid, lease.number)
    params, before = _enqueued_for(c, uuid, lease.number)
    return Taken(
        lease=lease,
        started=trial.state == "RUNNING",
        fruitless=_fruitless(c, free.trial_id, history),
        enqueued=params,
        enqueued_before=before,
        runtime=json.loads(runtime) if runtime else None,
    )


def _end_lost(c: sa.Connection, database: Database, last: sa.Row[Any]) -> bool:
    ended = c.execute(
        sa.update(attempts)
        .where(
            attempts.c.trial_id == last.trial_id,
            attempts.c.k == last.k,
            attempts.c.outcome.is_(None),
            attempts.c.until < database.now(),
        )
        .values(outcome="lost", ended=attempts.c.until, reason=RAN_OUT)
    )
    return ended.rowcount == 1


def _fruitless(c: sa.Connection, trial_id: int, history: Any) -> tuple[str, ...]:
    """Why attempts died, newest first, until one that finished an epoch; no hand-backs."""
    fruitful = set(
        c.scalars(sa.select(epochs.c.attempt).where(epochs.c.trial_id == trial_id).distinct())
    )
    reasons = []
    for row in history:
        if row.k in fruitful:
            break
        if row.outcome == "lost":
            reasons.append(row.reason or "")
        if row.outcome is None:  # when it was read; it has just been ended
            reasons.append(RAN_OUT)
    return tuple(reasons)


def _assign_enqueued(c: sa.Connection, uuid: str, number: int) -> None:
    """Trials are first taken in the order of their numbers, so the oldest waiting one is next."""
    e = enqueued.c
    oldest = c.scalar(sa.select(sa.func.min(e.id)).where(e.study == uuid, e.number.is_(None)))
    if oldest is not None:
        c.execute(sa.update(enqueued).where(e.id == oldest).values(number=number))


def _enqueued_for(c: sa.Connection, uuid: str, number: int) -> tuple[dict[str, Any] | None, int]:
    e = enqueued.c
    mine = c.scalar(sa.select(e.params).where(e.study == uuid, e.number == number))
    before = c.scalar(sa.select(sa.func.count()).where(e.study == uuid, e.number < number))
    return (json.loads(mine) if mine else None), int(before or 0)


def renew(database: Database, lease: Lease, progress: dict[str, Any] | None = None) -> None:
    """Extend the lease from now; `progress` goes into the worker's row. Raises Fenced."""
    with database.write() as c:
        _renew(c, database, lease)
        if progress is not None:
            _progress(c, database, lease.worker, progress)


def _renew(c: sa.Connection, database: Database, lease: Lease, **values: Any) -> None:
    values["until"] = database.now() + lease.lease_s
    if c.execute(sa.update(attempts).where(lease.holds()).values(**values)).rowcount != 1:
        raise lease.lost()


def _progress(c: sa.Connection, database: Database, worker: str, values: dict[str, Any]) -> None:
    c.execute(
        sa.update(workers).where(workers.c.id == worker).values(seen=database.now(), **values)
    )


def keep_runtime(database: Database, lease: Lease, runtime: dict[str, Any]) -> None:
    """What this trial computes with, for whoever takes it over. Raises Fenced."""
    with database.write() as c:
        _renew(c, database, lease, runtime=json.dumps(runtime, sort_keys=True))


def begin_epoch(database: Database, lease: Lease, epoch: int, progress: dict[str, Any]) -> None:
    """Write down that `epoch` (from 1) is about to be computed by this attempt. Raises Fenced."""
    with database.write() as c:
        first = sa.func.coalesce(attempts.c.first_epoch, epoch)
        _renew(c, database, lease, epoch=epoch, first_epoch=first)
        _progress(c, database, lease.worker, progress)


def record_epoch(
    database: Database,
    lease: Lease,
    epoch: int,
    metrics: dict[str, float],
    *,
    checkpoint: bool,
    progress: dict[str, Any],
) -> str | None:
    """One transaction: the epoch's metrics and the pointer to its checkpoint, under the lease.

    Returns how the study is to stop ('user' or 'rule'), or None. Raises Fenced.
    """
    with database.write() as c:
        _renew(c, database, lease)
        # A takeover without its predecessor's checkpoint computes the epoch again.
        c.execute(
            sa.delete(epochs).where(epochs.c.trial_id == lease.trial_id, epochs.c.epoch >= epoch)
        )
        c.execute(
            epochs.insert().values(
                trial_id=lease.trial_id,
                epoch=epoch,
                study=lease.study,
                attempt=lease.k,
                finished=database.now(),
                metrics=json.dumps(metrics),
                checkpoint=lease.k if checkpoint else None,
            )
        )
        _progress(c, database, lease.worker, progress)
        return c.scalar(sa.select(studies.c.stop).where(studies.c.uuid == lease.study))


def release(database: Database, lease: Lease, outcome: str, reason: str) -> bool:
    """Give the trial up so that it can be taken at once: `handed_back` on purpose, or `lost` with
    a process that cannot go on. False where it was lost already."""
    with database.write() as c:
        done = c.execute(
            sa.update(attempts)
            .where(lease.holds())
            .values(outcome=outcome, reason=redact(reason), ended=database.now())
        )
        return done.rowcount == 1


def abandon(database: Database, worker: str, reason: str) -> int:
    """End what a worker held that is known to be dead; the number of trials set free."""
    with database.write() as c:
        done = c.execute(
            sa.update(attempts)
            .where(attempts.c.worker == worker, attempts.c.outcome.is_(None))
            .values(outcome="lost", reason=reason, ended=database.now())
        )
        c.execute(sa.update(studies).where(studies.c.filler == worker).values(filler=None))
        c.execute(
            sa.update(workers)
            .where(workers.c.id == worker, workers.c.ended.is_(None))
            .values(ended=database.now(), reason=reason)
        )
        return done.rowcount


def take_fill_turn(database: Database, uuid: str, worker: str) -> bool:
    """Whether `worker` may add waiting trials now; others may again after FILLER_LEASE_S."""
    s, now = studies.c, database.now()
    with database.write() as c:
        done = c.execute(
            sa.update(studies)
            .where(s.uuid == uuid, sa.or_(s.filler.is_(None), s.filler_until < now))
            .values(filler=worker, filler_until=now + FILLER_LEASE_S)
        )
        return done.rowcount == 1


def end_fill_turn(database: Database, uuid: str, worker: str) -> None:
    with database.write() as c:
        c.execute(
            sa.update(studies)
            .where(studies.c.uuid == uuid, studies.c.filler == worker)
            .values(filler=None)
        )


def live_leases(database: Database, uuid: str) -> list[str]:
    """Workers that hold a live lease in the study."""
    a = attempts.c
    with database.read() as c:
        return list(
            c.scalars(
                sa.select(a.worker)
                .where(a.study == uuid, a.outcome.is_(None), a.until >= database.now())
                .distinct()
            )
        )
