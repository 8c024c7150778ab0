"""Checks of a database and of the files of its studies."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from hpo.doctor import rules
from hpo.doctor.files import find_damaged, find_leftovers
from hpo.doctor.repair import is_orphan
from hpo.doctor.rules import Finding, OrphanStudy, Rows, StoredStudy, StoredTrial
from hpo.errors import NotFound
from hpo.formatting import plural
from hpo.paths import Home
from hpo.storage import tables
from hpo.storage.database import Database, exists
from hpo.storage.records import Attempt, select_attempts
from hpo.storage.tables import epochs, optuna_studies, optuna_trials, studies


@dataclass(frozen=True)
class Counts:
    """Numbers of studies, trials, attempts and epochs that were checked."""

    studies: int = 0
    trials: int = 0
    attempts: int = 0
    epochs: int = 0


@dataclass(frozen=True)
class CheckResult:
    """Result of a check."""

    counts: Counts
    findings: tuple[Finding, ...]
    readable: bool = True
    """False if the database is damaged or of another version, so that its rows were not checked."""

    @property
    def faults(self) -> list[Finding]:
        """What is wrong."""
        return [finding for finding in self.findings if finding.fault]

    @property
    def notes(self) -> list[Finding]:
        """What only looks wrong."""
        return [finding for finding in self.findings if not finding.fault]


def require_database(database: Database) -> None:
    """Raise NotFound if there is no database of hpo's; make none."""
    advice = "to make one: hpo run STUDY.toml, or hpo storage upgrade"
    if not exists(database):
        raise NotFound(f"no database {database.shown}; {advice}")
    if tables.version(database) is None:
        raise NotFound(f"{database.shown}: none of hpo's tables are in it; {advice}")


def check_database(database: Database) -> CheckResult:
    """Check everything but the files. Raises StorageError, also for a database of a newer hpo."""
    found = [*_damage(database), *_age(database)]
    if found:
        return CheckResult(Counts(), tuple(found), readable=False)
    found += _foreign_keys(database)
    rows = read_rows(database)
    return CheckResult(_counts(rows), (*found, *rules.diagnose(rows)))


def _damage(database: Database) -> Iterator[Finding]:
    """Yield what SQLite finds damaged in its file; servers look after theirs."""
    if not database.is_sqlite:
        return
    with database.read() as c:
        said = list(c.scalars(sa.text("PRAGMA integrity_check(5)")))
    if said != ["ok"]:
        advice = (
            "stop the workers and restore a backup, or save what can be read: sqlite3's .recover"
        )
        yield Finding(rules.DAMAGED_DATABASE, "; ".join(map(str, said)), advice=advice)


def _age(database: Database) -> Iterator[Finding]:
    found = tables.version(database)
    if found is not None and found < tables.VERSION:
        message = f"schema {found}, this hpo needs {tables.VERSION}"
        advice = str(tables.needs_upgrade(database, "made by an older hpo"))
        yield Finding(rules.OLD_SCHEMA, message, advice=advice)


def _foreign_keys(database: Database) -> Iterator[Finding]:
    """Yield rows of Optuna's tables on SQLite that refer to nothing. Ours are checked by name."""
    if not database.is_sqlite:
        return
    ours = {table.name for table in tables.OURS}
    with database.read() as c:
        bad = Counter(row[0] for row in c.execute(sa.text("PRAGMA foreign_key_check")))
    for table, count in bad.items():
        if table not in ours:
            rows = plural(count, "row")
            message = f"{rows} of Optuna's table {table}: what it is about is gone"
            yield Finding(rules.ORPHAN_ROWS, message, advice="they are Optuna's, and hurt nobody")


def read_rows(database: Database) -> Rows:
    """Read all that a check decides from, in one transaction."""
    with database.snapshot() as c:
        now = float(c.scalar(sa.select(database.now())) or 0.0)
        theirs = {row.study_id: row.study_name for row in c.execute(sa.select(optuna_studies))}
        ours = c.execute(sa.select(studies).order_by(studies.c.created)).all()
        whole = [row for row in ours if theirs.get(row.study_id) == row.name]
        trials, ids = _trials(c, database), {row.study_id for row in ours}
        return Rows(
            now=now,
            studies=[
                StoredStudy(row.uuid, row.name, row.trials, row.lease_s, trials.get(row.uuid, []))
                for row in whole
            ],
            orphans=[
                OrphanStudy(row.uuid, row.name, theirs.get(row.study_id))
                for row in ours
                if row not in whole
            ],
            foreign=sorted(name for study_id, name in theirs.items() if study_id not in ids),
            orphan_rows=_orphan_rows(c, database),
        )


def _trials(c: sa.Connection, database: Database) -> dict[str, list[StoredTrial]]:
    """Return the trials of our studies in order, by the study's uuid."""
    finished = _epochs(c)
    tried: dict[tuple[str, int], list[Attempt]] = defaultdict(list)
    for study, trial_id, attempt in select_attempts(c, database):
        tried[study, trial_id].append(attempt)
    t = optuna_trials.c
    query = (
        sa.select(studies.c.uuid, t.trial_id, t.number, t.state)
        .join_from(optuna_trials, studies, studies.c.study_id == t.study_id)
        .order_by(t.number, t.trial_id)
    )
    found: dict[str, list[StoredTrial]] = defaultdict(list)
    for uuid, trial_id, number, state in c.execute(query):
        key = (uuid, trial_id)
        one = StoredTrial(trial_id, number, str(state), tried.get(key, ()), finished.get(key, {}))
        found[uuid].append(one)
    return found


def _epochs(c: sa.Connection) -> dict[tuple[str, int], dict[int, int]]:
    e = epochs.c
    query = sa.select(e.study, e.trial_id, e.attempt, sa.func.count()).group_by(
        e.study, e.trial_id, e.attempt
    )
    found: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)
    for study, trial_id, attempt, count in c.execute(query):
        found[study, trial_id][attempt] = count
    return found


def _orphan_rows(c: sa.Connection, database: Database) -> dict[str, int]:
    """Count the rows that belong to no study or trial, by table."""
    found = {}
    for table in tables.OURS:
        if "study" not in table.c:
            continue
        query: Any = sa.select(sa.func.count()).select_from(table)
        if count := c.scalar(query.where(is_orphan(database, table))):
            found[table.name] = count
    return found


def _counts(rows: Rows) -> Counts:
    """Count as people do: waiting trials beyond the budget are never taken, and not shown."""
    trials = [
        trial
        for study in rows.studies
        for trial in study.trials
        if trial.state != "WAITING" or trial.number < study.budget
    ]
    return Counts(
        len(rows.studies),
        len(trials),
        sum(len(trial.attempts) for trial in trials),
        sum(sum(trial.epochs.values()) for trial in trials),
    )


def check_all(
    database: Database, home: Home, artifacts: str | None = None, *, files: bool = False
) -> CheckResult:
    """Check the database and the files, and change nothing. `artifacts` is one more store to check;
    with `files` every file that bears a checksum is read through, too.

    Raises NotFound where there is no database of hpo's, StorageError where it cannot be read.
    """
    require_database(database)
    checked = check_database(database)
    if not checked.readable:
        return checked
    found = [*checked.findings, *find_leftovers(database, home, artifacts)]
    if files:
        found += find_damaged(database, home, artifacts)
    return replace(checked, findings=tuple(found))


def repair_all(database: Database, checked: CheckResult) -> list[Finding]:
    """Repair what can be repaired; return the findings that were."""
    return [
        finding
        for finding in checked.findings
        if finding.repair is not None and finding.repair.apply(database)
    ]
