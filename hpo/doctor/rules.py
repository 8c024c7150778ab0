"""Rules by which faults of a database are diagnosed, from its rows at one moment.

A live search leaves no finding: a trial is RUNNING only under an attempt, or paused after one, and
it and its last attempt end in one transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hpo.doctor.repair import (
    LONGEST,
    DropRows,
    DropStudy,
    EndAttempt,
    EnterAttempt,
    HandBack,
    Repair,
    ShortenLease,
    TellOptuna,
    outcome_of_state,
    values_to_tell,
)
from hpo.formatting import plural
from hpo.storage.records import FINISHED_STATES, Attempt, Outcome

UNATTEMPTED_TRIAL = "trial without attempt"
CONTRADICTION = "contradiction"
UNENDED_ATTEMPT = "attempt without end"
ORPHAN_EPOCHS = "epochs without attempt"
ORPHAN_ROWS = "rows without study or trial"
ORPHAN_STUDY = "study without Optuna's"
ORPHAN_FILES = "files without study or trial"
SURPLUS_FILES = "files of trials that are over"
UNREAD_ARTIFACTS = "artifacts not looked at"
OLD_SCHEMA = "old schema"
DAMAGED_DATABASE = "damaged database"
DAMAGED_FILE = "damaged file"
FOREIGN_STUDY = "study of Optuna's own"
EXPIRED_LEASE = "waits for a worker"


@dataclass(frozen=True)
class Finding:
    """A fault, or a note of what only looks like one."""

    kind: str
    message: str
    """What is wrong; it names what the fields below do not."""
    study: str = ""
    trial: int | None = None
    attempt: int | None = None
    repair: Repair | None = None
    """What `--repair` does; None: it is left to the user."""
    advice: str = ""
    """What the user can do, where nothing is repaired."""
    fault: bool = True

    @property
    def where(self) -> str:
        """`digits, trial 3, attempt 1`, as far as it is known."""
        parts = [self.study] if self.study else []
        parts += [] if self.trial is None else [f"trial {self.trial}"]
        parts += [] if self.attempt is None else [f"attempt {self.attempt}"]
        return ", ".join(parts)

    def to_dict(self) -> dict[str, object]:
        """Return it as `hpo storage check --json` prints it."""
        return {
            "kind": self.kind,
            "study": self.study or None,
            "trial": self.trial,
            "attempt": self.attempt,
            "means": self.message,
            "repair": None if self.repair is None else str(self.repair),
            "left": self.advice or None,
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
class StoredStudy:
    """A study that both our and Optuna's tables have."""

    uuid: str
    name: str
    budget: int
    lease_s: float
    trials: Sequence[StoredTrial]


@dataclass(frozen=True)
class OrphanStudy:
    """A study of ours that Optuna's tables do not have, or have under another name."""

    uuid: str
    name: str
    theirs: str | None


@dataclass(frozen=True)
class Rows:
    """A database at one moment; `now` by its own clock."""

    now: float
    studies: Sequence[StoredStudy] = ()
    orphans: Sequence[OrphanStudy] = ()
    foreign: Sequence[str] = ()
    """Names of studies that only Optuna's tables have."""
    orphan_rows: Mapping[str, int] = field(default_factory=dict)
    """Number of rows that belong to no study or trial, by table."""


def diagnose(rows: Rows) -> Iterator[Finding]:
    """Yield all findings, faults and notes."""
    for name in rows.foreign:
        yield Finding(FOREIGN_STUDY, "another tool made it; it is not looked at", name, fault=False)
    for orphan in rows.orphans:
        yield _orphan(orphan)
    for table, count in rows.orphan_rows.items():
        message = f"{plural(count, 'row')} of {table}: the study or trial is gone"
        yield Finding(ORPHAN_ROWS, message, repair=DropRows(table))
    for study in rows.studies:
        for trial in study.trials:
            yield from _trial(study, trial, rows.now)


def _orphan(study: OrphanStudy) -> Finding:
    if study.theirs is None:
        message = "it is gone from Optuna's tables: deleted by a tool that does not know hpo's"
        return Finding(ORPHAN_STUDY, message, study.name, repair=DropStudy(study.uuid))
    message = (
        f"Optuna's tables have {study.theirs!r} under its id: renamed, or deleted and replaced"
    )
    advice = f"give it its name again if it is the same study; else delete it: uuid {study.uuid}"
    return Finding(ORPHAN_STUDY, message, study.name, advice=advice)


def _trial(study: StoredStudy, trial: StoredTrial, now: float) -> Iterator[Finding]:
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
        yield _beyond(study, trial, UNATTEMPTED_TRIAL if last.outcome else UNENDED_ATTEMPT)
    elif last.outcome is None:
        yield from _open(study, trial, last, now)
    elif last.outcome == Outcome.PAUSED and not trial.epochs:
        message = "it paused at a rung, and none of its trial's epochs are there"
        advice = "it is told pruned when the study ends: restore a backup to have it go on"
        yield Finding(CONTRADICTION, message, study.name, trial.number, last.k, advice=advice)


def _without_attempt(study: StoredStudy, trial: StoredTrial) -> Iterator[Finding]:
    where = (study.name, trial.number)
    if trial.state in FINISHED_STATES:
        message = (
            f"it is {trial.state} in Optuna's tables, and no worker of hpo had it: another tool"
        )
        yield Finding(UNATTEMPTED_TRIAL, f"{message} made it", *where, advice=_no_result(study))
    elif trial.state == "RUNNING" and trial.number >= study.budget:
        yield _beyond(study, trial, UNATTEMPTED_TRIAL)
    elif trial.state == "RUNNING":
        message = "it is RUNNING in Optuna's tables, and no worker of hpo has had it: another tool"
        repair = HandBack(study.uuid, trial.trial_id, trial.number)
        yield Finding(UNATTEMPTED_TRIAL, f"{message} began it", *where, repair=repair)


def _no_result(study: StoredStudy) -> str:
    return (
        "whether it is a result only you can know; for one more trial of hpo's own: "
        f"hpo extend {study.name} --trials +1"
    )


def _beyond(study: StoredStudy, trial: StoredTrial, kind: str) -> Finding:
    message = (
        f"it is {trial.state} beyond the budget of {study.budget} trials: no worker may take it"
    )
    advice = f"hpo extend {study.name} --trials {trial.number + 1} lets one"
    return Finding(kind, message, study.name, trial.number, advice=advice)


def _over(study: StoredStudy, trial: StoredTrial, last: Attempt, now: float) -> Iterator[Finding]:
    """Check that the last attempt of a finished trial has ended it."""
    where = (study.name, trial.number, last.k)
    if last.outcome is None:
        message = (
            f"it is open, and its trial {trial.state} in Optuna's tables: another tool ended it"
        )
        if last.until >= now:
            advice = f"worker {last.worker} holds it: look again when its lease has run out"
            yield Finding(UNENDED_ATTEMPT, message, *where, advice=advice)
        else:
            outcome = outcome_of_state(trial.state) or Outcome.LOST
            reason = f"another tool ended its trial as {trial.state}"
            repair = EndAttempt(trial.trial_id, last.k, outcome, reason)
            yield Finding(UNENDED_ATTEMPT, message, *where, repair=repair)
    elif not last.outcome.is_final:
        message = f"it is {trial.state} in Optuna's tables, and its last attempt was "
        message += f"{last.outcome.words}: another"
        yield Finding(
            UNATTEMPTED_TRIAL, f"{message} tool ended it", *where, advice=_no_result(study)
        )
    elif last.outcome.optuna_state != trial.state:
        message = f"it ended its trial as {last.outcome}; Optuna's tables have {trial.state}"
        advice = (
            "Optuna ends a trial once for all, so neither can follow the other: restore a backup"
        )
        yield Finding(CONTRADICTION, message, *where, advice=advice)


def _not_told(study: StoredStudy, trial: StoredTrial, last: Attempt) -> Finding:
    assert last.outcome is not None
    message = (
        f"it ended its trial as {last.outcome}; in Optuna's tables that is {trial.state} still"
    )
    where = (study.name, trial.number, last.k)
    if values_to_tell(last) is not None:
        repair = TellOptuna(trial.trial_id, last.k, last.outcome)
        return Finding(CONTRADICTION, message, *where, repair=repair)
    return Finding(
        CONTRADICTION, message, *where, advice="its value is not known: restore a backup"
    )


def _open(study: StoredStudy, trial: StoredTrial, last: Attempt, now: float) -> Iterator[Finding]:
    """Check the lease of an unfinished trial: a worker holds it, or the next one claims it."""
    where = (study.name, trial.number, last.k)
    if last.until > now + LONGEST * study.lease_s:
        message = (
            f"its lease ends in {last.until - now:.0f} s, where {study.lease_s:g} are the most: a "
            "clock was wrong, and if its worker is gone nobody takes it over before that"
        )
        repair = ShortenLease(trial.trial_id, last.k, study.lease_s)
        yield Finding(UNENDED_ATTEMPT, message, *where, repair=repair)
    elif last.until < now:
        ago = now - last.until
        message = (
            f"{last.worker} left it, its lease ran out {ago:.0f} s ago: the next worker goes on"
        )
        yield Finding(EXPIRED_LEASE, message, *where, fault=False)


def _earlier(study: StoredStudy, trial: StoredTrial, now: float) -> Iterator[Finding]:
    """Check that attempts with a successor have ended, and have not ended the trial."""
    for row in trial.attempts[:-1]:
        where = (study.name, trial.number, row.k)
        if row.is_final:
            message = f"it ended its trial as {row.outcome}, and another attempt came after it"
            advice = "the later one counts; two workers may have run it, its curve may be mixed"
            yield Finding(CONTRADICTION, message, *where, advice=advice)
        elif row.outcome is None:
            message = "it is open, although another attempt came after it"
            if row.until >= now:
                advice = f"worker {row.worker} holds it: look again when its lease has run out"
                yield Finding(UNENDED_ATTEMPT, message, *where, advice=advice)
            else:
                repair = EndAttempt(trial.trial_id, row.k, Outcome.LOST, "it was superseded")
                yield Finding(UNENDED_ATTEMPT, message, *where, repair=repair)


def _unowned(study: StoredStudy, trial: StoredTrial) -> Iterator[Finding]:
    """Find epochs of attempts that have no row."""
    ks = [row.k for row in trial.attempts]
    for k, count in trial.epochs.items():
        if k in ks:
            continue
        where = (study.name, trial.number, k)
        message = f"it has no row, and finished {plural(count, 'epoch')}"
        if ks and ks[-1] > k:
            repair = EnterAttempt(study.uuid, trial.trial_id, trial.number, k)
            yield Finding(ORPHAN_EPOCHS, message, *where, repair=repair)
        else:
            advice = "the metrics stay as they are; how the attempt ended is not known"
            yield Finding(ORPHAN_EPOCHS, message, *where, advice=advice)
