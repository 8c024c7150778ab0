"""Tables for terminals: what `hpo trials` shows first, and what does not fit."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.table import Table

from hpo.cli.console import SafeConsole, broken
from hpo.cli.options import working
from hpo.cli.tables import plain_table
from hpo.cli.trial_list import explained, trials_table
from hpo.control import enter_phase
from hpo.formatting import short_names
from hpo.search import study as studies
from hpo.search.status import StudyStatus, read_status
from hpo.storage.database import Database
from hpo.storage.records import Trial
from tests.harness.fakes import study_file

SPACE = """
optimizer.name = ["sgd", "adamw"]
optimizer.lr = {low = 1e-4, high = 1e-1, log = true}
optimizer.weight_decay = {low = 1e-6, high = 1e-2, log = true}
model.dropout = {low = 0.0, high = 0.5}
schedule.name = ["cosine", "step"]
batch_size = [16, 32]
augment.crop_padding = [0, 1]
"""


def drawn(table: Table, width: int) -> list[str]:
    out = io.StringIO()
    SafeConsole(file=out, width=width).print(table)
    return out.getvalue().splitlines()


def made(number: int, state: str, value: float | None) -> Trial:
    lr = 0.01 * (number + 1)
    params = {
        "optimizer.name": ("sgd", "adamw")[number % 2],
        "optimizer.lr": lr,
        "optimizer.weight_decay": 1e-5,
        "model.dropout": 0.1 * (number % 5),
        "schedule.name": "step",
        "batch_size": 16,
        "augment.crop_padding": number % 2,
    }
    return Trial(number=number, params=params, state=state, attempts=(), epochs=(),
                 value=value, best_epoch=None, reason=None)  # fmt: skip


@pytest.fixture
def status(database: Database) -> StudyStatus:
    study = studies.create(database, study_file(trials=30, space=SPACE))[0]
    trials = [made(n, "pruned" if n % 3 else "complete", 0.5 + 0.01 * n) for n in range(29)]
    now = read_status(database, study.row.name)
    return replace(now, trials=(*trials, made(29, "failed", None)))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_table_of_trials_fits(status: StudyStatus, width: int) -> None:
    table, more = trials_table(status, width)
    lines = drawn(table, width)
    words = {word for line in lines for word in line.split()}
    assert max(map(len, lines)) <= width
    assert {"complete", "pruned", "failed", "val_top1", "lr"} <= words
    assert "decay" not in words, "the same in all trials"
    numbers = [int(line.split()[0]) for line in lines if line.split()[0].isdigit()]
    complete = [n for n in range(27, -1, -1) if n % 3 == 0]
    assert numbers == [*complete, *(n for n in range(28, -1, -1) if n % 3), 29]
    assert more.endswith("more columns")


def test_wide_shows_all_and_most_the_best(status: StudyStatus) -> None:
    table, more = trials_table(status, 80, wide=True)
    heads = set(drawn(table, 500)[0].split())
    assert {"optimizer.name", "schedule.name", "weight_decay", "origin"} <= heads
    assert more == ""
    table, more = trials_table(status, 80, most=3)
    assert more.endswith("more columns and 27 more trials")
    assert [line.split()[0] for line in drawn(table, 80)[-3:]] == ["27", "24", "21"]


def test_short_names() -> None:
    names = ["optimizer.name", "schedule.name", "optimizer.lr", "epochs", "a.epochs"]
    assert list(short_names(names).values()) == [
        "optimizer.name", "schedule.name", "lr", "epochs", "a.epochs",
    ]  # fmt: skip


def test_what_a_parameter_explains() -> None:
    values = [0.1, 0.12, 0.5, 0.52, 0.9, 0.91]
    assert explained(["a", "a", "b", "b", "c", "c"], values) > 0.99
    assert explained(["a", "b", "c", "a", "b", "c"], values) < 0
    assert explained([0.1 * one for one in range(6)], values) > 0.7
    assert explained([], []) == -1
    assert explained([1, 2], [0.5, float("inf")]) == -1


def test_a_table_that_is_too_wide_goes_on_below() -> None:
    heads = [f"a_metric_{one}" for one in range(12)]
    table = plain_table("name", *heads, "empty", "note", right=heads)
    note = "a note of several words that is longer than the terminal is wide, and wrapped"
    table.add_row("first", *["0.9812 ± 0.0021"] * 12, "-", note)
    lines = drawn(table, 60)
    assert max(map(len, lines)) <= 60
    assert sum(line.startswith("first") for line in lines) > 3
    assert " ".join(lines).count("0.9812 ± 0.0021") == 12
    assert "empty" not in " ".join(lines)
    words = " ".join(" ".join(lines).split())
    assert all(word in words.split() for word in note.split())


def test_a_long_path_leaves_room_for_the_rest() -> None:
    table = plain_table("image", "class", "probability", right=("probability",))
    table.add_row(str(Path("/a" * 60)), "bees", "0.9999")
    lines = drawn(table, 60)
    assert lines[1].split()[1:] == ["bees", "0.9999"]
    assert max(map(len, lines)) <= 60


def test_headers_are_broken_between_words() -> None:
    assert broken("best val_balanced_accuracy", 14) == "best val_\nbalanced_\naccuracy"
    assert broken("optimizer.lr", 10) == "optimizer\n.lr"
    assert broken("architecture", 4) == "architecture"


@pytest.mark.parametrize("shown", [True, False])
def test_a_terminal_sees_what_takes_long(monkeypatch: pytest.MonkeyPatch, *, shown: bool) -> None:
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    with working("in a pipe"):
        enter_phase("decoding 1/2")
    assert err.getvalue() == ""
    monkeypatch.setattr(err, "isatty", lambda: True)
    with working("loading torch", shown=shown):
        enter_phase("decoding 1/2")
    assert ("decoding 1/2" in err.getvalue()) is shown
