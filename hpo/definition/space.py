"""What is searched: parameters by the dotted path of their config field.

Two kinds of value meet here. *Config values* are what TOML and TrainConfig hold, lists and tables
included. *Optuna's values* are the same, except that a list or table among the choices is its
canonical JSON text, since Optuna stores nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpo.definition.parameters import (
    LARGEST_GRID,
    Choice,
    Parameter,
    Scalar,
    Suggests,
    When,
    same,
    shown,
)
from hpo.errors import ConfigError, nearest

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


class Space(Mapping[str, Parameter]):
    """Searched fields by dotted path; a parent of a `when` comes before its children.

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
        """{name: table as in TOML}, plain data; `hpo.definition.spacefile.parse_space` takes it."""
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
