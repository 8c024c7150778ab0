"""Networks as people write them, for what must hold of any."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Own(nn.Module):
    """Three blocks of convolutions and a linear layer, to be put together by `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([convolution(3, 4), convolution(4, 4), convolution(4, 4)])
        self.fc = nn.Linear(4, 3)

    def pooled(self, maps: Tensor) -> Tensor:
        logits: Tensor = self.fc(functional.adaptive_avg_pool2d(maps, 1).flatten(1))
        return logits


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(convolution(3, 4), nn.MaxPool2d(2), convolution(4, 6))
        self.fc = nn.Linear(6 * 4 * 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.flatten(self.features(images), 1))
        return logits


class Skips(Own):
    """Functional calls, additions, and an operation in place on what crosses."""

    def forward(self, images: Tensor) -> Tensor:
        first = self.blocks[0](images)
        second = functional.leaky_relu(self.blocks[1](first) + first, 0.1)
        second.mul_(2.0)
        functional.relu_(second)
        return self.pooled(self.blocks[2](second) + second)


class DropoutBetween(Own):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.blocks[1](self.blocks[0](images))
        maps = functional.dropout(maps, 0.3, self.training)
        return self.pooled(self.drop(self.blocks[2](maps)))


class Dense(Own):
    """Every map is used at the end."""

    def forward(self, images: Tensor) -> Tensor:
        maps = [self.blocks[0](images)]
        for block in list(self.blocks)[1:]:
            maps.append(block(maps[-1]))
        return self.pooled(torch.stack(maps).sum(0))


class TwoSizes(Own):
    """Maps of two sizes and the images themselves go to what learns."""

    def forward(self, images: Tensor) -> Tensor:
        first = self.blocks[0](images)
        second = functional.max_pool2d(self.blocks[1](first), 2)
        third = self.blocks[2](first) * images.mean((1, 2, 3), keepdim=True)
        return self.pooled(functional.max_pool2d(third, 2) + second)


class Reshapes(Own):
    """Takes the number of images first and needs it last."""

    def forward(self, images: Tensor) -> Tensor:
        count, channels = images.size(0), images.shape[1]
        shape = images.shape
        maps = images
        for block in self.blocks:
            maps = block(maps)
        maps = maps.reshape(count, 4, -1).mean(2) + channels
        logits: Tensor = self.fc(maps.view(shape[0], -1)).view(images.size(0), -1)
        return logits


class WithoutGradients(Own):
    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            maps = self.blocks[1](self.blocks[0](images))
        return self.pooled(self.blocks[2](maps))


class Shared(Own):
    """One block stands before and behind what learns."""

    def forward(self, images: Tensor) -> Tensor:
        maps = self.blocks[1](self.blocks[0](images))
        return self.pooled(self.blocks[1](self.blocks[2](self.blocks[1](maps))))


class Normalizes(Own):
    """Constants that are made anew in every call, and a buffer that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]), persistent=False)
        self.shift = torch.tensor(0.5)

    def forward(self, images: Tensor) -> Tensor:
        mean = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
        maps = (images - mean) / self.get_buffer("scale").view(1, 3, 1, 1) - self.shift
        for block in self.blocks:
            maps = block(maps)
        return self.pooled(maps)


class Counts(Own):
    """A buffer counts the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.blocks[1](self.blocks[0](images))
        self.get_buffer("calls").add_(1)
        return self.pooled(self.blocks[2](maps) + self.get_buffer("calls"))


class Levels(nn.ModuleList):
    def forward(self, images: Tensor) -> dict[str, Any]:
        maps = [images]
        for block in self:
            maps.append(block(maps[-1]))
        return {"maps": maps[1:], "size": images.shape[-1], "name": "levels"}


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(8, 4, 1)

    def forward(self, found: dict[str, Any]) -> Tensor:
        assert found["name"] == "levels"
        maps: Tensor = self.mix(torch.cat(found["maps"], 1)) / found["size"]
        return maps


class Dictionary(nn.Module):
    """A backbone that gives more than a tensor to a neck that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Levels([convolution(3, 4), convolution(4, 4)])
        self.neck = Fused()
        self.blocks = [self.backbone, self.neck]
        self.fc = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.neck(self.backbone(images)).mean((2, 3)))
        return logits


class Parametrized(Own):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.spectral_norm(self.blocks[0][0])
        parametrizations.weight_norm(self.blocks[2][0])

    def forward(self, images: Tensor) -> Tensor:
        for block in self.blocks:
            images = block(images)
        return self.pooled(images)


class Hooked(Own):
    """Hooks of the network itself, of a frozen module and of one that is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*self.blocks)
        self.register_forward_hook(lambda module, inputs, logits: logits * 2)
        self.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.1,))
        self.blocks[0].register_forward_hook(lambda module, inputs, maps: maps + 1)
        self.body.register_forward_hook(lambda module, inputs, maps: maps.tanh())

    def forward(self, images: Tensor) -> Tensor:
        return self.pooled(self.body(images))


class Tokens(nn.Module):
    """A transformer whose tokens, not images, are the first dimension at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1) for _ in range(3)
        )
        self.fc = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).permute(2, 0, 1)
        tokens = torch.cat([self.token.expand(-1, tokens.shape[1], -1), tokens])
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.fc(tokens[0])
        return logits


class Noisy(Own):
    """Another computation in training."""

    def forward(self, images: Tensor) -> Tensor:
        maps = self.blocks[1](self.blocks[0](images))
        if self.training:
            maps = maps + torch.randn_like(maps)
        return self.pooled(self.blocks[2](maps))


class BatchStatistics(Own):
    """Its second block's norm looks at the batch in evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1][1] = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, images: Tensor) -> Tensor:
        for block in self.blocks:
            images = block(images)
        return self.pooled(images)


class Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, maps: Tensor) -> Tensor:
        maps = maps if maps.sum() > 1e9 else maps + 1
        result: Tensor = self.conv(maps)
        return result


class Encapsulated(Own):
    """What cannot be traced stands in blocks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([convolution(3, 4), Undecided(), Undecided()])

    def forward(self, images: Tensor) -> Tensor:
        for block in self.blocks:
            images = block(images)
        return self.pooled(images)


class Remembers(Own):
    """Keeps what it computed, as people do who look at it later."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Any = None

    def forward(self, images: Tensor) -> Tensor:
        self.seen = self.blocks[1](self.blocks[0](images))
        return self.pooled(self.blocks[2](self.seen))


class MakesTensors(Own):
    """Of shapes, and writes into some."""

    def forward(self, images: Tensor) -> Tensor:
        maps = images[:, [2, 1, 0]]
        maps[:, 0] = 0.5
        count, channels, height, width = maps.shape
        maps = maps + torch.zeros(channels, 1, 1) + torch.arange(height).view(1, 1, -1, 1)
        maps = torch.cat([maps, maps.new_ones(count, 1, height, width)], 1)[:, :channels]
        for block in self.blocks:
            maps = block(maps).clone()
            maps[maps > 1] = 1.0
        return self.pooled(maps)


class Pyramid(nn.ModuleList):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        first = self[0](images)
        return {"first": first, "second": self[1](first)}


class Values(nn.Module):
    """Goes through a dictionary that the backbone gives."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Pyramid([convolution(3, 4), convolution(4, 4)])
        self.blocks = [self.backbone]
        self.fc = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = [one.mean((2, 3)) for one in self.backbone(images).values()]
        logits: Tensor = self.fc(torch.cat(maps, 1))
        return logits


class ByShape(Own):
    """Decides, counts and asserts by shapes."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.ndim == 4
        assert images.shape[1] == 3
        maps = images if images.shape[-1] > 4 else images.repeat(1, 1, 2, 2)
        for number in range(images.shape[1]):
            maps = self.blocks[number](maps) / math.sqrt(maps.size(1))
        if maps.dim() == 4 and len(maps.shape) == 4:
            maps = maps.mean([place for place, _ in enumerate(maps.shape) if place > 1])
        return self.pooled(maps.view(-1, int(maps.shape[1]), 1, 1))


class ChangesLists(Own):
    """A module takes the list that it is given apart."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(Popping())

    def forward(self, images: Tensor) -> Tensor:
        first = self.blocks[0](images)
        return self.pooled(self.blocks[3]([first, self.blocks[1](first)]))


class Popping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        maps[0] = self.conv(maps.pop())
        return maps[0]


class Encoder(nn.Module):
    """torch's own encoder, which is frozen in part."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.blocks = list(self.encoder.layers)
        self.fc = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        logits: Tensor = self.fc(self.encoder(tokens).mean(1))
        return logits


class Straddling(nn.Module):
    """A part that cannot be traced holds frozen layers and others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(3, 4)
        self.body = Mixed()
        self.blocks = [self.stem, self.body.first, self.body.second]
        self.fc = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.body(self.stem(images)).mean((2, 3)))
        return logits


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = convolution(4, 4), convolution(4, 4)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.first(maps * self.scale)
        if maps.max() > 0:
            maps = self.second(maps)
        return maps * self.scale


def sequential() -> nn.Module:
    model = nn.Sequential(convolution(3, 4), convolution(4, 4), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Dropout(0.2), nn.Linear(4, 3))  # fmt: skip
    model.blocks = [model[0], model[1]]  # type: ignore[assignment]
    return model


# What cannot be cut at all.


class ByContents(Own):
    def forward(self, images: Tensor) -> Tensor:
        maps = self.blocks[0](images)
        if maps.mean() > 0:
            maps = self.blocks[1](maps)
        return self.pooled(self.blocks[2](maps))


class Chance(Own):
    def forward(self, images: Tensor) -> Tensor:
        maps = self.blocks[1](self.blocks[0](images))
        return self.pooled(self.blocks[2](maps) * torch.rand(1))


class LearnsWithout(Own):
    def forward(self, images: Tensor) -> Tensor:
        maps = self.blocks[1](self.blocks[0](images))
        with torch.no_grad():
            maps = self.blocks[2](maps)
        return self.pooled(maps)


class MonteCarlo(Own):
    """Dropout in evaluation, too, before anything."""

    def forward(self, images: Tensor) -> Tensor:
        maps = functional.dropout(images, 0.5)
        for block in self.blocks:
            maps = block(maps)
        return self.pooled(maps)


class Alternates(Own):
    """Does something else in every second call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        maps = self.blocks[1](self.blocks[0](images))
        return self.pooled(self.blocks[2](maps * (1 + self.calls % 2)))


class BySingle(Own):
    """Does something else with a single image."""

    def forward(self, images: Tensor) -> Tensor:
        maps = self.blocks[1](self.blocks[0](images))
        if images.shape[0] == 1:
            maps = maps * 2
        return self.pooled(self.blocks[2](maps))


class CentresBatch(Own):
    def forward(self, images: Tensor) -> Tensor:
        maps = images - images.mean(0)
        for block in self.blocks:
            maps = block(maps)
        return self.pooled(maps)


def named(name: str, trainable_blocks: int) -> dict[str, Any]:
    """The `model` of a configuration that trains one of them, with the fixture `nets`."""
    options = {"name": name}
    return {"architecture": "nets:build", "options": options, "trainable_blocks": trainable_blocks}
