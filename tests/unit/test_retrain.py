"""Retraining: the full schedule on all images, several seeds, resumable, the test set once each."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hpo.config.study import load_config
from hpo.config.train import TrainConfig
from hpo.data import dataset
from hpo.errors import ConfigError, Conflict, InputError, Interrupted, NotFound, TrialFailed
from hpo.paths import Home
from hpo.trained import retrain as retraining
from hpo.trained.recipe import make_recipe
from hpo.trained.run import RunDir, TrainedRun, load_run
from tests.harness.trained import SPLITS, pictures, tiny_config, train_run


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return tiny_config(pictures(tmp_path))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


class StopAt:
    """Stops training like a signal does, in this epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def step(self, *, epoch: int, images: int) -> None:
        if epoch == self.epoch:
            raise Interrupted("stopped by a signal")


def provenance(**fields: Any) -> dict[str, Any]:
    base = {"trial": 4, "state": "complete", "epochs": 3, "epochs_trained": 3}
    return {**base, "rates": [0.05, 0.05, 0.005], **fields}


def weights(run: TrainedRun) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run.seeds[0].files.weights)


def curves(run: TrainedRun, seed: int = 0) -> list[dict[str, str]]:
    return list(csv.DictReader(run.files.seed(seed).curves.read_text().splitlines()))


# What is run


def test_the_plateau_is_replayed() -> None:
    plateau = TrainConfig.parse({"epochs": 3, "schedule": {"name": "plateau", "patience": 1}})
    recipe = make_recipe(plateau, provenance(), keep_validation=False)
    assert recipe.config.schedule.name == "replay"
    assert recipe.config.schedule.rates == (0.05, 0.05, 0.005)
    assert recipe.epochs == 3
    assert "rates of trial 4" in recipe.notes[0]
    kept = make_recipe(plateau, provenance(), keep_validation=True)
    assert kept.config == plateau


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({}, "none are recorded"),
        (provenance(state="pruned", rates=[0.05]), "1 of them .* because the trial was pruned"),
        (provenance(epochs=2, rates=[0.05, 0.05]), "2 of them are recorded"),
        (provenance(epochs=9, stopped_epoch=2, rates=[0.05, 0.05]), "2 of them are recorded"),
    ],
)
def test_a_plateau_without_its_rates(told: dict[str, Any], reason: str) -> None:
    plateau = TrainConfig.parse({"epochs": 3, "schedule": {"name": "plateau"}})
    with pytest.raises(ConfigError, match=f"schedule.name: .*{reason}.*--keep-validation"):
        make_recipe(plateau, told, keep_validation=False)


def test_a_plateau_on_a_training_metric_needs_no_trial() -> None:
    schedule = {"name": "plateau", "metric": "train_loss"}
    plateau = TrainConfig.parse({"epochs": 3, "schedule": schedule})
    assert make_recipe(plateau, {}, keep_validation=False).config == plateau


def test_early_stopping_stops_where_the_trial_did() -> None:
    stopping = TrainConfig.parse({"epochs": 9, "early_stopping": {"patience": 2}})
    told = provenance(epochs=9, stopped_epoch=4)
    recipe = make_recipe(stopping, told, keep_validation=False)
    assert recipe.epochs == 4
    assert recipe.config.epochs == 9  # the cosine keeps its length
    assert recipe.config.early_stopping.patience is None
    full = make_recipe(stopping, provenance(epochs=9), keep_validation=False)
    assert full.epochs == 9
    longer = make_recipe(stopping, provenance(epochs=5, stopped_epoch=4), keep_validation=False)
    assert longer.epochs == 9
    assert "epochs = 9 was asked for" in longer.notes[0]
    assert make_recipe(stopping, told, keep_validation=True).config == stopping


def test_a_pruner_that_stops_early_is_followed_as_early_stopping_is() -> None:
    """`patient` without another pruner: a complete trial, with fewer epochs than its schedule."""
    config = TrainConfig.parse({"epochs": 9})
    recipe = make_recipe(config, provenance(epochs=9, stopped_epoch=4), keep_validation=False)
    assert (recipe.epochs, recipe.config.epochs) == (4, 9)
    longer = make_recipe(config, provenance(epochs=5, stopped_epoch=4), keep_validation=False)
    assert longer.epochs == 9
    assert make_recipe(config, {}, keep_validation=False).epochs == 9


def test_early_stopping_without_a_trial() -> None:
    stopping = TrainConfig.parse({"early_stopping": {"patience": 2}})
    for told in ({}, provenance(epochs=10, state="pruned")):
        with pytest.raises(ConfigError, match=r"early_stopping\.patience: 2: .*--keep-validation"):
            make_recipe(stopping, told, keep_validation=False)
    own = {"patience": 2, "metric": "train_loss"}
    watching = TrainConfig.parse({"early_stopping": own})
    assert make_recipe(watching, {}, keep_validation=False).config == watching


def test_plateau_and_early_stopping_together() -> None:
    both = {"schedule": {"name": "plateau"}, "early_stopping": {"patience": 2}}
    config = TrainConfig.parse({"epochs": 9, **both})
    told = provenance(epochs=9, stopped_epoch=3)
    recipe = make_recipe(config, told, keep_validation=False)
    assert recipe.epochs == 3
    assert recipe.config.schedule.rates[:3] == (0.05, 0.05, 0.005)


# What comes out


def test_a_run_trains_on_everything_and_tests_each_seed(
    config: TrainConfig, out: Path, home: Home
) -> None:
    run = train_run(config, out, home, seeds=2)
    assert [one.seed for one in run.seeds] == [0, 1]
    for one in run.seeds:
        found = one.metrics
        assert found["images"] == {"train": 36, "val": 0, "test": 15}
        assert found["epochs"] == found["best_epoch"] == 3
        assert found["val"] is None
        assert set(found["test"]["per_class"]) == {"class0", "class1", "class2"}
        assert found["test"]["per_class"]["class1"]["support"] == SPLITS["test"]
        hits = sum(found["test"]["confusion"][i][i] for i in range(3))
        assert found["test"]["top1"] == pytest.approx(hits / 15)
        assert "top5" not in found["test"]
        rows = curves(run, one.seed)
        assert [row["epoch"] for row in rows] == ["1", "2", "3"]
        assert float(rows[2]["train_loss"]) == found["train"]["loss"]
        assert one.files.checkpoints() == []
    assert run == load_run(out)


def test_the_summary_is_mean_and_sample_deviation(
    config: TrainConfig, out: Path, home: Home
) -> None:
    run = train_run(config, out, home, seeds=3)
    losses = [one.metrics["test"]["loss"] for one in run.seeds]
    expected = {"mean": statistics.fmean(losses), "std": statistics.stdev(losses)}
    assert run.summary["test"]["loss"] == expected
    assert run.summary["seeds"] == [0, 1, 2]
    assert json.loads(RunDir(out).summary.read_text()) == run.summary
    alone = load_run(out / "seed-1")
    assert [one.seed for one in alone.seeds] == [1]
    assert alone.summary["test"]["loss"] == {"mean": losses[1], "std": None}


def test_normalisation_is_that_of_the_training_part(
    config: TrainConfig, out: Path, home: Home
) -> None:
    run = train_run(config, out, home)
    data = dataset.open_data(config.data, home.cache)
    assert run.metadata.mean == data.mean
    assert run.metadata.std == data.std


def test_kept_validation_keeps_the_best_epoch(config: TrainConfig, out: Path, home: Home) -> None:
    run = train_run(config, out, home, keep_validation=True)
    found = run.seeds[0].metrics
    assert found["images"] == {"train": 24, "val": 12, "test": 15}
    rows = curves(run)
    best = max(rows, key=lambda row: float(row["val_top1"]))
    assert found["best_epoch"] == int(best["epoch"])
    assert found["val"]["top1"] == float(best["val_top1"])
    assert run.summary["val"]["top1"]["mean"] == found["val"]["top1"]


def test_early_stopping_leaves_the_loop(config: TrainConfig, out: Path, home: Home) -> None:
    stopping = config.model_copy(
        update={"early_stopping": config.early_stopping.model_copy(update={"patience": 2})}
    )
    told = provenance(stopped_epoch=2)
    run = train_run(stopping, out, home, provenance=told)
    assert run.seeds[0].metrics["epochs"] == 2
    # The same two epochs as in the whole schedule.
    whole = train_run(config, out.with_name("whole"), home)
    of_run, of_whole = ([row["train_loss"] for row in curves(one)] for one in (run, whole))
    assert of_run == of_whole[:2]


def test_without_a_test_split_nothing_is_called_test(tmp_path: Path, out: Path, home: Home) -> None:
    config = tiny_config(pictures(tmp_path, {"train": 8, "val": 4}))
    run = train_run(config, out, home)
    assert run.seeds[0].metrics["test"] is None
    assert run.summary["test"] is None
    assert run.metadata.keep_validation
    assert run.summary["val"]["top1"]["std"] is None
    assert run.seeds[0].metrics["images"]["train"] == 24
    assert any("test_from_train = true. The validation images are kept out" in note
               for note in run.notes)  # fmt: skip
    train_run(config, out, home)  # goes on


def test_an_old_run_without_a_test_split_goes_on_as_it_began(
    tmp_path: Path, out: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(pictures(tmp_path, {"train": 8, "val": 4}))
    with monkeypatch.context() as patch:
        patch.setattr(retraining, "_must_keep_validation", lambda *_: False)
        train_run(config, out, home)
    run = train_run(config, out, home, seeds=2)
    assert [one.metrics["images"]["train"] for one in run.seeds] == [36, 36]


def test_a_limit_is_kept_and_told(tmp_path: Path, out: Path, home: Home) -> None:
    config = tiny_config(pictures(tmp_path), {"data.limit_train": 6})
    run = train_run(config, out, home)
    assert run.seeds[0].metrics["images"]["train"] == 6 + 12
    assert any("--set data.limit_train=" in note for note in run.notes)


def test_other_images_than_the_search_had_are_told(
    config: TrainConfig, out: Path, home: Home
) -> None:
    told = provenance(data_fingerprints=["0" * 16])
    run = train_run(config, out, home, provenance=told)
    assert any("not those of the search" in note for note in run.notes)
    fitting = provenance(data_fingerprints=[run.metadata.fingerprint])
    assert not train_run(config, out.with_name("b"), home, provenance=fitting).notes


def test_the_configuration_is_kept_with_its_provenance(
    config: TrainConfig, out: Path, home: Home
) -> None:
    told = provenance(study="toy")
    train_run(config, out, home, provenance=told)
    runtime = config.runtime.model_copy(update={"deterministic": True, "compile": "none"})
    resolved = config.model_copy(update={"runtime": runtime})
    assert load_config(RunDir(out).config) == (resolved, told)


def test_what_is_auto_is_resolved_and_matches_itself_later(
    config: TrainConfig, out: Path, home: Home
) -> None:
    auto = config.model_copy(update={"runtime": TrainConfig().runtime})
    run = train_run(auto, out, home)
    assert run.config.runtime.precision in ("float32", "bfloat16")
    assert run.config.runtime.threads == torch.get_num_threads()
    assert len(train_run(auto, out, home, seeds=2).seeds) == 2


# Interrupted, repeated, refused


def test_interrupted_and_resumed_equals_uninterrupted(
    config: TrainConfig, out: Path, home: Home
) -> None:
    with pytest.raises(Interrupted):
        train_run(config, out, home, control=StopAt(3))
    with pytest.raises(NotFound, match="no finished seed yet"):
        load_run(out)
    assert [epoch for epoch, _ in RunDir(out).seed(0).checkpoints()] == [2]
    lines: list[str] = []
    resumed = train_run(config, out, home, progress=lines.append)
    assert next(line for line in lines if "epoch" in line).startswith("seed 0: epoch 3/3")
    whole = train_run(config, out.with_name("whole"), home)
    assert resumed.seeds[0].metrics["test"] == whole.seeds[0].metrics["test"]
    assert all(torch.equal(weights(resumed)[name], w) for name, w in weights(whole).items())


def test_a_run_killed_after_its_last_epoch_only_tests(
    config: TrainConfig, out: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(retraining, "save_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            train_run(config, out, home)
    lines: list[str] = []
    run = train_run(config, out, home, progress=lines.append)
    assert lines == ["seed 0: opening the test set (15 images)"]
    assert RunDir(out).seed(0).checkpoints() == []
    assert run.seeds[0].metrics["epochs"] == 3


def test_the_test_set_is_opened_once_for_each_seed(
    config: TrainConfig, out: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []

    def counted(*args: Any) -> Any:
        opened.append(len(RunDir(out).finished()))
        return open_test(*args)

    open_test = dataset.open_test
    monkeypatch.setattr(dataset, "open_test", counted)
    train_run(config, out, home, seeds=2)
    assert opened == [0, 1]
    run = train_run(config, out, home, seeds=3)  # finished seeds are not run again
    assert opened == [0, 1, 2]
    assert [one.seed for one in run.seeds] == [0, 1, 2]


def test_another_configuration_is_refused(config: TrainConfig, out: Path, home: Home) -> None:
    train_run(config, out, home)
    before = RunDir(out).config.read_text()
    other = config.model_copy(update={"batch_size": 6})
    with pytest.raises(Conflict, match=r"batch_size: 12 -> 6\n.*-o"):
        train_run(other, out, home)
    stopped = config.model_copy(
        update={"early_stopping": config.early_stopping.model_copy(update={"patience": 1})}
    )
    with pytest.raises(Conflict, match="epochs trained: 3 -> 2"):
        train_run(stopped, out, home, provenance=provenance(stopped_epoch=2))
    with pytest.raises(Conflict, match="keep_validation: False -> True"):
        train_run(config, out, home, keep_validation=True)
    assert RunDir(out).config.read_text() == before


def test_changed_images_are_refused(config: TrainConfig, out: Path, home: Home) -> None:
    train_run(config, out, home)
    assert config.data.root
    next(Path(config.data.root).glob("train/class0/*")).unlink()
    with pytest.raises(Conflict, match="begun with other images"):
        train_run(config, out, home, seeds=2)


def test_a_directory_of_something_else_is_left_alone(
    config: TrainConfig, out: Path, home: Home
) -> None:
    out.mkdir()
    RunDir(out).config.write_text("mine")
    with pytest.raises(Conflict, match="not of a run"):
        train_run(config, out, home)
    assert RunDir(out).config.read_text() == "mine"
    with pytest.raises(InputError, match="cannot be a run directory"):
        train_run(config, RunDir(out).config, home)
    with pytest.raises(NotFound, match="not a trained run"):
        load_run(out)


def test_data_without_a_folder_are_known_again(out: Path, home: Home) -> None:
    digits = TrainConfig.parse(
        {
            "epochs": 1,
            "data": {"dataset": "digits", "limit_train": 20},
            "model": {"cnn": {"filters": [2]}},
        }
    )
    train_run(digits, out, home, seeds=1)
    assert len(train_run(digits, out, home, seeds=2).seeds) == 2


def test_two_writers_are_told_apart(config: TrainConfig, out: Path, home: Home) -> None:
    class Second:
        def step(self, *, epoch: int, images: int) -> None:
            with pytest.raises(Conflict, match="another hpo train"):
                train_run(config, out, home)
            raise Interrupted("seen enough")

    with pytest.raises(Interrupted, match="seen enough"):
        train_run(config, out, home, control=Second())


def test_errors_of_training_are_not_taken_for_those_of_the_directory(
    config: TrainConfig, out: Path, home: Home
) -> None:
    class Forbidden:
        def step(self, *, epoch: int, images: int) -> None:
            raise PermissionError("from below")

    with pytest.raises(PermissionError, match="from below"):
        train_run(config, out, home, control=Forbidden())
    assert train_run(config, out, home).seeds  # and the lock is free


def test_a_loss_that_is_not_finite(tmp_path: Path, out: Path, home: Home) -> None:
    wild = {"optimizer.lr": 100.0, "optimizer.weight_decay": 10.0, "schedule.name": "constant"}
    config = tiny_config(pictures(tmp_path), {**wild, "epochs": 60})
    for _ in range(2):  # and again from its checkpoint
        with pytest.raises(TrialFailed, match=r"seed 0: the loss is not finite in epoch \d+"):
            train_run(config, out, home)
    assert not RunDir(out).finished()


def test_numbers_of_seeds(config: TrainConfig, out: Path, home: Home) -> None:
    with pytest.raises(InputError, match="--seeds 0: at least 1"):
        train_run(config, out, home, seeds=0)
    assert not out.exists()
    run = train_run(config.model_copy(update={"seed": 5}), out, home, seeds=2)
    assert [one.seed for one in run.seeds] == [5, 6]
    assert run.seeds[0].metrics["test"]["loss"] != run.seeds[1].metrics["test"]["loss"]


def test_evaluation_asks_the_control(config: TrainConfig, out: Path, home: Home) -> None:
    """A signal during the test ends it; the same call tests again."""
    with pytest.raises(Interrupted):
        train_run(config, out, home, control=StopAt(0))  # evaluation is epoch 0
    assert RunDir(out).seed(0).weights.exists()
    assert train_run(config, out, home).seeds[0].metrics["test"] is not None
