"""Studies, architectures and trained runs beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpo.cli.main import app
from hpo.errors import InputError, NotFound
from hpo.paths import Home
from hpo.reports.compare import compare
from hpo.reports.compare_page import comparison_report, figures_of
from hpo.search.status import read_status
from hpo.storage.database import Database
from hpo.trained.run import TrainedRun, load_run
from hpo.training.models import build
from tests.harness.fakes import study_file
from tests.harness.filled import Trial, fill
from tests.harness.trained import pictures, tiny_config, train_run
from tests.unit.test_imports import CALL, loaded_by
from tests.unit.test_report import drawn, text_of

SPACE = """model.architecture = ["resnet18", "small_cnn"]
model.cnn.filters = {choices = [[4], [8]], when = {"model.architecture" = "small_cnn"}}
"""
TRAIN = "epochs = 3\n[train.data]\nimage_size = 32"
TRIALS = [
    *(Trial("complete", (0.3, 0.4 + i / 100)) for i in range(10)),
    Trial("pruned", (0.1,)),
    Trial("failed", (), "out of memory"),
    Trial("diverged", (0.2, float("nan")), "loss not finite in epoch 2"),
]


@pytest.fixture
def studies(database: Database) -> Database:
    fill(database, study_file(trials=13, space=SPACE, train=TRAIN, name="wide"), TRIALS)
    fill(database, study_file(trials=13, name="narrow"), TRIALS[5:])
    return database


def test_each_architecture_of_each_study_is_an_entry(studies: Database) -> None:
    found = compare(studies, ["wide", "narrow"], top=3)
    names = {one.name for one in found.entries}
    assert names == {"wide: resnet18", "wide: small_cnn", "narrow: small_cnn"}
    assert sum(one.trials for one in found.entries if one.study == "wide") == 13
    status = read_status(studies, "wide")
    for one in [one for one in found.entries if one.study == "wide"]:
        own = [t for t in status.trials if t.params["model.architecture"] == one.architecture]
        values = sorted((t.value or 0 for t in own if t.state == "complete"), reverse=True)
        assert one.best == values[0]
        assert one.mean_top == pytest.approx(sum(values[:3]) / len(values[:3]))
        assert one.epochs == sum(len(t.epochs) for t in own)
        assert one.seconds == one.epochs * 2.0
        best = status.trials[one.best_trial or 0]
        config = status.file.config(best.params)
        model = build(config.model, classes=10, image_size=config.data.image_size)
        assert one.parameters == sum(part.numel() for part in model.parameters())
        assert [row["val_top1"] for row in one.curve] == [0.3, one.best]
        assert one.latency_ms is None


def test_costs_that_are_known_need_no_torch(
    studies: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "runs"))
    (found,) = compare(studies, ["narrow"]).entries
    (counted,) = (tmp_path / "runs" / "cache" / "costs").iterdir()
    assert json.loads(counted.read_text()) == {"parameters": found.parameters, "flops": found.flops}
    call = ["compare", "narrow", "--json", "--storage", studies.secret_url]
    assert "torch" not in loaded_by(CALL.format(args=call, codes=(0,)), tmp_path)
    counted.write_text("{")
    assert compare(studies, ["narrow"]).entries == (found,)


def test_costs_that_are_equal_are_not_drawn(studies: Database) -> None:
    fill(studies, study_file(trials=13, name="again"), TRIALS[3:7])
    found = compare(studies, ["narrow", "again"])
    figures = figures_of(found)
    assert figures["cost-parameters"] is None
    assert figures["best"] is not None
    page = comparison_report(found, "both")
    assert "All have the same parameters of the best network, multiply-adds" in text_of(page)
    assert {"best", "cost-seconds"} <= set(drawn(page))
    assert {"cost-parameters", "cost-flops"}.isdisjoint(drawn(page))


def test_a_latency_of_the_study_is_kept_and_others_are_timed(database: Database) -> None:
    trial = Trial("complete", (0.5,), costs=(123.0,))
    fill(database, study_file(name="own", study='metrics = ["val_top1", "latency_ms"]'), [trial])
    fill(database, study_file(name="none"), [Trial("complete", (0.5,))])
    own, other = compare(database, ["own", "none"], latency=True).entries
    assert own.latency_ms == 123.0
    assert other.latency_ms is not None
    assert 0 < other.latency_ms != 123.0


def test_images_that_are_not_here_leave_the_costs_blank(database: Database, tmp_path: Path) -> None:
    train = f'epochs = 1\ndata = {{dataset = "folder", root = "{tmp_path / "gone"}"}}'
    fill(database, study_file(train=train), [Trial("complete", (0.5,))])
    found = compare(database, ["toy"])
    assert found.entries[0].best == 0.5
    assert found.entries[0].parameters is None
    assert len(found.notes) == 1
    assert "gone" in found.notes[0]


def test_a_study_without_trials_is_no_entry(database: Database) -> None:
    fill(database, study_file(), [])
    found = compare(database, ["toy"])
    assert found.entries == ()
    assert "Nothing has finished an epoch yet" in text_of(comparison_report(found, "toy"))


def test_what_is_neither_study_nor_run_is_refused(studies: Database) -> None:
    with pytest.raises(NotFound, match="did you mean 'wide'"):
        compare(studies, ["wdie"])
    with pytest.raises(InputError, match="named twice"):
        compare(studies, ["wide", "wide"])


def test_different_metrics_share_no_axis(studies: Database) -> None:
    file = study_file(name="loss", study='metric = "val_loss"')
    fill(studies, file, [Trial("complete", (0.5,))])
    figures = figures_of(compare(studies, ["narrow", "loss"]))
    assert figures["cost-parameters"] is None
    assert figures["curves-loss"] is not None


def test_runs_before_and_after_tuning(database: Database, home: Home, tmp_path: Path) -> None:
    root = pictures(tmp_path)
    config = tiny_config(root)
    tuned = config.model_copy(update={"epochs": 1})
    runs = [
        train_run(config, tmp_path / "before", home, seeds=2, keep_validation=True),
        train_run(tuned, tmp_path / "after", home, seeds=1),
    ]
    found = compare(database, [str(run.path) for run in runs])
    before, after = found.runs
    assert (before.seeds, after.seeds) == (2, 1)
    assert (before.part, after.part) == ("test", "test")
    for entry, run in zip(found.runs, runs, strict=True):
        for score, value in entry.scores.items():
            assert value == run.summary["test"][score]["mean"]
        f1 = [seed.metrics["test"]["per_class"] for seed in run.seeds]
        for name, value in entry.f1_by_class.items():
            assert value == pytest.approx(sum(rows[name]["f1"] for rows in f1) / len(f1))
    assert after.std["top1"] is None
    figures = drawn(comparison_report(found, "tuning"))
    ends = [trace["name"].rpartition("/")[2] for trace in figures["scores"]["data"]]
    assert ends == ["before", "after"]
    assert len(figures["classes"]["data"][0]["y"]) == 3
    dots = figures["scores"]["data"][0]
    assert dots["x"] == pytest.approx(list(before.scores.values()), abs=1e-5)
    ends = zip(dots["error_x"]["arrayminus"], dots["error_x"]["array"], strict=True)
    for value, (below, above), score in zip(dots["x"], ends, before.scores, strict=True):
        interval = before.intervals[score]
        assert value - below == pytest.approx(interval.low, abs=1e-5)
        assert value + above == pytest.approx(interval.high, abs=1e-5)
    assert set(after.intervals) == {"top1", "top5"} & set(after.scores)
    # One trained on its validation images too: its dashed line stands for it in the legend.
    legend = [t["name"].rpartition("/")[2] for t in figures["curves-loss"]["data"]
              if t["showlegend"]]  # fmt: skip
    assert legend == ["before", "after"]


def test_only_the_most_frequent_classes_are_compared(run_copy: TrainedRun) -> None:
    from hpo.reports import compare as comparing

    path = run_copy.seeds[0].files.metrics
    metrics = json.loads(path.read_text())
    metrics["test"]["per_class"] = {
        f"c{i}": {"precision": 1.0, "recall": 1.0, "f1": i / 30, "support": i} for i in range(30)
    }
    path.write_text(json.dumps(metrics))
    found = comparing._f1_by_class(load_run(path.parent), "test")
    assert list(found) == [f"c{i}" for i in range(29, 9, -1)]


def test_the_command_prints_a_table_and_writes_a_page(studies: Database, tmp_path: Path) -> None:
    page, storage = tmp_path / "compare.html", ["--storage", studies.secret_url]
    done = CliRunner().invoke(app, ["compare", "wide", "narrow", "-o", str(page), *storage],
                              env={"COLUMNS": "200"})  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "mean of top 5" in done.output
    figures = drawn(page.read_text())
    assert {"cost-parameters", "cost-flops", "cost-seconds", "curves-top1"} <= set(figures)
    assert "wide · narrow" in text_of(page.read_text())
    done = CliRunner().invoke(app, ["compare", "wide", "--json", *storage])
    assert {one["study"] for one in json.loads(done.output)["studies"]} == {"wide"}
