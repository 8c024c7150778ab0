"""What commands print with --json: one value, with the fields that docs/json.md lists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hpo.cli.main import app
from hpo.search.study import Study
from hpo.storage.database import Database
from tests.harness.fakes import study_file
from tests.harness.filled import MIXED, RICH_SPACE, fill

DOCS = (Path(__file__).parents[2] / "docs/json.md").read_text()


@pytest.fixture
def study(database: Database) -> Study:
    return fill(database, study_file(trials=20, space=RICH_SPACE), MIXED)


def ask(study: Study, *arguments: str) -> Any:
    """The JSON that a command prints on the study's database."""
    storage = ("--storage", study.database.secret_url)
    found = CliRunner().invoke(app, [*arguments, "--json", *storage], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def documented(command: str) -> set[str]:
    """The fields of a command's line in the table, or, of a study, of the section."""
    line = re.search(rf"^\| `{command}` \| (.*) \|$", DOCS, re.M)
    if line is not None:
        return set(re.findall(r"`(\w+)`", line[1]))
    section = DOCS.partition("## A study")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", section, re.M)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_a_study_is_the_same_for_all_commands(study: Study) -> None:
    known = documented("a study")
    now = ask(study, "status", "toy")
    assert set(now) <= known
    assert now.pop("summary")[0]["kind"] == "searched"
    assert [set(one) for one in ask(study, "list")] == [set(now)]
    assert ask(study, "stop", "toy")["state"] == "stopped"
    assert ask(study, "resume", "toy")["state"] == "waiting"
    more = ask(study, "extend", "toy", "--trials", "+5")
    assert more["budget"] == 25
    assert set(more) == set(now) | {"retried", "continued"}


def test_other_commands(study: Study, tmp_path: Path) -> None:
    trial = ask(study, "trial", "toy", "3")
    assert set(trial) == documented("trial")
    file = tmp_path / "best.toml"
    exported = ask(study, "export", "toy", "-o", str(file))
    assert set(exported) == {"study", "exported", "note"} <= documented("export")
    assert exported["exported"][0]["file"] == str(file)
    queued = ask(study, "enqueue", "toy", "optimizer.lr=0.01")
    assert queued == {"study": "toy", "enqueued": {"optimizer.lr": 0.01}}
    page = ask(study, "report", "toy", "-o", str(tmp_path / "report.html"))
    assert set(page) == documented("report")
    assert ask(study, "delete", "toy", "--yes") == {"deleted": "toy", "verification": None}


def test_an_empty_database_has_an_empty_list(database: Database) -> None:
    found = CliRunner().invoke(app, ["list", "--json", "--storage", database.secret_url])
    assert json.loads(found.stdout) == []
