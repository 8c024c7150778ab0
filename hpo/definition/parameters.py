"""Searched parameters: a range of numbers, or choices; each between config values and Optuna's."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Protocol

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
