"""docs/reference.md, from the JSON Schema of study files; run as a script, it writes the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpo.config.base import NONE
from hpo.config.schema import json_schema
from hpo.config.strategies import Strategy, StudyConfig

PAGE = Path(__file__).parents[1] / "reference.md"
INTRODUCTION = """\
# Every field of a study file

Generated from the models that check study files (`python docs/tools/reference.py`); `hpo schema`
prints the same as a JSON Schema, with which a TOML editor completes and checks. `[study]` says how
to search, `[train]` what is fixed, and `[space]` what is searched, by the same dotted names;
[a study file](study-file.md) shows one. In dotted names `N` is the index of an item, from 0, and
`NAME` a name of yours. `"none"` switches a field off.
"""
TITLES = {
    "": "Training",
    "data": "Data",
    "model": "Model",
    "optimizer": "Optimizer",
    "schedule": "Learning rate schedule",
    "augment": "Augmentation",
    "early_stopping": "Early stopping",
    "retrieval": "Retrieval",
    "runtime": "Runtime",
    "phases": "Phases",
}
HEAD = "| field | type and range | default | searchable | |\n|---|---|---|---|---|"
STRATEGIES = ("sampler", "scheduler", "pruner")
PATTERNS = (
    ("val_recall", "`val_recall:CLASS`"),
    ("minimize", "`module:function`"),
    (":[A-Za-z_]", "`module:function`"),
    ("regex", "`regex:PATTERN`"),
    ("[<>]", "bound"),
    ("\\s*d)", "duration such as `1h30m`"),
)
"""What text must look like, by a part of its pattern."""

Schema = Mapping[str, Any]


def page() -> str:
    """Return the page."""
    return "\n".join([INTRODUCTION, *_study(), *_strategies(), *_training()])


def _study() -> Iterator[str]:
    fields = json_schema()["properties"]["study"]["properties"]
    yield "## `[study]`: the search\n"
    yield "| field | type and range | default | |\n|---|---|---|---|"
    for name, field in fields.items():
        kind = ", ".join(_names(field)) if name in STRATEGIES else _kind(field)
        known = {"default": StudyConfig.model_fields[name].get_default(call_default_factory=True)}
        default = _default(known if name == "sampler" else field)
        yield f"| `{name}` | {kind} | {default} | {_told(field)} |"


def _strategies() -> Iterator[str]:
    """Yield a table of options for each sampler, scheduler and pruner."""
    fields = json_schema()["properties"]["study"]["properties"]
    for kind in STRATEGIES:
        yield f"\n## `study.{kind}`: options\n"
        yield f"Written as `{kind} = NAME`, or with options as `{kind} = {{name = NAME, ...}}`."
        for model in fields[kind]["anyOf"]:
            if "properties" in model:
                yield from _strategy(kind, model)


def _strategy(kind: str, model: Schema) -> Iterator[str]:
    options = dict(model["properties"])
    name = options.pop("name")["const"]
    yield f"\n### {kind} `{name}`\n\n{_text(model['description'])}"
    if options:
        yield "\n| option | type and range | default | |\n|---|---|---|---|"
    for key, field in options.items():
        yield f"| `{key}` | {_kind(field)} | {_default(field)} | {_told(field)} |"


def _training() -> Iterator[str]:
    """Yield a table for each group of the fields of `[train]`."""
    definitions = json_schema()["definitions"]
    for group, title in TITLES.items():
        yield f"\n## {title}\n\n{HEAD}"
        for path, field in definitions.items():
            if "description" not in field or "title" not in field or _group(path) != group:
                continue
            name = path.replace("#", "N").replace("*", "NAME")
            mark = "yes" if f"space.{path}" in definitions else "no"
            yield f"| `{name}` | {_kind(field)} | {_default(field)} | {mark} | {_told(field)} |"


def _group(path: str) -> str:
    """Return the key in TITLES of a field; another one for what stands in `[space]`."""
    first, dot, _ = path.partition(".")
    return first if dot or first in TITLES else ""


def _kind(field: Schema) -> str:
    """Return type and range of a field in words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(one) for one in field["anyOf"]))
    if "enum" in field:
        return ", ".join(f"`{_value(one)}`" for one in field["enum"])
    if "const" in field:
        return f"`{_value(field['const'])}`"
    kind = field.get("type")
    if kind == "array":
        parts = [_kind(one) for one in field.get("prefixItems", ())]
        return f"[{', '.join(parts)}]" if parts else f"list of {_kind(field.get('items', {}))}"
    if kind == "object":
        return "table"
    if kind == "boolean":
        return "`true`, `false`"
    if kind == "string":
        return next((name for key, name in PATTERNS if key in field.get("pattern", "")), "text")
    return f"{kind}{_range(field)}" if kind else "any"


def _range(field: Schema) -> str:
    least, most = field.get("minimum", field.get("ge")), field.get("maximum", field.get("le"))
    above, below = field.get("exclusiveMinimum"), field.get("exclusiveMaximum")
    parts = [
        *([f"at least {least:,}"] if least is not None else []),
        *([f"above {above:,}"] if above is not None else []),
        *([f"at most {most:,}"] if most is not None else []),
        *([f"below {below:,}"] if below is not None else []),
    ]
    if least is not None and most is not None:
        parts = [f"{least:,} to {most:,}"]
    return f", {', '.join(parts)}" if parts else ""


def _names(field: Schema) -> list[str]:
    """Return the names of the strategies of a field."""
    names = next(one["enum"] for one in field["anyOf"] if "enum" in one)
    return [f'`"{name}"`' for name in names]


def _default(field: Schema) -> str:
    return f"`{_value(field['default'])}`" if "default" in field else ""


def _value(value: Any) -> str:
    """Return a value as TOML has it; of a strategy its name."""
    if isinstance(value, Strategy):
        value = value.model_dump()
    if isinstance(value, Mapping) and "name" in value:
        value = value["name"]
    return json.dumps(value, ensure_ascii=False).replace("|", "\\|")


def _told(field: Schema) -> str:
    return _text(field.get("description", "")).replace("|", "\\|")


def _text(text: str) -> str:
    """Return a docstring as one line, its None as a study file writes it."""
    text = re.sub(r"\bNone\b", f"`{NONE}`", " ".join(text.split()))
    return text.replace("<", "&lt;").replace("*", r"\*")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
