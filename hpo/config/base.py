"""Base of all configuration models: dotted paths, and pydantic's errors as ConfigError."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Self, TypeGuard, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError, core_schema

from hpo.errors import ConfigError, nearest
from hpo.formatting import DURATION_PATTERN, LONGEST_S, exact_duration, parse_duration


def as_tuple(value: Any) -> Any:
    """Return a list as a tuple: TOML has lists only, frozen models hold tuples."""
    return tuple(value) if isinstance(value, list) else value


def _seconds(value: Any) -> Any:
    """Return a duration in seconds; a value that is neither a text nor a number as it is."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    return parse_duration(value)


Duration = Annotated[
    float,
    BeforeValidator(_seconds),
    PlainSerializer(exact_duration, return_type=str, when_used="json"),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_S},
                {"type": "string", "pattern": DURATION_PATTERN},
            ]
        }
    ),
]
"""Seconds, also written 90s, 30m, 1h30m or 2 h."""


def _seconds_of_text(value: Any) -> Any:
    return parse_duration(value) if isinstance(value, str) else value


_TEXT = {"type": "string", "pattern": DURATION_PATTERN}
Seconds = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(_seconds_of_text),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, _TEXT]}),
]
"""The same, kept as a number of any size."""
LeaseSeconds = Annotated[
    float,
    Field(ge=1, le=86_400),
    BeforeValidator(_seconds_of_text),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 1, "maximum": 86_400}, _TEXT]}),
]

Ratio = Annotated[float, Field(ge=0, le=1)]
Rates = Annotated[tuple[Annotated[float, Field(ge=0)], ...], BeforeValidator(as_tuple)]
Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(as_tuple)]

FUNCTION_SCHEMA = {"type": "string", "pattern": r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"}
"""JSON Schema of `module:function`, the name of a function of the user's."""


TIMM = "timm:"
"""How architectures of timm's begin."""
TIMM_PATTERN = r"^timm:[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?$"


def is_timm(architecture: str) -> bool:
    """Return whether an architecture is of timm's: `timm:NAME` or `timm:NAME.TAG`."""
    return re.fullmatch(TIMM_PATTERN, architecture) is not None


def is_function_name(name: str) -> bool:
    """Return whether `name` has the form `module:function`, and is not of timm's."""
    own = re.fullmatch(FUNCTION_SCHEMA["pattern"], name) is not None
    return own and not name.startswith(TIMM)


@dataclass(frozen=True)
class NameOrFunction:
    """Annotation of a text: one of `names`, a match of `pattern` if there is one, or
    `module:function` of the user's own."""

    what: str
    names: Sequence[str]
    pattern: str = ""

    def _check(self, value: Any) -> Any:
        if not isinstance(value, str) or value in self.names or is_function_name(value):
            return value
        if self.pattern and re.fullmatch(self.pattern, value):
            return value
        own, hint = "your own is named module:function", nearest(value, self.names)
        raise ValueError(
            f"unknown {self.what}" + (f"; {own}" if ":" in value else f" ({own}); {hint}")
        )

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Check the name before the type."""
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Return all forms."""
        more = [{"type": "string", "pattern": self.pattern}] if self.pattern else []
        return {"anyOf": [{"enum": list(self.names)}, *more, FUNCTION_SCHEMA]}


def auto_or_flag(value: Any) -> Any:
    """Return "auto", true or false. Raises ValueError for anything else."""
    if value != "auto" and not isinstance(value, bool):
        raise ValueError('allowed: "auto", true, false')
    return value


NONE = "none"
"""None in TOML, which has no null."""


class ConfigModel(BaseModel):
    """A frozen table of fields; unknown keys and values of a wrong type are refused. A field that
    may be None takes "none" for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Wrap the whole model: its own validators see None, whichever way it was written."""
        return core_schema.no_info_before_validator_function(cls._with_none, handler(source))

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Describe each field by the text below it."""
        whole = handler(schema)
        fields = handler.resolve_ref_schema(whole)["properties"]
        for name, text in descriptions(cls).items():
            fields[name].setdefault("description", text)
        return whole

    @classmethod
    def _with_none(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {
            name: None if value == NONE and may_be_none(cls, name) else value
            for name, value in data.items()
        }

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, where: str = "", prefix: str = "") -> Self:
        """Validate nested `data`.

        Raises ConfigError naming `where` (the file), each wrong field by its dotted path behind
        `prefix`, its value and what is allowed.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise explain(error, cls, where=where, prefix=prefix) from None


def may_be_none(model: type[BaseModel], name: str) -> bool:
    """Return whether the field `name` takes None, and "none" is none of its own values."""
    field = model.model_fields.get(name)
    if field is None or field.is_required():
        return False
    kinds = get_args(field.annotation)
    return NONE not in kinds and (field.default is None or type(None) in kinds)


# Errors


def toml_repr(value: Any) -> str:
    """Return `value` as TOML writes it, at most 80 characters: of a longer one both ends, since
    either may tell it from another."""
    if value is None or isinstance(value, float):  # also inf and nan
        return NONE if value is None else repr(value)
    text = json.dumps(value, default=str, ensure_ascii=False, skipkeys=True)
    text = text if text.isprintable() else json.dumps(value, default=str, skipkeys=True)
    return text if len(text) <= 80 else f"{text[:37]}...{text[-40:]}"


RULE = "rule"
"""Type of an error of several fields that do not go together."""


def fail(key: str, value: Any, allowed: str) -> NoReturn:
    """Raise from a validator that compares fields: `key` is the dotted path, below the model, of
    the field at fault."""
    message = f"{toml_repr(value)}: {allowed}"
    raise PydanticCustomError(RULE, "{message}", {"key": key, "message": message})


def explain(
    error: ValidationError, model: type[BaseModel], *, where: str = "", prefix: str = ""
) -> ConfigError:
    """Return one ConfigError for all that pydantic found, a line each: key, value, what is
    allowed."""
    return combined([complaint(item, model, prefix) for item in error.errors()]).at(where)


def combined(errors: Sequence[ConfigError]) -> ConfigError:
    """Return one error that says all of `errors`, which are not empty."""
    if len(errors) == 1:
        return errors[0]
    lines = "".join(f"\n  {one}" for one in errors)
    return ConfigError(f"{len(errors)} fields are wrong:{lines}")


def complaint(item: Any, model: type[BaseModel], prefix: str = "") -> ConfigError:
    """Return what pydantic's error `item` says of one field: key, value, what is allowed."""
    path, owner, kind = _locate(model, item["loc"])
    context, value = item.get("ctx", {}), toml_repr(item["input"])
    match item["type"]:
        case "rule":
            path += [part for part in context["key"].split(".") if part]
            message = context["message"]
        case "value_error":
            message = f"{value}: {context['error']}"
        case "extra_forbidden":
            message = f"unknown key; {nearest(path[-1], owner.model_fields if owner else ())}"
        case "literal_error":
            message = f"{value}: {nearest(item['input'], _quoted(context['expected']))}"
        case "union_tag_invalid":
            name, names = context["tag"], _quoted(context["expected_tags"])
            message = f"{toml_repr(name)}: {nearest(name, names)}"
        case "union_tag_not_found":
            path += ["name"]
            message = f"missing; {nearest('', members(kind))}"
        case "missing" if isinstance(item["loc"][-1], int):  # the list is too short
            path.pop()
            message = f"{value}: allowed: {_allowed(model, item['loc'][:-1])}"
        case "missing":
            message = "missing"
        case "too_short" if words := _allowed(model, item["loc"]):
            message = f"{value}: allowed: {words} with {context['min_length']} or more of them"
        case name if name in _WRONG_KIND and (words := _allowed(model, item["loc"])):
            message = f"{value}: allowed: {words}"
        case _:
            message = f"{value}: {item['msg'][0].lower()}{item['msg'][1:]}"
    return ConfigError(message, key=prefix + ".".join(path))


def _quoted(text: str) -> list[str]:
    """Return the words in quotes of pydantic's lists of expected values."""
    return re.findall(r"'([^']*)'", text)


_WRONG_KIND = {
    *("tuple_type", "list_type", "dict_type", "model_type", "model_attributes_type"),
    *("bool_type", "int_type", "int_from_float", "float_type", "string_type", "too_long"),
}
"""Pydantic's errors about a value of another type than the field's; we say it in TOML's words."""
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Literal: "a text",
    dict: "a table",
    Any: "a value",
}


def _allowed(model: type[BaseModel], loc: Sequence[int | str]) -> str:
    """Return the type of the field at `loc` in TOML's words; empty if there are none."""
    path, owner, kind = _locate(model, loc)
    optional = owner is not None and may_be_none(owner, path[-1])
    words = _in_words(kind)
    return words and words + (f' or "{NONE}"' if optional else "")


def _in_words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        first, *more = get_args(kind)
        word = "boolean" if first is bool else _in_words(_bare(first)).removeprefix("a ")
        many = f"{word}s"
        return f"an array of {many}" if more == [...] else f"an array of {1 + len(more)} {many}"
    if names := members(kind):
        return f'a name, or a table {{name = "{next(iter(names))}"}}'
    return "a table" if is_model(kind) else _WORDS.get(get_origin(kind) or kind, "")


# Types of fields


def is_model(kind: Any) -> TypeGuard[type[BaseModel]]:
    """Return whether `kind` is a table of fields."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def members(union: Any) -> dict[str, type[BaseModel]]:
    """Return the models of a union by their names, which their field `name` has as its default;
    empty for other types."""
    kinds = get_args(union) if get_origin(union) in (Union, UnionType) else ()
    return {kind.model_fields["name"].default: kind for kind in kinds if is_model(kind)}


def field_type(model: type[BaseModel], name: str) -> Any:
    """Return the type of the field `name`, its None left out; None for an unknown name."""
    field = model.model_fields.get(name)
    return _bare(field.annotation) if field else None


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Return the text below each field of a model that has one, its bases' included.

    The source is parsed only here: pydantic's `use_attribute_docstrings` would do that for every
    model at every start.
    """
    found: dict[str, str] = {}
    for one in reversed(model.__mro__):
        if issubclass(one, ConfigModel):
            found |= _texts(one)
    return {name: text for name, text in found.items() if text}


def _texts(model: type) -> dict[str, str]:
    """Return the text below each field that the class itself defines; empty where there is none."""
    (definition,) = ast.parse(inspect.getsource(model)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: _text(below)
        for field, below in pairwise([*definition.body, ast.Pass()])
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def _text(node: ast.stmt) -> str:
    match node:
        case ast.Expr(ast.Constant(str(text))):
            return inspect.cleandoc(text)
    return ""


def type_at(model: type[BaseModel], path: str) -> Any:
    """Return the type of a field, or of an item of a list, by its dotted path; None: unknown."""
    return _locate(model, [int(one) if one.isdigit() else one for one in path.split(".")])[2]


def _bare(kind: Any) -> Any:
    """Return `kind` without what is annotated to it, and without None."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    others = [one for one in get_args(kind) if one is not type(None)]
    return _bare(others[0]) if type(None) in get_args(kind) and len(others) == 1 else kind


def _locate(
    model: type[BaseModel], loc: Sequence[int | str]
) -> tuple[list[str], type[BaseModel] | None, Any]:
    """Follow pydantic's `loc`: return the dotted path, the model that has the last field, and the
    type of what is there, each None if unknown. The name of a union's member is not in the path."""
    path: list[str] = []
    owner: type[BaseModel] | None = None
    kind: Any = model
    for step in loc:
        if union := members(kind):
            kind = union.get(str(step))
            continue
        path.append(str(step))
        owner = kind if is_model(kind) else None
        if owner:
            kind = field_type(owner, str(step))
        elif get_origin(kind) is tuple and isinstance(step, int):
            kind = _bare(get_args(kind)[0])
        else:
            kind = _bare(get_args(kind)[1]) if get_origin(kind) is dict else None
    return path, owner, kind


# Dotted paths


def list_path(path: str) -> str:
    """Return the list in which `path` names an item or a field of one, `path` itself without a
    number: `phases` of `phases.1.lr`, `model.head.hidden` of `model.head.hidden.0`."""
    return re.split(r"\.\d+(?:\.|$)", path)[0]


def with_values(data: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of nested `data` with `values` set by dotted path; list items by index from 0.

    Raises ConfigError where a path runs through a single value or past the end of a list.
    """
    result: dict[str, Any] = _copied(data)
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
            raise ConfigError(f"{toml_repr(node)} has no fields", key=path)
    return result


def _copied(value: Any) -> Any:
    """Return a copy of plain data; `copy.deepcopy` takes five times as long."""
    if isinstance(value, Mapping):
        return {name: _copied(one) for name, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list) else value


def _step(node: Any, name: str, path: str) -> Any:
    if isinstance(node, list):
        if not name.isdigit() or int(name) >= len(node):
            raise ConfigError(
                f"no item {name}: the list has {len(node)} (counted from 0)", key=path
            )
        return node[int(name)]
    if not isinstance(node, dict):
        raise ConfigError(f"{toml_repr(node)} has no field {name!r}", key=path)
    return node.setdefault(name, {})


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested plain data as {dotted path: value}; `trainable_blocks` tables stay whole."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping) and name != "trainable_blocks":
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
