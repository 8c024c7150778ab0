"""The snapshot of a study that scheduling decides from: what is free, what runs, what is spent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from hpo.errors import NotFound
from hpo.storage.database import Database
from hpo.storage.leases import ClaimableTrial
from hpo.storage.records import FINAL, FINISHED_STATES, UNFINISHED_STATES, Outcome
from hpo.storage.retry import storage_call
from hpo.storage.tables import TAKEN_OVER, attempts, epochs, optuna_trials, studies


@dataclass(frozen=True, kw_only=True)
class Spending:
    """Limits on a study's time and epochs, and what is spent of each; 0 of one without a limit."""

    timeout_s: float | None
    active_s: float
    """Summed seconds of all attempts."""
    max_time_s: float | None = None
    elapsed_s: float = 0.0
    """Seconds in which anything ran, by the clock."""
    max_full_trainings: float | None = None
    max_epochs: int = 1
    """Epochs of a full training: the most that a trial can have."""
    spent_epochs: int = 0
    """Finished epochs of all trials, each once; none of trials that were taken over."""

    @property
    def full_trainings(self) -> float:
        """What the finished epochs amount to in full trainings."""
        return self.spent_epochs / self.max_epochs


@dataclass(frozen=True, kw_only=True)
class StudySnapshot(Spending):
    """What a decision needs to know of a study, read in one transaction."""

    uuid: str
    trials: int
    """The budget; `tables.OPEN_ENDED` where only time or epochs end the study."""
    target: float | None
    patience_trials: int | None
    stop: str | None
    stop_reason: str | None
    created: int
    finished: int
    running: int
    waiting: int
    free: tuple[ClaimableTrial, ...]
    """Trials that may be taken; of many the first."""
    best: float | None
    since_best: int
    failures: tuple[str, ...]
    """Reasons of the latest trials that failed in a row, newest first."""
    now: float = 0.0
    """By the database's clock."""
    paused: tuple[ClaimableTrial, ...] = ()
    """Trials that paused at a rung, which count neither as running nor as free."""

    @property
    def begun(self) -> int:
        """Number of trials that some worker has taken."""
        return self.finished + self.running + len(self.paused)


@storage_call
def read_snapshot(
    database: Database, uuid: str, *, maximize: bool, max_epochs: int, whole: bool = False
) -> StudySnapshot:
    """Read a study's snapshot; `max_epochs` are those of a full training; `whole`: with what is
    spent also where nothing limits it. Raises NotFound if it was deleted."""
    with database.read() as c:
        study = _select_study(c, uuid)
        t = optuna_trials.c
        below = sa.case((t.number < study.trials, 1), else_=0)
        counts = {
            state: (inside, total)
            for state, inside, total in c.execute(
                sa.select(t.state, sa.func.sum(below), sa.func.count())
                .where(t.study_id == study.study_id)
                .group_by(t.state)
            )
        }

        def inside(*states: str) -> int:
            return sum(int(counts[s][0]) for s in states if s in counts)

        best, since_best = _best(c, uuid, maximize)
        paused = _paused(c, uuid, study.study_id, study.trials)
        return StudySnapshot(
            **vars(_select_spending(c, database, study, max_epochs, whole=whole)),
            uuid=uuid,
            trials=study.trials,
            target=study.target,
            patience_trials=study.patience_trials,
            stop=study.stop,
            stop_reason=study.stop_reason,
            created=sum(int(total) for _, total in counts.values()),
            finished=inside(*FINISHED_STATES),
            running=inside("RUNNING") - len(paused),
            waiting=inside("WAITING"),
            free=_free(c, database, study.study_id, study.trials),
            best=best,
            since_best=since_best,
            failures=_failures(c, uuid, study.resumed),
            now=float(c.scalar(sa.select(database.now())) or 0.0),
            paused=paused,
        )


def _is_paused(trial_id: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
    """Return the condition under which the last attempt of a trial ended with a pause."""
    last, later = attempts.alias(), attempts.alias()
    return sa.exists().where(
        last.c.trial_id == trial_id,
        last.c.outcome == Outcome.PAUSED,
        ~sa.exists().where(later.c.trial_id == last.c.trial_id, later.c.k > last.c.k),
    )


def _paused(c: sa.Connection, uuid: str, study_id: int, trials: int) -> tuple[ClaimableTrial, ...]:
    t, a = optuna_trials.c, attempts.c
    some = sa.select(a.trial_id).where(a.study == uuid, a.outcome == Outcome.PAUSED)
    query = (
        sa.select(t.trial_id, t.number)
        .where(t.trial_id.in_(some), t.study_id == study_id, t.number < trials)
        .where(t.state == "RUNNING", _is_paused(t.trial_id))
        .order_by(t.number)
    )
    return tuple(ClaimableTrial(row.trial_id, row.number, True) for row in c.execute(query))


def _free(
    c: sa.Connection, database: Database, study_id: int, trials: int
) -> tuple[ClaimableTrial, ...]:
    t, a = optuna_trials.c, attempts.c
    owned = sa.and_(a.trial_id == t.trial_id, a.outcome.is_(None))
    leased = sa.exists().where(owned, a.until >= database.now())
    expired = sa.exists().where(owned).label("expired")
    query = (
        sa.select(t.trial_id, t.number, t.state, expired)
        .where(t.study_id == study_id, t.number < trials, t.state.in_(UNFINISHED_STATES))
        .where(~leased, ~_is_paused(t.trial_id))
        .order_by(t.number)
        .limit(32)
    )
    return tuple(
        ClaimableTrial(row.trial_id, row.number, row.state == "RUNNING", bool(row.expired))
        for row in c.execute(query)
    )


def _best(c: sa.Connection, uuid: str, maximize: bool) -> tuple[float | None, int]:
    a = attempts.c
    complete = sa.and_(a.study == uuid, a.outcome == Outcome.COMPLETE)
    order = a.value.desc() if maximize else a.value.asc()
    best = c.execute(
        sa.select(a.value, a.ended).where(complete).order_by(order, a.ended).limit(1)
    ).one_or_none()
    if best is None:
        return None, 0
    since = sa.select(sa.func.count()).where(
        a.study == uuid, a.outcome.in_(FINAL), a.ended > best.ended
    )
    return float(best.value), int(c.scalar(since) or 0)


def _failures(c: sa.Connection, uuid: str, resumed: float) -> tuple[str, ...]:
    a = attempts.c
    over = sa.and_(a.study == uuid, a.outcome.in_(FINAL), a.ended >= resumed)
    last = c.scalar(sa.select(sa.func.max(a.ended)).where(over, a.outcome != Outcome.FAILED))
    failed = sa.select(a.reason).where(over, a.outcome == Outcome.FAILED, a.ended > (last or 0.0))
    return tuple(reason or "" for reason in c.scalars(failed.order_by(a.ended.desc())))


@storage_call
def read_spending(database: Database, uuid: str, *, max_epochs: int) -> Spending:
    """Read what a study has spent. Raises NotFound if it was deleted."""
    s = studies.c
    with database.read() as c:
        limits = (s.uuid, s.timeout_s, s.max_time_s, s.max_full_trainings)
        return _select_spending(c, database, _select_study(c, uuid, *limits), max_epochs)


@storage_call
def read_definition(database: Database, uuid: str) -> dict[str, Any]:
    """Return a study's definition as it is now. Raises NotFound if it was deleted."""
    with database.read() as c:
        found: dict[str, Any] = json.loads(_select_study(c, uuid, studies.c.definition)[0])
        return found


def _select_study(c: sa.Connection, uuid: str, *columns: sa.ColumnElement[Any]) -> sa.Row[Any]:
    """Return a study's row, or `columns` of it. Raises NotFound if it was deleted."""
    chosen = sa.select(*columns) if columns else sa.select(studies)
    study = c.execute(chosen.where(studies.c.uuid == uuid)).one_or_none()
    if study is None:
        raise NotFound("the study was deleted")
    return study


def _select_spending(
    c: sa.Connection,
    database: Database,
    study: sa.Row[Any],
    max_epochs: int,
    *,
    whole: bool = False,
) -> Spending:
    """Read what the study of a row of `hpo_studies` has spent; `whole`: also without a limit."""
    uuid, limits = study.uuid, (study.timeout_s, study.max_time_s, study.max_full_trainings)
    summed, timed, counted = (whole or limit is not None for limit in limits)
    return Spending(
        timeout_s=study.timeout_s,
        active_s=_active_s(c, database, uuid) if summed else 0.0,
        max_time_s=study.max_time_s,
        elapsed_s=_elapsed_s(c, database, uuid) if timed else 0.0,
        max_full_trainings=study.max_full_trainings,
        max_epochs=max_epochs,
        spent_epochs=_spent_epochs(c, uuid) if counted else 0,
    )


def _end(database: Database) -> sa.ColumnElement[float]:
    """Return when an attempt ended; of one without an end now, or the end of its lease."""
    a, now = attempts.c, database.now()
    return sa.func.coalesce(a.ended, sa.case((a.until < now, a.until), else_=now))


def _active_s(c: sa.Connection, database: Database, uuid: str) -> float:
    spent = sa.func.sum(_end(database) - attempts.c.started)
    return float(c.scalar(sa.select(spent).where(attempts.c.study == uuid)) or 0.0)


def _elapsed_s(c: sa.Connection, database: Database, uuid: str) -> float:
    """Sum what each attempt, in the order of their starts, adds to the time that those before it
    cover."""
    a, order = attempts.c, (attempts.c.started, attempts.c.trial_id, attempts.c.k)
    reached = sa.func.max(_end(database)).over(order_by=order, rows=(None, -1))
    spans = (
        sa.select(a.started, _end(database).label("ended"), reached.label("reached"))
        .where(a.study == uuid)
        .subquery()
        .c
    )
    begin = sa.case((spans.reached > spans.started, spans.reached), else_=spans.started)
    added = sa.case((spans.ended > begin, spans.ended - begin), else_=0.0)
    return float(c.scalar(sa.select(sa.func.sum(added))) or 0.0)


def _spent_epochs(c: sa.Connection, uuid: str) -> int:
    mine = sa.and_(epochs.c.study == uuid, epochs.c.attempt > TAKEN_OVER)
    return int(c.scalar(sa.select(sa.func.count()).where(mine)) or 0)
