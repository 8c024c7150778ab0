"""Networks of one's own that benchmarks train."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


class NarrowResNet(ResNet):
    """A ResNet of basic blocks with a quarter of the channels, for images of some 8 to 32 pixels:
    a first convolution of 3 x 3 with stride 1, and no max-pool."""

    def __init__(self, layers: list[int], classes: int) -> None:
        super().__init__(BasicBlock, layers)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.maxpool = nn.Identity()
        self.fc = nn.Linear(128, classes)

    def _make_layer(
        self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        self.inplanes = planes // 4 if planes == 64 else self.inplanes
        return super()._make_layer(block, planes // 4, blocks, stride, dilate)


def narrow_resnet18(classes: int, image_size: int) -> nn.Module:
    """What `model.architecture = "benchmarks.networks:narrow_resnet18"` names."""
    return NarrowResNet([2, 2, 2, 2], classes)
