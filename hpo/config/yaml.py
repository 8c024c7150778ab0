"""Study files and configurations in YAML: the same tables as in TOML.

Scalars are those of YAML 1.2's core schema: `no`, `on` and dates are words, `1e-3` is a number.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.events import AliasEvent, Event
from yaml.nodes import MappingNode, Node

from hpo.errors import LONGEST_KEY, ConfigError

_STR, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"
_SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    _NULL: (r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}


def _problem(what: str, event: Event) -> yaml.MarkedYAMLError:
    error = yaml.MarkedYAMLError(problem=what)
    error.problem_mark = event.start_mark  # type: ignore[assignment]
    return error


class _Loader(yaml.SafeLoader):
    """A loader without what surprises, or what makes a small file a large one."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - PyYAML's own

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Refuse aliases: a few lines of them describe more than a memory holds."""
        if self.check_event(AliasEvent):
            raise _problem("aliases (*name) are not read", self.peek_event())  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """Refuse a scalar that is none of its tag, and whole numbers too long for Python."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):
            kind, text = node.tag.rpartition(":")[2], str(node.value)
            shown = text if len(text) <= LONGEST_KEY else f"{text[:LONGEST_KEY]}..."
            problem = f"{shown!r} cannot be read as {kind}"
            raise yaml.MarkedYAMLError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a name that stands twice, and names that are no text."""
        seen = set()
        for key, _ in node.value if isinstance(node, MappingNode) else ():
            name = getattr(key, "value", None)
            if not isinstance(name, str):
                raise yaml.MarkedYAMLError(None, None, "a name is text", key.start_mark)
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"{name} stands twice", key.start_mark)
            seen.add(name)
            key.tag = _STR
        return super().construct_mapping(node, deep)


for _tag, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})$"), list(_first))
# A field that may be off is "none" in TOML, which has no null.
_Loader.add_constructor(_NULL, lambda loader, node: "none")
# YAML 1.1 reads 010 as eight.
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(node.value, 16 if node.value.startswith("0x") else 10),
)


def parse(text: str, where: str = "") -> dict[str, Any]:
    """Return the tables of `text`; raises ConfigError with line and column of what is not YAML."""
    try:
        tables = yaml.load(text, _Loader)
    except RecursionError:
        raise ConfigError("not a study file: nested too deep", where=where) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not a YAML file: {_described(error)}", where=where) from None
    if tables == "none":
        return {}
    if not isinstance(tables, dict):
        raise ConfigError("not a study file: it has no tables such as study:", where=where)
    return tables


def _described(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"{problem} (at line {mark.line + 1}, column {mark.column + 1})" if mark else problem
