"""Pictures as vectors: what a network knows of them before its classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpo.engine import models
from hpo.engine.control import Control
from hpo.engine.images import Images, Numbers
from hpo.engine.learner import Batch, Evaluation, evaluate

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Embedded:
    """N pictures as vectors, in their order."""

    features: Vectors
    """(N, D)."""
    labels: Numbers
    """(N,) int64."""
    names: tuple[str, ...]
    identities: tuple[str, ...]
    """As those of `Images`."""

    def __len__(self) -> int:
        return len(self.names)


def embed(
    model: nn.Module,
    images: Images,
    batches: Iterable[Batch],
    *,
    classes: int,
    device: torch.device,
    precision: str,
    control: Control,
    epoch: int = 0,
    judged: nn.Module | None = None,
) -> tuple[Embedded, Evaluation]:
    """`images`, which `batches` gives in their order, as `model` sees them in eval mode, and what
    its classifier makes of them. `model` comes from `models.build`; `judged` is its suffix, where
    `batches` hold what its prefix makes of the images."""
    with _Listening(classifier(model)) as heard:
        found = evaluate(
            judged or model,
            batches,
            classes=classes,
            device=device,
            precision=precision,
            control=control,
            epoch=epoch,
        )
    features = torch.cat(heard.parts).numpy()
    return Embedded(features, images.labels, images.names, images.identities), found


def classifier(model: nn.Module) -> nn.Module:
    """The first layer of the head of `model` that learns to tell classes: its input, pooled, are
    the features."""
    head = model.get_submodule(models.family(model).head)
    return next(part for part in head.modules() if isinstance(part, nn.Linear | nn.Conv2d))


def width(model: nn.Module, image_size: int) -> int:
    """How many features `model` gives, D, from shapes alone, which costs milliseconds."""
    tensors = dict(model.state_dict(keep_vars=True))
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    model.eval()
    with torch.no_grad(), _Listening(classifier(model), lambda heard: heard) as heard:
        torch.func.functional_call(model, shapes, (images,))
    return heard.parts[0].shape[1]


def pooled(features: Tensor) -> Tensor:
    """(B, D) float32: the mean over the places of a map (B, D, H, W), which squeezenet has before
    its classifier; vectors as they are."""
    return (features.float().mean((2, 3)) if features.ndim == 4 else features.float()).flatten(1)


class _Listening:
    """Keeps what comes into a layer, pooled, batch by batch; `keep` says where."""

    def __init__(self, layer: nn.Module, keep: Callable[[Tensor], Tensor] = Tensor.cpu) -> None:
        self.parts: list[Tensor] = []
        self._keep = keep
        self._handle = layer.register_forward_pre_hook(self._hear)

    def _hear(self, layer: nn.Module, inputs: Sequence[Any]) -> None:
        self.parts.append(self._keep(pooled(inputs[0])))

    def __enter__(self) -> _Listening:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handle.remove()
