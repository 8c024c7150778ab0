"""The data of a training, and its batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpo.config.train import TrainConfig
from hpo.data.images import Images
from hpo.training.feature_cache import NO_AUGMENT, Features, FeatureSets, View
from hpo.training.learner import memory_format
from hpo.training.loader import EvalBatches, TrainBatches

EVALUATED = 4
"""Times as many images as in training are evaluated at once on a GPU."""


@dataclass(frozen=True)
class TrainingData:
    """Everything that a training may see, which is never the test images."""

    classes: int
    train: Images
    val: Images | None
    """None: train on everything; there are no val_ metrics, and the best epoch is the last."""
    mean: tuple[float, ...]
    """Mean of each channel, of pixels scaled to 0..1."""
    std: tuple[float, ...]
    names: tuple[str, ...] = ()
    """Class names; needed only by metrics of a single class."""


@dataclass(frozen=True)
class Batches:
    """The batches of an epoch."""

    train: TrainBatches | None
    """None if nothing is trained."""
    val: EvalBatches | None
    gallery: EvalBatches | None
    """Training images without augmentation, among which the validation images are looked up."""


def views(config: TrainConfig, data: TrainingData) -> list[View]:
    """Return all images of an epoch with their augmentation."""
    learnt = [] if config.frozen else [(data.train, config.augment)]
    if data.val is None:
        return learnt
    gallery = [(data.train, NO_AUGMENT)] if config.looks_up else []
    return [*learnt, *gallery, (data.val, NO_AUGMENT)]


def make_batches(
    config: TrainConfig,
    data: TrainingData,
    device: torch.device,
    micro_batch: int,
    cached: FeatureSets,
) -> Batches:
    """Return the batches of all `views`, with the features of those that are `cached`."""

    def plain(images: Images) -> EvalBatches:
        features = cached.get((images, NO_AUGMENT))
        return eval_batches(images, config, data.mean, data.std, device, micro_batch, features)

    looked_up = config.looks_up and data.val is not None
    return Batches(
        train=None if config.frozen else _train_batches(config, data, device, cached),
        val=None if data.val is None else plain(data.val),
        gallery=plain(data.train) if looked_up else None,
    )


def _train_batches(
    config: TrainConfig, data: TrainingData, device: torch.device, cached: FeatureSets
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
        features=cached.get((data.train, config.augment)),
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
    """Return batches of `images` without augmentation, in order, as large as those of training; on
    a GPU EVALUATED times that, which takes less memory than a training step: no output is kept."""
    size = min(micro_batch or config.batch_size, config.batch_size)
    return EvalBatches(
        images,
        mean=mean,
        std=std,
        image_size=config.data.image_size,
        batch_size=EVALUATED * size if device.type == "cuda" else size,
        device=device,
        memory_format=memory_format(config.runtime.memory_format),
        loader_workers=0 if images.in_memory else config.data.loader_workers,
        features=features,
    )
