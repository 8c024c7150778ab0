"""Experiment trackers: real event files, and MLflow and W&B by small stand-ins for them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from hpo.config.study import StudyFile
from hpo.errors import ConfigError, InputError, Interrupted
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search import trackers
from hpo.search.status import read_status
from hpo.search.study import Study
from hpo.search.trackers import MLflow, Run, TensorBoard, Trackers, WandB
from hpo.search.trial import TrialRunner
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage
from hpo.workers.worker import Worker
from tests.harness.fakes import study_file
from tests.harness.searches import TINY
from tests.harness.trained import pictures, tiny_config, train_run

RUN = Run("digits", "trial-7", "abc-7", {"optimizer.lr": 0.1, "optimizer.name": "sgd"})


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(one.step, round(one.value, 4)) for one in read(folder).Scalars(name)]


def work(study: Study, home: Home) -> None:
    storage = FencedStorage(study.database)
    view = study.optuna_study(storage)
    runner = TrialRunner(study, storage, view, home, torch.device("cpu"), threads=1)
    worker = Worker(study, storage, runner, home=home)
    worker.run(threading.Event())
    worker.close()


class Memory:
    """A tracker that remembers what it was told; `fail` may raise."""

    def __init__(self, fail: Callable[[], None] = lambda: None) -> None:
        self.told: list[Any] = []
        self.fail = fail

    def open(self, run: Run) -> None:
        self.told.append(("open", run.name, len(run.epochs)))

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.fail()
        self.told.append(epoch)

    def close(self, outcome: str | None, results: Mapping[str, float]) -> None:
        self.told.append((outcome, dict(results)))


class TestTensorBoard:
    def test_a_run_that_goes_on_has_each_step_once(self, tmp_path: Path) -> None:
        first = TensorBoard(tmp_path)
        first.open(RUN)
        for epoch in (1, 2, 3):  # the third was not recorded before the worker died
            first.log(epoch, {"val_top1": epoch / 10})
        second = TensorBoard(tmp_path)
        second.open(replace(RUN, epochs=[{"val_top1": 0.1}, {"val_top1": 0.2}]))
        second.log(3, {"val_top1": 0.35})
        second.close("complete", {"best_val_top1": 0.35})
        folder = tmp_path / "trial-7"
        assert len(list(folder.iterdir())) == 2
        assert curve(folder, "val_top1") == [(1, 0.1), (2, 0.2), (3, 0.35)]
        assert curve(folder, "best_val_top1") == [(3, 0.35)]

    def test_parameters_are_those_of_the_hparams_tab(self, tmp_path: Path) -> None:
        board = TensorBoard(tmp_path)
        board.open(RUN)
        board.log(1, {"val_top1": 0.5})
        board.close("pruned", {"best_val_top1": 0.5})
        stored = read(tmp_path / "trial-7").SummaryMetadata("_hparams_/session_start_info")
        data = plugin_data_pb2.HParamsPluginData.FromString(stored.plugin_data.content)
        shown = data.session_start_info.hparams
        assert shown["optimizer.lr"].number_value == 0.1
        assert shown["optimizer.name"].string_value == "sgd"


def test_a_search_logs_every_epoch(database: Database, home: Home) -> None:
    file = study_file(trials=2, train=TINY, study='log = ["tensorboard"]')
    study, _ = studies.create(database, file)
    work(study, home)
    folder = study.directory(home).tensorboard
    for trial in read_status(database, file.name).trials:
        named = folder / f"trial-{trial.number}"
        stored = [(row.epoch, round(row.metrics["val_top1"], 4)) for row in trial.epochs]
        assert curve(named, "val_top1") == stored
        assert curve(named, "best_val_top1")[-1][1] == round(trial.value, 4)


class StopIn3:
    """Stops training in its third epoch."""

    def step(self, *, epoch: int, images: int) -> None:
        if epoch == 3:
            raise Interrupted("stopped")


def test_a_retraining_logs_epochs_and_test_scores(tmp_path: Path, home: Home) -> None:
    config, out = tiny_config(pictures(tmp_path)), tmp_path / "out"
    with pytest.raises(Interrupted):
        train_run(config, out, home, log=["tensorboard"], control=StopIn3())
    run = train_run(config, out, home, log=["tensorboard"])
    folder = out / "tensorboard" / f"seed-{config.seed}"
    assert [step for step, _ in curve(folder, "train_loss")] == [1, 2, 3]
    assert curve(folder, "test_top1") == [(3, round(run.seeds[0].metrics["test"]["top1"], 4))]


def test_trackers_may_change_on_a_study_that_exists(database: Database) -> None:
    def file(*names: str) -> StudyFile:
        return study_file(study=f"log = {list(names)}".replace("'", '"'))

    study, _ = studies.create(database, file())
    assert "log" not in study.row.definition["study"]
    study, is_new = studies.create(database, file("mlflow", "mlflow", "tensorboard"))
    assert not is_new
    assert study.file.study.log == ("mlflow", "tensorboard")
    study, _ = studies.create(database, file())
    assert studies.load(database, study.row.name).file.study.log is None


def test_a_tracker_that_fails_is_dropped_and_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def away() -> None:
        raise OSError("server away")

    broken, sound = Memory(away), Memory()
    both = Trackers({"mlflow": broken, "wandb": sound})
    both.open(RUN)
    for epoch in (1, 2, 2, 3):  # what is known already is not told again
        both.log(RUN.key, epoch, {})
    both.log("another", 9, {})
    both.end(RUN.key, "complete", {"best": 1.0})
    both.close()
    assert broken.told == [("open", "trial-7", 0)]
    assert sound.told == [("open", "trial-7", 0), 1, 2, 3, ("complete", {"best": 1.0})]
    [warned] = [one for one in caplog.records if one.name == trackers.__name__]
    assert "'mlflow': OSError: server away" in warned.getMessage()


def test_one_that_hangs_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "MOST_WAITING", 3)
    monkeypatch.setattr(trackers, "FLUSH_S", 0.1)
    hung = threading.Event()
    slow = Trackers({"mlflow": Memory(lambda: hung.wait() and None)})
    slow.open(RUN)
    for epoch in range(1, 20):
        slow.log(RUN.key, epoch, {})
    slow.close()
    assert "3 messages behind" in caplog.text
    hung.set()


def test_a_run_that_is_left_stays_open() -> None:
    memory = Memory()
    made = Trackers({"mlflow": memory})
    made.open(RUN)
    made.open(replace(RUN, name="trial-8", key="abc-8", epochs=[{}]))
    made.log("abc-8", 2, {})
    made.close()
    assert memory.told == [
        ("open", "trial-7", 0), (None, {}), ("open", "trial-8", 1), 2, (None, {})
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "told"),
    [('["tensorbord"]', "did you mean 'tensorboard'"), ('"x"', "tensorboard, mlflow, wandb")],
)
def test_an_unknown_tracker(value: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"study\.log.*{told}"):
        study_file(study=f"log = {value}")


def test_commands_show_what_no_server_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = Home(tmp_path / "runs")
    assert list(trackers.commands(trackers.NAMES, home, home.root / "my board")) == [
        "tensorboard --logdir 'runs/my board'",
        "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db",
    ]


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="log 'tensorbord': did you mean 'tensorboard'"):
        trackers.require(["tensorbord"])
    (tmp_path / "wandb").mkdir()  # where W&B keeps its runs
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(InputError, match=r"log 'wandb': it is not installed: .*\[wandb\]"):
        trackers.require(["wandb"])


class FakeClient:
    """As much of MlflowClient as is used; the server is the class."""

    experiments: ClassVar[list[str]] = []
    runs: ClassVar[dict[str, Any]] = {}

    def __init__(self, tracking_uri: str) -> None:
        self.uri = tracking_uri

    def get_experiment_by_name(self, name: str) -> Any:
        known = name in self.experiments
        return SimpleNamespace(experiment_id=name) if known else None

    def create_experiment(self, name: str, artifact_location: str | None) -> str:
        self.experiments.append(name)
        raise RuntimeError("another worker created it just now")

    def search_runs(self, experiments: list[str], filter_string: str) -> list[Any]:
        return [one for one in self.runs.values() if one.tags["hpo.key"] in filter_string]

    def create_run(self, experiment: str, tags: dict[str, str], run_name: str) -> Any:
        run = SimpleNamespace(
            info=SimpleNamespace(run_id=run_name), tags=tags, status="RUNNING", params={},
            data=SimpleNamespace(metrics={}), history=[],
        )  # fmt: skip
        self.runs[run_name] = run
        return run

    def log_param(self, run_id: str, name: str, value: Any) -> None:
        self.runs[run_id].params[name] = value

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.runs[run_id].history += metrics
        self.runs[run_id].data.metrics |= {one.key: one.value for one in metrics}

    def get_metric_history(self, run_id: str, name: str) -> list[Any]:
        return [one for one in self.runs[run_id].history if one.key == name]

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id].status = status

    set_terminated = update_run

    def set_tag(self, run_id: str, name: str, value: str) -> None:
        self.runs[run_id].tags[name] = value


def test_an_mlflow_run_goes_on(monkeypatch: pytest.MonkeyPatch, home: Home) -> None:
    def metric(key: str, value: float, timestamp: int, step: int) -> Any:
        return SimpleNamespace(key=key, value=value, step=step)

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=FakeClient))
    monkeypatch.setitem(sys.modules, "mlflow.entities", SimpleNamespace(Metric=metric))
    first, second = MLflow(home.mlflow), MLflow(home.mlflow)
    first.open(RUN)
    first.log(1, {"val_recall:tabby cat": 0.1})
    first.log(2, {"val_recall:tabby cat": 0.2})
    first.close(None, {})
    run = FakeClient.runs["trial-7"]
    assert run.status == "RUNNING"
    second.open(replace(RUN, epochs=[{"val_recall:tabby cat": 0.1}]))
    for epoch in (2, 3):
        second.log(epoch, {"val_recall:tabby cat": epoch / 10})
    second.close("paused", {"best_val": 0.3})
    assert (run.status, run.tags["hpo.outcome"]) == ("SCHEDULED", "paused")
    assert run.params == RUN.params
    assert [(one.key, one.step, one.value) for one in run.history] == [
        *(("val_recall_tabby cat", epoch, epoch / 10) for epoch in (1, 2, 3)),
        ("best_val", 3, 0.3),
    ]
    assert second.client.uri == f"sqlite:///{home.mlflow}"


@pytest.mark.parametrize(("mode", "begins"), [("offline", 0), ("online", 2)])
def test_a_wandb_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, home: Home, mode: str, begins: int
) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    ended: list[int] = []
    asked: dict[str, Any] = {}
    run = SimpleNamespace(
        starting_step=begins,
        log=lambda metrics, step: logged.append((step, metrics)),
        summary={},
        finish=lambda exit_code: ended.append(exit_code),
    )

    def init(**options: Any) -> Any:
        asked.update(options)
        return run

    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict))
    board = WandB(home.root)
    board.open(replace(RUN, epochs=[{"val_top1": 0.1}]))
    board.log(2, {"val_top1": 0.2})
    board.close("failed", {"best_val_top1": 0.2})
    assert [step for step, _ in logged] == ([1, 2] if mode == "offline" else [2])
    assert asked["resume"] == (None if mode == "offline" else "allow")
    assert (asked["project"], asked["id"], asked["dir"]) == ("digits", "abc-7", str(home.root))
    assert (run.summary["outcome"], ended) == ("failed", [1])
