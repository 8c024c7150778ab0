"""Verification: the best configurations of a study trained again with other seeds, in a study of
its own."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from hpo.config.parameters import canonical_json
from hpo.config.study import StudyFile, Verified
from hpo.errors import Conflict, InputError, NotFound
from hpo.formatting import number, plural, plus_minus
from hpo.intervals import Interval, of_mean, tied_with_first
from hpo.paths import Home
from hpo.search.status import (
    StudyStatus,
    find_verification,
    read_status,
    verification_name,
)
from hpo.storage import records
from hpo.storage.database import Database
from hpo.storage.records import FINAL, Outcome, StudyRow, Trial

TOP, SEEDS = 5, 3
"""Configurations and seeds of each by default."""
MOST_SEEDS = 100
SEED = "seed"
"""Field that a verification varies."""
KEPT = ("metric", "seed", "lease_s", "stall_timeout_s", "max_failures", "log")
"""Fields of [study] that a verification has from the study that it verifies."""


# Which trainings there are


def definition_of(parent: StudyStatus) -> dict[str, Any]:
    """Return the definition of the study that verifies `parent`: its space and the seed, by the
    first of its metrics. Raises InputError for a study that cannot be verified."""
    file, name = parent.file, parent.row.name
    if file.verifies is not None:
        verified = file.verifies.study
        raise InputError(f"{name!r} verifies {verified!r}; to go on with it: hpo verify {verified}")
    if SEED in file.space:
        raise InputError(
            f"{name!r} searches {SEED}, the very field that a verification varies: search the "
            "others alone, under another study.name"
        )
    given = file.definition()
    train = {key: value for key, value in given["train"].items() if key != SEED}
    study = {key: given["study"][key] for key in KEPT if key in given["study"]}
    fixed = {"sampler": "random", "pruner": "none", "defaults": False, "trials": 1}
    seed = {"name": SEED, "low": 0, "high": MOST_SEEDS}
    return {
        "study": {"name": verification_name(name), **study, **fixed},
        "train": train,
        "space": [*given["space"], seed],
        "baselines": [],
        "verifies": asdict(Verified(name, parent.row.uuid)),
    }


def identity(values: Mapping[str, Any]) -> str:
    """Return a text that is the same for equal configurations, whatever their seed."""
    return canonical_json({name: value for name, value in values.items() if name != SEED})


def best_configurations(parent: StudyStatus, top: int) -> list[Trial]:
    """Return the `top` best complete trials of different configurations, or all if there are fewer.
    Raises NotFound where no trial is complete, InputError where a seed changes nothing."""
    different: dict[str, Trial] = {}
    for trial in parent.ranked():
        different.setdefault(identity(trial.params), trial)
    if not different:
        name = parent.row.name
        raise NotFound(f"study {name!r} has no complete trial yet: hpo status {name} shows it")
    chosen = list(different.values())[:top]
    for trial in chosen:
        if parent.file.config(trial.params).frozen:
            raise InputError(
                f"trial {trial.number} trains nothing (retrieval with model.trainable_blocks = 0): "
                "every seed gives the same result"
            )
    return chosen


def trainings(parent: StudyStatus, chosen: Sequence[Trial], seeds: int) -> list[dict[str, Any]]:
    """Return the configurations to train, seed by seed: the first `seeds` from 0 that are not the
    one of the search, by whose result a trial was chosen."""
    own = {trial.number: parent.file.config(trial.params).seed for trial in chosen}
    others = {
        trial.number: [seed for seed in range(seeds + 1) if seed != own[trial.number]]
        for trial in chosen
    }
    return [
        {**trial.params, SEED: others[trial.number][place]}
        for place, trial in itertools.product(range(seeds), chosen)
    ]


def prepare(
    database: Database, name: str, top: int, seeds: int, home: Home, *, force: bool = False
) -> StudyStatus:
    """Create the verification of the study `name`, or add to it what it lacks of the `top` best
    configurations with `seeds` seeds each, and lift a stop; return it.

    Any number of callers at once, and one that died on the way, leave each configuration and seed
    there once; what failed is tried again. Raises InputError and NotFound for what cannot be
    verified, Conflict where another study has the name or, unless `force`, where there is something
    to train and the code here is not the search's.
    """
    if top < 1:
        raise InputError(f"--top {top}: at least 1")
    if not 2 <= seeds <= MOST_SEEDS:
        raise InputError(f"--seeds {seeds}: allowed: 2 to {MOST_SEEDS}; one has no spread")
    parent = read_status(database, name)
    file = StudyFile.from_definition(definition_of(parent))
    wanted = trainings(parent, best_configurations(parent, top), seeds)
    if not force:
        _require_code(database, parent, wanted)
    row = _created(database, parent, file)
    _share(database, parent.row, row, home)
    with database.alone():
        child = read_status(database, row.name)
        for values in missing(child, records.read_enqueued(database, row.uuid), wanted):
            records.enqueue(database, row.uuid, values)
        budget = len(records.read_enqueued(database, row.uuid))
        if budget > child.row.trials or child.row.stop:
            records.update_study(database, row.uuid, trials=budget)
            records.resume_study(database, row.uuid)
    return read_status(database, row.name)


def _require_code(database: Database, parent: StudyStatus, wanted: list[dict[str, Any]]) -> None:
    """Raise Conflict, before anything is written, where something of `wanted` is still to be
    trained and the code here is not that with which the search began."""
    from hpo.search.fingerprints import require_code

    row = find_verification(database, parent.row)
    if row is not None:
        child, enqueued = read_status(database, row.name), records.read_enqueued(database, row.uuid)
        if child.state == "finished" and not missing(child, enqueued, wanted):
            return
    require_code(database, parent.row.uuid, parent.file)


def _created(database: Database, parent: StudyStatus, file: StudyFile) -> StudyRow:
    """Return the row of the verification, which begins without a trial: none is taken before what
    it is to train is written down."""
    from hpo.search import study as studies

    row = find_verification(database, parent.row)
    if row is not None:
        return row
    taken = records.find_study(database, file.name)
    if taken is not None:
        raise Conflict(
            f"a study {file.name!r} is there that does not verify this {parent.row.name!r}: "
            f"hpo delete {file.name}, if it is not needed"
        )
    return studies.create(database, file, trials=0)[0].row


def _share(database: Database, parent: StudyRow, child: StudyRow, home: Home) -> None:
    """Let the verification compute as the search did: with its code, its images, the precision that
    was measured for it, and its artifacts."""
    from hpo.search import sync
    from hpo.search.fingerprints import FORCED

    there = records.read_resolved(database, child.uuid)
    for key, value in records.read_resolved(database, parent.uuid).items():
        if key in there or key.startswith(FORCED):
            continue
        if key == sync.KEY:
            sync.keep(database, child, value, home)
        else:
            records.resolve_once(database, child.uuid, key, value)


def missing(
    child: StudyStatus,
    enqueued: Iterable[tuple[Mapping[str, Any], int | None]],
    wanted: Iterable[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return what of `wanted` is neither done nor coming: a training that failed, or that was ended
    since too many failed, is missing again."""
    states = {trial.number: trial.state for trial in child.trials}
    there = {
        canonical_json(values)
        for values, trial in enqueued
        if states.get(-1 if trial is None else trial) not in (Outcome.FAILED, Outcome.PRUNED)
    }
    return [values for values in wanted if canonical_json(values) not in there]


# What came of it


@dataclass(frozen=True)
class Candidate:
    """One configuration, and what it reached with each seed."""

    trial: int
    """Its trial of the search, the best one of that configuration."""
    searched: float
    """The value by which it was chosen."""
    params: Mapping[str, Any]
    values: Mapping[int, float]
    """By seed; the seed of the search is not among them."""
    diverged: tuple[int, ...] = ()
    """Seeds with which the loss was not finite."""
    failed: int = 0
    pending: int = 0

    @property
    def mean(self) -> float | None:
        """The mean over the seeds."""
        return fmean(self.values.values()) if self.values else None

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of the mean; None for fewer than two seeds."""
        return of_mean(list(self.values.values()))

    @property
    def shown(self) -> str:
        """The mean with half its interval, such as `0.9812 ± 0.0021`."""
        interval = self.interval
        half = None if interval is None else (interval.high - interval.low) / 2
        return plus_minus(self.mean, half)

    @property
    def is_sound(self) -> bool:
        """True if it has what a comparison needs, and diverged with no seed."""
        return len(self.values) > 1 and not self.diverged

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        interval = self.interval
        return asdict(self) | {
            "mean": self.mean,
            "interval": None if interval is None else [interval.low, interval.high],
        }


@dataclass(frozen=True)
class Verification:
    """What the verification of a study has found so far."""

    study: str
    """The study that was verified."""
    name: str
    """The verification's own."""
    metric: str
    maximize: bool
    own_seed: int
    """The seed of the search."""
    searched: int
    """Finished trials of the search, of which the candidates were the best."""
    unverified: int | None
    """The best trial of the search, where it has not been verified."""
    candidates: tuple[Candidate, ...]
    """Best first: by their means, those that diverged with some seed last."""

    @property
    def pending(self) -> int:
        """Number of trainings that are still to come."""
        return sum(one.pending for one in self.candidates)

    @property
    def winner(self) -> Candidate | None:
        """The candidate of the best mean, once all are trained; None before, or where none is
        sound."""
        if self.pending or not self.candidates or not self.candidates[0].is_sound:
            return None
        return self.candidates[0]

    @cached_property
    def tied(self) -> tuple[Candidate, ...]:
        """Candidates that cannot be told from the winner (`hpo.intervals.tied_with_first`)."""
        sound = [one for one in self.candidates if one.is_sound]
        if self.winner is None:
            return ()
        places = tied_with_first([list(one.values.values()) for one in sound])
        return tuple(sound[place] for place in places)

    @property
    def regression(self) -> float | None:
        """By how much the means are worse than the values of the search, averaged over the
        candidates: above 0 where the search promised too much."""
        sign = 1 if self.maximize else -1
        lost = [sign * (c.searched - c.mean) for c in self.candidates if c.mean is not None]
        return fmean(lost) if lost else None

    @property
    def verdict(self) -> str:
        """Which configuration won, or which ones cannot be told apart, in a sentence."""
        winner, tied = self.winner, [one.trial for one in self.tied]
        if self.pending:
            return f"not finished: {plural(self.pending, 'training')} to go"
        if winner is None:
            return "no winner: no configuration has two seeds and diverged with none"
        if not tied:
            alone = len(self.candidates) == 1
            why = "the only one" if alone else "better than the others beyond chance (95 %)"
            return f"winner: trial {winner.trial}, {why}"
        names = ", ".join(map(str, tied))
        several = "trials" if len(tied) > 1 else "trial"
        return (
            f"not distinguishable: trial {winner.trial}, which has the best mean, and {several} "
            f"{names}"
        )

    def remarks(self) -> list[str]:
        """Return what a reader of the numbers should know, a sentence each."""
        told = [
            f"Means over seeds other than the search's own ({self.own_seed}): each was chosen by "
            f"its result with that one, so it does not count. ± is a 95 % interval (Student's t)."
        ]
        if self.regression is not None:
            told.append(self._regressed(self.regression))
        if self.unverified is not None:
            told.append(
                f"Trial {self.unverified}, the best of the search, is not among them: hpo verify "
                f"{self.study} adds it."
            )
        failed = sum(one.failed for one in self.candidates)
        if failed:
            told.append(f"{plural(failed, 'training')} failed: hpo verify {self.study} retries, "
                        f"hpo trials {self.name} says why.")  # fmt: skip
        return told

    def _regressed(self, lost: float) -> str:
        if lost <= 0:
            return (
                f"No regression to the mean: with other seeds they are {number(-lost)} better on "
                "average than in the search."
            )
        return (
            f"Regression to the mean: with other seeds they are {number(lost)} worse on average "
            f"than in the search, which chose them as the best of {plural(self.searched, 'trial')}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, for `hpo verify --json`."""
        fields = ("study", "name", "metric", "own_seed", "pending", "regression", "verdict")
        winner = self.winner
        return {
            **{field: getattr(self, field) for field in fields},
            "direction": "maximize" if self.maximize else "minimize",
            "winner": None if winner is None else winner.trial,
            "tied": [one.trial for one in self.tied],
            "candidates": [one.to_dict() for one in self.candidates],
        }


def read(database: Database, name: str) -> Verification | None:
    """Return what the verification of the study `name` has found; None where it has none."""
    row = find_verification(database, records.get_study(database, name))
    if row is None:
        return None
    parent, child = read_status(database, name), read_status(database, row.name)
    return judge(parent, child, records.read_enqueued(database, row.uuid))


def judge(
    parent: StudyStatus,
    child: StudyStatus,
    enqueued: Iterable[tuple[Mapping[str, Any], int | None]],
) -> Verification:
    """Return what the verification `child` of `parent` has found; `enqueued` are its trainings,
    each with its trial."""
    trials = {trial.number: trial for trial in child.trials}
    groups: dict[str, dict[int, Trial | None]] = defaultdict(dict)
    for values, taken in enqueued:  # of a training that was tried again the last one counts
        trial = None if taken is None else trials.get(taken)
        groups[identity(values)][values[SEED]] = trial
    originals: dict[str, Trial] = {}
    for trial in parent.ranked():
        originals.setdefault(identity(trial.params), trial)
    best = next(iter(originals), None)
    maximize = child.file.direction == "maximize"
    found = [_candidate(originals[key], seeds) for key, seeds in groups.items() if key in originals]
    return Verification(
        study=parent.row.name,
        name=child.row.name,
        metric=child.file.metric,
        maximize=maximize,
        own_seed=parent.file.config(parent.file.space.corners()[0]).seed,
        searched=parent.finished,
        unverified=None if best is None or best in groups else originals[best].number,
        candidates=tuple(sorted(found, key=lambda one: _order(one, maximize=maximize))),
    )


def _candidate(original: Trial, seeds: Mapping[int, Trial | None]) -> Candidate:
    over = {seed: one for seed, one in seeds.items() if one is not None and one.state in FINAL}
    values = {
        seed: one.value
        for seed, one in sorted(over.items())
        if one.state == Outcome.COMPLETE and one.value is not None
    }
    diverged = tuple(sorted(s for s, one in over.items() if one.state == Outcome.DIVERGED))
    return Candidate(
        trial=original.number,
        searched=original.value or 0.0,
        params=original.params,
        values=values,
        diverged=diverged,
        failed=len(over) - len(values) - len(diverged),
        pending=len(seeds) - len(over),
    )


def _order(one: Candidate, *, maximize: bool) -> tuple[bool, bool, float, int]:
    mean = one.mean or 0.0
    return bool(one.diverged), one.mean is None, -mean if maximize else mean, one.trial
