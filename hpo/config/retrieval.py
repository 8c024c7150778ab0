"""Image retrieval: configuration of the nearest-neighbour search, and its metrics."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpo.config.base import ConfigModel

RETRIEVED = (
    "val_precision_at_5",
    "val_precision_at_k",
    "val_top1",
    "val_precision",
    "val_recall",
    "val_f1",
    "val_mean_distance",
)
"""Metrics of a retrieval, as fractions, but for the distance: the share of right classes among the
5 (k) nearest training images, and by their vote accuracy and macro precision, recall and F1."""


class RetrievalConfig(ConfigModel):
    """task = "retrieval" only: how the nearest training images of a validation image are found.

    Compared are the network's pooled features before its classifier. A network with
    model.trainable_blocks = 0 is taken as it is, in one epoch; another learns as a classifier.
    """

    k: int = Field(default=5, ge=1, le=1000)
    """Neighbours that count and vote; all training images where there are fewer."""
    distance: Literal["euclidean", "cosine"] = "euclidean"
    """euclidean, or cosine: 1 - the cosine of the angle, 0 to 2."""
    standardize: bool = False
    """Bring each feature to mean 0 and standard deviation 1 over the training images."""
    pca: int | None = Field(default=None, ge=0, le=65_536)
    """Principal components of the training images' features that are kept, after `standardize`; at
    most the smaller of images and features. None or 0: all features as they are."""
