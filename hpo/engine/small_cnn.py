"""The convolutional network that `model.cnn` describes; its defaults suit images from 8 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from hpo.definition.cnn import COLOURS, CnnConfig, repeated


class SmallCnn(nn.Module):
    """The convolutions of `config`, a pool to a fixed size or none, fully connected layers with
    dropout before the last. Maps (B, 3, S, S) to (B, classes) logits, S being `image_size`."""

    def __init__(self, config: CnnConfig, classes: int, image_size: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*_blocks(config))
        pooled = config.adaptive_pool
        self.avgpool = nn.AdaptiveAvgPool2d(pooled) if pooled else nn.Identity()
        self.flatten = nn.Flatten()
        side = pooled or _last_side(config, image_size)
        sizes = (config.filters[-1] * side * side, *config.hidden)
        self.classifier = _classifier(sizes, classes, config.dropout)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.flatten(self.avgpool(self.features(images))))
        return logits


class Block(nn.Module):
    """One convolution with what follows it: batch norm, its input added, ReLU, pool."""

    def __init__(self, conv: nn.Conv2d, norm: bool, residual: bool, pool: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels) if norm else nn.Identity()
        self.residual = residual
        self.relu = nn.ReLU(inplace=True)
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        out = self.norm(self.conv(images))
        if self.residual:
            out = out + images
        pooled: Tensor = self.pool(self.relu(out))
        return pooled


def _blocks(config: CnnConfig) -> list[Block]:
    count = len(config.filters)
    inputs = (COLOURS, *config.filters)
    kernels, strides = repeated(config.kernels, count), repeated(config.strides, count)
    norm, residual = repeated(config.norm, count), repeated(config.residual, count)
    pools = repeated(config.pool_sizes, count)
    return [
        Block(
            nn.Conv2d(
                inputs[i], config.filters[i], kernels[i], strides[i], padding=kernels[i] // 2
            ),
            norm[i],
            residual[i],
            _pool(config.pool, pools[i]),
        )
        for i in range(count)
    ]


def _pool(kind: str, size: int) -> nn.Module:
    if size == 1:
        return nn.Identity()
    if kind == "max":
        return nn.MaxPool2d(size, ceil_mode=True)
    return nn.AvgPool2d(size, ceil_mode=True)


def _last_side(config: CnnConfig, side: int) -> int:
    """Side of the last picture: an odd kernel with its padding, and a pool that rounds up, leave
    the quotient by their stride, rounded up."""
    count = len(config.filters)
    steps = zip(repeated(config.strides, count), repeated(config.pool_sizes, count), strict=True)
    for stride, pool in steps:
        side = -(-side // stride)
        side = -(-side // pool)
    return side


def _classifier(sizes: Sequence[int], classes: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(sizes[-1], classes))
