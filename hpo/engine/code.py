"""Which code computes the trials of a study: what its workers must have in common.

The fingerprint is of what decides a result where the configuration and the images are the same: the
modules of hpo's `engine` and `definition` that compute, the versions of torch and torchvision
(major.minor: patch releases are not to change results), and the user's own modules that the study
names as its loss, architecture or metric; not what those import. A module counts by its syntax
tree, without comments, docstrings and layout: a reworded comment stops no running study. An own
data set counts by its images, which have a fingerprint of their own. Devices do not count: a study
may run on GPUs of many kinds.

Imports no torch.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

import hpo
from hpo.definition.studyfile import StudyFile
from hpo.engine import modules
from hpo.engine.cache import short_hash
from hpo.errors import ConfigError

FLOORS = ("definition", "engine")
TELLING = (
    "definition/remarks",
    "definition/schema",
    "definition/starter",
    "engine/code",
    "engine/onnx_files",
)
"""Modules of those that only tell, measure or convert."""
LIBRARIES = ("torch", "torchvision")
DECISIVE = (
    "loss",
    "model.architecture",
    "schedule.metric",
    "early_stopping.metric",
    "study.metric",
)
"""Fields whose own functions decide results; that of `data.dataset` is shown alone."""
LONGEST_SOURCE = 500_000
"""Bytes of an own module's file, above which its text is not kept."""


@dataclass(frozen=True)
class Code:
    """The code of one process."""

    parts: Mapping[str, str]
    """What counts: {"hpo sources": digest, "torch": "2.15", "own nets": digest, ...}."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Texts of the user's own modules, by module."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits."""
        return short_hash(sorted(self.parts.items()))[:16]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value}" for name, value in self.parts.items())
        return f"{self.fingerprint}: {parts}"

    def differences(self, other: Code) -> list[str]:
        """What differs from `other`, a few words each: `torch 2.14 -> 2.15`."""
        names = sorted(self.parts.keys() | other.parts.keys())
        return [
            f"{name} {other.parts.get(name, '(none)')} -> {self.parts.get(name, '(none)')}"
            for name in names
            if self.parts.get(name) != other.parts.get(name)
        ]


def code_of(file: StudyFile) -> Code:
    """The code that would compute the trials of `file` here. Raises ConfigError for a module of the
    user's own that is not there."""
    parts = {"hpo sources": _sources_digest()}
    parts |= {name: ".".join(version(name).split(".")[:2]) for name in LIBRARIES}
    parts |= {f"own {one}": _digest(_file_of(one)) for one in file.own_modules(*DECISIVE)}
    files = {one: _file_of(one) for one in file.own_modules(*DECISIVE, "data.dataset")}
    return Code(parts, {name: text for name, path in files.items() if (text := _text(path))})


@cache
def _sources_digest() -> str:
    """Return the digest of hpo's own modules, by their names and syntax trees."""
    root = Path(hpo.__file__).parent
    found = hashlib.blake2b(digest_size=6)
    for floor in FLOORS:
        for path in sorted((root / floor).rglob("*.py")):
            name = path.relative_to(root).with_suffix("").as_posix()
            if name not in TELLING:
                found.update(f"{name} {syntax_digest(path.read_bytes())} ".encode())
    return found.hexdigest()


def syntax_digest(source: bytes) -> str:
    """Return 12 hex digits of what the Python module `source` computes: its syntax tree without
    comments, docstrings and layout; of its bytes where it does not parse."""
    found = hashlib.blake2b(digest_size=6)
    try:
        found.update(_plain(ast.parse(source)).encode("utf-8", "surrogatepass"))
    except (SyntaxError, ValueError):
        found.update(source)
    return found.hexdigest()


def _plain(node: object) -> str:
    """Spell out a syntax tree, the same under every version of Python: what is empty or None is
    left out, since newer versions know more fields."""
    if isinstance(node, list):
        return f"[{' '.join(_plain(one) for one in node if not _is_text(one))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.JoinedStr):  # Python 3.12.1 ends some with an empty string
        node.values = [one for one in node.values if getattr(one, "value", None) != ""]
    fields = [
        f"{name}={_plain(value)}"
        for name, value in ast.iter_fields(node)
        if value is not None and value != [] and name not in ("kind", "type_comment")
    ]
    return f"{type(node).__name__}({' '.join(fields)})"


def _is_text(node: object) -> bool:
    """Tell whether a statement is a string alone: a docstring, of a field too."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _file_of(module: str) -> Path | None:
    try:
        return modules.module_file(module)
    except Exception as error:  # finding a.b imports a, which may raise anything
        raise ConfigError(
            f"your module {module!r} cannot be found ({error}); it is "
            f"{modules.search_hint()}: put it there, as on the host where the study began"
        ) from error


def _digest(path: Path | None) -> str:
    if path is None:
        return "built in"
    return syntax_digest(path.read_bytes())


def _text(path: Path | None) -> str | None:
    if path is None or path.suffix != ".py" or path.stat().st_size > LONGEST_SOURCE:
        return None
    return path.read_text(encoding="utf-8", errors="replace")
