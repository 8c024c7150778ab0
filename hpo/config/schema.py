"""The JSON Schema of a study file (draft 7), for TOML editors and other programs.

It knows every field's type, range, default and meaning. Rules between fields, such as low <= high,
are left to `hpo.config.study`.
"""

from __future__ import annotations

import re
from typing import Any

from hpo.config.base import (
    NONE,
    may_be_none,
    model_at,
)
from hpo.config.space import FIXED_ONLY
from hpo.config.strategies import (
    PRUNERS,
    SAMPLERS,
    WRAPPED,
    Strategy,
    StudyConfig,
)
from hpo.config.train import (
    OPTIONS,
    TrainConfig,
    field_paths,
)

Schema = dict[str, Any]

_CHOICES: Schema = {"type": "array", "minItems": 1, "uniqueItems": True}
_WHEN: Schema = {
    "type": "object",
    "description": 'Searched only under these values of other parameters: {"optimizer.name" = '
    '"sgd"}; a list allows several.',
}


def json_schema() -> Schema:
    """The schema of a whole study file."""
    fields = _fields(TrainConfig.model_json_schema(), "")
    lists = {path: item for path, field in fields.items() if (item := _items(field))}
    values = {**fields}
    for path, item in lists.items():
        values |= _by_number(path, item)
    option = fields[OPTIONS]["additionalProperties"]
    fixed = _names(list(fields), set(lists))
    searched = _names([one for one in fields if one not in FIXED_ONLY], set(lists), "space.")
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "hpo study file",
        "type": "object",
        "additionalProperties": False,
        "required": ["space"],
        "properties": {
            "study": _study(),
            "train": {**fixed, "description": "Fixed fields of the training."},
            "space": {
                **searched,
                "description": "Searched fields: a range, or a list of choices, by field.",
                "minProperties": 1,
            },
            "baseline": {
                "type": "array",
                "description": "Configurations that are tried first: values of searched fields.",
                "items": fixed,
            },
        },
        "definitions": {
            **values,
            **{f"space.{path}": _searched(path, field) for path, field in values.items()},
            f"{OPTIONS}.*": option,
            f"space.{OPTIONS}": {
                "type": "object",
                "additionalProperties": _searched(f"{OPTIONS}.*", option),
            },
        },
    }


def _ref(definition: str) -> Schema:
    return {"$ref": f"#/definitions/{definition}"}


def _study() -> Schema:
    schema = _inlined(StudyConfig.model_json_schema())
    schema["properties"]["sampler"] = _by_name(SAMPLERS, schema["properties"]["sampler"])
    schema["properties"]["pruner"] = _by_name(PRUNERS, schema["properties"]["pruner"])
    schema["required"] = []  # `name` defaults to the file's
    return schema


def _by_name(kinds: dict[str, type[Strategy]], field: Schema) -> Schema:
    """A name, or one kind's table with the options of that kind."""
    return {
        "description": field.get("description", ""),
        "anyOf": [{"enum": list(kinds)}, *(_strategy(kind) for kind in kinds.values())],
    }


def _strategy(kind: type[Strategy]) -> Schema:
    schema = _inlined(kind.model_json_schema())
    if "wrapped_pruner" in schema["properties"]:
        wrapped = schema["properties"]["wrapped_pruner"]
        schema["properties"]["wrapped_pruner"] = _by_name(WRAPPED, wrapped)
    schema["required"] = ["name"]
    return schema


def _inlined(schema: Schema) -> Schema:
    """`schema` without references: what they point to stands in their place."""
    definitions = schema.get("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            node = {**definitions[node["$ref"].rpartition("/")[2]], **node}
        if node.get("type") == "null":
            return {"const": NONE}
        dropped = ("$ref", "$defs", "discriminator")
        kept = {key: resolve(value) for key, value in node.items() if key not in dropped}
        return kept | ({"default": NONE} if kept.get("default", NONE) is None else {})

    resolved: Schema = resolve(schema)
    return resolved


def _fields(schema: Schema, prefix: str) -> dict[str, Schema]:
    """{dotted path: schema} of every single field."""
    known = set(field_paths())
    found: dict[str, Schema] = {}
    for name, field in _inlined(schema)["properties"].items():
        path = prefix + name
        if path in known:
            found[path] = field
        else:
            table = next(one for one in [field, *field.get("anyOf", [])] if "properties" in one)
            found |= _fields(table, f"{path}.")
    return found


def _names(paths: list[str], lists: set[str], space: str = "", prefix: str = "") -> Schema:
    """A table in which each field may stand by its dotted name, quoted, or in nested tables; and
    each item of one of `lists` by its index."""
    properties: Schema = {}
    patterns: Schema = {}
    for path in paths:
        name, definition = path.removeprefix(prefix), _ref(space + path)
        properties[name] = definition
        if path in lists:
            item = _ref(f"{space}{path}.*")
            by_index = {"patternProperties": {r"^\d+$": item}, "additionalProperties": False}
            properties[name] = {"anyOf": [definition, {"type": "object", **by_index}]}
            patterns[rf"^{re.escape(name)}\.\d+$"] = item
        if "." in name:
            part = f"{prefix}{name.partition('.')[0]}."
            inner = [one for one in paths if one.startswith(part)]
            table = _names(inner, lists, space, part)
            off = {"anyOf": [table, {"const": NONE}]}
            optional = not space and _is_optional(part[:-1])
            properties[part.removeprefix(prefix)[:-1]] = off if optional else table
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        **({"patternProperties": patterns} if patterns else {}),
    }


def _is_optional(path: str) -> bool:
    """Whether the table at `path` may be None."""
    *parents, name = path.split(".")
    part = model_at(TrainConfig, parents)
    return part is not None and may_be_none(part, name)


def _variants(field: Schema) -> list[Schema]:
    variants: list[Schema] = field.get("anyOf", [field])
    return variants


def _items(field: Schema) -> Schema | None:
    """The schema of a list's items; None where the field is no list of equal items."""
    lists = [one for one in _variants(field) if isinstance(one.get("items"), dict)]
    return lists[0]["items"] if lists else None


def _by_number(path: str, item: Schema) -> dict[str, Schema]:
    """An item of the list at `path`, and each field of it where it is a table."""
    found = {f"{path}.*": {**item, "required": []} if "properties" in item else item}
    for name, field in item.get("properties", {}).items():
        found[f"{path}.*.{name}"] = field
    return found


def _searched(path: str, field: Schema) -> Schema:
    """Choices of the field's values, or a range where it takes numbers; by field in a table."""
    choices = {**_CHOICES, "items": _ref(path)}
    forms = [choices, _table({"choices": choices}, ["choices"])]
    if path.endswith(".*") and "properties" in field:
        fields = {name: _ref(f"space.{path}.{name}") for name in field["properties"]}
        forms.append({"type": "object", "additionalProperties": False, "properties": fields})
    for number in _variants(field):
        if number.get("type") in ("integer", "number"):
            forms.append(_range(number))
    return {"description": field.get("description", ""), "anyOf": forms}


def _range(number: Schema) -> Schema:
    end = {key: number[key] for key in number if key not in ("default", "description", "title")}
    fields: Schema = {
        "low": {**end, "description": "Smallest value, included."},
        "high": {**end, "description": "Largest value, included."},
        "log": {"type": "boolean", "default": False, "description": "Search the logarithm."},
        "step": {
            "type": number["type"],
            "exclusiveMinimum": 0,
            "description": "Distance of the values; high - low is a multiple of it.",
        },
    }
    return _table(fields, ["low", "high"])


def _table(properties: Schema, required: list[str]) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": {**properties, "when": _WHEN},
    }
