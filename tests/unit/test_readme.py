"""What the README and the pages of docs/ show exists and works as written."""

from __future__ import annotations

import ast
import inspect
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest

import hpo
from hpo.cli.main import COMMANDS
from hpo.config.study import StudyFile, parse_study
from tests.harness.deployment import FENCED, commands, parse, shown_commands

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")
name_of = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_readme_is_read_in_minutes() -> None:
    assert len(README.splitlines()) <= 150


def test_every_command_is_in_the_table_and_exists() -> None:
    table = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`hpo ([a-z]+)", table))
    assert named == {name for commands in COMMANDS.values() for name in commands}


@name_of
def test_every_command_shown_parses(page: Path) -> None:
    for command in shown_commands(page.read_text(encoding="utf-8")):
        if command != ["--install-completion"]:
            assert " ".join(command).startswith(parse(command))


@name_of
def test_every_option_named_in_the_text_exists(page: Path) -> None:
    """In `hpo COMMAND ... --option`, also where it is no whole command."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for command in re.findall(r"`hpo ([a-z][^`]*)`", text.replace("\n", " ")):
        words = command.split()
        found = _options(words)
        for option in re.findall(r"(?<![\w-])(--[a-z][a-z-]*)", command):
            assert option in found, f"{page.name}: hpo {command} has no {option}"


def _options(words: list[str]) -> set[str]:
    """All options of the command that `words` begin with."""
    command = commands()
    for word in words:
        command = getattr(command, "commands", {}).get(word, command)
    return {option for parameter in command.params for option in parameter.opts}


@name_of
def test_the_study_files_shown_are_valid(page: Path) -> None:
    """A part of one is completed by a space."""
    for text in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        space = "" if "[space]" in text else "\n[space]\noptimizer.lr = [0.1, 0.2]\n"
        parse_study(text + space, page.name, defaults={"name": "shown"})


def test_the_python_shown_calls_what_is_there() -> None:
    """docs/python.md is run by another test."""
    (text,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shown = (hpo, hpo.Study, hpo.TrainedModel)
    known = {"params", *(name for one in shown for name, _ in inspect.getmembers(one))}
    named = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
    assert named
    assert named <= known, named - known


def test_the_first_line_runs_a_study_that_is_there() -> None:
    (path,) = re.findall(r"hpo run (studies/\S+) --workers 2$", README, re.MULTILINE)
    assert StudyFile.load(ROOT / path).name == "digits"


def test_ci_runs_the_test_line_of_the_readme() -> None:
    lines = re.findall(r"^ *(python3 -m venv .*pytest) *$", README, re.MULTILINE)
    assert lines == [
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest"
    ]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_somewhere(page: Path) -> None:
    """Files and their headings; what is on other hosts is not asked."""
    for target in (one or other for one, other in LINK.findall(page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = unquote(target).partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_every_page_is_reached() -> None:
    """From the README, from the index and from the site's navigation."""
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in DOCS:
        assert f" {page.name}\n" in site, f"mkdocs.yml: {page.name}"
        if page.name != "index.md":
            assert f"({page.name})" in index, f"docs/index.md: {page.name}"
            assert f"(docs/{page.name})" in README, f"README.md: {page.name}"


def test_the_reference_is_that_of_the_models() -> None:
    """Otherwise: python docs/tools/reference.py."""
    made = runpy.run_path(str(ROOT / "docs" / "tools" / "reference.py"))["page"]()
    assert (ROOT / "docs" / "reference.md").read_text(encoding="utf-8") == made


def test_messages_of_the_troubleshooting_are_those_of_hpo() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "hpo").rglob("*.py"))
    assert len(messages) > 15
    for message in messages:
        for part in filter(None, message.split("…")):
            assert part.strip(" ") in code, message


def test_every_extra_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    for name in set(project["optional-dependencies"]) - {"all", "docs", "test"}:
        assert re.search(rf"^\| [^|]*`{name}`", page, re.MULTILINE), name


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs mkdocs (the extra docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(DOCS)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|img|link)\b[^>]*(?:src|href)=.(?:https?:)?//", text) == []
