"""Tables of a grid, and the Pareto front in pages and exports."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path

import pytest

from hpo.cli.tables import groups_csv, trials_csv
from hpo.config.study import load_config
from hpo.errors import InputError, NotFound
from hpo.reports.groups import front_figure, front_table, group_by, group_data, group_table
from hpo.reports.importance import importances
from hpo.reports.study import study_report
from hpo.search.status import StudyStatus, read_status
from hpo.storage.database import Database
from hpo.trained.export import export_front, write_top
from tests.harness.fakes import study_file
from tests.harness.filled import Trial, fill
from tests.unit.test_report import drawn, text_of

BY_ARCHITECTURE = """model.architecture = ["resnet18", "small_cnn"]
model.stem = {choices = ["small", "default"], when = {"model.architecture" = "resnet18"}}
model.cnn.filters = {choices = [[4], [8]], when = {"model.architecture" = "small_cnn"}}
"""
TRAIN = "epochs = 3\n[train.data]\nimage_size = 32"
COSTS = 'metrics = ["val_top1", "latency_ms", "parameters"]'


def test_trials_are_grouped_by_architecture(database: Database) -> None:
    fill(database, study_file(trials=12, space=BY_ARCHITECTURE, train=TRAIN),
         [*(Trial("complete", (0.3, 0.5 + i / 100, 0.2)) for i in range(10)),
          Trial("pruned", (0.1,)), Trial("failed")])  # fmt: skip
    status = read_status(database, "toy")
    groups = group_by(status, "model.architecture")
    assert [group.label for group in groups] == ["resnet18", "small_cnn"]
    assert sum(group.pruned for group in groups) == 1
    for group in groups:
        wanted = [t for t in status.trials if t.state == "complete"
                  and t.params["model.architecture"] == group.label]  # fmt: skip
        assert list(group.complete) == wanted
        assert group.values("val_top1") == [t.value for t in wanted]
        # The losses are those of the best epoch, the second, not of the last one.
        assert group.values("val_loss") == pytest.approx([1.2 - (t.value or 0) for t in wanted])


def test_a_conditional_parameter_counts_where_it_was_used(database: Database) -> None:
    fill(database, study_file(trials=12, space=BY_ARCHITECTURE, train=TRAIN),
         [Trial("complete", (0.5,)) for _ in range(12)])  # fmt: skip
    status = read_status(database, "toy")
    used = {name: sum(len(g.complete) for g in group_by(status, name))
            for name in status.file.space}  # fmt: skip
    assert used["model.architecture"] == 12
    assert used["model.stem"] + used["model.cnn.filters"] == 12
    assert 0 < used["model.stem"] < 12


def test_a_row_has_mean_spread_and_best(database: Database) -> None:
    trials = [Trial("complete", (0.5 + i / 10,)) for i in range(4)]
    fill(database, study_file(trials=4, space="batch_size = [32, 64]"), trials)
    status = read_status(database, "toy")
    found = group_data(status, "batch_size")
    for row in found:
        values = [status.trials[n].value or 0.0 for n in row["complete"]]
        assert row["val_top1"]["mean"] == pytest.approx(statistics.fmean(values))
        assert row["val_top1"]["best"] == max(values)
        assert row["val_loss"]["best"] == pytest.approx(1.2 - max(values))
        if len(values) > 1:
            assert row["val_top1"]["std"] == pytest.approx(statistics.stdev(values))
        else:
            assert row["val_top1"]["std"] is None
    rows = list(csv.DictReader(io.StringIO(groups_csv(found))))
    assert [float(r["val_top1_mean"]) for r in rows] == [r["val_top1"]["mean"] for r in found]
    table = group_table(status, "batch_size")
    assert table.headers == ("batch_size", "complete", "pruned", "val_top1", "best val_top1")


def test_a_continuous_range_is_cut_into_four_parts(database: Database) -> None:
    fill(database, study_file(trials=30), [Trial("complete", (0.5,)) for _ in range(30)])
    groups = group_by(read_status(database, "toy"), "optimizer.lr")
    assert groups[0].label == "0.0001 to 0.0005623"
    assert len(groups) == 4
    assert sum(len(group.complete) for group in groups) == 30
    for group in groups:
        low, high = (float(end) for end in group.label.split(" to "))
        lrs = [trial.params["optimizer.lr"] for trial in group.complete]
        assert low * 0.999 <= min(lrs) <= max(lrs) <= high * 1.001


def test_a_parameter_that_is_not_searched_is_refused(database: Database) -> None:
    fill(database, study_file(), [])
    with pytest.raises(NotFound, match=r"did you mean 'optimizer\.lr'"):
        group_by(read_status(database, "toy"), "optimiser.lr")


def with_costs(database: Database) -> StudyStatus:
    curves = [
        ((0.9,), (9.0, 1e6)),
        ((0.8,), (5.0, 2e6)),
        ((0.7,), (6.0, 3e6)),
        ((0.6,), (7.0, 10.0)),
    ]
    trials = [*(Trial("complete", curve, costs=costs) for curve, costs in curves),
              Trial("pruned", (0.1,), costs=(1.0, 1.0)), Trial("failed", costs=(1.0, 1.0)),
              Trial("diverged", (0.1,), costs=(1.0, 1.0))]  # fmt: skip
    fill(database, study_file(trials=9, study=COSTS), trials)
    return read_status(database, "toy")


def test_the_front_in_the_report(database: Database) -> None:
    status = with_costs(database)
    assert [trial.number for trial in status.front()] == [0, 1, 3]
    page = study_report(database, "toy")
    figures = drawn(page)
    assert {"front-latency_ms", "front-parameters"} <= set(figures)
    done, front = figures["front-latency_ms"]["data"]
    assert (done["x"], done["y"]) == ([6.0], [0.7])
    assert (front["x"], front["y"]) == ([5.0, 7.0, 9.0], [0.8, 0.6, 0.9])
    assert figures["front-parameters"]["layout"]["xaxis"]["type"] == "log"
    text = text_of(page)
    assert "3 trials that no other beats in all of val_top1, latency_ms, parameters" in text
    assert "1,000,000" in text
    assert "hpo export toy --pareto" in text
    assert front_table(status).headers[:4] == ("trial", "val_top1", "latency_ms", "parameters")


def test_a_study_without_a_complete_trial_has_no_front(database: Database) -> None:
    fill(database, study_file(study=COSTS), [])
    status = read_status(database, "toy")
    assert status.front() == []
    assert front_figure(status, "latency_ms") is None
    assert "The Pareto front" in text_of(study_report(database, "toy"))


def test_importances_of_several_objectives_are_of_the_first(database: Database) -> None:
    trials = [Trial("complete", (0.3 + i / 50,), costs=(1.0, float(i))) for i in range(16)]
    space = "optimizer.lr = {low = 1e-4, high = 1e-1, log = true}\nbatch_size = [32, 64]"
    fill(database, study_file(trials=16, study=COSTS, space=space), trials)
    fill(database, study_file(trials=16, space=space, name="one"),
         [Trial("complete", one.curve) for one in trials])  # fmt: skip
    assert importances(database, "toy") == importances(database, "one")
    assert importances(database, "one").shares


def test_the_front_is_exported_a_file_each(database: Database, tmp_path: Path) -> None:
    with_costs(database)
    exports = export_front(database, "toy")
    paths = write_top(tmp_path / "front", exports)
    assert [path.name for path in paths] == ["1-trial-0.toml", "2-trial-1.toml", "3-trial-3.toml"]
    _, provenance = load_config(paths[1])
    assert provenance["values"] == {"val_top1": 0.8, "latency_ms": 5.0, "parameters": 2e6}


def test_a_single_metric_has_no_front_to_export(database: Database) -> None:
    fill(database, study_file(), [Trial("complete", (0.5,))])
    with pytest.raises(InputError, match="has one metric, val_top1"):
        export_front(database, "toy")


def test_all_values_stand_in_the_csv_of_trials(database: Database) -> None:
    rows = list(csv.DictReader(io.StringIO(trials_csv(with_costs(database)))))
    assert [row["latency_ms"] for row in rows[:5]] == ["9.0", "5.0", "6.0", "7.0", ""]
    assert json.loads(rows[3]["parameters"]) == 10.0
