"""What is done about classes of unequal size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hpo.engine.images import Numbers


def class_weights(labels: Numbers, classes: int) -> Tensor:
    """(C,) float64: N / (C n_c), scikit-learn's `balanced`, whose mean over the images is 1; C are
    the classes that `labels` (N,) has. A class without images has weight 1."""
    counts = np.bincount(labels, minlength=classes)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.from_numpy(np.where(counts > 0, weights, 1.0))


def weighted_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor, label_smoothing: float
) -> Tensor:
    """The mean () of each image's cross-entropy times its class's weight. Unlike torch's own, the
    sum is divided by the number of images, so that parts of a batch add up."""
    losses = functional.cross_entropy(
        logits, labels, reduction="none", label_smoothing=label_smoothing
    )
    return (losses * weights[labels]).mean()


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) places drawn with replacement, each class of `labels` (N,) with equal probability."""
    counts = torch.bincount(labels)
    present = counts.nonzero()[:, 0]
    drawn = present[torch.randint(len(present), (len(labels),), generator=generator)]
    # Of each class its pictures stand together in `by_class`.
    by_class = labels.argsort(stable=True)
    first = counts.cumsum(0) - counts
    within = (torch.rand(len(labels), generator=generator, dtype=torch.float64)
              * counts[drawn]).long()  # fmt: skip
    return by_class[first[drawn] + within]
