"""What is done about classes of unequal size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hpo.engine.images import Numbers


def class_weights(labels: Numbers, classes: int) -> Tensor:
    """(C,) float64: N / (C n_c), scikit-learn's `balanced`, whose mean over the images is 1; C are
    the classes that `labels` (N,) has. A class without images has weight 1."""
    counts = np.bincount(labels, minlength=classes)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.from_numpy(np.where(counts > 0, weights, 1.0))


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
