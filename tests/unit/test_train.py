"""The training generator: resuming, determinism, best epoch, divergence, memory."""

import dataclasses
import gc
import weakref
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpo.config.train import TrainConfig
from hpo.control import NullControl
from hpo.data.dataset import open_data
from hpo.errors import Damaged, Interrupted, TrialFailed
from hpo.training import learner, models, train
from hpo.training.checkpoint import Checkpoint, best_weights
from hpo.training.evaluation import evaluate
from hpo.training.inputs import TrainingData
from hpo.training.learner import Learner, RunningMeans
from hpo.training.train import EpochResult
from tests.harness.training import (
    CPU,
    DATA,
    assert_same,
    assert_same_checkpoint,
    config,
    files,
    numbers,
    run,
)


def test_an_epoch_reports_its_metrics() -> None:
    results = run(config())
    assert [one.epoch for one in results] == [1, 2, 3, 4]
    assert [one.last for one in results] == [False, False, False, True]
    assert set(results[0].metrics) == {
        *("train_loss", "train_top1", "val_loss", "val_top1"),
        *("val_macro_f1", "val_balanced_accuracy"),
        *("lr", "seconds", "images_per_s", "peak_memory_mb"),
    }
    assert all(one.metrics["images_per_s"] > 0 for one in results)


def test_a_training_leaves_nothing_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network and its step refer to each other: only the garbage collector frees them, and on a
    GPU the next trial, or another worker, would lack their memory."""
    made: list[weakref.ref[Learner]] = []
    build = Learner.__init__

    def noting(self: Learner, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Learner, "__init__", noting)
    monkeypatch.setattr(train, "is_scarce", lambda device: True)
    gc.disable()
    try:
        run(config(epochs=1))
        with closing(train.train(config(), DATA, NullControl(), device=CPU)) as pruned:
            next(pruned)
            assert made[1]() is not None
        assert [one() for one in made] == [None, None]
    finally:
        gc.enable()


def test_it_learns() -> None:
    assert run(config(epochs=8))[-1].metrics["val_top1"] > 0.8


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    first = run(config(), checkpoint=files(tmp_path / "a"))
    torch.rand(5)
    second = run(config(), checkpoint=files(tmp_path / "b"))
    assert numbers(first) == numbers(second)
    assert_same_checkpoint(tmp_path / "a/epoch-4.ckpt", tmp_path / "b/epoch-4.ckpt")
    assert numbers(run(config(seed=1))) != numbers(first)


def test_real_digits_are_learned(tmp_path: Path) -> None:
    data = open_data(TrainConfig.parse({}).data, tmp_path)
    settings = config(epochs=4, batch_size=64, model={"cnn": {"filters": [16, 32]}}, augment={})
    seen = TrainingData(len(data.classes), data.train, data.val, data.mean, data.std)
    assert run(settings, seen)[-1].metrics["val_top1"] > 0.9


class StopsAt(NullControl):
    """Interrupts before the n-th step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, *, epoch: int, images: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise Interrupted("stop")


SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "step": {"step_size": 2},
    "cosine": {"warmup_epochs": 1.5},
    "plateau": {"patience": 0, "factor": 0.5},
    "onecycle": {},
    "replay": {"rates": [0.05, 0.05, 0.01, 0.02, 0.03]},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resumed_equals_uninterrupted(tmp_path: Path, schedule: str, optimizer: str) -> None:
    settings = config(
        epochs=5,
        optimizer={"name": optimizer, "lr": 0.05},
        schedule={"name": schedule, **SCHEDULES[schedule]},
    )
    whole = run(settings, checkpoint=files(tmp_path / "whole"))
    halves: list[EpochResult] = []
    # Five training and two validation batches an epoch, and a call behind each of both: this is in
    # the middle of the third epoch.
    cut = train.train(settings, DATA, StopsAt(21), device=CPU, checkpoint=files(tmp_path / "first"))
    with pytest.raises(Interrupted):
        halves.extend(cut)
    assert len(halves) == 2
    resume = halves[-1].checkpoint
    halves += run(settings, checkpoint=files(tmp_path / "second"), resume=resume)
    assert numbers(halves) == numbers(whole)
    assert [one.best_epoch for one in halves] == [one.best_epoch for one in whole]
    assert_same_checkpoint(tmp_path / "second/epoch-5.ckpt", tmp_path / "whole/epoch-5.ckpt")


@pytest.mark.parametrize(
    "augment",
    [
        {"preset": "heavy", "policy": "randaugment", "strength": 0.7, "mixup": 0.4, "cutmix": 1.0},
        {"preset": "basic", "policy": "trivialaugment", "erasing": 0.5, "cached_views": 2},
    ],
)
def test_resumed_equals_uninterrupted_with_every_augmentation(
    tmp_path: Path, augment: dict[str, Any]
) -> None:
    settings = config(epochs=3, augment=augment)
    whole = run(settings, checkpoint=files(tmp_path))
    resumed = run(settings, resume=whole[0].checkpoint)
    assert numbers(resumed) == numbers(whole[1:])


def test_early_stopping_counts_across_a_resume(tmp_path: Path) -> None:
    settings = config(
        epochs=20,
        optimizer={"lr": 1e-9},
        early_stopping={"patience": 3, "metric": "val_top1"},
        schedule={"name": "constant"},
    )
    whole = run(settings, checkpoint=files(tmp_path))
    assert len(whole) < 20
    assert whole[-1].last
    resumed = run(settings, resume=whole[1].checkpoint)
    assert [one.epoch for one in resumed] == [one.epoch for one in whole[2:]]
    assert run(settings, resume=whole[-1].checkpoint) == []


def test_the_best_epoch_is_kept_and_not_twice(tmp_path: Path) -> None:
    settings = config(epochs=6, optimizer={"lr": 2.0})
    results = run(settings, metric="val_loss", checkpoint=files(tmp_path))
    losses = [one.metrics["val_loss"] for one in results]
    for one in results:
        assert one.best_epoch == losses.index(min(losses[: one.epoch])) + 1
        assert one.checkpoint is not None
        kept = Checkpoint.load(one.checkpoint)
        assert (kept.best is None) is (one.best_epoch == one.epoch)
    last = results[-1]
    assert last.best_epoch < last.epoch
    assert last.checkpoint is not None
    best = files(tmp_path)(last.best_epoch)
    assert_same(best_weights(last.checkpoint), Checkpoint.load(best).model)
    assert results[-2].best_epoch == last.best_epoch < results[-2].epoch
    again = files(tmp_path / "again")
    run(settings, metric="val_loss", checkpoint=again, resume=results[-2].checkpoint)
    assert_same_checkpoint(again(6), last.checkpoint)


def test_without_validation_the_last_epoch_is_the_best(tmp_path: Path) -> None:
    data = dataclasses.replace(DATA, val=None)
    results = run(config(epochs=2), data, checkpoint=files(tmp_path))
    assert [one.best_epoch for one in results] == [1, 2]
    assert "val_loss" not in results[0].metrics


def test_early_stopping_without_validation_says_what_to_do() -> None:
    data = dataclasses.replace(DATA, val=None)
    with pytest.raises(TrialFailed, match=r"early_stopping\.metric: val_loss is not measured"):
        run(config(early_stopping={"patience": 2}), data)


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    results = run(config(epochs=6, optimizer={"lr": 100.0, "weight_decay": 10.0}))
    assert results[-1].diverged
    assert results[-1].last
    assert len(results) < 6
    assert not any(one.diverged for one in results[:-1])


def test_another_configuration_cannot_resume(tmp_path: Path) -> None:
    results = run(config(epochs=2), checkpoint=files(tmp_path))
    with pytest.raises(Damaged, match=r"optimizer\.lr = 0\.05 instead of 0\.1"):
        run(config(epochs=2, optimizer={"lr": 0.1}), resume=results[0].checkpoint)


class Counts(NullControl):
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def step(self, *, epoch: int, images: int) -> None:
        self.seen.append((epoch, images))


def test_the_control_hears_of_every_image() -> None:
    control = Counts()
    run(config(epochs=2), control=control)
    for epoch in (1, 2):
        assert sum(images for at, images in control.seen if at == epoch) == 70 + 30


def test_leaving_the_loop_closes_the_training() -> None:
    control = Counts()
    with closing(train.train(config(), DATA, control, device=CPU)) as results:
        next(results)
    calls = len(control.seen)
    assert next(results, None) is None
    assert len(control.seen) == calls


def batch(images: int = 8) -> learner.Batch:
    torch.manual_seed(0)
    return torch.randn(images, 3, 8, 8), torch.arange(images) % 3


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    settings = config(model={"architecture": "small_cnn", "cnn": {"filters": [4]}, "dropout": 0.0})
    steps = []
    for size in (8, 3):
        torch.manual_seed(1)
        made = Learner(settings, classes=3, device=CPU, micro_batch=size)
        made.model.eval()
        means = RunningMeans(CPU)
        made.step(batch(), 0.1, means)
        steps.append((means.read(), [part.grad for part in made.model.parameters()]))
    assert steps[0][0] == pytest.approx(steps[1][0])
    for whole, summed in zip(steps[0][1], steps[1][1], strict=True):
        torch.testing.assert_close(whole, summed)


def test_gradients_are_clipped() -> None:
    made = Learner(config(clip_grad_norm=0.01), classes=3, device=CPU)
    made.step(batch(), 0.1)
    norms = [part.grad.norm() for part in made.model.parameters() if part.grad is not None]
    assert torch.stack(norms).norm() == pytest.approx(0.01, rel=1e-3)


def test_frozen_blocks_do_not_move_nor_do_their_statistics() -> None:
    settings = config(model={"cnn": {"filters": [4, 8]}, "trainable_blocks": 1})
    made = Learner(settings, classes=3, device=CPU)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    made.train_mode()
    made.step(batch(), 0.1)
    moved = {
        name for name, value in made.model.state_dict().items() if (value != before[name]).any()
    }
    assert not any(name.startswith("features.0") for name in moved)
    assert "features.1.norm.running_mean" in moved
    assert "classifier.1.weight" in moved


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precisions_and_layouts_train(precision: str, layout: str, tmp_path: Path) -> None:
    runtime = {"precision": precision, "memory_format": layout, "threads": 1}
    settings = config(epochs=2, runtime=runtime)
    whole = run(settings, checkpoint=files(tmp_path))
    assert np.isfinite(whole[-1].metrics["val_loss"])
    resumed = run(settings, resume=whole[0].checkpoint)
    assert numbers(resumed) == numbers(whole[1:])


def test_evaluation_of_known_logits() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [2.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1, 2])
    batches = [(logits[:2], labels[:2]), (logits[2:], labels[2:])]
    found = evaluate(
        nn.Identity(), batches, classes=3, device=CPU, precision="float32", control=NullControl()
    )
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert (found.top1, found.top5) == (pytest.approx(2 / 3), 1.0)
    assert found.confusion.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert found.predictions.tolist() == [0, 1, 0]


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Networks run out of memory at more than `most` images, from step `after` on."""
    limits: dict[str, Any] = {"most": 10**9, "after": 0, "steps": 0}
    limits["error"] = partial(torch.OutOfMemoryError, "CUDA out of memory")
    original = models.build

    def check(model: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        limits["steps"] += 1
        if len(inputs[0]) > limits["most"] and limits["steps"] > limits["after"]:
            raise limits["error"]()

    def build(*args: Any, **kwargs: Any) -> nn.Module:
        model = original(*args, **kwargs)
        model.register_forward_pre_hook(check)
        return model

    monkeypatch.setattr(models, "build", build)
    return limits


def test_out_of_memory_halves_the_micro_batch(small_device: dict[str, Any]) -> None:
    small_device["most"] = 5
    results = run(config(epochs=2))
    assert [one.micro_batch for one in results] == [4, 4]
    small_device["most"] = 10**9
    runtime = {
        "precision": "float32",
        "memory_format": "contiguous",
        "micro_batch": 4,
        "threads": 1,
    }
    assert numbers(results) == numbers(run(config(epochs=2, runtime=runtime)))


@pytest.mark.parametrize(
    "message",
    [
        "MPS backend out of memory (MPS allocated: 17.36 GB, other allocations: 613.56 MB, ...",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_lack_of_memory_has_several_names(small_device: dict[str, Any], message: str) -> None:
    small_device |= {"most": 8, "error": partial(RuntimeError, message)}
    assert run(config(epochs=1))[0].micro_batch == 8
    small_device["error"] = partial(RuntimeError, "CUDA error: unspecified launch failure")
    with pytest.raises(RuntimeError, match="launch failure"):
        run(config(epochs=1))


def test_out_of_memory_gives_the_memory_back_before_it_goes_on(
    small_device: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[nn.Module]] = []
    alive: list[int] = []
    original = models.build

    def build(*args: Any, **kwargs: Any) -> nn.Module:
        alive.append(sum(one() is not None for one in made))
        model = original(*args, **kwargs)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models, "build", build)
    small_device["most"] = 5
    assert run(config(epochs=1))[0].micro_batch == 4
    assert alive == [0, 0, 0]  # 16, 8, 4 images at once


def test_out_of_memory_later_goes_back_to_the_checkpoint(
    small_device: dict[str, Any], tmp_path: Path
) -> None:
    # An epoch runs the network seven times: this is in the second one.
    small_device |= {"most": 8, "after": 9}
    results = run(config(epochs=3), checkpoint=files(tmp_path))
    assert [(one.epoch, one.micro_batch) for one in results] == [(1, 16), (2, 8), (3, 8)]
    resumed = run(config(epochs=3), resume=results[1].checkpoint)
    assert numbers(resumed) == numbers(results[2:])
    assert resumed[0].micro_batch == 8


def test_out_of_memory_later_without_a_checkpoint_fails(small_device: dict[str, Any]) -> None:
    small_device |= {"most": 8, "after": 9}
    with pytest.raises(TrialFailed, match="epoch 2, without a checkpoint"):
        run(config(epochs=3))


def test_a_network_that_does_not_fit_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_args: Any, **_kwargs: Any) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models, "build", build)
    with pytest.raises(TrialFailed, match="small_cnn alone does not fit in memory"):
        run(config())


def test_one_image_cannot_teach_batch_norm() -> None:
    settings = config(batch_size=1, augment={}, model={"cnn": {"filters": [4, 4, 4, 4]}})
    with pytest.raises(TrialFailed, match="a batch of 1 cannot be trained on"):
        run(settings)


def test_out_of_memory_to_the_end_fails_the_trial(small_device: dict[str, Any]) -> None:
    small_device["most"] = 0
    with pytest.raises(TrialFailed, match="out of memory even with 2 images at once"):
        run(config())
