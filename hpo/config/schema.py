"""JSON Schema of a study file (draft 7), for TOML editors and other programs.

It is pydantic's, with what a study file adds: dotted names, "none", and searched fields. Rules
between fields, such as low <= high, are left to `hpo.config.study`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from hpo.config.base import NONE
from hpo.config.parameters import Choice, Float, Int
from hpo.config.space import FIXED_ONLY
from hpo.config.strategies import StudyConfig
from hpo.config.train import TrainConfig

Schema = dict[str, Any]


_OFF = {"const": NONE}


class _TomlSchema(GenerateJsonSchema):
    """None is written "none"."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> Schema:
        return self.get_union_of_schemas([self.generate_inner(schema["schema"]), _OFF])

    def encode_default(self, dft: Any) -> Any:
        return NONE if dft is None else super().encode_default(dft)


def json_schema() -> Schema:
    """Return the schema of a whole study file."""
    fields = dict(_fields(_schema_of(TrainConfig), ""))
    searched = {
        path: _searched(path, field)
        for path, field in fields.items()
        if path not in FIXED_ONLY and field != _OFF
    }
    fixed = _table(list(fields), "")
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "hpo study file",
        "type": "object",
        "additionalProperties": False,
        "required": ["space"],
        "properties": {
            "study": _schema_of(StudyConfig),
            "train": {**fixed, "description": "Fixed fields of the training."},
            "space": {
                **_table(list(searched), "space."),
                "description": "Searched fields: a range, or a list of choices, by field.",
                "minProperties": 1,
            },
            "baseline": {
                "type": "array",
                "description": "Configurations that are tried first: values of searched fields.",
                "items": fixed,
            },
        },
        "definitions": fields | {f"space.{path}": one for path, one in searched.items()},
    }


@cache
def _schema_of(model: type[BaseModel]) -> Schema:
    return model.model_json_schema(schema_generator=_TomlSchema)


def _variants(field: Schema) -> list[Schema]:
    variants: list[Schema] = field.get("anyOf", [field])
    return variants


def _fields(table: Schema, prefix: str) -> Iterator[tuple[str, Schema]]:
    """Yield the schema of every field by its dotted path, with `#` for the index of a list's item
    and `*` for a name of the user's; of a table only that it may be none."""
    for name, field in table["properties"].items():
        path, variants = f"{prefix}{name}", _variants(field)
        inner = next((one for one in variants if "properties" in one and "title" in one), None)
        if inner and len(variants) > 1:
            yield path, _OFF
        if inner:
            yield from _fields(inner, f"{path}.")
            continue
        yield path, field
        for one in variants:
            if isinstance(item := one.get("items"), dict):
                yield f"{path}.#", item | {"required": []} if "properties" in item else item
                yield from _fields(item, f"{path}.#.") if "properties" in item else ()
            elif isinstance(item := one.get("additionalProperties"), dict):
                yield f"{path}.*", item


def _table(paths: list[str], space: str, prefix: str = "") -> Schema:
    """Return the table in which each of `paths` may be written by its dotted name, quoted, or in
    nested tables; its schema is the definition of that name, behind `space`."""
    table: Schema = {"type": "object", "additionalProperties": False}
    table |= {"properties": {}, "patternProperties": {}}

    def put(name: str, schema: Schema) -> None:
        pattern = re.escape(name).replace(r"\#", r"\d+").replace(r"\*", r"\w+")
        if {"#", "*"} & set(name):
            table["patternProperties"][f"^{pattern}$"] = schema
        else:
            table["properties"][name] = schema

    names = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
    for name in dict.fromkeys([*names, *(name.partition(".")[0] for name in names)]):
        forms = [_ref(f"{space}{prefix}{name}")] if name in names else []
        if any(other.startswith(f"{name}.") for other in names):
            forms.append(_table(paths, space, f"{prefix}{name}."))
        put(name, {"anyOf": forms} if len(forms) > 1 else forms[0])
    return table


def _ref(definition: str) -> Schema:
    return {"$ref": f"#/definitions/{definition}"}


def _searched(path: str, field: Schema) -> Schema:
    """Return the schema of choices of the field's values, or of a range where it takes numbers."""
    values = {"items": _ref(path), "uniqueItems": True}
    choice = _with(_schema_of(Choice), choices=values)
    ranges = [_range(one) for one in _variants(field) if one.get("type") in ("integer", "number")]
    return {
        "description": field.get("description", ""),
        "anyOf": [choice["properties"]["choices"], choice, *ranges],
    }


def _range(number: Schema) -> Schema:
    """Return the schema of a range of `number`, whose limits are those of both ends."""
    limits = {key: number[key] for key in number if key not in ("default", "description", "title")}
    return _with(_schema_of(Int if number["type"] == "integer" else Float), low=limits, high=limits)


def _with(table: Schema, **more: Schema) -> Schema:
    """Return `table` with more said of some of its fields."""
    fields = table["properties"]
    return table | {"properties": fields | {name: fields[name] | more[name] for name in more}}
