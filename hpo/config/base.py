"""Fields by dotted path: the base of every validated part, and words for what is wrong in one."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
)
from pydantic_core import core_schema

from hpo.errors import (
    ConfigError,
    nearest,
)


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


NONE = "none"
"""How None is written: TOML has no null."""


class Part(BaseModel):
    """A frozen table of fields; unknown keys and values of a wrong type are refused. A field that
    may be None takes "none" for it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Around the whole part: its own rules see None, whichever way it was written."""
        return core_schema.no_info_before_validator_function(cls._with_none, handler(source))

    @classmethod
    def _with_none(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {
            name: None if value == NONE and may_be_none(cls, name) else value
            for name, value in data.items()
        }


def or_none(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Take None beside what `handler` takes."""
    return None if value is None else handler(value)


def may_be_none(model: type[BaseModel], name: str) -> bool:
    """Whether `model` has a field `name` that takes None, and for which "none" is no text."""
    field = model.model_fields.get(name)
    if field is None or field.is_required():
        return False
    kinds = get_args(field.annotation)
    return NONE not in kinds and (field.default is None or type(None) in kinds)


def fail(key: str, value: Any, allowed: str) -> None:
    """Raise from a validator of several fields, naming the one at fault (see `explain`)."""
    raise ValueError(f"\0{key}\0{_shown(value)}: {allowed}")


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    text = repr(list(value)) if isinstance(value, tuple) else text
    return text if len(text) <= 80 else f"{text[:37]}...{text[-40:]}"


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
    elif item["type"] == "missing" and path[-1].isdigit():
        path = path[:-1]  # the list is too short
        message = f"{_shown(item['input'])}: allowed: {_kind_at(model, path)}"
    elif kind := _kind_at(model, path) if item["type"] in _WRONG_KIND else "":
        least = item.get("ctx", {}).get("min_length") if item["type"] == "too_short" else None
        of = f" with {least} or more of them" if least and "array of" in kind else ""
        message = f"{_shown(item['input'])}: allowed: {kind}{of}"
    elif item["type"] == "missing":
        message = "missing"
    else:
        message = f"{_shown(item['input'])}: {message[0].lower()}{message[1:]}"
    return ConfigError(message, key=prefix + ".".join(path))


_WRONG_KIND = {
    *("tuple_type", "list_type", "dict_type", "model_type", "model_attributes_type"),
    *("bool_type", "int_type", "int_from_float", "float_type", "string_type"),
    *("too_short", "too_long"),
}
"""What pydantic calls a value of another kind than the field's; we say it in TOML's words."""
_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "a table",
}


def _kind_at(model: type[BaseModel], path: list[str]) -> str:
    """What a value at `path` is in TOML; empty where we have no word for it."""
    names = list(path)
    while len(names) > 1 and names[-1].isdigit():
        names.pop()
    part = model_at(model, names[:-1])
    field = part.model_fields.get(names[-1]) if part else None
    if part is None or field is None:
        return ""
    kind = _bare(field.annotation)
    for _ in path[len(names) :]:
        kind = _bare(get_args(kind)[0]) if get_origin(kind) is tuple else None
    optional = names == path and may_be_none(part, names[-1])
    return _kind(kind) + (f' or "{NONE}"' if optional else "")


def _bare(kind: Any) -> Any:
    """`kind` without what is annotated to it, and without None."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    others = [one for one in get_args(kind) if one is not type(None)]
    return _bare(others[0]) if type(None) in get_args(kind) and len(others) == 1 else kind


def _kind(kind: Any) -> str:
    kind = _bare(kind)
    if get_origin(kind) is tuple:
        first, *more = get_args(kind)
        many = _kind(first).removeprefix("a ") + "s"
        return f"an array of {many}" if more == [...] else f"an array of {1 + len(more)} {many}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a table"
    return _KINDS.get(get_origin(kind) or kind, "")


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
