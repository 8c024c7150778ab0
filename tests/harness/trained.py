"""Small folders of pictures, and configurations that train on them in a moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hpo.config.base import with_values
from hpo.config.train import TrainConfig
from hpo.paths import Home
from hpo.trained.inference import Prediction, TrainedModel
from hpo.trained.retrain import retrain
from hpo.trained.run import TrainedRun
from tests.harness.images import make_folder

SPLITS = {"train": 8, "val": 4, "test": 5}
"""Pictures of each of the three classes."""


def tiny_config(root: Path, values: Mapping[str, Any] | None = None) -> TrainConfig:
    """A training on the folder `root`, with `values` by dotted path in place."""
    base = {
        "epochs": 3,
        "batch_size": 12,
        "data": {"dataset": "folder", "root": str(root), "image_size": 12},
        "model": {"cnn": {"filters": [4]}},
        "optimizer": {"lr": 0.05},
        "runtime": {"precision": "float32", "memory_format": "contiguous", "threads": 1},
    }
    return TrainConfig.parse(with_values(base, values or {}))


def pictures(tmp_path: Path, splits: Mapping[str, int] | None = None) -> Path:
    return make_folder(tmp_path / "pictures", splits or SPLITS, size=(20, 16))


def train_run(config: TrainConfig, out: Path, home: Home, **options: Any) -> TrainedRun:
    """`retrain` on the CPU; handwritten unless `provenance` is given."""
    provenance = options.pop("provenance", {})
    return retrain(config, provenance, out=out, home=home, device="cpu", **options)


def predict(run: TrainedRun, images: Sequence[Path], k: int = 5) -> list[Prediction]:
    """Return the answers of `run` to `images`, on the CPU."""
    return TrainedModel.of_run(run, torch.device("cpu")).predict(images, k=k)
