"""The [space] table of a study file -> Space, every range and choice held against its field."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from hpo.definition.config import OPTIONS, check_path, field_errors, field_paths, is_option
from hpo.definition.fields import flatten, list_of, with_values
from hpo.definition.parameters import Choice, Float, Int, Parameter, When, canonical, shown
from hpo.definition.space import Space
from hpo.errors import ConfigError, nearest

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
