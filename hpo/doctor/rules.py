"""What is wrong in a database, decided from rows of one moment. Touches nothing.

Whatever a live search does leaves no finding: a trial is RUNNING only under an attempt, and it and
its attempt end in one transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hpo.doctor import repair
from hpo.doctor.repair import (
    Cure,
    outcome_of,
    told_values,
)
from hpo.formatting import plural
from hpo.storage.records import (
    FINISHED_STATES,
    Attempt,
    Outcome,
)

UNATTEMPTED = "trial without attempt"
CONTRADICTION = "contradiction"
ENDLESS = "attempt without end"
UNOWNED = "epochs without attempt"
NOWHERE = "rows without study or trial"
HALVED = "study without Optuna's"
STRAY = "files without study or trial"
SURPLUS = "files of trials that are over"
UNREAD = "artifacts not looked at"
OLD = "old schema"
DAMAGED = "damaged database"
SPOILED = "damaged file"
FOREIGN = "study of Optuna's own"
EXPECTED = "waits for a worker"


@dataclass(frozen=True)
class Finding:
    """One thing that a check came upon: a fault, or else a note, of what only looks like one."""

    kind: str
    means: str
    """What it is, in words; says of what, as far as the fields below do not."""
    study: str = ""
    trial: int | None = None
    attempt: int | None = None
    cure: Cure | None = None
    """What `--repair` does; None: it leaves it to the user."""
    left: str = ""
    """Why, and what they can do."""
    fault: bool = True

    @property
    def where(self) -> str:
        """`digits, trial 3, attempt 1`, as far as it is known."""
        parts = [self.study] if self.study else []
        parts += [] if self.trial is None else [f"trial {self.trial}"]
        parts += [] if self.attempt is None else [f"attempt {self.attempt}"]
        return ", ".join(parts)

    def to_dict(self) -> dict[str, object]:
        """For `hpo storage check --json`."""
        return {
            "kind": self.kind,
            "study": self.study or None,
            "trial": self.trial,
            "attempt": self.attempt,
            "means": self.means,
            "repair": None if self.cure is None else str(self.cure),
            "left": self.left or None,
        }


@dataclass(frozen=True)
class StoredTrial:
    """A trial in Optuna's tables, with what ours have of it."""

    trial_id: int
    number: int
    state: str
    attempts: Sequence[Attempt] = ()
    """By number."""
    epochs: Mapping[int, int] = field(default_factory=dict)
    """How many were finished by each attempt."""


@dataclass(frozen=True)
class Known:
    """A study that both sides have."""

    uuid: str
    name: str
    budget: int
    lease_s: float
    trials: Sequence[StoredTrial]


@dataclass(frozen=True)
class Halved:
    """A study of ours that Optuna's tables do not have, or have under another name."""

    uuid: str
    name: str
    theirs: str | None


@dataclass(frozen=True)
class Rows:
    """A database at one moment; `now` by its own clock."""

    now: float
    studies: Sequence[Known] = ()
    halved: Sequence[Halved] = ()
    foreign: Sequence[str] = ()
    """Names of studies that only Optuna's tables have."""
    nowhere: Mapping[str, int] = field(default_factory=dict)
    """Number of rows that belong to no study or trial, by table."""


def judge(rows: Rows) -> Iterator[Finding]:
    """All findings, faults and notes."""
    for name in rows.foreign:
        yield Finding(FOREIGN, "another tool made it; it is not looked at", name, fault=False)
    for half in rows.halved:
        yield _half(half)
    for table, count in rows.nowhere.items():
        means = f"{plural(count, 'row')} of {table}: the study or trial is gone"
        yield Finding(NOWHERE, means, cure=repair.DropRows(table))
    for study in rows.studies:
        for trial in study.trials:
            yield from _trial(study, trial, rows.now)


def _half(half: Halved) -> Finding:
    if half.theirs is None:
        means = "it is gone from Optuna's tables: deleted by a tool that does not know hpo's"
        return Finding(HALVED, means, half.name, cure=repair.DropStudy(half.uuid))
    means = f"Optuna's tables have {half.theirs!r} under its id: renamed, or deleted and replaced"
    left = f"give it its name again if it is the same study; else delete it: uuid {half.uuid}"
    return Finding(HALVED, means, half.name, left=left)


def _trial(study: Known, trial: StoredTrial, now: float) -> Iterator[Finding]:
    yield from _earlier(study, trial, now)
    yield from _unowned(study, trial)
    last = trial.attempts[-1] if trial.attempts else None
    if last is None:
        yield from _without_attempt(study, trial)
    elif trial.state in FINISHED_STATES:
        yield from _over(study, trial, last, now)
    elif last.is_final:
        yield _not_told(study, trial, last)
    elif trial.number >= study.budget:
        yield _beyond(study, trial, UNATTEMPTED if last.outcome else ENDLESS)
    elif last.outcome is None:
        yield from _open(study, trial, last, now)


def _without_attempt(study: Known, trial: StoredTrial) -> Iterator[Finding]:
    where = (study.name, trial.number)
    if trial.state in FINISHED_STATES:
        means = f"it is {trial.state} in Optuna's tables, and no worker of hpo had it: another tool"
        yield Finding(UNATTEMPTED, f"{means} made it", *where, left=_no_result(study))
    elif trial.state == "RUNNING" and trial.number >= study.budget:
        yield _beyond(study, trial, UNATTEMPTED)
    elif trial.state == "RUNNING":
        means = "it is RUNNING in Optuna's tables, and no worker of hpo has had it: another tool"
        cure = repair.HandBack(study.uuid, trial.trial_id, trial.number)
        yield Finding(UNATTEMPTED, f"{means} began it", *where, cure=cure)


def _no_result(study: Known) -> str:
    return (
        "whether it is a result only you can know; for one more trial of hpo's own: "
        f"hpo extend {study.name} --trials +1"
    )


def _beyond(study: Known, trial: StoredTrial, kind: str) -> Finding:
    means = f"it is {trial.state} beyond the budget of {study.budget} trials: no worker may take it"
    left = f"hpo extend {study.name} --trials {trial.number + 1} lets one"
    return Finding(kind, means, study.name, trial.number, left=left)


def _over(study: Known, trial: StoredTrial, last: Attempt, now: float) -> Iterator[Finding]:
    """Of a trial that is over its last attempt has ended it."""
    where = (study.name, trial.number, last.k)
    if last.outcome is None:
        means = f"it is open, and its trial {trial.state} in Optuna's tables: another tool ended it"
        if last.until >= now:
            left = f"worker {last.worker} holds it: look again when its lease has run out"
            yield Finding(ENDLESS, means, *where, left=left)
        else:
            outcome = outcome_of(trial.state) or Outcome.LOST
            reason = f"another tool ended its trial as {trial.state}"
            cure = repair.EndAttempt(trial.trial_id, last.k, outcome, reason)
            yield Finding(ENDLESS, means, *where, cure=cure)
    elif not last.outcome.is_final:
        means = f"it is {trial.state} in Optuna's tables, and its last attempt was "
        means += f"{last.outcome.words}: another"
        yield Finding(UNATTEMPTED, f"{means} tool ended it", *where, left=_no_result(study))
    elif last.outcome.optuna_state != trial.state:
        means = f"it ended its trial as {last.outcome}; Optuna's tables have {trial.state}"
        left = "Optuna ends a trial once for all, so neither can follow the other: restore a backup"
        yield Finding(CONTRADICTION, means, *where, left=left)


def _not_told(study: Known, trial: StoredTrial, last: Attempt) -> Finding:
    assert last.outcome is not None
    means = f"it ended its trial as {last.outcome}; in Optuna's tables that is {trial.state} still"
    where = (study.name, trial.number, last.k)
    if told_values(last) is not None:
        cure = repair.TellOptuna(trial.trial_id, last.k, last.outcome)
        return Finding(CONTRADICTION, means, *where, cure=cure)
    return Finding(CONTRADICTION, means, *where, left="its value is not known: restore a backup")


def _open(study: Known, trial: StoredTrial, last: Attempt, now: float) -> Iterator[Finding]:
    """Of a trial that goes on: somebody holds it, or the next worker takes it over."""
    where = (study.name, trial.number, last.k)
    if last.until > now + repair.LONGEST * study.lease_s:
        means = (
            f"its lease ends in {last.until - now:.0f} s, where {study.lease_s:g} are the most: a "
            "clock was wrong, and if its worker is gone nobody takes it over before that"
        )
        cure = repair.ShortenLease(trial.trial_id, last.k, study.lease_s)
        yield Finding(ENDLESS, means, *where, cure=cure)
    elif last.until < now:
        ago = now - last.until
        means = f"{last.worker} left it, its lease ran out {ago:.0f} s ago: the next worker goes on"
        yield Finding(EXPECTED, means, *where, fault=False)


def _earlier(study: Known, trial: StoredTrial, now: float) -> Iterator[Finding]:
    """Attempts that have a successor: they have ended, and have not ended the trial."""
    for row in trial.attempts[:-1]:
        where = (study.name, trial.number, row.k)
        if row.is_final:
            means = f"it ended its trial as {row.outcome}, and another attempt came after it"
            left = "the later one counts; two workers may have run it, its curve may be mixed"
            yield Finding(CONTRADICTION, means, *where, left=left)
        elif row.outcome is None:
            means = "it is open, although another attempt came after it"
            if row.until >= now:
                left = f"worker {row.worker} holds it: look again when its lease has run out"
                yield Finding(ENDLESS, means, *where, left=left)
            else:
                cure = repair.EndAttempt(trial.trial_id, row.k, Outcome.LOST, "it was superseded")
                yield Finding(ENDLESS, means, *where, cure=cure)


def _unowned(study: Known, trial: StoredTrial) -> Iterator[Finding]:
    """Epochs of attempts that have no row."""
    ks = [row.k for row in trial.attempts]
    for k, count in trial.epochs.items():
        if k in ks:
            continue
        where = (study.name, trial.number, k)
        means = f"it has no row, and finished {plural(count, 'epoch')}"
        if ks and ks[-1] > k:
            cure = repair.EnterAttempt(study.uuid, trial.trial_id, trial.number, k)
            yield Finding(UNOWNED, means, *where, cure=cure)
        else:
            left = "the metrics stay as they are; how the attempt ended is not known"
            yield Finding(UNOWNED, means, *where, left=left)
