"""Whether a study that is over kept every promise, as seen in its database and its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.config.parameters import canonical_json
from hpo.paths import Home
from hpo.search import retention
from hpo.search import study as studies
from hpo.search.promotion import geometric
from hpo.search.status import StudyStatus, read_status
from hpo.storage.database import Database
from hpo.storage.leases import MAX_FRUITLESS
from hpo.storage.optuna import FencedStorage
from hpo.storage.records import FINAL, Outcome, Trial
from hpo.storage.tables import attempts

METRICS = ("train_loss", "train_top1", "val_loss", "val_top1")
Curves = Mapping[str, list[tuple[float, ...]]]
"""METRICS of each epoch, by the parameters of a trial."""
CLOCK_S = 0.01
"""More than what a transaction's own looks at the clock differ by."""
STATES = {"failed": TrialState.FAIL, "pruned": TrialState.PRUNED}


@dataclass
class Verdict:
    """One study."""

    trials: int
    attempts: int
    epochs: int
    again: int
    """Epochs that were begun more often than once."""
    failed: int
    compared: int = 0
    violations: list[str] = field(default_factory=list)


def curves(database: Database, name: str) -> dict[str, list[tuple[float, ...]]]:
    return {
        canonical_json(trial.params): _curve(trial) for trial in read_status(database, name).trials
    }


def _curve(trial: Trial) -> list[tuple[float, ...]]:
    return [tuple(row.metrics[name] for name in METRICS) for row in trial.epochs]


def judge(database: Database, name: str, home: Home, expected: Curves) -> Verdict:
    """`expected` are the curves of an undisturbed search."""
    status = read_status(database, name)
    tries = [one for trial in status.trials for one in trial.attempts]
    epochs = sum(len(trial.epochs) for trial in status.trials)
    begun = sum(one.epoch - (one.first_epoch or 0) + 1 for one in tries if one.epoch)
    found = Verdict(status.count(*FINAL), len(tries), epochs, begun - epochs,
                    status.count("failed"))  # fmt: skip
    for trial in status.trials:
        curve, wanted = _curve(trial), expected.get(canonical_json(trial.params), [])
        found.compared += len(curve)
        if curve != wanted[: len(curve)]:
            found.violations.append(f"trial {trial.number}: other numbers than undisturbed")
        if trial.state == "complete" and len(curve) != len(wanted):
            found.violations.append(f"trial {trial.number}: {len(curve)} epochs are complete")
    found.violations += [
        *_budget(status),
        *_attempts(status),
        *promotions(status),
        *late_writes(database, status),
        *_optuna(database, status),
        *_integrity(database),
        *_files(database, status, home),
    ]
    return found


def _budget(status: StudyStatus) -> Iterator[str]:
    numbers = [trial.number for trial in status.trials]
    if numbers != list(range(status.row.trials)):
        yield f"{status.row.trials} trials are wanted, there are {numbers}"
    unfinished = [t.number for t in status.trials if t.state not in FINAL]
    if unfinished:
        yield f"trials {unfinished} are not finished"
    tried = [canonical_json(trial.params) for trial in status.trials]
    if len(set(tried)) != len(tried):
        yield "a point of the grid was tried twice"


def _attempts(status: StudyStatus) -> Iterator[str]:
    for trial in status.trials:
        rows, number = trial.attempts, trial.number
        if [one.k for one in rows] != list(range(1, len(rows) + 1)):
            yield f"trial {number}: attempts {[one.k for one in rows]}"
        if sum(one.outcome in FINAL for one in rows) != 1 or rows[-1].outcome not in FINAL:
            yield f"trial {number}: outcomes {[one.outcome for one in rows]}"
        begun = sum(one.epoch - (one.first_epoch or 0) + 1 for one in rows if one.epoch)
        interrupted = sum(one.outcome in ("lost", "handed_back") for one in rows)
        if begun - len(trial.epochs) > interrupted:
            again = begun - len(trial.epochs)
            yield f"trial {number}: {again} epochs again in {len(rows)} attempts"
        owners = [row.attempt for row in trial.epochs]
        if owners != sorted(owners):
            yield f"trial {number}: its epochs are of attempts {owners}"
        fruitless = sum(one.outcome == "lost" for one in rows)
        if trial.state == "failed" and fruitless < MAX_FRUITLESS:
            yield f"trial {number} failed after {fruitless} lost attempts: {trial.reason}"


def promotions(status: StudyStatus) -> Iterator[str]:
    """Of a study with a scheduler: who paused did so at a rung, and no more went beyond it than
    were among its best or are to be finished, but for decisions at the same time."""
    file, scheduler = status.file, status.file.study.scheduler
    if scheduler is None:
        return
    rungs = geometric(file.first_rung, file.reduction_factor, file.max_epochs)
    lengths = [len(trial.epochs) for trial in status.trials if trial.state != "failed"]
    for trial in status.trials:
        outcomes = [one.outcome for one in trial.attempts]
        pauses = outcomes.count(Outcome.PAUSED)
        again = outcomes.count(Outcome.LOST) + outcomes.count(Outcome.HANDED_BACK)
        if pauses > len(rungs) + again or (
            trial.state == "pruned" and len(trial.epochs) not in rungs
        ):
            yield f"trial {trial.number}: {pauses} pauses in {len(trial.epochs)} epochs"
    for rung in rungs:
        reached, beyond = (sum(one >= least for one in lengths) for least in (rung, rung + 1))
        most = reached // file.reduction_factor + scheduler.finish + len(status.workers)
        if beyond > most:
            yield f"rung {rung}: {beyond} of {reached} trials went on"
    complete = status.count("complete")
    if complete + status.count("failed") < min(scheduler.finish, status.row.trials):
        yield f"{complete} trials are complete"


def late_writes(database: Database, status: StudyStatus) -> Iterator[str]:
    """An attempt that has ended writes no more: each of its writes would renew its lease. (What a
    dead one left on disk is recorded as its own, but by its successor.)"""
    a, written = attempts.c, attempts.c.until - status.row.lease_s
    late = sa.select(a.number, a.k).where(a.study == status.row.uuid, written > a.ended + CLOCK_S)
    with database.read() as c:
        for row in c.execute(late):
            yield f"trial {row.number}: attempt {row.k} wrote after it had ended"


def _optuna(database: Database, status: StudyStatus) -> Iterator[str]:
    """What Optuna's own tables say is what ours do."""
    study = studies.load(database, status.row.name)
    theirs = {trial.number: trial for trial in study.optuna_study(FencedStorage(database)).trials}
    for trial in status.trials:
        one = theirs[trial.number]
        if one.state != STATES.get(trial.state, TrialState.COMPLETE):
            yield f"trial {trial.number} is {trial.state}, in Optuna {one.state.name}"
        reported = {row.epoch: row.metrics[status.file.metric] for row in trial.epochs}
        if one.intermediate_values != reported:
            yield f"trial {trial.number}: reported {one.intermediate_values}, not {reported}"
        if trial.state == "complete" and one.value != trial.value:
            yield f"trial {trial.number}: {trial.value}, in Optuna {one.value}"


def _integrity(database: Database) -> Iterator[str]:
    if not database.is_sqlite:
        return
    with database.engine.connect() as c:
        for pragma in ("integrity_check", "foreign_key_check"):
            rows = [tuple(row) for row in c.execute(sa.text(f"PRAGMA {pragma}"))]
            if rows not in ([], [("ok",)]):
                yield f"{pragma}: {rows[:3]}"


KEPT = ("/weights.safetensors", "/predictions.npz")


def _files(database: Database, status: StudyStatus, home: Home) -> Iterator[str]:
    """Of trials that are over nothing stays but weights and their predictions, once a worker has
    tidied up."""
    study: Any = studies.load(database, status.row.name)
    retention.apply_retention(study, home)
    root = study.directory(home).trials
    left = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
    if more := [name for name in left if not name.endswith(KEPT)]:
        yield f"files are left: {more[:3]}"
