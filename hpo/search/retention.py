"""Which files of a study stay: nothing of a trial that is over, but the weights of the best ones
(three, or the whole front of several metrics), and their last checkpoints where that is asked for.

The same here and in the study's artifacts. A trial that runs, or is free to be resumed, keeps all.
A trial that is not among the best once never is again, so nobody removes what another worker has
just added.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from hpo.config.metrics import (
    dominates,
    front_of,
)
from hpo.errors import StorageError
from hpo.paths import (
    CHECKPOINT,
    WEIGHTS,
    Home,
    files_in,
    folders_in,
)
from hpo.search import sync
from hpo.search.study import Study
from hpo.storage import (
    leases,
    records,
)
from hpo.storage.leases import Ending
from hpo.storage.records import AttemptRow

log = logging.getLogger(__name__)

KEPT = 3
"""Weights of this many best trials are kept, where there is one metric."""

Attempts = Mapping[int, Sequence[AttemptRow]]


@dataclass(frozen=True)
class Best:
    """The trials of which something stays."""

    weights: frozenset[int]
    checkpoints: frozenset[int]


def tidy(study: Study, home: Home) -> None:
    """Remove the files of trials that are over and need not stay, here and from the artifacts."""
    attempts = records.read_attempts(study.database, study.uuid)
    best = best_of_all(study, attempts)
    directory = study.directory(home)
    here = map(directory.name_of, files_in(directory.trials))
    for name in surplus(here, attempts, best):
        (directory.root / name).unlink(missing_ok=True)
    for folder in folders_in(directory.trials):
        if is_over(attempts, directory.name_of(folder)):
            with suppress(OSError):  # not empty, or somebody else was quicker
                folder.rmdir()
    there = sync.find(study.database, study.uuid, home)
    if there is None:
        return
    try:
        sync.removed(there, surplus(there.names(), attempts, best))
    except StorageError as error:
        log.warning("%s; what is not needed there is removed later", error)


def surplus(names: Iterable[str], attempts: Attempts, best: Best) -> list[str]:
    """Of files by their names within the study, those that need not stay: of trials that are over,
    all but the final attempt's weights and the newest checkpoint, where `best` says so."""
    by_trial: dict[int, list[str]] = {}
    for name in names:
        if is_over(attempts, name):
            by_trial.setdefault(trial_of(name), []).append(name)
    gone = []
    for number, files in by_trial.items():
        stay = _staying(number, files, attempts[number][-1].k, best)
        gone += [name for name in files if name not in stay]
    return gone


def is_over(attempts: Attempts, name: str) -> bool:
    """Whether a file or folder belongs to a trial that is over; what belongs to none does not."""
    rows = attempts.get(trial_of(name))
    return rows is not None and rows[-1].outcome in leases.FINAL


def trial_of(name: str) -> int:
    found = re.match(r"trials/(\d+)(/|$)", name)
    return int(found[1]) if found else -1


def _staying(number: int, files: Iterable[str], k: int, best: Best) -> set[str]:
    stay = set()
    checkpoints = []
    for name in files:
        weights, checkpoint = WEIGHTS.fullmatch(name), CHECKPOINT.fullmatch(name)
        if weights and number in best.weights and int(weights[2]) == k:
            stay.add(name)
        elif checkpoint and number in best.checkpoints:
            checkpoints.append((int(checkpoint[2]), int(checkpoint[3]), name))
    return stay | {name for *_, name in sorted(checkpoints)[-1:]}


def best_of_all(study: Study, attempts: Attempts) -> Best:
    """The trials of which weights and checkpoints stay, of those that are complete."""
    order = ranked(study, attempts)
    weights = front_of(_objectives(study, attempts)) if _has_several(study) else order[:KEPT]
    return Best(frozenset(weights), frozenset(order[: study.file.study.keep_checkpoints]))


def ranked(study: Study, attempts: Attempts) -> list[int]:
    """Complete trials, best first; of several metrics the front, then the others, both by the
    first metric."""
    sign = -1 if study.maximize else 1
    values = {number: row.value for number, row in _complete(attempts) if row.value is not None}
    order = sorted(values, key=lambda number: (sign * values[number], number))
    if not _has_several(study):
        return order
    front = set(front_of(_objectives(study, attempts)))
    return sorted(order, key=lambda number: number not in front)


def is_kept(study: Study, ending: Ending) -> bool:
    """Whether a trial that ends so is among the best so far."""
    attempts = records.read_attempts(study.database, study.uuid)
    if ending.objectives is not None:
        mine = dict(zip(study.file.objectives, ending.objectives, strict=True))
        return not any(dominates(one, mine) for one in _objectives(study, attempts).values())
    value, others = ending.value, [row.value for _, row in _complete(attempts)]
    assert value is not None  # it is complete
    better = [x for x in others if x is not None and (x > value if study.maximize else x < value)]
    return len(better) < KEPT


def _complete(attempts: Attempts) -> list[tuple[int, AttemptRow]]:
    return [(number, rows[-1]) for number, rows in attempts.items()
            if rows[-1].outcome == "complete"]  # fmt: skip


def _has_several(study: Study) -> bool:
    return len(study.file.objectives) > 1


def _objectives(study: Study, attempts: Attempts) -> dict[int, dict[str, float]]:
    """Values of complete trials by number and objective, where there are several."""
    return {
        number: dict(zip(study.file.objectives, row.objectives, strict=True))
        for number, row in _complete(attempts)
        if row.objectives is not None
    }
