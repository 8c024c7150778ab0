"""timm's pretrained weights by name, and where they are: read from its source, without importing
it, which would load torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from hpo.config.base import TIMM
from hpo.errors import ConfigError
from hpo.extras import install_command

HUB_FILE = "model.safetensors"
"""The file of weights in a repository of timm's on the Hugging Face Hub."""
OWN = "timm/"
"""timm's account there; alone it stands for the repository of that name."""


def refuse_missing(architecture: str) -> NoReturn:
    """Raise ConfigError: timm is not installed."""
    raise ConfigError(
        f"{architecture!r} needs timm: {install_command('timm')}", key="model.architecture"
    )


def split(architecture: str) -> tuple[str, str]:
    """Return timm's name of an architecture, and its tag, empty without one: of
    `timm:vit_tiny_patch16_224.augreg_in21k` the tag augreg_in21k."""
    name, _, tag = architecture.removeprefix(TIMM).partition(".")
    return name, tag


def full_name(architecture: str, weights: str | None) -> str:
    """Return timm's name, with a tag where one is given: by `model.weights`, unless that is
    DEFAULT or a file, or else in `model.architecture`."""
    name, tag = split(architecture)
    named = weights if weights in hub_repositories(architecture) else tag
    return f"{name}.{named}" if named else name


@cache
def hub_repositories(architecture: str) -> Mapping[str, tuple[str, str]]:
    """Return {tag: (repository, file)} of the weights of `timm:NAME` that are on the Hugging Face
    Hub, timm's default first. Raises ConfigError where timm is not installed."""
    name, _ = split(architecture)
    for path in _sources(architecture):
        text = path.read_text(encoding="utf-8")
        if f"\ndef {name}(" in text:
            return dict(_repositories(ast.parse(text), name))
    return {}


def _sources(architecture: str) -> list[Path]:
    spec = find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        refuse_missing(architecture)
    return [
        path
        for one in spec.submodule_search_locations
        for path in sorted(Path(one, "models").glob("*.py"))
    ]


def _repositories(tree: ast.Module, name: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the tags of an architecture, its default first: the one with a star, or that without a
    name, or else the first."""
    tags: list[tuple[str, tuple[str, str]]] = []
    for key, value in _settings(tree):
        model, _, tag = key.partition(".")
        given = _given(value)
        repository = given.get("hf_hub_id")
        if model != name or not repository:
            continue
        plain = tag.rstrip("*")
        whole = f"{OWN}{name}.{plain}" if plain else f"{OWN}{name}"
        place = whole if repository == OWN else repository
        found = plain or "DEFAULT", (place, given.get("hf_hub_filename", HUB_FILE))
        tags.insert(0 if tag.endswith("*") or not tag else len(tags), found)
    yield from tags


def _settings(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Yield the names with tags, and what is said of their weights: of the tables that a module
    gives to generate_default_cfgs, or calls default_cfgs first."""
    for node in ast.walk(tree):
        tables: list[ast.expr] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "generate_default_cfgs":
            tables = node.args
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "default_cfgs":
            tables = [node.value]
        for table in tables:
            if isinstance(table, ast.Dict):
                for key, value in zip(table.keys, table.values, strict=True):
                    if isinstance(key, ast.Constant):
                        yield str(key.value), value


def _given(value: ast.expr) -> dict[str, str]:
    """Return the texts that a call is given by name."""
    keywords = value.keywords if isinstance(value, ast.Call) else []
    return {
        str(one.arg): str(one.value.value)
        for one in keywords
        if isinstance(one.value, ast.Constant) and isinstance(one.value.value, str)
    }
