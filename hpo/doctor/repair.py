"""Repairs of a database: one transaction each, which changes nothing if the fault is gone.

The attempt is locked before its trial, as every write of an owner does it. An attempt whose lease
is live is never touched. Nothing here removes a trial, an epoch's metrics or a file of a study.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from hpo.storage import tables
from hpo.storage.database import Database
from hpo.storage.records import (
    FINISHED_STATES,
    UNFINISHED_STATES,
    Attempt,
    Outcome,
    select_attempts,
)
from hpo.storage.studies import end_trial, worst_values
from hpo.storage.tables import attempts, epochs, optuna_studies, optuna_trials, studies

REPAIRER = "hpo storage check"
"""Worker of an attempt that is inserted."""
LONGEST = 2.0
"""No lease ends later than this many of its lengths from now."""


class Repair(Protocol):
    """Repair of one finding. As text: what is done, as `the attempt is ended`."""

    def apply(self, database: Database) -> bool:
        """Repair it; return False if the fault is gone, or a worker is at it."""


@dataclass(frozen=True)
class EndAttempt:
    """End an open attempt whose lease ran out, and whose trial is finished or has a later one."""

    trial_id: int
    k: int
    outcome: Outcome
    reason: str

    def __str__(self) -> str:
        return f"the attempt is ended as {self.outcome}"

    def apply(self, database: Database) -> bool:
        """Apply it; see `Repair`."""
        with database.write() as c:
            rows, state = lock_trial(c, database, self.trial_id)
            superseded = bool(rows) and rows[0].k > self.k
            if self.outcome != (Outcome.LOST if superseded else outcome_of_state(state)):
                return False
            a = attempts.c
            done = c.execute(
                sa.update(attempts)
                .where(a.trial_id == self.trial_id, a.k == self.k)
                .where(a.outcome.is_(None), a.until < database.now())
                .values(outcome=self.outcome, reason=self.reason, ended=a.until)
            )
            return done.rowcount == 1


@dataclass(frozen=True)
class ShortenLease:
    """Shorten a lease that was written while the clock was wrong. A live owner renews it."""

    trial_id: int
    k: int
    lease_s: float

    def __str__(self) -> str:
        return f"the lease ends in {self.lease_s:g} s, unless a worker renews it"

    def apply(self, database: Database) -> bool:
        """Apply it; see `Repair`."""
        a, now = attempts.c, database.now()
        with database.write() as c:
            done = c.execute(
                sa.update(attempts)
                .where(a.trial_id == self.trial_id, a.k == self.k)
                .where(a.outcome.is_(None), a.until > now + LONGEST * self.lease_s)
                .values(until=now + self.lease_s)
            )
            return done.rowcount == 1


@dataclass(frozen=True)
class HandBack:
    """Hand back a trial that runs in Optuna's tables and that no worker of ours ever had: the next
    one continues with its parameters. Optuna's rows stay as they are."""

    study: str
    trial_id: int
    number: int

    def __str__(self) -> str:
        return "it is entered as handed back, and the next worker runs it"

    def apply(self, database: Database) -> bool:
        """Apply it; see `Repair`."""
        with database.write() as c:
            rows, state = lock_trial(c, database, self.trial_id)
            if rows or state != "RUNNING":
                return False
            now = float(c.scalar(sa.select(database.now())) or 0.0)
            about = {"trial_id": self.trial_id, "number": self.number, "study": self.study}
            times = {"started": now, "until": now, "ended": now}
            return _insert_attempt(c, about | times | {
                "k": 1,
                "outcome": Outcome.HANDED_BACK,
                "reason": "another tool began it",
            })  # fmt: skip


@dataclass(frozen=True)
class TellOptuna:
    """End a trial in Optuna's tables as our attempt `k` ended it."""

    trial_id: int
    k: int
    outcome: Outcome

    def __str__(self) -> str:
        return f"Optuna is told {self.outcome.optuna_state}, as the attempt ended"

    def apply(self, database: Database) -> bool:
        """Apply it; see `Repair`."""
        with database.write() as c:
            rows, state = lock_trial(c, database, self.trial_id)
            last = rows[0] if rows else None
            if last is None or (last.k, last.outcome) != (self.k, self.outcome):
                return False
            if state not in UNFINISHED_STATES:
                return False
            values = values_to_tell(last)
            if values is None:
                return False
            if self.outcome.is_worthless:
                values = worst_values(c, self.trial_id)
            end_trial(c, self.trial_id, self.outcome.optuna_state, values, last.ended or last.until)
            return True


@dataclass(frozen=True)
class EnterAttempt:
    """Insert the row of an attempt that left epochs, and a successor."""

    study: str
    trial_id: int
    number: int
    k: int

    def __str__(self) -> str:
        return "the attempt is entered as lost"

    def apply(self, database: Database) -> bool:
        """Apply it; see `Repair`."""
        e = epochs.c
        spans = sa.select(
            sa.func.min(e.epoch), sa.func.max(e.epoch),
            sa.func.min(e.finished), sa.func.max(e.finished),
        ).where(e.trial_id == self.trial_id, e.attempt == self.k)  # fmt: skip
        with database.write() as c:
            rows, _ = lock_trial(c, database, self.trial_id)
            first, last, started, ended = c.execute(spans).one()
            if first is None or not rows or rows[0].k < self.k or self.k in [r.k for r in rows]:
                return False
            about = {"trial_id": self.trial_id, "number": self.number, "study": self.study}
            times = {"started": started, "until": ended, "ended": ended}
            return _insert_attempt(c, about | times | {
                "k": self.k,
                "outcome": Outcome.LOST,
                "reason": "its row was gone",
                "first_epoch": first,
                "epoch": last,
            })  # fmt: skip


@dataclass(frozen=True)
class DropRows:
    """Delete our rows that belong to no study, or to no trial of it."""

    table: str

    def __str__(self) -> str:
        return "the rows are deleted"

    def apply(self, database: Database) -> bool:
        """Apply it; see `Repair`."""
        table = tables.metadata.tables[self.table]
        with database.write() as c:
            return c.execute(sa.delete(table).where(is_orphan(database, table))).rowcount > 0


@dataclass(frozen=True)
class DropStudy:
    """Delete our rows of a study that is gone from Optuna's tables."""

    uuid: str

    def __str__(self) -> str:
        return "its rows are deleted; its files stay"

    def apply(self, database: Database) -> bool:
        """Apply it; see `Repair`."""
        gone = ~sa.exists().where(optuna_studies.c.study_id == studies.c.study_id)
        with database.write() as c:
            done = c.execute(sa.delete(studies).where(studies.c.uuid == self.uuid, gone))
            return done.rowcount == 1


def is_orphan(database: Database, table: sa.Table) -> sa.ColumnElement[bool]:
    """Return the condition for rows of our table whose study is gone, or whose trial is not its
    study's. Rows of a study that is gone from Optuna's tables go with it; what a live worker holds
    is no orphan."""
    s, t = studies.c, optuna_trials.c
    if "trial_id" not in table.c:
        return ~sa.exists().where(s.uuid == table.c.study)
    whole = s.study_id == optuna_studies.c.study_id
    orphaned = sa.exists().where(s.uuid == table.c.study, ~sa.exists().where(whole))
    placed = sa.exists().where(
        s.uuid == table.c.study, t.study_id == s.study_id, t.trial_id == table.c.trial_id
    )
    orphans = sa.and_(~placed, ~orphaned)
    if table is attempts:
        over = sa.or_(table.c.outcome.is_not(None), table.c.until < database.now())
        orphans = sa.and_(orphans, over)
    return orphans


def outcome_of_state(state: str | None) -> Outcome | None:
    """Return how an attempt ends whose trial another tool ended in `state`; None if it is going on.
    A COMPLETE that hpo has not seen is no result to rank beside its own: the attempt is lost."""
    if state not in FINISHED_STATES:
        return None
    return {"FAIL": Outcome.FAILED, "PRUNED": Outcome.PRUNED}.get(state, Outcome.LOST)


def lock_trial(
    c: sa.Connection, database: Database, trial_id: int
) -> tuple[list[Attempt], str | None]:
    """Return the attempts of a trial, latest first, and its state in Optuna's tables; lock both."""
    a, t = attempts.c, optuna_trials.c
    mine = a.trial_id == trial_id
    c.execute(sa.select(attempts).where(mine).order_by(a.k.desc()).with_for_update()).all()
    state = c.scalar(sa.select(t.state).where(t.trial_id == trial_id).with_for_update())
    # Read again: a statement that had to wait for a lock has not seen what was added meanwhile.
    rows = sorted((row for *_, row in select_attempts(c, database, mine)), key=lambda row: -row.k)
    return rows, state


def values_to_tell(attempt: Attempt) -> tuple[float, ...] | None:
    """Return what Optuna is told of an attempt that ended its trial: its values; () if it has none
    (of a worthless one `worst_values`); None if they are not known."""
    if attempt.outcome != Outcome.COMPLETE:
        return ()
    scores = attempt.scores
    known = scores and all(value is not None and math.isfinite(value) for value in scores)
    return scores if known else None


def _insert_attempt(c: sa.Connection, values: dict[str, Any]) -> bool:
    row = {"token": secrets.token_hex(16), "worker": REPAIRER} | values
    try:
        with c.begin_nested():
            c.execute(attempts.insert().values(row))
    except IntegrityError:
        return False  # a worker was quicker
    return True
