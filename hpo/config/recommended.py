"""Recommended configurations: which of `recommended.toml` a study tries first, cut to its space."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any, Literal

from hpo.config import toml
from hpo.config.base import NONE, flatten
from hpo.config.parameters import Choice, Float, Int, Parameter, is_same
from hpo.config.strategies import Grid
from hpo.config.study import Proposal, StudyFile
from hpo.config.train import TrainConfig
from hpo.errors import ConfigError

MOST = 4
"""Recommended configurations of a study at most."""
SMALL = 64
"""Largest side of small images, in pixels."""
SITUATION = (
    *("model.architecture", "model.weights", "model.trainable_blocks", "data.image_size"),
    *("phases.0.trainable_blocks", "phases.1.trainable_blocks"),
)
"""Fields that decide which entries fit; where they are searched, each combination is a situation
(of phases the first two)."""
MOST_SITUATIONS = 500

Start = Literal["scratch", "frozen", "fine-tuned"]
Size = Literal["small", "large"]


@dataclass(frozen=True)
class Situation:
    """What a training is like, as far as recommended configurations depend on it."""

    architecture: str
    start: Start
    images: Size


@dataclass(frozen=True)
class Entry:
    """An entry of `recommended.toml`."""

    architectures: tuple[str, ...]
    start: Start
    images: Literal["small", "large", "any"]
    source: str
    values: dict[str, Any]
    """By dotted path; a list of names stands for the first that a study allows."""

    def fits(self, situation: Situation) -> bool:
        """Return whether the start and the images are those of `situation`."""
        return self.start == situation.start and self.images in ("any", situation.images)

    def names(self, architecture: str) -> bool:
        """Return whether it is for `architecture` in particular."""
        own = ":" in architecture
        return not own and any(
            one != "*" and fnmatchcase(architecture, one) for one in self.architectures
        )


@cache
def entries() -> tuple[Entry, ...]:
    """Return the entries of the package's `recommended.toml`, in order."""
    text = resources.files("hpo.config").joinpath("recommended.toml").read_text(encoding="utf-8")
    return parse_entries(text)


def parse_entries(text: str) -> tuple[Entry, ...]:
    """Return the entries of `text` (TOML, as `recommended.toml`)."""
    return tuple(
        Entry(
            tuple(one["architectures"]),
            one["start"],
            one["images"],
            one["source"],
            flatten(one["values"]),
        )
        for one in toml.parse(text)["recommended"]
    )


def situation_of(config: TrainConfig) -> Situation:
    """Return the situation of a training."""
    start: Start = "scratch"
    if config.model.weights is not None:
        frozen = all(phase.trainable_blocks == 0 for phase in config.all_phases())
        start = "frozen" if frozen else "fine-tuned"
    small = config.data.image_size <= SMALL
    return Situation(config.model.architecture, start, "small" if small else "large")


def situations_of(file: StudyFile) -> dict[Situation, list[dict[str, Any]]]:
    """Return the situations of the trials of `file`, each with the searched values that lead to
    it."""
    found: dict[Situation, list[dict[str, Any]]] = {}
    for pinned in _combinations(file):
        try:
            situation = situation_of(file.config(file.space.around(pinned)))
        except ConfigError:
            continue  # values that do not go together
        found.setdefault(situation, []).append(pinned)
    return found


def family(architecture: str) -> str:
    """Return what architectures have in common that are recommended the same from scratch: their
    patterns; `architecture` itself where it is named by none."""
    for one in entries():
        if one.start == "scratch" and one.names(architecture):
            return ", ".join(one.architectures)
    return architecture


def entries_for(situation: Situation, known: Iterable[Entry] | None = None) -> list[Entry]:
    """Return the entries for `situation` in order, those for any architecture only where none names
    it. `known`: default: all."""
    fitting = [one for one in (entries() if known is None else known) if one.fits(situation)]
    named = [one for one in fitting if one.names(situation.architecture)]
    return named or [one for one in fitting if "*" in one.architectures]


def share(file: StudyFile) -> int:
    """Return how many trials may try something known before the search: a third of the trials, at
    least one, as far as the study's own baselines leave them. Beside a limit on time or on full
    trainings those count instead, each a trial."""
    budget = file.study.trials or file.study.max_full_trainings or math.inf
    trials = int(min(budget, 1_000_000))
    return max(0, min(max(1, trials // 3), trials - len(file.baselines)))


def recommend(
    file: StudyFile, before: Iterable[Proposal] = (), known: Iterable[Entry] | None = None
) -> tuple[Proposal, ...]:
    """Return the recommended configurations that a new study of `file` tries, each with its source,
    cut to its space: at most MOST, and with those `before` (learned ones) at most its `share`.

    None under the sampler grid, for a retrieval, or with `study.defaults = false`. Nothing that a
    baseline, one `before` or another recommended one has is in it twice. `known`: the entries to
    choose from, default: all.
    """
    if not file.study.defaults or isinstance(file.study.sampler, Grid):
        return ()
    if file.train.get("task", "classification") != "classification":
        return ()
    tried = [*file.baselines, *(one.values for one in before)]
    room = min(MOST, share(file) - (len(tried) - len(file.baselines)))
    found: list[Proposal] = []
    for entry, pinned in _in_order(file, known):
        values = cut(file, entry.values, pinned)
        if values is not None and not any(_is_within(one, values) for one in tried):
            tried.append(values)
            found.append(Proposal("recommended", values, entry.source))
    return tuple(found[: max(0, room)])


def _is_within(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether `other` has all that `one` has."""
    return all(name in other and is_same(value, other[name]) for name, value in one.items())


def _in_order(
    file: StudyFile, known: Iterable[Entry] | None
) -> Iterator[tuple[Entry, dict[str, Any]]]:
    """Yield entries with the values that put `file` into their situation: the first entry of every
    situation, then the second ones. Of several values for an entry the next ones take turns."""
    options: dict[int, tuple[int, Entry, list[dict[str, Any]]]] = {}
    for situation, pins in situations_of(file).items():
        for rank, entry in enumerate(entries_for(situation, known)):
            options.setdefault(id(entry), (rank, entry, []))[2].extend(pins)
    in_order = sorted(options.values(), key=lambda one: one[0])
    for turn, (_, entry, pins) in enumerate(in_order):
        yield entry, pins[turn % len(pins)]


def _combinations(file: StudyFile) -> list[dict[str, Any]]:
    """Return all combinations of searched fields of SITUATION, at most MOST_SITUATIONS."""
    ends = {name: file.space[name].bounds() for name in SITUATION if name in file.space}
    product = itertools.product(*ends.values())
    return [dict(zip(ends, one, strict=True)) for one in itertools.islice(product, MOST_SITUATIONS)]


# Cutting a configuration to a space


def cut(
    file: StudyFile, given: Mapping[str, Any], pinned: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Return `given` values ({dotted path: value}) cut to the space of `file`, `pinned` ones
    unchanged: each searched and active parameter has the nearest allowed value; where nothing is
    given, that of its field's default, and where that has none, too, it is left out, to be sampled.

    None where a given value has no counterpart, nothing given is searched, the optimizer is fixed
    to another one, or the values do not go together.
    """
    pinned = pinned or {}
    scaled = _with_scaled_rate(file, given, pinned)
    if scaled is None:
        return None
    own = {name for name in scaled if name in file.space}
    defaults = _defaults(file, pinned)
    values: dict[str, Any] = {}
    for name, parameter in file.space.items():
        if not file.space.is_active(name, values):
            continue
        found = pinned.get(name)
        if found is None:
            found = nearest(parameter, scaled[name] if name in own else defaults.get(name, NONE))
        if found is None and name in own:
            return None
        if found is not None:
            values[name] = found
    if not own & values.keys() or not _is_possible(file, values):
        return None
    return file.space.decode(file.space.encode(values))


def _is_possible(file: StudyFile, values: Mapping[str, Any]) -> bool:
    try:
        file.config(file.space.around(values))
    except ConfigError:
        return False
    return True


def _defaults(file: StudyFile, pinned: Mapping[str, Any]) -> dict[str, Any]:
    """Return what fields have that are neither given nor searched, by dotted path."""
    needed = {name: value for name, value in pinned.items() if name.startswith("model.")}
    try:
        return flatten(file.config(needed).to_dict())
    except ConfigError:
        return flatten(TrainConfig().to_dict())


def _with_scaled_rate(
    file: StudyFile, given: Mapping[str, Any], pinned: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return `given` with the optimizer, and optimizer.lr as the batch size that it gets wants it;
    None where that optimizer cannot be."""
    fixed = _defaults(file, pinned)
    found = dict(given)
    if "optimizer.name" in given:
        name = _allowed_name(file, given["optimizer.name"], fixed)
        if name is None:
            return None
        found["optimizer.name"] = name
    if "batch_size" in given and "optimizer.lr" in given:
        batch = fixed["batch_size"]
        if "batch_size" in file.space:
            batch = nearest(file.space["batch_size"], given["batch_size"])
        ratio = (batch or given["batch_size"]) / given["batch_size"]
        sgd = found.get("optimizer.name", fixed["optimizer.name"]) == "sgd"
        if ratio != 1:
            rate = given["optimizer.lr"] * (ratio if sgd else math.sqrt(ratio))
            found["optimizer.lr"] = float(f"{rate:.4g}")
    return found


def _allowed_name(file: StudyFile, given: Any, fixed: Mapping[str, Any]) -> Any:
    """Return the first of the `given` optimizers that `file` searches or fixes; None: none."""
    wanted = given if isinstance(given, list) else [given]
    if "optimizer.name" in file.space:
        return nearest(file.space["optimizer.name"], wanted)
    return next((one for one in wanted if one == fixed["optimizer.name"]), None)


def nearest(parameter: Parameter, value: Any) -> Any:
    """Return the allowed value of `parameter` that is nearest to `value`; None where it has no
    counterpart. Of numbers above 0 the one of the nearest logarithm is meant; texts, booleans and
    lists of other lengths must be equal; a list of texts stands for the first that is allowed."""
    if isinstance(parameter, Choice):
        return _nearest_choice(parameter, value)
    if not _is_number(value) or not isinstance(parameter, Int | Float):
        return None
    clipped = min(max(value, parameter.low), parameter.high)
    if isinstance(parameter, Int):
        return parameter.low + round((clipped - parameter.low) / parameter.step) * parameter.step
    points = parameter.grid_values() if parameter.step else None
    return min(points, key=lambda one: abs(one - clipped)) if points else float(clipped)


def _nearest_choice(parameter: Choice, value: Any) -> Any:
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return next((one for one in value if parameter.contains(one)), None)
    same = next((one for one in parameter.choices if is_same(one, value)), None)
    if same is not None:
        return same
    numbers = [one for one in parameter.choices if _is_number(one)]
    if _is_number(value) and numbers:
        positive = min(value, *numbers) > 0
        scale: Callable[[float], float] = math.log if positive else float
        return min(numbers, key=lambda one: abs(scale(one) - scale(value)))
    lists = [one for one in parameter.choices if _is_like(one, value)]
    return min(lists, key=lambda one: _distance(one, value)) if lists else None


def _is_like(one: Any, other: Any) -> bool:
    """Return whether both are lists of as many numbers."""
    lists = isinstance(one, list | tuple) and isinstance(other, list | tuple)
    return lists and len(one) == len(other) > 0 and all(map(_is_number, (*one, *other)))


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
