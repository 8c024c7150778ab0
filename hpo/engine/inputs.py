"""What a training sees, and the batches that are made of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpo.definition.config import TrainConfig
from hpo.engine.features import Features
from hpo.engine.images import Images
from hpo.engine.learner import memory_format
from hpo.engine.loader import EvalBatches, TrainBatches


@dataclass(frozen=True)
class TrainingData:
    """What a training may see: never the test images."""

    classes: int
    train: Images
    val: Images | None
    """None: train on everything; there are no val_ metrics, and the best epoch is the last."""
    mean: tuple[float, ...]
    """Per channel, of pixels scaled to 0..1."""
    std: tuple[float, ...]


def training_batches(
    config: TrainConfig,
    data: TrainingData,
    device: torch.device,
    micro_batch: int,
    train_features: Features | None,
    val_features: Features | None,
) -> tuple[TrainBatches, EvalBatches | None]:
    layout = memory_format(config.runtime.memory_format)
    training = TrainBatches(
        data.train,
        mean=data.mean,
        std=data.std,
        augment=config.augment,
        image_size=config.data.image_size,
        batch_size=config.batch_size,
        device=device,
        memory_format=layout,
        seed=config.seed,
        loader_workers=config.data.loader_workers,
        balanced=config.data.balance == "sampling",
        features=train_features,
    )
    if data.val is None:
        return training, None
    return training, eval_batches(data.val, config, data, device, micro_batch, val_features)


def eval_batches(
    images: Images,
    config: TrainConfig,
    data: TrainingData,
    device: torch.device,
    micro_batch: int,
    features: Features | None = None,
) -> EvalBatches:
    return EvalBatches(
        images,
        mean=data.mean,
        std=data.std,
        image_size=config.data.image_size,
        batch_size=min(micro_batch, config.batch_size),
        device=device,
        memory_format=memory_format(config.runtime.memory_format),
        loader_workers=config.data.loader_workers,
        features=features,
    )
