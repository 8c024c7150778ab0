"""Which files of a study stay: nothing of a trial that is over, but the weights of the best ones
(three, or the whole front of several metrics) with their predictions, and their last checkpoints
where that is asked for.

The same here and in the study's artifacts. A trial that runs, or is free to be resumed, keeps all;
one that is paused, while it may still be promoted: without them it would be trained again.
A trial that is not among the best once never is again, so nobody removes what another worker has
just added.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from hpo.errors import StorageError
from hpo.paths import CHECKPOINT, PREDICTIONS, WEIGHTS, Home, files_in, folders_in
from hpo.search import sync
from hpo.search.standings import Standings
from hpo.search.study import Study
from hpo.storage import records
from hpo.storage.leases import Ending
from hpo.storage.records import Attempt, Outcome, Ranking

log = logging.getLogger(__name__)

KEPT = 3
"""Weights of this many best trials are kept, where there is one metric."""

Attempts = Mapping[int, Sequence[Attempt]]


@dataclass(frozen=True)
class Best:
    """The trials of which something stays."""

    weights: frozenset[int]
    checkpoints: frozenset[int]
    paused: frozenset[int] = frozenset()
    """Paused trials that may still be promoted."""


def apply_retention(study: Study, home: Home, standings: Standings | None = None) -> None:
    """Remove the files of trials that are over and need not stay, here and from the artifacts.
    `standings`: those of the study, where the caller has read some already."""
    attempts = records.read_attempts(study.database, study.uuid)
    best = best_of_all(study, attempts, standings)
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
    """Return, of files by their names within the study, those that need not stay: of trials that
    are over, all but the final attempt's weights and predictions and the newest checkpoint, where
    `best` says so."""
    by_trial: dict[int, list[str]] = {}
    gone = []
    for name in names:
        if is_over(attempts, name):
            by_trial.setdefault(trial_of(name), []).append(name)
        elif is_paused(attempts, name) and trial_of(name) not in best.paused:
            gone.append(name)
    for number, files in by_trial.items():
        stay = _staying(number, files, attempts[number][-1].k, best)
        gone += [name for name in files if name not in stay]
    return gone


def is_over(attempts: Attempts, name: str) -> bool:
    """Return whether a file or folder belongs to a trial that is over; what belongs to none does
    not."""
    rows = attempts.get(trial_of(name))
    return rows is not None and rows[-1].is_final


def is_paused(attempts: Attempts, name: str) -> bool:
    """Return whether a file or folder belongs to a paused trial."""
    rows = attempts.get(trial_of(name))
    return rows is not None and rows[-1].outcome == Outcome.PAUSED


def trial_of(name: str) -> int:
    """Return the number of the trial that a file belongs to; -1 if it belongs to none."""
    found = re.match(r"trials/(\d+)(/|$)", name)
    return int(found[1]) if found else -1


def _staying(number: int, files: Iterable[str], k: int, best: Best) -> set[str]:
    stay = set()
    checkpoints = []
    for name in files:
        result = WEIGHTS.fullmatch(name) or PREDICTIONS.fullmatch(name)
        checkpoint = CHECKPOINT.fullmatch(name)
        if result and number in best.weights and int(result[2]) == k:
            stay.add(name)
        elif checkpoint and number in best.checkpoints:
            checkpoints.append((int(checkpoint[2]), int(checkpoint[3]), name))
    return stay | {name for *_, name in sorted(checkpoints)[-1:]}


def best_of_all(study: Study, attempts: Attempts, standings: Standings | None = None) -> Best:
    """Return the trials of which weights and checkpoints stay."""
    ranking, scores = Ranking(study.file.directions), _scores(attempts)
    order, front = ranking.order(scores), ranking.front(scores)
    weights = front if ranking.has_several else order[:KEPT]
    paused = _promotable(study, attempts, standings or Standings(study))
    checkpoints = [*front, *(number for number in order if number not in front)]
    if study.file.study.scheduler is not None:  # they would go on if the study were extended
        checkpoints = ranking.order(scores | _pruned(attempts))
    kept = frozenset(checkpoints[: study.file.study.keep_checkpoints])
    return Best(frozenset(weights), kept, paused)


def _promotable(study: Study, attempts: Attempts, standings: Standings) -> frozenset[int]:
    """Return the paused trials that may still be promoted, whatever the trials to come reach."""
    if study.file.study.scheduler is None:
        return frozenset()
    live = sum(rows[-1].live for rows in attempts.values())
    return frozenset(standings.kept(study.snapshot().trials, live))


def is_kept(study: Study, ending: Ending) -> bool:
    """Return True if a trial that ends so is among the best so far."""
    ranking = Ranking(study.file.directions)
    others = _scores(records.read_attempts(study.database, study.uuid)).values()
    assert ending.value is not None  # it is complete
    mine = ending.objectives or (ending.value,)
    better = sum(ranking.beats(scores, mine) for scores in others)
    return better < (1 if ranking.has_several else KEPT)


def _scores(attempts: Attempts) -> dict[int, tuple[float, ...]]:
    """Return the values of complete trials by number."""
    return {number: rows[-1].scores for number, rows in attempts.items() if rows[-1].scores}


def _pruned(attempts: Attempts) -> dict[int, tuple[float, ...]]:
    """Return the best values of pruned trials by number."""
    last = {number: rows[-1] for number, rows in attempts.items()}
    pruned = {number: one for number, one in last.items() if one.outcome == Outcome.PRUNED}
    return {number: (one.value,) for number, one in pruned.items() if one.value is not None}
