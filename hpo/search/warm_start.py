"""Warm start: the best configurations of earlier studies, which a new one tries first.

Only values of validation are known here: a study never sees its test images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hpo.config.base import flatten
from hpo.config.parameters import Choice, Parameter, is_same
from hpo.config.recommended import cut, family, nearest, share, situations_of
from hpo.config.space import Space
from hpo.config.study import Proposal, StudyFile
from hpo.errors import HpoError, InputError
from hpo.formatting import number, plural
from hpo.search.status import StudyStatus, read_status
from hpo.storage import records
from hpo.storage.database import Database

MOST = 4
"""Learned configurations of a study at most."""
CANDIDATES = 20
"""Best trials of each earlier study that are considered."""
ALIKE = 0.1
"""Configurations are not both tried that differ in no parameter by more of its width."""

LearnFrom = Sequence[str] | Literal["auto"]
"""Names of studies; auto: every compatible one of the database."""


@dataclass(frozen=True)
class Evaluated:
    """A complete trial of an earlier study, in the space of the new one."""

    values: Mapping[str, Any]
    """Config values by dotted path."""
    regret: float
    """Its place among the trials of its study, from 0 (the best) to 1."""
    source: str
    """Study, trial, and what it reached there, in words."""


def learn(
    file: StudyFile, learn_from: LearnFrom, database: Database, *, elsewhere: bool = False
) -> tuple[Proposal, ...]:
    """Return the configurations that a new study of `file` learns from studies of `database`, at
    most MOST and its `share`; `elsewhere`: that is not its own database, and the source says so.

    Raises NotFound for an unknown study, naming the nearest, and InputError for one that is not
    compatible, saying why; `auto` leaves those out.
    """
    auto = learn_from == "auto"
    rows = records.list_studies(database) if auto else ()
    names = [row.name for row in rows if "verifies" not in row.definition] if auto else learn_from
    place = f" in {database.shown}" if elsewhere else ""
    found: list[list[Evaluated]] = []
    for name in dict.fromkeys(names):
        try:
            found.append(_evaluated(file, read_status(database, name), place))
        except HpoError:
            if not auto:
                raise
    chosen = choose(found, file.space, file.baselines, min(MOST, share(file)))
    return tuple(Proposal("learned", dict(one.values), one.source) for one in chosen)


def _evaluated(file: StudyFile, status: StudyStatus, place: str) -> list[Evaluated]:
    """Return the trials of an earlier study, best first; raises InputError if none can be used."""
    name = status.row.name
    if why := obstacle(file, status.file):
        raise InputError(f"{file.name} cannot learn from {name}: {why}")
    ranked = status.ranked()
    if not ranked:
        raise InputError(f"{file.name} cannot learn from {name}: it has no complete trial")
    found = []
    for rank, trial in enumerate(ranked):
        values = translated(file, status.file, trial.params)
        if values is not None:
            source = (
                f"study {name}{place}, trial {trial.number}: {status.file.metric} "
                f"{number(trial.value)}"
            )
            found.append(Evaluated(values, rank / max(1, len(ranked) - 1), source))
    if not found:
        raise InputError(
            f"{file.name} cannot learn from {name}: none of its "
            f"{plural(len(ranked), 'complete trial')} has a counterpart in [space]"
        )
    return found


def obstacle(file: StudyFile, earlier: StudyFile) -> str | None:
    """Return why a study of `file` can learn nothing from that of `earlier`; None where it can."""
    task, other = (one.train.get("task", "classification") for one in (file, earlier))
    if task != other:
        return f"its task is {other}, not {task}"
    if earlier.direction != file.direction:
        return f"{earlier.metric} is {earlier.direction}d, and {file.metric} {file.direction}d"
    here, there = _kinds(file), _kinds(earlier)
    if not here & there:
        return f"it trains {_in_words(there)}, not {_in_words(here)}"
    if not file.space.keys() & earlier.space.keys():
        return "it searches none of the same parameters"
    return None


def _kinds(file: StudyFile) -> set[tuple[str, str]]:
    """Return the families of networks, and how their training starts."""
    return {(family(one.architecture), one.start) for one in situations_of(file)}


def _in_words(kinds: Iterable[tuple[str, str]]) -> str:
    return " or ".join(f"{name} ({start})" for name, start in sorted(kinds))


def translated(
    file: StudyFile, earlier: StudyFile, params: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the configuration of a trial of `earlier` with `params`, cut to the space of `file`;
    None where what it searched has no counterpart."""
    whole = flatten(earlier.config(params).to_dict())
    needed = {"optimizer.name", "optimizer.lr", "batch_size"}
    given = {
        name: value
        for name, value in whole.items()
        if name in needed
        or (name in file.space and (name in params or _has(file.space[name], value)))
    }
    return cut(file, given)


def _has(parameter: Parameter, value: Any) -> bool:
    return nearest(parameter, value) is not None


# Choosing


def choose(
    studies: Sequence[Sequence[Evaluated]],
    space: Space,
    tried: Iterable[Mapping[str, Any]],
    count: int,
) -> list[Evaluated]:
    """Return up to `count` configurations of earlier `studies`, each with its trials best first,
    that are worth trying together: one after another the one that most lowers the mean over the
    studies of the least regret so far. In another study than its own a configuration has the regret
    of its nearest neighbour there. Once nothing lowers the mean any further, it starts anew with
    those that are left. None is like another, or like those `tried` anyway.
    """
    candidates = [one for trials in studies for one in trials[:CANDIDATES]]
    regrets = {id(one): [_regret_in(one, trials, space) for trials in studies]
               for one in candidates}  # fmt: skip
    known, chosen = list(tried), list[Evaluated]()
    least = [1.0] * len(studies)
    while len(chosen) < count:
        candidates = [one for one in candidates if not _is_known(one.values, known, space)]
        if not candidates:
            break
        means = [_mean(map(min, least, regrets[id(one)])) for one in candidates]
        if chosen and min(means) >= _mean(least) and min(least) < 1:
            least = [1.0] * len(studies)
            continue
        _, best = min(zip(means, candidates, strict=True), key=lambda one: (one[0], one[1].regret))
        least = list(map(min, least, regrets[id(best)]))
        chosen.append(best)
        known.append(best.values)
    return chosen


def _regret_in(one: Evaluated, trials: Sequence[Evaluated], space: Space) -> float:
    nearby = min(trials, key=lambda other: (apart(one.values, other.values, space), other.regret))
    return one.regret if any(other is one for other in trials) else nearby.regret


def _is_known(values: Mapping[str, Any], known: Iterable[Mapping[str, Any]], space: Space) -> bool:
    return any(max(_parts(values, {**values, **one}, space)) <= ALIKE for one in known)


def apart(one: Mapping[str, Any], other: Mapping[str, Any], space: Space) -> float:
    """Return how far two configurations are apart, from 0 to 1: the mean over the parameters that
    one of them has, of a range by its width (of its logarithm, if that is searched)."""
    return _mean(_parts(one, other, space))


def _parts(one: Mapping[str, Any], other: Mapping[str, Any], space: Space) -> list[float]:
    return [
        _apart(space[name], one[name], other[name]) if name in one and name in other else 1.0
        for name in space
        if name in one or name in other
    ]


def _apart(parameter: Parameter, one: Any, other: Any) -> float:
    if isinstance(parameter, Choice):
        return 0.0 if is_same(one, other) else 1.0
    low, high = parameter.bounds()[0], parameter.bounds()[-1]
    if low == high:
        return 0.0
    if getattr(parameter, "log", False):
        low, high, one, other = (math.log(value) for value in (low, high, one, other))
    return float(abs(one - other) / (high - low))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0
