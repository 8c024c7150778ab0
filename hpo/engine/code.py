"""Which code computes the trials of a study: what its workers must have in common.

The fingerprint is of what decides a result where the configuration and the images are the same:
the sources of hpo's `engine` and `definition`, the versions of torch and torchvision (major.minor:
patch releases are not to change results), and the files of the user's own modules that the study
names as its loss, architecture or metric; not what those import. An own data set counts by its
images, which have a fingerprint of their own. Devices do not count: a study may run on GPUs of many
kinds.

Imports no torch.
"""

from __future__ import annotations

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
    """Of hpo's own files, by their names and texts."""
    root = Path(hpo.__file__).parent
    found = hashlib.blake2b(digest_size=6)
    for floor in FLOORS:
        for path in sorted((root / floor).rglob("*.py")):
            found.update(path.relative_to(root).as_posix().encode() + b"\0")
            found.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return found.hexdigest()


def _file_of(module: str) -> Path | None:
    try:
        return modules.file_of(module)
    except Exception as error:  # finding a.b imports a, which may raise anything
        raise ConfigError(
            f"your module {module!r} cannot be found ({error}); it is {modules.where()}: put it "
            "there, as on the host where the study began"
        ) from error


def _digest(path: Path | None) -> str:
    if path is None:
        return "built in"
    return hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()


def _text(path: Path | None) -> str | None:
    if path is None or path.suffix != ".py" or path.stat().st_size > LONGEST_SOURCE:
        return None
    return path.read_text(encoding="utf-8", errors="replace")
