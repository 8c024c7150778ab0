"""Search spaces: parameters by the dotted path of their config field.

Two kinds of value meet here. *Config values* are what TOML and TrainConfig hold, lists and tables
included. *Optuna's values* are the same, except that a list or table among the choices is its
canonical JSON text, since Optuna stores nothing else.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Protocol, Self

from pydantic import BeforeValidator, Field, model_validator

from hpo.config.base import (
    ConfigModel,
    as_tuple,
    fail,
    flatten,
    list_path,
    toml_repr,
    type_at,
    with_values,
)
from hpo.config.train import OPTIONS, TrainConfig, check_path, field_paths, value_error
from hpo.errors import ConfigError, nearest

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


class Suggests(Protocol):
    """Part of `optuna.trial.Trial` that `Space.suggest` calls."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Return a number of the range."""

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        """Return a whole number of the range."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Return one of `choices`."""


LARGEST_GRID = 100_000  # points; a grid is held in memory and counted before it starts
MOST_STEPS = 1_000_000_000
"""A finer grid is no grid, and finer than the arithmetic that finds its points."""

Scalar = bool | int | float | str


def canonical_json(value: Any) -> str:
    """Return JSON text that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _conditions(given: Any) -> Any:
    """Return parents by dotted path with lists of values, however they were written."""
    if not isinstance(given, Mapping):
        raise ValueError('a table, for example when = {"optimizer.name" = "sgd"}')
    when: dict[str, tuple[Any, ...]] = {}
    for parent, values in flatten(given).items():
        when[parent] = tuple(values) if isinstance(values, list | tuple) else (values,)
        if not when[parent]:
            raise ValueError(f"{parent}: no values given")
    return when


When = Annotated[
    dict[str, tuple[Any, ...]],
    BeforeValidator(_conditions, json_schema_input_type=dict[str, Any]),
]
"""Parents of a conditional parameter: {name: values of it under which this one is active}."""


class Parameter(ConfigModel):
    """One searched field."""

    when: When = Field(default_factory=dict)
    """Searched only under these values of other parameters: {"optimizer.name" = "sgd"}; a list
    allows several."""

    @property
    @abstractmethod
    def allowed(self) -> str:
        """The values it can take, for messages."""

    @abstractmethod
    def contains(self, value: Any) -> bool:
        """Return whether the config value `value` is one of its own."""

    @abstractmethod
    def encode(self, value: Any) -> Scalar:
        """Return Optuna's value for a config value that it contains."""

    @abstractmethod
    def decode(self, value: Any) -> Any:
        """Return the config value for one of Optuna's."""

    @abstractmethod
    def bounds(self) -> list[Any]:
        """Return both ends of a range, or all choices: what must be valid for the field."""

    @abstractmethod
    def grid_values(self) -> list[Any] | None:
        """Return all its values in order; None for a continuous range."""

    @abstractmethod
    def distribution(self) -> BaseDistribution:
        """Return the same for Optuna."""

    @abstractmethod
    def suggest(self, trial: Suggests, name: str) -> Any:
        """Ask Optuna for a value and return the config value."""

    def to_dict(self) -> dict[str, Any]:
        """Return its table as in TOML, without defaults but that of `log`."""
        return self.model_dump(mode="json", exclude_defaults=True)


class _Range(Parameter):
    """Numbers from `low` to `high`, both included."""

    low: float
    """Smallest value, included."""
    high: float
    """Largest value, included."""
    log: bool = False
    """Search the logarithm."""
    step: float | None
    """Distance of the values; high - low is a multiple of it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        low, high, step = self.low, self.high, self.step
        if low > high:
            fail("low", low, f"above high = {high}: allowed: low <= high")
        if self.log and low <= 0:
            fail("low", low, "with log = true allowed: above 0")
        if step is None or step == type(self).model_fields["step"].default:
            return self
        if self.log:
            fail("step", step, "not with log = true; remove one of them, or list choices")
        width = Decimal(str(high)) - Decimal(str(low))
        if width / Decimal(str(step)) > MOST_STEPS:
            fail("step", step, f"more than {MOST_STEPS:,} steps from low to high; leave step out")
        if width % Decimal(str(step)) != 0:
            fail("step", step, f"does not fit: high - low = {width} must be a multiple of it")
        return self

    @property
    def _steps(self) -> float | None:
        """The step if it is not the default."""
        return self.step if self.step != type(self).model_fields["step"].default else None

    @property
    def allowed(self) -> str:
        """The values it can take, for messages."""
        steps = f" in steps of {self.step}" if self._steps else ""
        return f"{self.low} to {self.high}{steps}"

    def bounds(self) -> list[Any]:
        """Return both ends; one if they are equal."""
        return [self.low, self.high] if self.low < self.high else [self.low]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as in TOML, with `log`."""
        return {"log": self.log, **super().to_dict()}


_Number = Annotated[float, Field(gt=-1e300, lt=1e300)]
_Whole = Annotated[int, Field(gt=-(2**63), lt=2**63)]


class Float(_Range):
    """Numbers from `low` to `high`, both included; with `step` only low, low + step, ..."""

    low: _Number
    high: _Number
    step: float | None = Field(default=None, gt=0, lt=1e300)

    def contains(self, value: Any) -> bool:
        """Return whether `value` is in the range, on its grid."""
        if not _is_number(value) or not self.low <= value <= self.high:
            return False
        steps: float = (value - self.low) / self.step if self.step else 0
        return abs(steps - round(steps)) < 1e-8

    def encode(self, value: Any) -> float:
        """Return Optuna's value."""
        return float(value)

    decode = encode

    def grid_values(self) -> list[Any] | None:
        """Return all values in order; None for a continuous range."""
        if self.low == self.high:
            return [self.low]
        if self.step is None:
            return None
        low, step = Decimal(str(self.low)), Decimal(str(self.step))
        count = int((Decimal(str(self.high)) - low) / step) + 1
        return [float(low + i * step) for i in range(min(count, LARGEST_GRID + 1))]

    def distribution(self) -> BaseDistribution:
        """Return Optuna's distribution."""
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def suggest(self, trial: Suggests, name: str) -> float:
        """Ask Optuna for a value of the range."""
        return trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)


class Int(_Range):
    """Whole numbers from `low` to `high`, both included, `step` apart."""

    low: _Whole
    high: _Whole
    step: int = Field(default=1, gt=0, lt=2**63)

    def contains(self, value: Any) -> bool:
        """Return whether `value` is in the range, on its grid."""
        inside = _is_int(value) and self.low <= value <= self.high
        return inside and not (value - self.low) % self.step

    def encode(self, value: Any) -> int:
        """Return Optuna's value."""
        return int(value)

    decode = encode

    def grid_values(self) -> list[Any]:
        """Return all values in order; None for a continuous range."""
        return list(range(self.low, self.high + 1, self.step)[: LARGEST_GRID + 1])

    def distribution(self) -> BaseDistribution:
        """Return Optuna's distribution."""
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.high, log=self.log, step=self.step)

    def suggest(self, trial: Suggests, name: str) -> int:
        """Ask Optuna for a value of the range."""
        return trial.suggest_int(name, self.low, self.high, log=self.log, step=self.step)


class Choice(Parameter):
    """One of `choices`: numbers, strings, booleans, lists or tables."""

    choices: Annotated[tuple[Any, ...], Field(min_length=1), BeforeValidator(as_tuple)]

    @model_validator(mode="after")
    def _different(self) -> Self:
        seen: set[str] = set()
        for choice in self.choices:
            if (text := _identity(choice)) in seen:
                fail("choices", choice, "given twice")
            seen.add(text)
        return self

    @property
    def allowed(self) -> str:
        """The choices, for messages."""
        return "one of " + ", ".join(toml_repr(one) for one in self.choices)

    def contains(self, value: Any) -> bool:
        """Return whether `value` is one of the choices."""
        return any(is_same(one, value) for one in self.choices)

    def encode(self, value: Any) -> Scalar:
        """Return Optuna's value: JSON text for a list or table."""
        return next(_text(one) for one in self.choices if is_same(one, value))

    def decode(self, value: Any) -> Any:
        """Return the choice for Optuna's value; raises ValueError if there is none."""
        return self.choices[[_text(one) for one in self.choices].index(value)]

    def bounds(self) -> list[Any]:
        """Return all choices."""
        return list(self.choices)

    grid_values = bounds

    def distribution(self) -> BaseDistribution:
        """Return Optuna's distribution."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([_text(one) for one in self.choices])

    def suggest(self, trial: Suggests, name: str) -> Any:
        """Ask Optuna for one of the choices."""
        return self.decode(trial.suggest_categorical(name, [_text(one) for one in self.choices]))


def _text(choice: Any) -> Scalar:
    text: Scalar = canonical_json(choice) if isinstance(choice, list | dict) else choice
    return text


def _identity(choice: Any) -> str:
    """Return the same for what Optuna would take for one choice: 1 and 1.0, a list and its text."""
    if isinstance(choice, str):
        return choice
    whole = isinstance(choice, float) and choice.is_integer()
    return canonical_json(int(choice) if whole else choice)


def is_same(one: Any, other: Any) -> bool:
    """Return whether both are equal as configuration: 1 and 1.0 are, 1 and true are not."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
        """Check the conditions of `parameters` and put parents first."""
        for name, parameter in parameters.items():
            for parent, values in parameter.when.items():
                _check_condition(name, parent, values, parameters)
        self._parameters = {name: parameters[name] for name in _parents_first(parameters)}

    def __getitem__(self, name: str) -> Parameter:
        """Return a parameter by its dotted path."""
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the dotted paths, parents first."""
        return iter(self._parameters)

    def __len__(self) -> int:
        """Return the number of parameters."""
        return len(self._parameters)

    def __repr__(self) -> str:
        """Return the parameters by path."""
        return f"Space({self._parameters!r})"

    def suggest(self, trial: Suggests) -> dict[str, Any]:
        """Ask Optuna for every active parameter and return config values."""
        values: dict[str, Any] = {}
        for name, parameter in self.items():
            if self.is_active(name, values):
                values[name] = parameter.suggest(trial, name)
        return values

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return Optuna's distribution of every parameter, conditional ones included."""
        return {name: parameter.distribution() for name, parameter in self.items()}

    def encode(self, values: Mapping[str, Any]) -> dict[str, Scalar]:
        """Return Optuna's values for config values; raises ConfigError as `check` does."""
        self.check(values)
        return {name: self[name].encode(value) for name, value in values.items()}

    def decode(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return config values for Optuna's; raises ConfigError for what is not of this space."""
        try:
            return {name: self[name].decode(value) for name, value in values.items()}
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{toml_repr(dict(values))}: not of this space: {error}") from error

    @property
    def ranges(self) -> list[str]:
        """Ranges of numbers that every trial has."""
        return [
            name
            for name, one in self.items()
            if not isinstance(one, Choice) and len(one.bounds()) > 1 and not one.when
        ]

    def is_active(self, name: str, values: Mapping[str, Any]) -> bool:
        """Return whether `name` is searched if the others have `values` (config values)."""
        return all(
            parent in values and any(is_same(one, values[parent]) for one in allowed)
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
                raise ConfigError(f"{toml_repr(value)}: allowed: {self[name].allowed}", key=name)
            if not self.is_active(name, values):
                needs = _condition_text(self[name].when)
                raise ConfigError(f"{toml_repr(value)}: used only with {needs}", key=name)
        for name, parameter in self.items() if complete else ():
            if name not in values and self.is_active(name, values):
                raise ConfigError(f"missing; allowed: {parameter.allowed}", key=name)

    def grid(self) -> list[dict[str, Any]]:
        """Return every configuration once, the last parameter moving fastest.

        Raises ConfigError for a continuous range, and for more than `LARGEST_GRID` points.
        """
        grid: list[dict[str, Any]] = [{}]
        for name, parameter in self.items():
            points = parameter.grid_values()
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
        """Return complete configurations that show each end and each choice of every parameter, the
        others at their first value: few, but enough to find values that do not go together."""
        found = [self.around({})]
        for name, parameter in self.items():
            for value in parameter.bounds():
                corner = self.around({**self._parents(name), name: value})
                if corner not in found:
                    found.append(corner)
        return found

    def _parents(self, name: str) -> dict[str, Any]:
        """Return first values of the parents of `name`, and of theirs, under which it is active."""
        values: dict[str, Any] = {}
        for parent, allowed in self[name].when.items():
            values |= self._parents(parent) | {parent: allowed[0]}
        return values

    def around(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return a complete configuration: `given` values, missing ones at their first."""
        values: dict[str, Any] = {}
        for name, parameter in self.items():
            if self.is_active(name, values):
                values[name] = given.get(name, parameter.bounds()[0])
        return values

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return {name: table as in TOML}, plain data; `parse_space` takes it back."""
        return {name: parameter.to_dict() for name, parameter in self.items()}


def _condition_text(when: Mapping[str, tuple[Any, ...]]) -> str:
    return " and ".join(
        f"{parent} = " + " or ".join(toml_repr(value) for value in values)
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
            raise ConfigError(f"{parent} is never {toml_repr(value)}: allowed: {allowed}", key=key)


def _parents_first(parameters: Mapping[str, Parameter]) -> list[str]:
    """Return the names in order, each moved behind its parents; raises ConfigError for a cycle."""
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
"""Fields of a parameter of any kind."""

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
    """Return {dotted path: table or list} of a nested [space] table."""
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
    """Return whether a table holds further names, rather than a range or choices."""
    if not isinstance(value, Mapping) or not value:
        return False
    if path in _FIELDS and path != OPTIONS:
        return all(name.isdigit() for name in value)
    return not set(value) & {"low", "high", "choices"}


def parse_space(leaves: Mapping[str, Any], fixed: Mapping[str, Any]) -> Space:
    """Return the space of `leaves` ({dotted path: table or list of choices}).

    `fixed` is the nested [train] table. Raises ConfigError, its key starting with `space.`.
    """
    try:
        return Space({name: _parameter(name, leaf, fixed) for name, leaf in leaves.items()})
    except ConfigError as error:
        if not error.key or error.key.startswith("space."):
            raise
        raise ConfigError(error.message, key=f"space.{error.key}") from None


def _parameter(name: str, leaf: Any, fixed: Mapping[str, Any]) -> Parameter:
    _check_name(name, fixed)
    if isinstance(leaf, list):
        leaf = {"choices": leaf}
    if not isinstance(leaf, Mapping):
        raise ConfigError(
            f"{toml_repr(leaf)}: a single value is not searched: put it under [train], or give "
            "{low = ..., high = ...} or a list of choices",
            key=name,
        )
    parameter = _kind(name, leaf).parse(leaf, prefix=f"space.{name}.")
    for value in parameter.bounds():
        if error := value_error(name, value):
            raise error
    return parameter


def _kind(name: str, leaf: Mapping[str, Any]) -> type[Parameter]:
    """Return the kind of a parameter: by the keys of its table, and the type of its field."""
    for key in leaf:
        if key not in KEYS:
            raise ConfigError(f"unknown key; {nearest(key, KEYS)}", key=f"{name}.{key}")
        if key not in Choice.model_fields and "choices" in leaf:
            message = "not beside choices: give a range or choices"
            raise ConfigError(message, key=f"{name}.{key}")
    if "choices" in leaf:
        return Choice
    for key in ("low", "high"):
        if key not in leaf:
            raise ConfigError("missing: give low and high, or choices", key=f"{name}.{key}")
    field = type_at(TrainConfig, name)
    numbers = [leaf[key] for key in ("low", "high", "step") if key in leaf]
    whole = field is not float and all(isinstance(one, int) for one in numbers)
    return Int if whole or field is int else Float


def _check_name(name: str, fixed: Mapping[str, Any]) -> None:
    check_path(name)
    if name in FIXED_ONLY:
        raise ConfigError(
            "cannot be searched: it changes which images a trial is measured on, or how, or "
            "nothing at all; fix it under [train]",
            key=name,
        )
    given = flatten(fixed)
    base = list_path(name)
    if base == name:
        if name in given:
            value = toml_repr(given[name])
            raise ConfigError(
                f"also fixed at {value} in [train]: remove it there, or from [space]", key=name
            )
    elif not isinstance(given.get(base), list):
        raise ConfigError(
            f"items are searched only of a list in [train]: write {base} = [...] there", key=name
        )
    with_values(fixed, {name: None})  # raises for an item behind the list's last
