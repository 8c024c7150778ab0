"""Cross-validation: folds of the images, a network for each, and their mean as a trial's value."""

from __future__ import annotations

import math
import multiprocessing
import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo.config.data import DataConfig
from hpo.config.study import load_config, parse_study
from hpo.config.train import TrainConfig
from hpo.data.dataset import Images, describe, open_data, open_test
from hpo.data.split import Item, make_folds
from hpo.errors import Damaged, DataError, Interrupted, TrialFailed
from hpo.paths import Home
from hpo.search import trial as objective
from hpo.storage.database import Database, connect
from hpo.trained.dry_run import check
from hpo.trained.export import export, write_export
from hpo.trained.retrain import retrain
from hpo.training import learner, train
from hpo.training.checkpoint import Checkpoint
from hpo.training.inputs import TrainingData
from hpo.training.train import EpochResult, fold_config, mean_over_folds
from tests.harness.fakes import study_file
from tests.harness.images import make_folder
from tests.harness.training import (
    CPU,
    DATA,
    Pictures,
    assert_same,
    assert_same_checkpoint,
    config,
    files,
    numbers,
)
from tests.unit.test_objective import TRAIN, only, search
from tests.unit.test_train import StopsAt

FOLDS = [
    TrainingData(3, Pictures(50, seed), Pictures(20, seed + 9), (0.5,) * 3, (0.2 + seed / 50,) * 3)
    for seed in range(3)
]
FOLDED = TRAIN.replace("limit_train = 100", "limit_train = 100\nfolds = 3")


def folded(**fields: Any) -> TrainConfig:
    data = {"image_size": 8, "folds": 3, **fields.pop("data", {})}
    return config(**{"epochs": 4, "data": data, **fields})


def run(made: TrainConfig, **options: Any) -> list[EpochResult]:
    control = options.pop("control", StopsAt(10**9))
    return list(train.train(made, options.pop("folds", FOLDS), control, device=CPU, **options))


# Networks


def test_an_epoch_is_the_mean_of_networks_that_were_trained_alone() -> None:
    made = folded(schedule={"name": "cosine"}, epochs=3)
    together = run(made)
    alone = [
        numbers(list(train.train(fold_config(made, i, 3), one, StopsAt(10**9), device=CPU)))
        for i, one in enumerate(FOLDS)
    ]
    for epoch, found in enumerate(together):
        each = [curve[epoch] for curve in alone]
        for name in each[0]:
            assert found.metrics[name] == pytest.approx(statistics.mean(x[name] for x in each))
        assert found.metrics["val_top1_std"] == pytest.approx(
            statistics.stdev(x["val_top1"] for x in each)
        )
    assert len({fold_config(made, i, 3).seed for i in range(3)} | {made.seed}) == 4
    assert fold_config(made, 0, 1) is made


def test_seconds_add_up_and_memory_is_the_most() -> None:
    base = {"seconds": 2.0, "peak_memory_mb": 5.0, "val_loss": 1.0}
    found = mean_over_folds(
        [base, base | {"peak_memory_mb": 7.0, "val_loss": math.nan}], "val_loss"
    )
    assert (found["seconds"], found["peak_memory_mb"]) == (4.0, 7.0)
    assert math.isnan(found["val_loss"])
    assert mean_over_folds([base], "val_loss") == base


WAYS: dict[str, dict[str, Any]] = {
    "plateau": {"schedule": {"name": "plateau", "patience": 0, "factor": 0.5}},
    "average": {"ema_decay": 0.9, "optimizer": {"name": "adam", "lr": 0.01}},
    "phases": {
        "epochs": 4,
        "phases": [{"epochs": 2, "trainable_blocks": 0}, {"epochs": 2, "trainable_blocks": "all"}],
    },
    "balanced": {"data": {"balance": "loss"}, "augment": {"mixup": 0.4}},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [7, 25, 33])
def test_resumed_equals_uninterrupted(tmp_path: Path, way: str, steps: int) -> None:
    """Four training and two validation batches of each fold, and a call behind each of both: these
    are in the first and second epoch, in different folds."""
    made = folded(**WAYS[way])
    whole = run(made, checkpoint=files(tmp_path / "whole"))
    halves: list[EpochResult] = []
    cut = train.train(made, FOLDS, StopsAt(steps), device=CPU, checkpoint=files(tmp_path / "one"))
    with pytest.raises(Interrupted):
        halves.extend(cut)
    resume = halves[-1].checkpoint if halves else None
    halves += run(made, checkpoint=files(tmp_path / "two"), resume=resume)
    assert numbers(halves) == numbers(whole)
    assert [one.best_epoch for one in halves] == [one.best_epoch for one in whole]
    assert_same_checkpoint(tmp_path / "two/epoch-4.ckpt", tmp_path / "whole/epoch-4.ckpt")


def test_the_best_epoch_of_the_mean_is_kept_of_every_fold(tmp_path: Path) -> None:
    made = folded(epochs=6, optimizer={"lr": 0.5}, schedule={"name": "constant"}, augment={})
    results = run(made, metric="val_loss", checkpoint=files(tmp_path))
    losses = [one.metrics["val_loss"] for one in results]
    best = results[-1].best_epoch
    assert best == losses.index(min(losses)) + 1 < 6
    last = Checkpoint.load(files(tmp_path)(6))
    then = Checkpoint.load(files(tmp_path)(best))
    assert len(last.networks) == 3
    assert_same(last.best_weights, then.best_weights)
    for i, state in enumerate(then.networks):
        mine = {name.removeprefix(f"fold{i}."): value for name, value in last.best_weights.items()
                if name.startswith(f"fold{i}.")}  # fmt: skip
        assert_same(mine, state["model"])


def test_out_of_memory_halves_the_micro_batch_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = learner.Learner._loss, 0

    def small_only(self: Any, forward: Any, images: torch.Tensor, labels: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls > 20 and len(images) > 8:  # in the second fold of the second epoch
            raise torch.OutOfMemoryError("pretended")
        return original(self, forward, images, labels)

    monkeypatch.setattr(learner.Learner, "_loss", small_only)
    results = run(folded(epochs=3), checkpoint=files(tmp_path))
    assert [one.micro_batch for one in results] == [16, 8, 8]
    assert [one.epoch for one in results] == [1, 2, 3]


def test_networks_that_do_not_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def full(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        if len(made) > 2:
            raise torch.OutOfMemoryError("pretended")
        return learner.Learner(*args, **kwargs)

    monkeypatch.setattr("hpo.training.train.Learner", full)
    with pytest.raises(TrialFailed, match=r"3 networks of small_cnn \(folds\) do not fit"):
        run(folded())


def test_one_fold_that_diverges_ends_the_training() -> None:
    bad = TrainingData(3, FOLDS[0].train, FOLDS[0].val, (0.5,) * 3, (0.0,) * 3)
    results = run(folded(), folds=[*FOLDS[:2], bad])
    assert results[-1].diverged
    assert results[-1].last


def test_labels_may_lie_elsewhere_on_another_host(tmp_path: Path) -> None:
    made = config(epochs=1, data={"dataset": "csv", "labels": "a/x.csv", "image_size": 8})
    run(made, folds=DATA, checkpoint=files(tmp_path))
    there = config(epochs=1, data={"dataset": "csv", "labels": "b/x.csv", "image_size": 8})
    Checkpoint.load(files(tmp_path)(1)).require(there)
    with pytest.raises(Damaged, match=r"data\.folds = None instead of 3"):
        Checkpoint.load(files(tmp_path)(1)).require(folded(epochs=1))


def test_a_checkpoint_of_one_network_is_as_before(tmp_path: Path) -> None:
    run(config(epochs=1), folds=DATA, checkpoint=files(tmp_path))
    stored = torch.load(files(tmp_path)(1), weights_only=True)
    assert stored.pop("others") == []
    old = {"config", "metrics", "best_epoch", "micro_batch", "model", "best", "optimizer"}
    assert old | {"average", "averaged"} <= stored.keys()
    torch.save(stored, tmp_path / "old.ckpt")
    assert len(Checkpoint.load(tmp_path / "old.ckpt").networks) == 1


# Images

CONTENTS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60)), min_size=1, max_size=80)


@given(CONTENTS, st.integers(2, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_folds_are_even_and_depend_on_contents_alone(
    contents: list[tuple[int, int]], folds: int, seed: int
) -> None:
    items = [Item(f"{i}", label, f"{label} {c}") for i, (label, c) in enumerate(contents)]
    found = make_folds(items, folds, seed)
    assert sorted(one.name for part in found for one in part) == sorted(one.name for one in items)
    digests = [{item.digest for item in part} for part in found]
    assert sum(map(len, digests)) == len(set().union(*digests))  # none in two folds
    renamed = make_folds(
        [Item(f"x{n.name}", n.label, n.digest) for n in reversed(items)], folds, seed
    )
    assert [{item.digest for item in part} for part in renamed] == digests
    sizes = Counter(item.digest for item in items)
    for label in {item.label for item in items}:
        counts = [sum(item.label == label for item in part) for part in found]
        different = {item.digest for item in items if item.label == label}
        if len(different) >= folds:
            assert min(counts) >= 1
        assert max(counts) - min(counts) <= 2 * max(sizes[digest] for digest in different)


def _config(root: Path, **values: Any) -> DataConfig:
    return DataConfig(**{"dataset": "folder", "root": str(root), "image_size": 16, **values})


def _names(*parts: Images) -> list[str]:
    return sorted(name for part in parts for name in part.names)


@pytest.mark.parametrize("splits", [None, {"train": 9, "test": 3}])
def test_folds_share_out_what_is_not_tested(tmp_path: Path, splits: dict[str, int] | None) -> None:
    root = make_folder(tmp_path / "data", splits, count=12)
    one = _config(root)
    many = one.model_copy(update={"folds": 3})
    plain = open_data(one, tmp_path / "cache")
    data = open_data(many, tmp_path / "cache", folded=True)
    tested, same = open_test(one, tmp_path / "cache"), open_test(many, tmp_path / "cache")
    assert tested is not None
    assert same is not None
    assert tested.names == same.names
    pool = _names(plain.train, plain.val)
    assert _names(*(each.val for each in data.folds)) == pool
    for each in data.folds:
        assert _names(each.train, each.val) == pool
        assert set(each.val.labels.tolist()) == {0, 1, 2}
        pixels = each.train.stacked().reshape(-1, 3) / 255 if each.train.uniform else None
        if pixels is not None:
            assert each.mean == pytest.approx(pixels.mean(0).tolist())
            assert each.std == pytest.approx(pixels.std(0).tolist())
    assert len({each.mean for each in data.folds}) == 3
    unfolded = open_data(many, tmp_path / "cache")
    assert unfolded.train.names == plain.train.names
    assert unfolded.fingerprint == data.fingerprint != plain.fingerprint
    assert sum(describe(many)["val"].values()) == len(data.val)
    assert sum(describe(many)["train"].values()) == len(data.train)


def test_a_limit_is_of_what_each_fold_trains_on(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", count=12)
    data = open_data(_config(root, folds=3, limit_train=9), tmp_path / "cache", folded=True)
    assert [len(one.train) for one in data.folds] == [9, 9, 9]
    assert sum(len(one.val) for one in data.folds) == 30
    assert not any(set(one.train.names) & set(one.val.names) for one in data.folds)


def test_images_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    given_val = make_folder(tmp_path / "given", {"train": 6, "val": 3})
    with pytest.raises(DataError, match=r"data\.folds = 3 divides .* part \(val\) of its own"):
        describe(_config(given_val, folds=3))
    few = make_folder(tmp_path / "few", {"train": 4, "test": 2})
    with pytest.raises(DataError, match=r"data\.folds = 5: class 'class0' has 4 different images"):
        describe(_config(few, folds=5))


# Searches


def test_a_search_prunes_by_the_mean_and_keeps_every_fold(database: Database, home: Home) -> None:
    pruner = 'pruner = {name = "median", n_startup_trials = 2, n_warmup_steps = 0}'
    text = study_file(trials=8, train=FOLDED).text.replace('pruner = "none"', pruner)
    status = search(database, home, parse_study(text, "toy.toml"))
    assert status.finished == 8
    assert status.count("pruned") > 0
    assert status.count("complete") + status.count("pruned") == 8
    for trial in status.trials:
        values = [row.metrics["val_top1"] for row in trial.epochs]
        assert trial.value == max(values)
        assert all(0 <= row.metrics["val_top1_std"] < 1 for row in trial.epochs)
    kept = next(home.root.rglob("weights.safetensors"))
    names = safetensors.torch.load_file(kept)
    assert {name.partition(".")[0] for name in names} == {"fold0", "fold1", "fold2"}
    made, provenance = export(database, "toy")
    assert made.data.folds == 3
    write_export(home.root / "best.toml", made, provenance)
    trained = retrain(*load_config(home.root / "best.toml"), out=home.root / "out", home=home,
                      device="cpu")  # fmt: skip
    assert any("data.folds = 3 applies to the search" in note for note in trained.notes)
    assert not any("are not those of the search" in note for note in trained.notes)
    weights = safetensors.torch.load_file(trained.seeds[0].files.weights)
    assert not any(name.startswith("fold") for name in weights)


def test_a_trial_taken_over_ends_as_if_nothing_had_happened(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_lines = FOLDED.replace("epochs = 2", "epochs = 4")
    file = study_file(trials=1, train=train_lines)
    whole = only(search(connect(f"sqlite:///{tmp_path}/whole.db"), home, file))
    original, left = learner.Learner.step, [0]

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        left[0] += 1
        if left[0] in (2, 12):
            raise OSError("the host went away")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(objective.retention, "apply_retention", lambda *_: None)
    monkeypatch.setattr(learner.Learner, "step", dying)
    database = connect(f"sqlite:///{tmp_path}/cut.db")
    for _ in range(2):
        with pytest.raises(OSError, match="went away"):
            search(database, home, file)
    trial = only(search(database, home, file))
    clocked = {"seconds", "images_per_s", "peak_memory_mb"}
    assert len({row.attempt for row in trial.epochs}) > 1
    for mine, theirs in zip(trial.epochs, whole.epochs, strict=True):
        for name in theirs.metrics.keys() - clocked:
            assert mine.metrics[name] == theirs.metrics[name]
    assert trial.value == whole.value


def test_several_objectives_are_costs_of_one_network(database: Database, home: Home) -> None:
    study = 'metrics = ["val_top1", "epoch_seconds", "parameters"]'
    status = search(database, home, study_file(trials=2, train=FOLDED, study=study))
    for trial in status.trials:
        assert trial.state == "complete"
        mean = statistics.mean(row.metrics["seconds"] for row in trial.epochs) / 3
        values = dict(zip(status.file.objectives, trial.attempts[-1].objectives or (), strict=True))
        assert values["epoch_seconds"] == pytest.approx(mean)
        assert values["parameters"] == 170


@pytest.mark.parametrize("blocks", ["0", '"all"'])
def test_a_retrieval_is_looked_up_among_the_other_folds(
    database: Database, home: Home, blocks: str
) -> None:
    lines = f'task = "retrieval"\n{FOLDED}'
    file = study_file(trials=1, train=lines, space=f"model.trainable_blocks = [{blocks}]")
    trial = only(search(database, home, file))
    assert trial.state == "complete"
    assert trial.value == max(row.metrics["val_precision_at_k"] for row in trial.epochs)
    assert "val_precision_at_k_std" in trial.epochs[0].metrics


def test_check_counts_every_network(home: Home) -> None:
    shown = {}
    for lines in (TRAIN, FOLDED):
        file = study_file(trials=1, train=lines)
        shown[lines] = check(file, home=home, device="cpu", workers=1, threads=1)
    one, many = shown[TRAIN].costs[0], shown[FOLDED].costs[0]
    assert many.memory_mb is not None
    assert one.memory_mb is not None
    assert many.memory_mb > one.memory_mb
    assert sum(shown[FOLDED].data["val"].values()) == 510
    assert "a trial trains 3 networks at once" in str(shown[FOLDED])
    assert not home.root.exists()


def test_frozen_features_of_a_fold_are_computed_once(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", count=9)
    cache = tmp_path / "cache"
    values = {"dataset": "folder", "root": str(root), "image_size": 8, "folds": 3}
    made = folded(data=values, model={"cnn": {"filters": [4, 8]}, "trainable_blocks": 0},
                  augment={}, epochs=2)  # fmt: skip
    data = open_data(made.data, cache, folded=True)
    seen = [TrainingData(3, one.train, one.val, one.mean, one.std) for one in data.folds]
    kept = run(made, folds=seen, cache=cache)
    there = {path: path.stat().st_mtime_ns for path in (cache / "features").iterdir()}
    assert sum(not path.name.endswith(".lock") for path in there) == 9  # each in each fold
    assert numbers(run(made, folds=seen, cache=cache)) == numbers(kept)
    assert {path: path.stat().st_mtime_ns for path in there} == there
    shutil.rmtree(cache / "features")
    for mine, theirs in zip(numbers(run(made, folds=seen)), numbers(kept), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_folds_that_are_streamed_give_the_same(tmp_path: Path) -> None:
    """And only one network at a time has processes that decode."""
    root = make_folder(tmp_path / "data", count=9, varied=True)
    values = {"dataset": "folder", "root": str(root), "image_size": 8, "folds": 3}
    found = []
    for limit in (1.0, 0.0):
        made = folded(data=values | {"cache_limit_gb": limit, "loader_workers": 1}, epochs=2)
        data = open_data(made.data, tmp_path / f"cache{limit}", folded=True)
        assert data.train.streamed is (limit == 0)
        seen = [TrainingData(3, one.train, one.val, one.mean, one.std) for one in data.folds]
        most = 0

        class Watching(StopsAt):
            def step(self, *, epoch: int, images: int) -> None:
                nonlocal most
                most = max(most, len(multiprocessing.active_children()))

        found.append(numbers(run(made, folds=seen, control=Watching(0))))
        assert (0 < most <= 2) is data.train.streamed
    assert found[0] == found[1]
