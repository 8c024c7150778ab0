"""What a training sees, and the batches that are made of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpo.config.train import TrainConfig
from hpo.data.images import Images
from hpo.training.feature_cache import (
    PLAIN,
    Features,
    Kept,
    View,
)
from hpo.training.learner import memory_format
from hpo.training.loader import (
    EvalBatches,
    TrainBatches,
)


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
    names: tuple[str, ...] = ()
    """Of the classes; only metrics of a single class need them."""


@dataclass(frozen=True)
class Batches:
    """What an epoch goes through."""

    train: TrainBatches | None
    """None where nothing learns."""
    val: EvalBatches | None
    gallery: EvalBatches | None
    """Training images as they are, among which a retrieval looks the validation images up."""


def views(config: TrainConfig, data: TrainingData) -> list[View]:
    """All that an epoch goes through."""
    learnt = [] if config.frozen else [(data.train, config.augment)]
    if data.val is None:
        return learnt
    gallery = [(data.train, PLAIN)] if config.task == "retrieval" else []
    return [*learnt, *gallery, (data.val, PLAIN)]


def make_batches(
    config: TrainConfig, data: TrainingData, device: torch.device, micro_batch: int, kept: Kept
) -> Batches:
    """The batches of all `views`; of features where `kept` has them."""

    def plain(images: Images) -> EvalBatches:
        features = kept.get((images, PLAIN))
        return eval_batches(images, config, data.mean, data.std, device, micro_batch, features)

    looked_up = config.task == "retrieval" and data.val is not None
    return Batches(
        train=None if config.frozen else _train_batches(config, data, device, kept),
        val=None if data.val is None else plain(data.val),
        gallery=plain(data.train) if looked_up else None,
    )


def _train_batches(
    config: TrainConfig, data: TrainingData, device: torch.device, kept: Kept
) -> TrainBatches:
    return TrainBatches(
        data.train,
        mean=data.mean,
        std=data.std,
        augment=config.augment,
        image_size=config.data.image_size,
        batch_size=config.batch_size,
        device=device,
        memory_format=memory_format(config.runtime.memory_format),
        seed=config.seed,
        loader_workers=config.data.loader_workers,
        balanced=config.data.balance == "sampling",
        features=kept.get((data.train, config.augment)),
    )


def eval_batches(
    images: Images,
    config: TrainConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    micro_batch: int,
    features: Features | None = None,
) -> EvalBatches:
    """`images` as they are, in their order, in batches that fit where those of training do."""
    return EvalBatches(
        images,
        mean=mean,
        std=std,
        image_size=config.data.image_size,
        batch_size=min(micro_batch or config.batch_size, config.batch_size),
        device=device,
        memory_format=memory_format(config.runtime.memory_format),
        loader_workers=config.data.loader_workers,
        features=features,
    )
