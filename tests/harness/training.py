"""Trainings of seconds on pictures that are noise around a brightness, and their comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpo.config.train import TrainConfig
from hpo.control import NullControl
from hpo.data.images import Images
from hpo.training import train
from hpo.training.checkpoint import Checkpoint
from hpo.training.inputs import TrainingData
from hpo.training.train import EpochResult

CPU = torch.device("cpu")


class Pictures(Images):
    """Noise of 8 pixels around a brightness that is the class."""

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.names = tuple(str(number) for number in range(count))
        self.labels = rng.integers(0, 3, count)
        self.sizes = np.full((count, 2), 8)
        noise = rng.integers(0, 120, (count, 8, 8, 3))
        self._pixels = (noise + 60 * self.labels[:, None, None, None]).astype(np.uint8)

    def pixels(self, i: int) -> Any:
        return self._pixels[i]

    def stacked(self) -> Any:
        return self._pixels


DATA = TrainingData(
    classes=3,
    train=Pictures(70, 0),
    val=Pictures(30, 1),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)


def config(**fields: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "batch_size": 16,
        "data": {"image_size": 8},
        "model": {"cnn": {"filters": [4, 8]}, "dropout": 0.3},
        "optimizer": {"lr": 0.05},
        "augment": {"horizontal_flip": 0.5, "crop_padding": 1},
        "runtime": {"precision": "float32", "memory_format": "contiguous", "threads": 1},
    }
    epochs = {} if "phases" in fields else {"epochs": 4}
    return TrainConfig.parse(base | epochs | fields)


def files(folder: Path) -> Callable[[int], Path]:
    return lambda epoch: folder / f"epoch-{epoch}.ckpt"


def run(settings: TrainConfig, data: TrainingData = DATA, **options: Any) -> list[EpochResult]:
    control = options.pop("control", NullControl())
    return list(train.train(settings, data, control, device=CPU, **options))


def numbers(results: list[EpochResult]) -> list[dict[str, float]]:
    """Metrics that do not depend on the clock or on what else the process does."""
    clocked = ("seconds", "images_per_s", "peak_memory_mb")
    return [
        {key: value for key, value in one.metrics.items() if key not in clocked} for one in results
    ]


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal bit for bit, tensors in nested dicts and lists included."""
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    one, other = Checkpoint.load(ours), Checkpoint.load(theirs)
    for field in one.__dataclass_fields__:
        if field != "metrics":  # which tell the time, too
            assert_same(getattr(one, field), getattr(other, field))


def assert_resumes(settings: TrainConfig, folder: Path, after: int) -> list[EpochResult]:
    """Stopped after an epoch and resumed equals uninterrupted, bit for bit; returns the latter."""
    whole = run(settings, checkpoint=files(folder / "whole"))
    resume = whole[after - 1].checkpoint
    rest = run(settings, checkpoint=files(folder / "rest"), resume=resume)
    assert numbers(rest) == numbers(whole[after:])
    assert [one.best_epoch for one in rest] == [one.best_epoch for one in whole[after:]]
    last = whole[-1].epoch
    assert_same_checkpoint(files(folder / "rest")(last), files(folder / "whole")(last))
    return whole
