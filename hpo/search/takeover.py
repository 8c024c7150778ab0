"""Trials of an earlier study that a new one with another space takes over, as if it had run them.

A trial is taken over where the new study, with its parameters, describes the same training: then
their values compare. What the earlier study had fixed counts with its fixed value, and what only
the new one searches with the value that was trained with. Sampler, pruner, scheduler and ranking
see such a trial as any other; the budget does not count it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.config.base import NONE, flatten, toml_repr
from hpo.config.parameters import is_same
from hpo.config.study import StudyFile, TakenOver
from hpo.errors import Conflict, InputError
from hpo.formatting import plural
from hpo.io import same_place
from hpo.paths import Home
from hpo.search import sync
from hpo.search.fingerprints import CODE, FORCED, IMAGES, code_of, compare_code
from hpo.search.promotion import CHANCE
from hpo.search.status import StudyStatus, read_status
from hpo.storage import records
from hpo.storage.database import Database
from hpo.storage.leases import Ending
from hpo.storage.optuna import FencedStorage
from hpo.storage.records import Outcome, Trial
from hpo.storage.studies import TAKER, TakenTrial
from hpo.storage.tables import TAKEN_OVER

SEEN = ("complete", "pruned", "paused", "diverged", "infeasible")
"""States of trials that are taken over; of those that failed or still run nothing is known."""
SHARED = (IMAGES, "runtime ", CHANCE)
"""Beginnings of the keys of what the new study keeps as the earlier one resolved it."""
MEANINGLESS = frozenset({"data.cache_limit_gb", "data.loader_workers", "data.download"})
"""Fields that change no value."""
KEPT = 3
"""Best trials of a study of one metric whose weights are there."""
SHOWN = 4
"""Differences that a message names."""


@dataclass(frozen=True)
class TakeOver:
    """What a new study takes over from an earlier one."""

    record: TakenOver | None = None
    trials: Sequence[TakenTrial] = ()
    resolved: Mapping[str, Any] = field(default_factory=dict)
    left: int = 0
    """Finished trials of the earlier study without a place in the new space."""


NOTHING = TakeOver()


def take_over(file: StudyFile, name: str, database: Database, *, force: bool = False) -> TakeOver:
    """Return what a new study of `file` takes over from study `name`.

    Raises NotFound for an unknown study; Conflict where the code here is not that of the study,
    unless `force`; InputError where their values do not compare or no trial has a place in the new
    space, saying what differs.
    """
    status = read_status(database, name)
    if why := _obstacle(file, status.file):
        raise InputError(f"--from {name}: {why}")
    forced = compare_code(database, status.row.uuid, file)
    if forced is not None and not force:
        raise Conflict(
            f"--from {name}: the code here is not that of {name}, so the values would not compare: "
            f"{'; '.join(forced.differs)}. Restore it; --force takes them over nevertheless, which "
            "is recorded"
        )
    places, left = _places(file, status)
    trials = FencedStorage(database).get_all_trials(status.row.study_id, deepcopy=False)
    stored = {one.number: one for one in trials}
    taken = [_taken(file, status, one, stored[one.number], values) for one, values in places]
    tried = [values for _, values in places]
    known = [i for i, one in enumerate(file.baselines) if any(_holds(it, one) for it in tried)]
    record = TakenOver(name, tuple(one.number for one, _ in places), tuple(known))
    known_there = records.read_resolved(database, status.row.uuid)
    resolved = {key: one for key, one in known_there.items() if key.startswith(SHARED)}
    resolved[CODE] = dict(code_of(file).parts)
    if forced is not None:
        resolved[f"{FORCED}{TAKER} code"] = asdict(forced) | {"worker": TAKER}
    return TakeOver(record, [_with_origin(one, record, n) for n, one in enumerate(taken)],
                    resolved, left)  # fmt: skip


def copy_weights(database: Database, record: TakenOver, uuid: str, home: Home) -> None:
    """Copy what is kept of the earlier study's best trials, weights and their predictions, to the
    study `uuid` that took them over."""
    status = read_status(database, record.study)
    there, here = home.study(status.row.uuid), home.study(uuid)
    best = status.front() if status.ranking.has_several else status.ranked()[:KEPT]
    for trial in best:
        if trial.number not in record.trials or not trial.attempts:
            continue
        old = (trial.number, trial.attempts[-1].k)
        new = (record.trials.index(trial.number), TAKEN_OVER)
        here.attempt(*new).mkdir(parents=True, exist_ok=True)
        for path, to in (
            (there.weights(*old), here.weights(*new)),
            (there.predictions(*old), here.predictions(*new)),
        ):
            sync.fetch(database, home, status.row.uuid, path, to)


def _obstacle(file: StudyFile, earlier: StudyFile) -> str | None:
    """Return why nothing can be taken over; None where trials decide."""
    if file.name == earlier.name:
        return "it is the study itself: give the new one another name (--set study.name=...)"
    if earlier.verifies is not None:
        return f"it verifies {earlier.verifies.study}: name that one"
    if file.study.sampler.name == "grid":
        return "under grid the points are planned, not sampled: use another study.sampler"
    for what, mine, theirs in (
        ("it optimizes", file.objectives, earlier.objectives),
        ("it requires", _constraints(file), _constraints(earlier)),
    ):
        if mine != theirs:
            return f"{what} {', '.join(theirs) or 'none'}, not {', '.join(mine) or 'none'}"
    return None


def _constraints(file: StudyFile) -> tuple[str, ...]:
    return tuple(map(str, file.study.limits))


def _places(file: StudyFile, status: StudyStatus) -> tuple[list[tuple[Trial, dict[str, Any]]], int]:
    """Return the trials that have a place in the new space, with their values there, and how many
    have none. Raises InputError if none has one."""
    seen = [one for one in status.trials if one.state in SEEN]
    found, why = [], Counter[str]()
    for trial in seen:
        place = counterpart(file, status.file, trial.params)
        if isinstance(place, str):
            why[place] += 1
        else:
            found.append((trial, place))
    if not found:
        name = status.row.name
        reasons = "".join(f"\n  {one} ({plural(n, 'trial')})" for one, n in why.most_common(SHOWN))
        raise InputError(
            f"--from {name}: none of its {plural(len(seen), 'finished trial')} is one of "
            f"{file.name} ({name} -> {file.name}):{reasons}"
            if seen
            else f"--from {name}: it has no finished trial yet"
        )
    return found, len(seen) - len(found)


def counterpart(
    file: StudyFile, earlier: StudyFile, params: Mapping[str, Any]
) -> dict[str, Any] | str:
    """Return the values with which the study of `file` describes the training of a trial of
    `earlier` with `params`; where there are none, what differs."""
    trained = earlier.config(params).to_dict()
    values: dict[str, Any] = {}
    for name, parameter in file.space.items():
        if not file.space.is_active(name, values):
            continue
        value = params[name] if name in params else _at(trained, name)
        if not parameter.contains(value):
            return f"{name}: not in the new space ({parameter.allowed})"
        values[name] = value
    values = file.space.decode(file.space.encode(values))
    return _difference(flatten(trained), flatten(file.config(values).to_dict())) or values


def _at(config: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path, also of a list's item; NONE where there is none."""
    node: Any = config
    for part in path.split("."):
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (LookupError, TypeError, ValueError):
            return NONE
    return node


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Return in which fields two trainings differ; None where their values compare."""
    names = dict.fromkeys(name for name in [*before, *after] if name not in MEANINGLESS)
    other = [name for name in names if not _same(name, before.get(name), after.get(name))]
    told = [
        f"{name}: {_shown(before.get(name))} -> {_shown(after.get(name))}" for name in other[:SHOWN]
    ]
    return ", ".join([*told, "..."] if len(other) > SHOWN else told) or None


def _same(name: str, one: Any, other: Any) -> bool:
    if name in ("data.root", "data.labels"):
        return same_place(one, other)
    return bool(one == other)


def _shown(value: Any) -> str:
    return "(none)" if value is None else toml_repr(value)


def _holds(values: Mapping[str, Any], baseline: Mapping[str, Any]) -> bool:
    return all(name in values and is_same(values[name], one) for name, one in baseline.items())


def _taken(
    file: StudyFile,
    status: StudyStatus,
    trial: Trial,
    stored: FrozenTrial,
    values: Mapping[str, Any],
) -> TakenTrial:
    """Return a trial in the terms of the new study; one that is paused there is pruned here."""
    last, paused = trial.attempts[-1], trial.state == "paused"
    reason = f"paused in {status.row.name}: {last.reason}" if paused else last.reason
    outcome = Outcome.PRUNED if paused else Outcome(trial.state)
    value = trial.value if paused else last.value
    ending = Ending(outcome, value, reason, None if paused else last.objectives)
    runtimes = [one.runtime for one in trial.attempts if one.runtime is not None]
    distributions = file.space.distributions()
    params = file.space.encode(values)
    seen = FrozenTrial(
        number=0,  # the database counts
        trial_id=0,
        state=TrialState.PRUNED if paused else stored.state,
        value=None,
        values=_last_value(stored) if paused else stored.values,
        datetime_start=stored.datetime_start,
        datetime_complete=_moment(last.ended) if paused else stored.datetime_complete,
        params=params,
        distributions={name: distributions[name] for name in params},
        user_attrs={**stored.user_attrs, "outcome": str(outcome)},
        system_attrs={"fixed_params": params},
        intermediate_values=stored.intermediate_values,
    )
    return TakenTrial(seen, ending, runtimes[-1] if runtimes else None, trial.epochs)


def _moment(seconds: float | None) -> datetime | None:
    """Return seconds since 1970 as Optuna's trials have times: local."""
    return None if seconds is None else datetime.fromtimestamp(seconds)


def _last_value(trial: FrozenTrial) -> list[float] | None:
    """Return what Optuna takes for the value of a pruned trial: its last one."""
    steps = trial.intermediate_values
    last = steps[max(steps)] if steps else math.nan
    return None if math.isnan(last) else [last]


def _with_origin(taken: TakenTrial, record: TakenOver, number: int) -> TakenTrial:
    taken.trial.user_attrs["origin"] = record.origin(number)
    return taken
