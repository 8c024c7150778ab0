"""A small convolutional network for small images; runs from 8 pixels up."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class SmallCnn(nn.Module):
    """Per filter a 3 x 3 convolution, batch norm, ReLU and 2 x 2 max-pool; then the average over
    the picture, dropout, and a linear layer.

    Max-pools round up, so that any number of filters fits any image. Maps (B, 3, S, S) to
    (B, classes) logits.
    """

    def __init__(self, filters: Sequence[int], classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        channels = (3, *filters)
        self.features = nn.Sequential(
            *(_block(*pair) for pair in zip(channels, filters, strict=False))
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(filters[-1], classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.flatten(self.avgpool(self.features(images))))
        return logits


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, ceil_mode=True),
    )
