"""TOML: files (also such as are written in YAML), single values given on the command line, and
dotted names."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import tomli_w

from hpo.errors import LONGEST_KEY, ConfigError, nearest

YAML_SUFFIXES = (".yaml", ".yml")
SUFFIXES = (".toml", *YAML_SUFFIXES)
LARGEST = 1_000_000  # bytes; a study file has some thousand
DEEPEST = 32  # tables, lists and parts of a name in each other; a study file has six
_DEEP_NAME = re.compile(
    rf"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*"|'[^'\n]*')[ \t]*+\.[ \t]*+){{{2 * DEEPEST}}}"""
)


def is_file_name(text: str) -> bool:
    """Return whether `text` names a file of tables, not a study."""
    return Path(text).suffix in SUFFIXES


def read_text(path: Path) -> str:
    """Return a file of tables as TOML: as it is, or, of one in YAML, what it says.

    Raises ConfigError for one that is missing, too large, not UTF-8 or not YAML.
    """
    text = _read(path)
    if path.suffix not in YAML_SUFFIXES:
        return text
    from hpo.config import yaml

    tables = yaml.parse(text, str(path))
    if _is_deep(tables):
        raise _too_deep(str(path))
    return dump(tables)


def _read(path: Path) -> str:
    where = str(path)
    if not path.exists():
        names = (one for one in path.parent.glob("*") if one.suffix in SUFFIXES)
        beside = sorted(one.name for one in names)
        hint = f"; {nearest(path.name, beside)}" if beside else ""
        raise ConfigError(f"no such file{hint}", where=where)
    if not path.is_file():
        raise ConfigError("not a file: give the path of a TOML or YAML file", where=where)
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ConfigError(f"larger than {LARGEST:,} bytes: not a study file", where=where)
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=where) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"not a text file: byte {error.start} is not UTF-8; save it as UTF-8", where=where
        ) from error


def dump(tables: Mapping[str, Any]) -> str:
    """Return `tables` as TOML, paths as text. Raises ConfigError for a value that TOML lacks."""
    try:
        return tomli_w.dumps(_plain(tables))
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"not what a TOML file could hold: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, PurePath) else value


def parse(text: str, where: str = "") -> dict[str, Any]:
    """Return the tables of `text`; raises ConfigError with line and column of what is not TOML."""
    if _DEEP_NAME.search(text):  # tomllib would take minutes, and Python would not survive it
        raise _too_deep(where)
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:
        raise ConfigError(f"not a TOML file: {error}", where=where) from error
    if _is_deep(table):
        raise _too_deep(where)
    return table


def _too_deep(where: str) -> ConfigError:
    return ConfigError(f"not a study file: nested more than {DEEPEST} deep", where=where)


def _is_deep(value: Any) -> bool:
    """Return whether tables, lists and dotted names are nested more than DEEPEST deep."""
    left = [(value, 0)]
    while left:
        one, depth = left.pop()
        if depth > DEEPEST:
            return True
        if isinstance(one, Mapping):
            left += [(inner, depth + 1 + name.count(".")) for name, inner in one.items()]
        elif isinstance(one, list):
            left += [(inner, depth + 1) for inner in one]
    return False


def parse_assignments(items: Iterable[str]) -> dict[str, Any]:
    """Return `KEY=VALUE` of the command line as {key: value}; values are TOML, bare words strings.

    Raises ConfigError for a missing `=`, a key given twice and a value that is neither.
    """
    values: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key) or key.count(".") > DEEPEST:
            given = item if len(item) <= LONGEST_KEY else f"{item[:LONGEST_KEY]}..."
            raise ConfigError(f"{given!r}: write KEY=VALUE, for example optimizer.lr=0.1")
        if key in values:
            raise ConfigError("given twice on the command line", key=key)
        values[key] = _value(key, text.strip())
    return values


def _value(key: str, text: str) -> Any:
    try:
        table = parse(f"value = {text}")
    except ConfigError as error:
        if not text or text[0] in "[{\"'":
            hint = 'for example 3, 0.1, true, "text" or [1, 2]'
            given = text if len(text) <= LONGEST_KEY else f"{text[:LONGEST_KEY]}..."
            raise ConfigError(f"{given!r} is not a TOML value: {hint}", key=key) from error
        return text
    value = table["value"]
    plain = isinstance(value, bool | int | float | str | list | dict)
    return value if len(table) == 1 and plain else text


def nest(table: Mapping[str, Any], where: str = "", prefix: str = "") -> dict[str, Any]:
    """Return nested tables for names that may be quoted and dotted: {a: {b: 1}} for {"a.b": 1}.

    Raises ConfigError for a name that is given in both ways.
    """
    result: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            value = nest(value, where, f"{prefix}{name}.")
        _merge(result, name.split("."), value, where, prefix)
    return result


def _merge(into: dict[str, Any], path: list[str], value: Any, where: str, prefix: str) -> None:
    name, *rest = path
    key = prefix + name
    if rest:
        inner = into.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError("given twice, as a value and as a table", key=key, where=where)
        _merge(inner, rest, value, where, f"{key}.")
    elif isinstance(value, dict) and isinstance(into.get(name), dict):
        for inner_name, inner_value in value.items():
            _merge(into[name], [inner_name], inner_value, where, f"{key}.")
    elif name in into:
        raise ConfigError("given twice", key=key, where=where)
    else:
        into[name] = value
