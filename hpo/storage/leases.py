"""Trial leases: claim, renew, release, fence.

After an outage of the database, a sleep of the host or a jump of the database's clock all leases
have run out, and their owners are there. So whoever takes over an expired trial must itself have
been in touch with the database for one whole lease: in that time an owner would have renewed.

A trial is free if it waits, or runs without a live lease. Taking it is one transaction: the
predecessor's attempt is ended (a conditional update that must change its one row), then attempt
k + 1 is inserted under its primary key; both decide exactly who won. A trial whose number is not
below the budget is never taken: that alone makes the budget exact. Expiry only permits a successor:
an owner without one writes on, however late. And it permits only one that was itself in touch with
the database for a whole lease: after an outage, a sleep or a jump of the clock all leases have run
out, and their owners are there.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from hpo.errors import Fenced
from hpo.formatting import printable
from hpo.redaction import redact
from hpo.storage.database import Database
from hpo.storage.records import (
    UNFINISHED_STATES,
    Epoch,
    Outcome,
    assign_enqueued,
    enqueued_for,
)
from hpo.storage.retry import storage_call
from hpo.storage.tables import attempts, epochs, optuna_trials, studies, workers


@dataclass(frozen=True)
class ContactWindow:
    """Since when a process has been in touch with the database, by the database's clock.

    A gap of more than half a lease breaks it. A shorter one leaves an owner, who renews four times
    in a lease, the time to do so: nobody who saw it may think that the owner is dead.
    """

    since: float = math.inf
    last: float = -math.inf

    def heard(self, now: float, lease_s: float) -> ContactWindow:
        """Extend it by an answer of the database at `now`; threads may report in any order."""
        unbroken = abs(now - self.last) <= lease_s / 2
        return (
            ContactWindow(self.since, max(self.last, now)) if unbroken else ContactWindow(now, now)
        )

    def spans(self, lease_s: float) -> bool:
        """Return whether it is long enough to say that a lease which has run out was not renewed
        because its owner could not."""
        return self.last - self.since >= lease_s


NO_CONTACT = ContactWindow()


BEGINNING = {"epoch": None, "epochs": None, "value": None, "images_per_s": None, "reason": None}
"""Columns of a worker's row that tell of the trial before the one it takes."""
MAX_FRUITLESS = 5
"""Attempts in a row that died without one more epoch, after which a trial fails."""
RAN_OUT = "its lease ran out"
ENQUEUER_LEASE_S = 5.0


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
        """Return the condition under which this lease's owner may write."""
        return sa.and_(
            attempts.c.trial_id == self.trial_id,
            attempts.c.k == self.k,
            attempts.c.token == self.token,
            attempts.c.outcome.is_(None),
        )

    def lost(self) -> Fenced:
        """Return the error for an owner that is fenced."""
        return Fenced(f"trial {self.number}: attempt {self.k} is not its owner any more")


@dataclass(frozen=True)
class Ending:
    """How an attempt ends its trial: a final outcome, the objective's value, a reason in words."""

    outcome: Outcome
    value: float | None = None
    reason: str | None = None
    objectives: tuple[float, ...] | None = None
    """The values of all objectives, where there are several; `value` is the first."""

    def row(self) -> dict[str, Any]:
        """Return the columns of the attempt's row."""
        reason = None if self.reason is None else storable(self.reason)
        objectives = self.objectives and json.dumps(self.objectives)
        return asdict(self) | {"reason": reason, "objectives": objectives}


def storable(reason: str) -> str:
    """Return a reason as every database takes it and everybody may read it: without secrets, and
    with what is no text (names of files are bytes) as \\udce9."""
    return printable(redact(reason))


@dataclass(frozen=True)
class ClaimableTrial:
    """A trial that may be taken."""

    trial_id: int
    number: int
    started: bool
    expired: bool = False
    """Its owner's lease has run out, and nothing else is known of it: to be claimed by
    a worker whose `ContactWindow` spans a lease."""


@dataclass(frozen=True)
class Claim:
    """A lease just taken, and what the trial has so far."""

    lease: Lease
    started: bool
    fruitless: tuple[str, ...]
    """Why attempts in a row, before this one, died without finishing an epoch; newest first."""
    enqueued: dict[str, Any] | None
    enqueued_before: int
    """Enqueued configurations that trials of smaller numbers took."""
    runtime: dict[str, Any] | None


@dataclass(frozen=True)
class _ClaimRequest:
    """The wish to take a trial; repeated with the same token it is the same wish."""

    study: str
    candidate: ClaimableTrial
    worker: str
    contact: ContactWindow
    token: str

    def lease(self, k: int, lease_s: float) -> Lease:
        trial = self.candidate
        return Lease(self.study, trial.trial_id, trial.number, k, self.token, self.worker, lease_s)

    def may_supersede(self, now: float, lease_s: float) -> bool:
        """Return whether an expired owner may be called lost, by the contact until `now`: since the
        worker decided to take the trial it may have slept."""
        return self.candidate.expired and self.contact.heard(now, lease_s).spans(lease_s)


def claim(
    database: Database,
    uuid: str,
    candidate: ClaimableTrial,
    worker: str,
    contact: ContactWindow = NO_CONTACT,
) -> Claim | None:
    """Claim `candidate` for `worker`; return None if another worker was quicker or it is not free.

    One whose owner's lease has run out is taken only if `contact` spans a lease, until now.
    """
    return _claim(database, _ClaimRequest(uuid, candidate, worker, contact, secrets.token_hex(16)))


@storage_call
def _claim(database: Database, request: _ClaimRequest) -> Claim | None:
    try:
        with database.write() as c:
            return _claim_in(c, database, request)
    except IntegrityError:
        return None  # another worker inserted the same attempt first (PostgreSQL, MySQL)


def _claim_in(c: sa.Connection, database: Database, request: _ClaimRequest) -> Claim | None:
    t, a, candidate = optuna_trials.c, attempts.c, request.candidate
    study = c.execute(
        sa.select(studies.c.trials, studies.c.stop, studies.c.lease_s, studies.c.study_id).where(
            studies.c.uuid == request.study
        )
    ).one_or_none()
    if study is None or study.stop == "user" or candidate.number >= study.trials:
        return None
    # The attempt first, then the trial, as every write of an owner: in another order a late owner
    # and its successor would wait for each other.
    history = c.execute(
        sa.select(attempts)
        .where(a.trial_id == candidate.trial_id)
        .order_by(a.k.desc())
        .with_for_update()
    ).all()
    trial = c.execute(
        sa.select(t.state)
        .where(
            t.trial_id == candidate.trial_id,
            t.study_id == study.study_id,
            t.number == candidate.number,
        )
        .with_for_update()
    ).one_or_none()
    if trial is None or trial.state not in UNFINISHED_STATES:
        return None
    if study.stop is not None and trial.state == "WAITING":
        return None  # a stop rule has fired since: what was begun is told, nothing begins
    now = float(c.scalar(sa.select(database.now())) or 0)
    is_open = bool(history) and history[0].outcome is None
    if is_open and history[0].token == request.token:
        lease = request.lease(history[0].k, study.lease_s)  # taken, but the answer was lost
        history = history[1:]
    elif is_open and not (
        request.may_supersede(now, study.lease_s) and _end_lost(c, database, history[0])
    ):
        return None
    else:
        lease = request.lease(history[0].k + 1 if history else 1, study.lease_s)
        _open_attempt(c, lease, now, _runtime(history))
        _progress(c, database, lease.worker, BEGINNING | {"number": lease.number})
        if not history:
            assign_enqueued(c, lease.study, lease.number)
    params, before = enqueued_for(c, request.study, lease.number)
    runtime = _runtime(history)
    return Claim(
        lease=lease,
        started=trial.state == "RUNNING",
        fruitless=_fruitless(c, candidate.trial_id, history),
        enqueued=params,
        enqueued_before=before,
        runtime=json.loads(runtime) if runtime else None,
    )


def _open_attempt(c: sa.Connection, lease: Lease, now: float, runtime: str | None) -> None:
    c.execute(
        attempts.insert().values(
            trial_id=lease.trial_id,
            k=lease.k,
            study=lease.study,
            number=lease.number,
            token=lease.token,
            worker=lease.worker,
            started=now,
            until=now + lease.lease_s,
            runtime=runtime,
        )
    )


def _runtime(history: Sequence[sa.Row[Any]]) -> str | None:
    """Return how the trial computes since an earlier attempt, as JSON."""
    return next((row.runtime for row in history if row.runtime), None)


def _end_lost(c: sa.Connection, database: Database, last: sa.Row[Any]) -> bool:
    ended = c.execute(
        sa.update(attempts)
        .where(
            attempts.c.trial_id == last.trial_id,
            attempts.c.k == last.k,
            attempts.c.outcome.is_(None),
            attempts.c.until < database.now(),
        )
        .values(outcome=Outcome.LOST, ended=attempts.c.until, reason=RAN_OUT)
    )
    return ended.rowcount == 1


def _fruitless(c: sa.Connection, trial_id: int, history: Sequence[sa.Row[Any]]) -> tuple[str, ...]:
    """Return why attempts died, newest first, until one that finished an epoch; no hand-backs."""
    fruitful = set(
        c.scalars(sa.select(epochs.c.attempt).where(epochs.c.trial_id == trial_id).distinct())
    )
    reasons = []
    for row in history:
        if row.k in fruitful:
            break
        if row.outcome == Outcome.LOST:
            reasons.append(row.reason or "")
        if row.outcome is None:  # when it was read; it has just been ended
            reasons.append(RAN_OUT)
    return tuple(reasons)


@storage_call
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


def _finite(value: object) -> object:
    """Return `value`; None for a metric that is no number, which a column of MySQL's cannot hold
    (the epoch's row has it as text)."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _progress(c: sa.Connection, database: Database, worker: str, values: dict[str, Any]) -> None:
    known = {name: _finite(value) for name, value in values.items()}
    c.execute(sa.update(workers).where(workers.c.id == worker).values(seen=database.now(), **known))


@storage_call
def keep_runtime(database: Database, lease: Lease, runtime: dict[str, Any]) -> None:
    """Record how this trial computes, for its next attempt. Raises Fenced."""
    with database.write() as c:
        _renew(c, database, lease, runtime=json.dumps(runtime, sort_keys=True))


@storage_call
def begin_epoch(database: Database, lease: Lease, epoch: int, progress: dict[str, Any]) -> None:
    """Write down that `epoch` (from 1) is about to be computed by this attempt. Raises Fenced."""
    with database.write() as c:
        _renew(c, database, lease, **_begun(epoch, epoch))
        _progress(c, database, lease.worker, progress)


@storage_call
def record_epochs(
    database: Database,
    lease: Lease,
    rows: Sequence[Epoch],
    *,
    progress: dict[str, Any],
    keep: int = 0,
) -> str | None:
    """Record the metrics of epochs in order, and the pointer to the checkpoint of the last one, in
    one transaction under the lease. Usually one epoch; more where the database was unavailable.
    Epochs after them that are recorded stay up to epoch `keep`.

    Returns how the study is to stop ('user' or 'rule'), or None. Raises Fenced.
    """
    mine = [row.epoch for row in rows if row.attempt == lease.k]
    begun = _begun(mine[0], mine[-1]) if mine else {}
    with database.write() as c:
        _renew(c, database, lease, **begun)
        # A takeover without its predecessor's checkpoint computes epochs again.
        e, first, last = epochs.c, rows[0].epoch, rows[-1].epoch
        again = sa.or_(e.epoch.between(first, last), e.epoch > max(last, keep))
        c.execute(sa.delete(epochs).where(e.trial_id == lease.trial_id, again))
        for row in rows:
            c.execute(
                epochs.insert().values(
                    trial_id=lease.trial_id,
                    epoch=row.epoch,
                    study=lease.study,
                    attempt=row.attempt,
                    finished=database.now(),
                    metrics=json.dumps(row.metrics),
                    checkpoint=row.checkpoint,
                )
            )
            if row.attempt != lease.k:
                _note_begun(c, lease.trial_id, row)
        _progress(c, database, lease.worker, progress)
        return c.scalar(sa.select(studies.c.stop).where(studies.c.uuid == lease.study))


def _begun(first: int, last: int) -> dict[str, Any]:
    """Return an attempt's columns once it has begun epochs `first` to `last`."""
    return {"epoch": last, "first_epoch": sa.func.coalesce(attempts.c.first_epoch, first)}


def _note_begun(c: sa.Connection, trial_id: int, row: Epoch) -> None:
    """Credit an epoch to a dead predecessor that computed it while the database was unavailable:
    the epoch is its own attempt's."""
    a = attempts.c
    c.execute(
        sa.update(attempts)
        .where(a.trial_id == trial_id, a.k == row.attempt)
        .where(sa.func.coalesce(a.epoch, 0) < row.epoch)
        .values(**_begun(row.epoch, row.epoch))
    )


@storage_call
def note_damage(database: Database, lease: Lease, k: int, text: str) -> None:
    """Add to the record of attempt `k`, which is over, what became of its checkpoint. Raises
    Fenced."""
    a = attempts.c
    with database.write() as c:
        _renew(c, database, lease)
        here = sa.and_(a.trial_id == lease.trial_id, a.k == k, a.k != lease.k)
        before = c.scalar(sa.select(a.reason).where(here)) or ""
        if text not in before:
            reason = storable("; ".join(part for part in (before, text) if part))
            c.execute(sa.update(attempts).where(here).values(reason=reason))


@storage_call
def release(database: Database, lease: Lease, outcome: Outcome, reason: str) -> bool:
    """Give the trial up so that it can be taken: `handed_back` on purpose, `lost` with a process
    that cannot go on, `paused` at a rung. False where it was lost already."""
    with database.write() as c:
        done = c.execute(
            sa.update(attempts)
            .where(lease.holds())
            .values(outcome=outcome, reason=storable(reason), ended=database.now())
        )
        return done.rowcount == 1


def release_worker(database: Database, worker: str, reason: str) -> int:
    """End what a worker held that is known to be dead; the number of trials set free."""
    with database.write() as c:
        done = c.execute(
            sa.update(attempts)
            .where(attempts.c.worker == worker, attempts.c.outcome.is_(None))
            .values(outcome=Outcome.LOST, reason=reason, ended=database.now())
        )
        c.execute(sa.update(studies).where(studies.c.filler == worker).values(filler=None))
        c.execute(
            sa.update(workers)
            .where(workers.c.id == worker, workers.c.ended.is_(None))
            .values(ended=database.now(), reason=reason)
        )
        return done.rowcount


@storage_call
def claim_enqueuer(database: Database, uuid: str, worker: str) -> bool:
    """Return whether `worker` may add waiting trials now; others may again after
    ENQUEUER_LEASE_S."""
    s, now = studies.c, database.now()
    with database.write() as c:
        done = c.execute(
            sa.update(studies)
            .where(s.uuid == uuid)
            .where(sa.or_(s.filler.is_(None), s.filler == worker, s.filler_until < now))
            .values(filler=worker, filler_until=now + ENQUEUER_LEASE_S)
        )
        return done.rowcount == 1


@storage_call
def release_enqueuer(database: Database, uuid: str, worker: str) -> None:
    """Give up the enqueuer's lease."""
    with database.write() as c:
        c.execute(
            sa.update(studies)
            .where(studies.c.uuid == uuid, studies.c.filler == worker)
            .values(filler=None)
        )


def live_leases(database: Database, uuid: str) -> list[str]:
    """Return the workers that hold a live lease in the study."""
    a = attempts.c
    with database.read() as c:
        return list(
            c.scalars(
                sa.select(a.worker)
                .where(a.study == uuid, a.outcome.is_(None), a.until >= database.now())
                .distinct()
            )
        )
