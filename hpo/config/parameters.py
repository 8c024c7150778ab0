"""Searched parameters: a range of numbers, or choices.

Two kinds of value meet here. *Config values* are what TOML and TrainConfig hold, lists and tables
included. *Optuna's values* are the same, except that a list or table among the choices is its
canonical JSON text, since Optuna stores nothing else.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Protocol, Self

from pydantic import BeforeValidator, Field, model_validator

from hpo.config.base import ConfigModel, as_tuple, fail, flatten, toml_repr

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
    """Return the same for what Optuna would take for one choice: 1, 1.0 and true, a list and its
    text."""
    if isinstance(choice, str):
        return choice
    whole = isinstance(choice, bool) or (isinstance(choice, float) and choice.is_integer())
    return canonical_json(int(choice) if whole else choice)


def is_same(one: Any, other: Any) -> bool:
    """Return whether both are equal as configuration: 1 and 1.0 are, 1 and true are not."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


KEYS = ("low", "high", "log", "step", "choices", "when")
"""Fields of a parameter of any kind."""
