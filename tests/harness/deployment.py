"""What the files for many machines say, read as Docker, Slurm, Ray and Kubernetes would."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from typer.main import get_command

from hpo.cli.main import app

ROOT = Path(__file__).parents[2]
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}")
START = re.compile(r"(?:\w+=\S+ +)*(?:docker compose run (?:-\S+ +)*)?(?:\S*/)?hpo (?P<rest>.*)")
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def compose(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """docker-compose.yml with its variables put in, defaults for those that are not given."""
    given = variables or {}

    def value(found: re.Match[str]) -> str:
        return given.get(found["name"]) or found["default"] or ""

    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    read: dict[str, Any] = yaml.safe_load(VARIABLE.sub(value, "\n".join(lines)))
    return read


def in_order(services: Mapping[str, Any]) -> list[str]:
    """Names of services, each after those that it depends on."""
    done: list[str] = []

    def visit(name: str) -> None:
        for other in services[name].get("depends_on", {}):
            visit(other)
        if name not in done:
            done.append(name)

    for name in services:
        visit(name)
    return done


@cache
def commands() -> Any:
    """The tree of commands."""
    return get_command(app)


def parse(arguments: list[str]) -> str:
    """The name of the command that `hpo ARGUMENTS` would run; a click error where it would not."""
    command = commands()
    words, names = list(arguments), []
    while hasattr(command, "commands"):
        names.append(words.pop(0))
        assert names[-1] in command.commands, f"no command hpo {' '.join(names)}"
        command = command.commands[names[-1]]
    command.make_context(names[-1], words)
    return " ".join(names)


def shown_commands(page: str) -> Iterator[list[str]]:
    """Arguments of each `hpo ...` in the code blocks of a Markdown page."""
    fenced = [line for block in FENCED.findall(page) for line in block.splitlines()]
    indented = [line for line in FENCED.sub("", page).splitlines() if line.startswith("    ")]
    text = "\n".join(line.strip() for line in (*fenced, *indented)).replace("\\\n", " ")
    for line in text.splitlines():
        found = START.fullmatch(line)
        if found is not None:
            words = shlex.split(found["rest"], comments=True)
            ends = [i for i, word in enumerate(words) if word in ("|", ">", "&&", "&", ";")]
            yield words[: ends[0]] if ends else words
