"""What the README shows exists and works as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpo.cli.main import COMMANDS, GROUPS, app
from hpo.config.study import StudyFile, parse_study

ROOT = Path(__file__).parents[2]
GROUP_NAMES = {command.__name__ for command in GROUPS}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_is_in_the_table_and_exists() -> None:
    named = set(re.findall(r"`hpo ([a-z]+)", README))
    assert named == {name for commands in COMMANDS.values() for name in commands}


@pytest.mark.parametrize(
    "page", ["README.md", "docs/honest-results.md", "docs/ray.md", "docs/slurm.md"]
)
def test_every_option_shown_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for line in re.findall(r"^ +(?:\.venv/bin/)?hpo (.+?)(?: +#.*)?$", text, re.MULTILINE):
        words, options = line.split(), re.findall(r"(?<!\S)(--?[a-z][a-z-]*)", line)
        command = words[:2] if words[0] in GROUP_NAMES else words[:1]
        shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"}).output
        for option in options:
            assert option in shown, f"hpo {command} has no {option}"


def test_the_study_files_shown_are_valid() -> None:
    first, *others = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    for text in others:
        parse_study(text, "README.md", defaults={"name": "shown"})
    file = parse_study(first, "README.md")
    assert (file.name, file.study.trials, len(file.baselines)) == ("photos", 40, 1)


def test_the_first_line_runs_a_study_that_is_there() -> None:
    (path,) = re.findall(r"hpo run (studies/\S+) --workers 2$", README, re.MULTILINE)
    assert StudyFile.load(ROOT / path).name == "digits"


def test_ci_runs_the_test_line_of_the_readme() -> None:
    lines = re.findall(r"^ *(python3 -m venv .*pytest) *$", README, re.MULTILINE)
    assert lines == [
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest"
    ]
