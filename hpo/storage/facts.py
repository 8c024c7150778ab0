"""What a decision needs to know of a study, read in one transaction."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from hpo.errors import NotFound
from hpo.storage.db import Database
from hpo.storage.leases import FINAL, Free
from hpo.storage.patience import storage_call
from hpo.storage.tables import attempts, optuna_trials, studies


@dataclass(frozen=True)
class Facts:
    """What a decision needs to know of a study, read in one transaction."""

    uuid: str
    trials: int
    timeout_s: float | None
    target: float | None
    patience_trials: int | None
    stop: str | None
    stop_reason: str | None
    created: int
    finished: int
    running: int
    waiting: int
    free: tuple[Free, ...]
    active_s: float
    best: float | None
    since_best: int
    failures: tuple[str, ...]
    """Reasons of the latest trials that failed in a row, newest first."""
    now: float = 0.0
    """By the database's clock."""


@storage_call
def read_facts(database: Database, uuid: str, *, maximize: bool) -> Facts:
    """Raises NotFound where the study is gone."""
    with database.read() as c:
        study = c.execute(sa.select(studies).where(studies.c.uuid == uuid)).one_or_none()
        if study is None:
            raise NotFound("the study was deleted")
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
        return Facts(
            uuid=uuid,
            trials=study.trials,
            timeout_s=study.timeout_s,
            target=study.target,
            patience_trials=study.patience_trials,
            stop=study.stop,
            stop_reason=study.stop_reason,
            created=sum(int(total) for _, total in counts.values()),
            finished=inside("COMPLETE", "PRUNED", "FAIL"),
            running=inside("RUNNING"),
            waiting=inside("WAITING"),
            free=_free(c, database, study.study_id, study.trials),
            active_s=_active_s(c, database, uuid),
            best=best,
            since_best=since_best,
            failures=_failures(c, uuid, study.resumed),
            now=float(c.scalar(sa.select(database.now())) or 0.0),
        )


def _free(c: sa.Connection, database: Database, study_id: int, trials: int) -> tuple[Free, ...]:
    t, a = optuna_trials.c, attempts.c
    owned = sa.and_(a.trial_id == t.trial_id, a.outcome.is_(None))
    leased = sa.exists().where(owned, a.until >= database.now())
    expired = sa.exists().where(owned).label("expired")
    query = (
        sa.select(t.trial_id, t.number, t.state, expired)
        .where(t.study_id == study_id, t.number < trials, t.state.in_(["WAITING", "RUNNING"]))
        .where(~leased)
        .order_by(t.number)
        .limit(32)
    )
    return tuple(
        Free(row.trial_id, row.number, row.state == "RUNNING", bool(row.expired))
        for row in c.execute(query)
    )


def _active_s(c: sa.Connection, database: Database, uuid: str) -> float:
    a, now = attempts.c, database.now()
    until = sa.case((a.until < now, a.until), else_=now)
    spent = sa.func.sum(sa.func.coalesce(a.ended, until) - a.started)
    return float(c.scalar(sa.select(spent).where(a.study == uuid)) or 0.0)


def _best(c: sa.Connection, uuid: str, maximize: bool) -> tuple[float | None, int]:
    a = attempts.c
    complete = sa.and_(a.study == uuid, a.outcome == "complete")
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
        if row.outcome != "failed":
            break
        reasons.append(row.reason or "")
    return tuple(reasons)
