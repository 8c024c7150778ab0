"""What a study has spent of its budgets of time and epochs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from hpo.errors import NotFound
from hpo.storage.database import Database
from hpo.storage.retry import storage_call
from hpo.storage.tables import TAKEN_OVER, attempts, epochs, studies


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


@storage_call
def read_spending(database: Database, uuid: str, *, max_epochs: int) -> Spending:
    """Read what a study has spent. Raises NotFound if it was deleted."""
    s = studies.c
    with database.read() as c:
        limits = (s.uuid, s.timeout_s, s.max_time_s, s.max_full_trainings)
        return select_spending(c, database, select_study(c, uuid, *limits), max_epochs)


def select_study(c: sa.Connection, uuid: str, *columns: sa.ColumnElement[Any]) -> sa.Row[Any]:
    """Return a study's row, or `columns` of it. Raises NotFound if it was deleted."""
    chosen = sa.select(*columns) if columns else sa.select(studies)
    study = c.execute(chosen.where(studies.c.uuid == uuid)).one_or_none()
    if study is None:
        raise NotFound("the study was deleted")
    return study


def select_spending(
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
