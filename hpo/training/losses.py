"""Training losses by name: cross-entropy, focal loss, or a user function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hpo.config.train import TrainConfig
from hpo.data import user_code
from hpo.errors import ConfigError
from hpo.training import models

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps logits (B, C) float32 and labels (B,) int64 to their mean loss ()."""


def make_loss(config: TrainConfig, class_weights: Tensor | None = None) -> Loss:
    """Return the loss that `config` names, each image weighted by its class's weight, (C,) float32.

    Raises ConfigError if a user function cannot be found and, when called, if it raises or returns
    anything but a loss.
    """
    smoothing = config.label_smoothing
    if config.loss not in ("cross_entropy", "focal"):
        return _own(config.loss)
    if config.loss == "cross_entropy" and class_weights is None:
        return partial(functional.cross_entropy, label_smoothing=smoothing)
    gamma = config.focal_gamma if config.loss == "focal" else 0.0

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        losses = focal(logits, labels, gamma, smoothing)
        # Unlike torch's own weighted mean: divided by the images, so that parts of a batch add up.
        return (losses if class_weights is None else losses * class_weights[labels]).mean()

    return loss


def focal(logits: Tensor, labels: Tensor, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """Return (B,) focal losses: (1 - p)^gamma times each image's cross-entropy, with p the
    probability of its true class (Lin et al. 2017, equation 4); gamma = 0 is the cross-entropy
    itself."""
    losses = functional.cross_entropy(
        logits, labels, reduction="none", label_smoothing=label_smoothing
    )
    if gamma == 0:
        return losses
    right = logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]
    # At p = 1 a power below 1 has no finite slope.
    wrong = (1 - right).clamp_min(torch.finfo(logits.dtype).eps)
    return wrong**gamma * losses


def _own(name: str) -> Loss:
    function = user_code.load(name, "loss")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        returned = models.call_user_function(function, repr(name), "loss", logits, labels)
        return _mean(returned, name, len(labels))

    return loss


def _mean(returned: Any, name: str, images: int) -> Tensor:
    if not isinstance(returned, Tensor):
        raise _wrong(name, type(returned).__name__, images)
    if returned.shape not in ((), (images,)):
        raise _wrong(name, f"a tensor of shape {tuple(returned.shape)}", images)
    if not returned.is_floating_point() or (torch.is_grad_enabled() and not returned.requires_grad):
        raise _wrong(name, "a tensor without a gradient", images)
    return returned.mean()


def _wrong(name: str, got: str, images: int) -> ConfigError:
    allowed = f"a differentiable tensor of shape () or ({images},)"
    message = f"{name!r} returned {got} for {images} images; allowed: {allowed}"
    return ConfigError(message, key="loss")
