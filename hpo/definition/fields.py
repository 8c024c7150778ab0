"""Fields by dotted path: the base of every validated part, and words for what is wrong in one."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hpo.errors import ConfigError, nearest


def listed(value: Any) -> Any:
    """TOML has lists only; frozen parts hold tuples."""
    return tuple(value) if isinstance(value, list) else value


Ratio = Annotated[float, Field(ge=0, le=1)]
Rates = Annotated[tuple[Annotated[float, Field(ge=0)], ...], BeforeValidator(listed)]
Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(listed)]

OWN = {"type": "string", "pattern": r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"}
"""JSON Schema of `module:function`, the name of something of the user's own."""


def is_own(name: str) -> bool:
    """Whether `name` has the form `module:function`."""
    return re.fullmatch(OWN["pattern"], name) is not None


class Part(BaseModel):
    """A frozen table of fields; unknown keys and values of a wrong type are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def fail(key: str, value: Any, allowed: str) -> None:
    """Raise from a validator of several fields, naming the one at fault (see `explain`)."""
    raise ValueError(f"\0{key}\0{_shown(value)}: {allowed}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def explain(
    error: ValidationError, model: type[BaseModel], *, where: str = "", prefix: str = ""
) -> ConfigError:
    """One ConfigError for all that pydantic found, a line each: key, value, what is allowed."""
    found = [complaint(item, model, prefix) for item in error.errors(include_url=False)]
    if len(found) == 1:
        return found[0].at(where)
    lines = "".join(f"\n  {one}" for one in found)
    return ConfigError(f"{len(found)} fields are wrong:{lines}", where=where)


def complaint(item: Any, model: type[BaseModel], prefix: str = "") -> ConfigError:
    """What pydantic says about one field, in our words: key, value, what is allowed."""
    path = [str(part) for part in item["loc"]]
    message = str(item["msg"]).removeprefix("Value error, ")
    if message.startswith("\0"):
        key, message = message[1:].split("\0")
        path += key.split(".")
    elif item["type"] == "extra_forbidden":
        fields = model_at(model, path[:-1])
        message = f"unknown key; {nearest(path[-1], fields.model_fields if fields else ())}"
    elif item["type"] == "literal_error":
        expected = item["ctx"]["expected"].replace(" or ", ", ").split(", ")
        allowed = [part.strip("'") for part in expected]
        message = f"{_shown(item['input'])}: {nearest(item['input'], allowed)}"
    elif item["type"] != "missing":
        message = f"{_shown(item['input'])}: {message[0].lower()}{message[1:]}"
    return ConfigError(message, key=prefix + ".".join(path))


def model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """The part that stands at `path`, also where it may be None, and that of a list's items; None
    where there is none."""
    for name in path:
        if name.isdigit():
            continue
        field = model.model_fields.get(name)
        kinds = [field.annotation, *get_args(field.annotation)] if field else []
        parts = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if not parts:
            return None
        model = parts[0]
    return model


def list_of(path: str) -> str:
    """The list in which `path` names an item or a field of one; `path` itself where it has no
    number: `phases` of `phases.1.lr`, `model.head.hidden` of `model.head.hidden.0`."""
    return re.split(r"\.\d+(?:\.|$)", path)[0]


def has_items(model: type[BaseModel], name: str) -> bool:
    """Whether the field `name` is a list."""
    return get_origin(model.model_fields[name].annotation) is tuple


def with_values(data: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested `data` with `values` set by dotted path; list items by index from 0.

    Raises ConfigError where a path runs through a single value or past the end of a list.
    """
    result: dict[str, Any] = copy.deepcopy(dict(data))
    for path, value in values.items():
        node: Any = result
        *parents, last = path.split(".")
        for name in parents:
            node = _step(node, name, path)
        if isinstance(node, list):
            _step(node, last, path)
            node[int(last)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise ConfigError(f"{_shown(node)} has no fields", key=path)
    return result


def _step(node: Any, name: str, path: str) -> Any:
    if isinstance(node, list):
        if not name.isdigit() or int(name) >= len(node):
            raise ConfigError(
                f"no item {name}: the list has {len(node)} (counted from 0)", key=path
            )
        return node[int(name)]
    if not isinstance(node, dict):
        raise ConfigError(f"{_shown(node)} has no field {name!r}", key=path)
    return node.setdefault(name, {})


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain data as {dotted path: value}; `trainable_blocks` tables stay whole."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping) and name != "trainable_blocks":
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
