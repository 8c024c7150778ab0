"""Names of every script on standard streams that cannot show them, and names that are not UTF-8."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table

from hpo.cli.console import SafeConsole, Text, as_json
from hpo.cli.main import main
from hpo.paths import Home
from hpo.redaction import keep_secret
from hpo.reports.page import write_report
from hpo.reports.training import training_report
from hpo.trained.run import TrainedRun
from tests.harness.trained import pictures, tiny_config, train_run

DUCK = "日本語 🦆"
CAFE = os.fsdecode(b"caf\xe9")
"""Latin-1 bytes where the file system's names are UTF-8."""
ENCODINGS = ("latin-1", "ascii", "cp1252", "utf-8")

Streams = Callable[..., tuple[int, str, str]]

STUDY = f"""
[study]
name = "s"
trials = 1
[train]
epochs = 1
batch_size = 8
data = {{dataset = "folder", root = "pictures", image_size = 8}}
model.cnn.filters = [4]
[space]
optimizer.lr = [0.01]
# {DUCK}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    place = tmp_path_factory.mktemp("encodings")
    root = pictures(place)
    for part in root.iterdir():
        (part / "class0").rename(part / DUCK)
        (part / "class1").rename(part / CAFE)
    found = train_run(tiny_config(root, {"epochs": 1}), place / "run", Home(place / "home"))
    write_report(found.path / "report.html", training_report(found))
    return found


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch, run: TrainedRun) -> Streams:
    """Calls `hpo` where the run is, with standard streams of an encoding: exit code, output and
    errors, decoded strictly."""
    monkeypatch.setattr(sys, "argv", ["hpo"])
    monkeypatch.chdir(run.path.parent)

    def call(encoding: str, *args: str) -> tuple[int, str, str]:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", out)
            patched.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit) as end:
                main(args)
        said = []
        for stream in (out, err):
            stream.flush()
            said.append(stream.detach().getvalue().decode(encoding))  # type: ignore[attr-defined]
        assert "Traceback" not in said[1]
        return int(end.value.code or 0), said[0], said[1]

    return call


def shown(text: str, encoding: str) -> str:
    escaped = text.replace(CAFE, r"caf\udce9")
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_command_writes_to_any_stream(
    streams: Streams, run: TrainedRun, encoding: str
) -> None:
    Path("s.toml").write_text(STUDY, encoding="utf-8")
    for args in (
        ["--help"],
        ["predict", "--help"],
        ["check", "s.toml"],
        ["list"],
        ["schema"],
        ["evaluate", "run"],
        ["predict", "run", f"pictures/test/{DUCK}"],
        ["predict", "run", f"pictures/test/{DUCK}", "--csv", "-"],
        ["compare", "run"],
    ):
        code, out, err = streams(encoding, *args)
        assert code == 0, (args, err)
        assert out
    lists = ["predict", "run", "pictures/test", "--csv", "-"]  # a table folds what is too wide
    for args in (["check", "s.toml"], ["evaluate", "run"], lists):
        _, out, _ = streams(encoding, *args)
        for name in (DUCK, CAFE):
            assert shown(name, encoding) in out, args
    code, out, err = streams(encoding, "evaluate", "run", "--data", DUCK)
    assert (code, out) == (2, "")
    assert shown(DUCK, encoding) in err


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_and_csv_are_read_back(streams: Streams, run: TrainedRun, encoding: str) -> None:
    _, out, _ = streams(encoding, "evaluate", "run", "--json")
    assert set(json.loads(out)["seeds"]["0"]["per_class"]) == {DUCK, CAFE, "class2"}
    _, out, _ = streams(encoding, "predict", "run", f"pictures/test/{DUCK}", "--json")
    rows = json.loads(out)
    assert {row["image"].split("/")[2] for row in rows} == {DUCK}
    assert {name for name, _ in rows[0]["top"]} == {DUCK, CAFE, "class2"}
    _, out, _ = streams(encoding, "predict", "run", "pictures/test", "--csv", "-", "--top", "1")
    found = {row["class"] for row in csv.DictReader(io.StringIO(out))}
    assert found <= {shown(name, encoding) for name in (DUCK, CAFE, "class2")}


def test_ascii_is_not_passed_by(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """click writes UTF-8 to the bytes below an ASCII stream, past what hides secrets."""
    monkeypatch.setattr("hpo.redaction._secrets", set())
    keep_secret("hunter2")
    _, _, err = streams("ascii", "predict", "run", "hunter2", "--json")
    assert "hunter2" not in err
    assert "***" in err


def test_names_that_are_not_utf8_are_whole_in_files(run: TrainedRun) -> None:
    with np.load(run.seeds[0].files.test_logits) as answers:
        names = answers["names"].tolist()
    assert {name.split("/")[1] for name in names} == {DUCK, CAFE, "class2"}
    root = Path(run.config.data.folder)
    assert all((root / name).is_file() for name in names)
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert r"caf\udce9" in page
    assert "caf?" not in page


def test_a_column_is_as_wide_as_its_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(box=None)
    table.add_column("a")
    table.add_row(Text("x\x1b[31m"))
    table.add_row(Text.assemble("y", ("\udcff", "bold")))
    table.add_row(Text("z").append("\u202e"))
    SafeConsole(highlight=False, width=60).print(table)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [r" x\x1b[31m", r" y\udcff", r" z\u202e"]


@pytest.mark.parametrize("text", ["\x7f", "\x85", "\u202e", "\udce9", "\x1b[2J", "a\nb\tc", "ä🦆"])
def test_json_stays_json_where_a_terminal_would_obey(text: str) -> None:
    written = as_json({text: [text]})
    assert json.loads(written) == {text: [text]}
    assert not set(written) & set("\x7f\x85\u202e\udce9\x1b")
