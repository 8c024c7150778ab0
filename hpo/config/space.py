"""Search spaces: parameters by the dotted path of their config field.

Two kinds of value meet here. *Config values* are what TOML and TrainConfig hold, lists and tables
included. *Optuna's values* are the same, except that a list or table among the choices is its
canonical JSON text, since Optuna stores nothing else.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Protocol

from hpo.config.base import (
    flatten,
    list_of,
    with_values,
)
from hpo.config.train import (
    OPTIONS,
    check_path,
    field_errors,
    field_paths,
    is_option,
)
from hpo.errors import (
    ConfigError,
    nearest,
)

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


class Suggests(Protocol):
    """What `Space.suggest` asks: `optuna.trial.Trial`, or a draft of one."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A number of the range."""

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        """A whole number of the range."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """One of `choices`."""


LARGEST_GRID = 100_000  # points; a grid is held in memory and counted before it starts

When = Mapping[str, tuple[Any, ...]]
"""Parents of a conditional parameter: {name: values of it under which this one is active}."""

Scalar = bool | int | float | str


def canonical(value: Any) -> str:
    """JSON text that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def shown(value: Any) -> str:
    """A value as TOML writes it, short enough for a message: of a long one, such as a path, both
    ends, since either may tell it from another."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:37]}...{text[-40:]}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Parameter(ABC):
    """One searched field."""

    when: When = field(default_factory=dict, kw_only=True)

    @property
    @abstractmethod
    def allowed(self) -> str:
        """The values it can take, for messages."""

    @abstractmethod
    def contains(self, value: Any) -> bool:
        """Whether the config value `value` is one of its own."""

    @abstractmethod
    def encode(self, value: Any) -> Scalar:
        """Optuna's value for a config value that it contains."""

    @abstractmethod
    def decode(self, value: Any) -> Any:
        """The config value for one of Optuna's."""

    @abstractmethod
    def ends(self) -> list[Any]:
        """Both ends of a range, or all choices: what must be valid for the field."""

    @abstractmethod
    def points(self) -> list[Any] | None:
        """All its values in order; None where it is continuous."""

    @abstractmethod
    def distribution(self) -> BaseDistribution:
        """The same for Optuna."""

    @abstractmethod
    def suggest(self, trial: Suggests, name: str) -> Any:
        """Ask Optuna for a value; returns the config value."""

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """Its own fields as plain data, without `when`."""

    def to_dict(self) -> dict[str, Any]:
        """As it stands in TOML; conditions as lists."""
        when = {name: list(values) for name, values in self.when.items()}
        return {**self.fields(), **({"when": when} if when else {})}


@dataclass(frozen=True)
class Float(Parameter):
    """Numbers from `low` to `high`, both included; on a grid from `low` where `step` is given."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def allowed(self) -> str:
        return _range_text(self.low, self.high, self.step)

    def contains(self, value: Any) -> bool:
        if not _is_number(value) or not self.low <= value <= self.high:
            return False
        steps: float = (value - self.low) / self.step if self.step else 0
        return abs(steps - round(steps)) < 1e-8

    def encode(self, value: Any) -> float:
        return float(value)

    decode = encode

    def ends(self) -> list[Any]:
        return [self.low, self.high] if self.low < self.high else [self.low]

    def points(self) -> list[Any] | None:
        if self.low == self.high:
            return [self.low]
        if self.step is None:
            return None
        low, step = Decimal(str(self.low)), Decimal(str(self.step))
        count = int((Decimal(str(self.high)) - low) / step) + 1
        return [float(low + i * step) for i in range(min(count, LARGEST_GRID + 1))]

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def suggest(self, trial: Suggests, name: str) -> float:
        return trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)

    def fields(self) -> dict[str, Any]:
        step = {"step": self.step} if self.step is not None else {}
        return {"low": self.low, "high": self.high, "log": self.log, **step}


@dataclass(frozen=True)
class Int(Parameter):
    """Whole numbers from `low` to `high`, both included, `step` apart."""

    low: int
    high: int
    log: bool = False
    step: int = 1

    @property
    def allowed(self) -> str:
        return _range_text(self.low, self.high, self.step if self.step > 1 else None)

    def contains(self, value: Any) -> bool:
        inside = _is_int(value) and self.low <= value <= self.high
        return inside and not (value - self.low) % self.step

    def encode(self, value: Any) -> int:
        return int(value)

    decode = encode

    def ends(self) -> list[Any]:
        return [self.low, self.high] if self.low < self.high else [self.low]

    def points(self) -> list[Any]:
        return list(range(self.low, self.high + 1, self.step)[: LARGEST_GRID + 1])

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.high, log=self.log, step=self.step)

    def suggest(self, trial: Suggests, name: str) -> int:
        return trial.suggest_int(name, self.low, self.high, log=self.log, step=self.step)

    def fields(self) -> dict[str, Any]:
        step = {"step": self.step} if self.step != 1 else {}
        return {"low": self.low, "high": self.high, "log": self.log, **step}


@dataclass(frozen=True)
class Choice(Parameter):
    """One of `choices`: numbers, strings, booleans, lists or tables."""

    choices: tuple[Any, ...]

    @property
    def allowed(self) -> str:
        return "one of " + ", ".join(shown(one) for one in self.choices)

    def contains(self, value: Any) -> bool:
        return any(same(one, value) for one in self.choices)

    def encode(self, value: Any) -> Scalar:
        return next(_text(one) for one in self.choices if same(one, value))

    def decode(self, value: Any) -> Any:
        return self.choices[[_text(one) for one in self.choices].index(value)]

    def ends(self) -> list[Any]:
        return list(self.choices)

    def points(self) -> list[Any]:
        return list(self.choices)

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([_text(one) for one in self.choices])

    def suggest(self, trial: Suggests, name: str) -> Any:
        return self.decode(trial.suggest_categorical(name, [_text(one) for one in self.choices]))

    def fields(self) -> dict[str, Any]:
        return {"choices": list(self.choices)}


def _text(choice: Any) -> Scalar:
    text: Scalar = canonical(choice) if isinstance(choice, list | dict) else choice
    return text


def same(one: Any, other: Any) -> bool:
    """Equal as configuration: 1 and 1.0 are, 1 and true are not."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _range_text(low: float, high: float, step: float | None) -> str:
    return f"{low} to {high}" + (f" in steps of {step}" if step is not None else "")


class Space(Mapping[str, Parameter]):
    """Searched fields by dotted path; a parent of a `when` comes before its children.

    >>> from hpo import StudyFile
    >>> space = StudyFile.load("studies/digits.toml").space
    >>> space["optimizer.lr"]
    Float(when={}, low=0.0001, high=0.3, log=True, step=None)
    >>> space.is_active("optimizer.momentum", {"optimizer.name": "adamw"})
    False

    Raises ConfigError for a `when` that names no parameter, a value that its parent cannot take, or
    that leads back to itself.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        for name, parameter in parameters.items():
            for parent, values in parameter.when.items():
                _check_condition(name, parent, values, parameters)
        self._parameters = {name: parameters[name] for name in _parents_first(parameters)}

    def __getitem__(self, name: str) -> Parameter:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __repr__(self) -> str:
        return f"Space({self._parameters!r})"

    def suggest(self, trial: Suggests) -> dict[str, Any]:
        """Ask Optuna for every active parameter; returns config values."""
        values: dict[str, Any] = {}
        for name, parameter in self.items():
            if self.is_active(name, values):
                values[name] = parameter.suggest(trial, name)
        return values

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distribution of every parameter, conditional ones included."""
        return {name: parameter.distribution() for name, parameter in self.items()}

    def encode(self, values: Mapping[str, Any]) -> dict[str, Scalar]:
        """Optuna's values for config values; raises ConfigError as `check` does."""
        self.check(values)
        return {name: self[name].encode(value) for name, value in values.items()}

    def decode(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Config values for Optuna's; raises ConfigError for what is not of this space."""
        try:
            return {name: self[name].decode(value) for name, value in values.items()}
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{shown(dict(values))}: not of this space: {error}") from error

    @property
    def ranges(self) -> list[str]:
        """Ranges of numbers that every trial has."""
        return [
            name
            for name, one in self.items()
            if not isinstance(one, Choice) and len(one.ends()) > 1 and not one.when
        ]

    def is_active(self, name: str, values: Mapping[str, Any]) -> bool:
        """Whether `name` is searched where the others have `values` (config values)."""
        return all(
            parent in values and any(same(one, values[parent]) for one in allowed)
            for parent, allowed in self[name].when.items()
        )

    def check(self, values: Mapping[str, Any], complete: bool = False) -> None:
        """Raise ConfigError unless `values` (config values) lie in the space; `complete`: and none
        is missing."""
        for name, value in values.items():
            if name not in self:
                hint = nearest(name, self) if self else "nothing is searched"
                raise ConfigError(f"not a searched parameter; {hint}", key=name)
            if not self[name].contains(value):
                raise ConfigError(f"{shown(value)}: allowed: {self[name].allowed}", key=name)
            if not self.is_active(name, values):
                needs = _condition_text(self[name].when)
                raise ConfigError(f"{shown(value)}: used only with {needs}", key=name)
        for name, parameter in self.items() if complete else ():
            if name not in values and self.is_active(name, values):
                raise ConfigError(f"missing; allowed: {parameter.allowed}", key=name)

    def grid(self) -> list[dict[str, Any]]:
        """Every configuration once, the last parameter moving fastest.

        Raises ConfigError for a continuous range, and for more than `LARGEST_GRID` points.
        """
        grid: list[dict[str, Any]] = [{}]
        for name, parameter in self.items():
            points = parameter.points()
            if points is None:
                allowed = "a grid needs step or choices"
                raise ConfigError(f"continuous range {parameter.allowed}; {allowed}", key=name)
            active = [self.is_active(name, known) for known in grid]
            if sum(active) * len(points) > LARGEST_GRID:
                raise ConfigError(f"the grid has more than {LARGEST_GRID:,} points", key=name)
            grid = [
                {**known, name: point} if on else known
                for known, on in zip(grid, active, strict=True)
                for point in (points if on else points[:1])
            ]
        return grid

    def corners(self) -> list[dict[str, Any]]:
        """Complete configurations that show each end and each choice of every parameter, the others
        at their first value: few, but enough to find values that do not go together."""
        found = [self._around({})]
        for name, parameter in self.items():
            for value in parameter.ends():
                corner = self._around({**self._parents(name), name: value})
                if corner not in found:
                    found.append(corner)
        return found

    def _parents(self, name: str) -> dict[str, Any]:
        """First values of the parents of `name`, and of theirs, under which it is active."""
        values: dict[str, Any] = {}
        for parent, allowed in self[name].when.items():
            values |= self._parents(parent) | {parent: allowed[0]}
        return values

    def _around(self, given: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, parameter in self.items():
            if self.is_active(name, values):
                values[name] = given.get(name, parameter.ends()[0])
        return values

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """{name: table as in TOML}, plain data; `hpo.config.space.parse_space` takes it."""
        return {name: parameter.to_dict() for name, parameter in self.items()}


def _condition_text(when: When) -> str:
    return " and ".join(
        f"{parent} = " + " or ".join(shown(value) for value in values)
        for parent, values in when.items()
    )


def _check_condition(
    name: str, parent: str, values: Sequence[Any], parameters: Mapping[str, Parameter]
) -> None:
    key = f"{name}.when"
    if parent not in parameters:
        others = [one for one in parameters if one != name]
        hint = nearest(parent, others) if others else "nothing else is"
        raise ConfigError(f"{parent!r} is not searched; {hint}", key=key)
    for value in values:
        if not parameters[parent].contains(value):
            allowed = parameters[parent].allowed
            raise ConfigError(f"{parent} is never {shown(value)}: allowed: {allowed}", key=key)


def _parents_first(parameters: Mapping[str, Parameter]) -> list[str]:
    """The names in their order, each moved behind its parents; ConfigError for a cycle."""
    order: list[str] = []

    def place(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            cycle = " -> ".join([*path[path.index(name) :], name])
            raise ConfigError(f"conditions lead back to themselves: {cycle}", key=f"{name}.when")
        for parent in parameters[name].when:
            place(parent, (*path, name))
        if name not in order:
            order.append(name)

    for name in parameters:
        place(name, ())
    return order


KEYS = ("low", "high", "log", "step", "choices", "when")

MOST_STEPS = 1_000_000_000
"""A finer grid is no grid, and finer than the arithmetic that finds its points."""

# Trials that differ in one of these are not measured on the same images.
FIXED_ONLY = (
    "task",
    *("data.dataset", "data.root", "data.split_seed", "data.val_fraction", "data.test_fraction"),
    *("data.skip_unreadable", "data.max_pixels", "data.cache_limit_gb", "data.loader_workers"),
    *("data.download", "data.labels", "data.group_by", "data.folds"),
    "data.near_duplicates",
)

_FIELDS = frozenset(field_paths())


def split_space(table: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted path: what stands there} of a nested [space] table."""
    return dict(_leaves(table, ""))


def _leaves(table: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in table.items():
        path = prefix + name
        if _is_inner(path, value):
            found += _leaves(value, f"{path}.")
        else:
            found.append((path, value))
    return found


def _is_inner(path: str, value: Any) -> bool:
    """Whether a table holds further names, rather than a range or choices."""
    if not isinstance(value, Mapping) or not value:
        return False
    if path in _FIELDS and path != OPTIONS:
        return all(name.isdigit() for name in value)
    return not set(value) & {"low", "high", "choices"}


def parse_space(leaves: Mapping[str, Any], fixed: Mapping[str, Any]) -> Space:
    """The space of `leaves` ({dotted path: table or list of choices}).

    `fixed` is the nested [train] table. Raises ConfigError, its key starting with `space.`.
    """
    try:
        parameters = {name: _parameter(name, leaf, fixed) for name, leaf in leaves.items()}
        return Space(parameters)
    except ConfigError as error:
        raise ConfigError(error.message, key=f"space.{error.key}") from None


def _parameter(name: str, leaf: Any, fixed: Mapping[str, Any]) -> Parameter:
    _check_name(name, fixed)
    if isinstance(leaf, list):
        leaf = {"choices": leaf}
    if not isinstance(leaf, Mapping):
        raise ConfigError(
            f"{shown(leaf)}: a single value is not searched: put it under [train], or give "
            "{low = ..., high = ...} or a list of choices",
            key=name,
        )
    for key in leaf:
        if key not in KEYS:
            raise ConfigError(f"unknown key; {nearest(key, KEYS)}", key=f"{name}.{key}")
    when = _when(name, leaf.get("when", {}))
    if "choices" in leaf:
        return _choice(name, leaf, when, fixed)
    return _range(name, leaf, when, fixed)


def _check_name(name: str, fixed: Mapping[str, Any]) -> None:
    check_path(name)
    if name in FIXED_ONLY:
        raise ConfigError(
            "cannot be searched: it changes which images a trial is measured on, or how, or "
            "nothing at all; fix it under [train]",
            key=name,
        )
    given = flatten(fixed)
    base = list_of(name)
    if base == name:
        if name in given:
            value = shown(given[name])
            raise ConfigError(
                f"also fixed at {value} in [train]: remove it there, or from [space]", key=name
            )
    elif not isinstance(given.get(base), list):
        raise ConfigError(
            f"items are searched only of a list in [train]: write {base} = [...] there", key=name
        )


def _when(name: str, given: Any) -> When:
    if not isinstance(given, Mapping):
        example = 'when = {"optimizer.name" = "sgd"}'
        raise ConfigError(f"{shown(given)}: a table, for example {example}", key=f"{name}.when")
    conditions: dict[str, tuple[Any, ...]] = {}
    for parent, value in flatten(given).items():
        if value == []:
            raise ConfigError(f"{parent}: no values given", key=f"{name}.when")
        conditions[parent] = tuple(value) if isinstance(value, list) else (value,)
    return conditions


def _choice(name: str, leaf: Mapping[str, Any], when: When, fixed: Mapping[str, Any]) -> Choice:
    for key in ("low", "high", "log", "step"):
        if key in leaf:
            raise ConfigError("not beside choices: give a range or choices", key=f"{name}.{key}")
    choices = leaf["choices"]
    if not isinstance(choices, list) or not choices:
        raise ConfigError(
            f"{shown(choices)}: choices are a list of one value or more", key=f"{name}.choices"
        )
    seen: set[str] = set()
    for choice in choices:
        _check_value(name, choice, fixed)
        text = _identity(choice)
        if text in seen:
            raise ConfigError(f"{shown(choice)}: given twice", key=f"{name}.choices")
        seen.add(text)
    return Choice(choices=tuple(choices), when=when)


def _identity(choice: Any) -> str:
    """The same for choices that Optuna would take for one: 1 and 1.0, a list and its text."""
    if isinstance(choice, str):
        return choice
    whole = isinstance(choice, float) and choice.is_integer()
    return canonical(int(choice) if whole else choice)


def _range(name: str, leaf: Mapping[str, Any], when: When, fixed: Mapping[str, Any]) -> Parameter:
    numbers: dict[str, Any] = {}
    for key in ("low", "high", "step"):
        if key not in leaf and key != "step":
            raise ConfigError("missing: give low and high, or choices", key=f"{name}.{key}")
        if key in leaf:
            numbers[key] = _number(leaf[key], f"{name}.{key}")
    log = leaf.get("log", False)
    if not isinstance(log, bool):
        raise ConfigError(f"{shown(log)}: true or false", key=f"{name}.log")
    _check_range(name, numbers["low"], numbers["high"], numbers.get("step"), log)
    whole = all(isinstance(number, int) for number in numbers.values())
    whole = whole and (is_option(name) or bool(_rejects(name, float(numbers["low"]), fixed)))
    kind = Int if whole else Float
    if kind is Float:
        numbers = {key: float(number) for key, number in numbers.items()}
    for end in ("low", "high"):
        _check_value(name, numbers[end], fixed)
    return kind(**numbers, log=log, when=when)


def _number(value: Any, key: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{shown(value)}: a number", key=key)
    if not abs(value) < 1e300:  # also catches nan
        raise ConfigError(f"{value}: a finite number", key=key)
    return value


def _check_range(name: str, low: float, high: float, step: float | None, log: bool) -> None:
    if low > high:
        raise ConfigError(f"low = {low} is above high = {high}: allowed: low <= high", key=name)
    if log and low <= 0:
        raise ConfigError(f"{low}: with log = true allowed: above 0", key=f"{name}.low")
    if step is None:
        return
    if log:
        raise ConfigError(
            f"{step}: not with log = true; remove one of them, or list choices", key=f"{name}.step"
        )
    if step <= 0:
        raise ConfigError(f"{step}: allowed: above 0", key=f"{name}.step")
    width = Decimal(str(high)) - Decimal(str(low))
    if width / Decimal(str(step)) > MOST_STEPS:
        message = f"{step}: more than {MOST_STEPS:,} steps from low to high; leave step out"
        raise ConfigError(message, key=f"{name}.step")
    if width % Decimal(str(step)) != 0:
        raise ConfigError(
            f"{step}: does not fit: high - low = {width} must be a multiple of it",
            key=f"{name}.step",
        )


def _rejects(name: str, value: Any, fixed: Mapping[str, Any]) -> list[ConfigError]:
    """What is wrong with `value` at `name`, other fields and rules between fields left aside."""
    errors = field_errors(with_values(fixed, {name: value}))
    return [one for one in errors if f"{one.key}.".startswith(f"{name}.")]


def _check_value(name: str, value: Any, fixed: Mapping[str, Any]) -> None:
    for error in _rejects(name, value, fixed):
        raise error
