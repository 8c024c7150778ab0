"""What only a CUDA device can show: no waiting inside an epoch, recorded steps, lack of memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.config.train import TrainConfig
from hpo.control import NullControl
from hpo.training import device as runtime
from hpo.training import inputs, train
from hpo.training.checkpoint import Checkpoint
from hpo.training.learner import Learner
from hpo.training.train import EpochResult, Network
from tests.harness.training import CPU, DATA, config, files, numbers

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device here", allow_module_level=True)

SAME = {"precision": "float32", "memory_format": "contiguous", "threads": 1}
GPU = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Nothing of the last test is left on the device, nor its settings."""
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, False
    torch.cuda.empty_cache()


def settings(**fields: Any) -> TrainConfig:
    given = SAME | fields.pop("runtime", {})
    return config(runtime=given, **fields)


def run(wanted: TrainConfig, **options: Any) -> list[EpochResult]:
    return list(train.train(wanted, DATA, NullControl(), device=GPU, **options))


AUGMENTS: dict[str, dict[str, Any]] = {
    "crops": {"horizontal_flip": 0.5, "crop_padding": 1},
    "colours": {
        "brightness": 0.2,
        "contrast": 0.2,
        "saturation": 0.2,
        "hue": 0.1,
        "grayscale": 0.2,
    },
    "warps": {"rotation": 10.0, "translate": 0.1, "perspective": 0.2},
    "mixed": {"mixup": 0.2, "cutmix": 0.5, "erasing": 0.3},
    "policy": {"policy": "randaugment"},
    "resized": {"random_resized_crop": [0.5, 1.0]},
}


@pytest.mark.parametrize("compiled", ["none", "cuda-graph"])
@pytest.mark.parametrize("augment", AUGMENTS)
def test_nothing_waits_for_the_device_inside_an_epoch(augment: str, compiled: str) -> None:
    wanted = settings(
        augment=AUGMENTS[augment],
        runtime={"deterministic": False, "compile": compiled, "precision": "bfloat16"},
        ema_decay=0.9,
        clip_grad_norm=1.0,
        label_smoothing=0.1,
    )
    network = Network(wanted, DATA, NullControl(), GPU, wanted.batch_size, None)
    network.build(None, 1)
    network.epoch(1, [])  # prepares, and records a step
    network.prepare(2)
    batches = network.make_batches(2)
    assert batches.train is not None
    rates = [0.01] * len(batches.train)
    torch.cuda.set_sync_debug_mode("error")
    try:
        means = network.train_epoch(2, batches.train, rates)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(means.read()[0])


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_recorded_steps_learn_what_the_others_do(optimizer: str, tmp_path: Path) -> None:
    """Dropout, averages, a short last batch and two phases included."""
    fields: dict[str, Any] = {
        "optimizer": {"name": optimizer, "lr": 0.005},
        "ema_decay": 0.9,
        "phases": [{"epochs": 2, "trainable_blocks": 0}, {"epochs": 2}],
    }
    wanted = [
        settings(runtime={"deterministic": True, "compile": compiled}, **fields)
        for compiled in ("none", "cuda-graph")
    ]
    plain, recorded = (run(one, checkpoint=files(tmp_path / one.runtime.compile)) for one in wanted)
    for ours, theirs in zip(recorded, plain, strict=True):
        assert ours.metrics["train_loss"] == pytest.approx(theirs.metrics["train_loss"], rel=1e-3)
    assert recorded[-1].checkpoint is not None
    assert plain[-1].checkpoint is not None
    ours, theirs = Checkpoint.load(recorded[-1].checkpoint), Checkpoint.load(plain[-1].checkpoint)
    for name, tensor in theirs.model.items():
        torch.testing.assert_close(ours.model[name], tensor, rtol=1e-2, atol=1e-3)


def test_steps_are_recorded(caplog: pytest.LogCaptureFixture) -> None:
    wanted = settings(runtime={"deterministic": False, "compile": "cuda-graph"}, batch_size=16)
    learner = Learner(wanted, classes=3, device=GPU)
    learner.train_mode()
    images, labels = torch.randn(16, 3, 8, 8, device=GPU), torch.arange(16, device=GPU) % 3
    before = [part.detach().clone() for part in learner.model.parameters()]
    for _ in range(8):
        learner.step((images, labels), lr=0.01)
    assert learner._step._replay is not None  # type: ignore[attr-defined]
    assert not [one for one in caplog.records if "recorded" in one.message]
    after = list(learner.model.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("compiled", ["none", "cuda-graph"])
def test_resumed_equals_uninterrupted_where_it_is_deterministic(
    compiled: str, tmp_path: Path
) -> None:
    wanted = settings(runtime={"deterministic": True, "compile": compiled})
    whole = run(wanted, checkpoint=files(tmp_path / "whole"))
    rest = run(wanted, checkpoint=files(tmp_path / "rest"), resume=whole[1].checkpoint)
    assert numbers(rest) == numbers(whole[2:])


@pytest.mark.parametrize("compiled", ["none", "cuda-graph"])
def test_lack_of_memory_is_answered_by_a_smaller_micro_batch(compiled: str, tmp_path: Path) -> None:
    wanted = settings(
        batch_size=64,
        epochs=2,
        data={"image_size": 8},
        model={"cnn": {"filters": [4096, 16, 4096, 16], "kernels": [1], "pool_sizes": [1]}},
        runtime={"deterministic": False, "compile": compiled},
    )
    free = run(wanted, checkpoint=files(tmp_path / "free"))
    peak = free[0].metrics["peak_memory_mb"] * 1e6
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.empty_cache()
    # Nearly all of it are outputs of layers: half a batch needs half.
    torch.cuda.set_per_process_memory_fraction(0.7 * peak / total, GPU)
    try:
        small = run(wanted, checkpoint=files(tmp_path / "small"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    assert len(small) == 2
    assert small[-1].micro_batch < 64


def test_choices_are_measured_and_none_is_left_open() -> None:
    wanted = config(runtime={}, batch_size=64)
    found = runtime.resolve(wanted, classes=3, device=GPU, threads=1)
    assert "auto" not in (found.precision, found.memory_format, found.compile)
    assert found.deterministic is False


def test_larger_batches_change_no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = settings(runtime={"deterministic": True, "compile": "none"})
    large = run(wanted)
    monkeypatch.setattr(inputs, "EVALUATED", 1)
    small = run(wanted)
    for ours, theirs in zip(large, small, strict=True):
        assert ours.metrics["train_loss"] == theirs.metrics["train_loss"]
        assert ours.metrics["val_loss"] == pytest.approx(theirs.metrics["val_loss"], rel=1e-4)


def test_a_trial_moves_to_the_cpu_and_back(tmp_path: Path) -> None:
    wanted = settings(
        optimizer={"name": "adamw", "lr": 0.01},
        runtime={"deterministic": False, "compile": "cuda-graph"},
    )
    there = run(wanted, checkpoint=files(tmp_path / "gpu"))
    moved = list(
        train.train(wanted, DATA, NullControl(), device=CPU, checkpoint=files(tmp_path / "cpu"),
                    resume=there[0].checkpoint)
    )  # fmt: skip
    back = run(wanted, checkpoint=files(tmp_path / "back"), resume=moved[0].checkpoint)
    assert [one.epoch for one in back] == [3, 4]
    assert all(math.isfinite(one.metrics["train_loss"]) for one in back)


@pytest.mark.slow
def test_a_compiled_network_is_recorded_too(caplog: pytest.LogCaptureFixture) -> None:
    same = run(settings(runtime={"deterministic": False, "compile": "none"}, model={"cnn": {}}))
    compiled = run(
        settings(runtime={"deterministic": False, "compile": "inductor"}, model={"cnn": {}})
    )
    assert not [one for one in caplog.records if "not compiled" in one.message]
    assert compiled[-1].metrics["train_loss"] == pytest.approx(
        same[-1].metrics["train_loss"], rel=0.1
    )
