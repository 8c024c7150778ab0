"""The snapshot of a study that scheduling decides from: what is free, what runs, what is spent."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from hpo.storage.database import Database
from hpo.storage.leases import ClaimableTrial
from hpo.storage.records import FINAL, FINISHED_STATES, UNFINISHED_STATES, Outcome
from hpo.storage.retry import storage_call
from hpo.storage.spending import Spending, select_spending, select_study
from hpo.storage.tables import attempts, optuna_trials


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
        study = select_study(c, uuid)
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
            **vars(select_spending(c, database, study, max_epochs, whole=whole)),
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
    rows = c.execute(
        sa.select(a.outcome, a.reason)
        .where(a.study == uuid, a.outcome.in_(FINAL), a.ended >= resumed)
        .order_by(a.ended.desc())
        .limit(32)
    )
    reasons: list[str] = []
    for row in rows:
        if row.outcome != Outcome.FAILED:
            break
        reasons.append(row.reason or "")
    return tuple(reasons)
