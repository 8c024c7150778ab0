"""Search spaces: parameters by the dotted path of their config field.

`parameters` says what config values and Optuna's values are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpo.config.base import flatten, list_path, toml_repr, type_at, with_values
from hpo.config.parameters import (
    KEYS,
    LARGEST_GRID,
    Choice,
    Float,
    Int,
    Parameter,
    Scalar,
    Suggests,
    is_same,
)
from hpo.config.train import OPTIONS, TrainConfig, check_path, field_paths, value_error
from hpo.errors import ConfigError, nearest

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


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
