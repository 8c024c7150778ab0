"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), as torchvision does them: a batch is
mixed with itself, shifted by one picture, and one weight holds for the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hpo.definition.augment import AugmentConfig
from hpo.engine.augment.seeds import seed_of

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Mix:
    """What happens to one batch."""

    weight: float
    """Of a picture's own label, 0..1; the shifted one has the rest."""
    box: Box | None = None
    """(top, left, bottom, right), cut from the shifted batch; None: a blend by weight."""


@dataclass(frozen=True)
class Mixed:
    """Labels of a mixed batch."""

    labels: Tensor
    """(B,) int64."""
    others: Tensor
    """(B,) int64, of what was mixed in."""
    weight: float
    """Of `labels`, 0..1; `others` have the rest."""

    def __len__(self) -> int:
        return len(self.labels)

    def tensor_split(self, parts: int) -> list[Mixed]:
        """The same for each part of the batch, as `Tensor.tensor_split`."""
        pairs = zip(self.labels.tensor_split(parts), self.others.tensor_split(parts), strict=True)
        return [Mixed(labels, others, self.weight) for labels, others in pairs]


def draw(config: AugmentConfig, size: int, steps: int, seed: int, epoch: int) -> list[Mix | None]:
    """One Mix for each batch of an epoch, of pictures of `size` pixels; None: not mixed."""
    if not config.mixup and not config.cutmix:
        return [None] * steps
    source = np.random.default_rng(seed_of(seed, epoch, "mix"))
    cut = source.random(steps) < (0.5 if config.mixup and config.cutmix else bool(config.cutmix))
    drawn: list[Mix | None] = []
    for cuts in cut.tolist():
        alpha = config.cutmix if cuts else config.mixup
        weight = float(source.beta(alpha, alpha))
        drawn.append(_cut(weight, size, source) if cuts else Mix(weight))
    return drawn


def _cut(weight: float, size: int, source: np.random.Generator) -> Mix:
    """A square of 1 - weight of the area around any pixel; what lies outside does not count."""
    y, x = source.integers(size, size=2).tolist()
    half = int(0.5 * math.sqrt(1 - weight) * size)
    top, left = max(y - half, 0), max(x - half, 0)
    bottom, right = min(y + half, size), min(x + half, size)
    return Mix(1 - (bottom - top) * (right - left) / size**2, (top, left, bottom, right))


def apply(pictures: Tensor, labels: Tensor, mix: Mix) -> tuple[Tensor, Mixed]:
    """Mix (B, C, S, S) pictures, in place, and their (B,) labels."""
    shifted = pictures.roll(1, 0)
    if mix.box is None:
        pictures.mul_(mix.weight).add_(shifted, alpha=1 - mix.weight)
    else:
        top, left, bottom, right = mix.box
        inside = (..., slice(top, bottom), slice(left, right))
        pictures[inside] = shifted[inside]
    return pictures, Mixed(labels, labels.roll(1, 0), mix.weight)


def mean_loss(labels: Tensor | Mixed, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """`loss` of the labels; of mixed ones both losses by their weights."""
    if isinstance(labels, Tensor):
        return loss(labels)
    return labels.weight * loss(labels.labels) + (1 - labels.weight) * loss(labels.others)


def dominant(labels: Tensor | Mixed) -> Tensor:
    """(B,) int64: of mixed labels those of the larger weight."""
    if isinstance(labels, Tensor):
        return labels
    return labels.labels if labels.weight >= 0.5 else labels.others
