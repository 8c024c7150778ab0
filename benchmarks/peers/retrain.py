"""The winners' real worth: each retrained with several seeds by the same bare loop, and tested.

No loader, no transforms: all images in memory, so that many winners can be retrained; training and
validation images together, as one would before using a network, the cosine over the same epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torchvision import datasets, transforms

from benchmarks.peers.search import Config
from benchmarks.peers.training import MEAN, STD, accuracy, network, optimizer

PADDING = 4
TEST_BATCH = 500
Images = tuple[Tensor, Tensor]
"""Normalised images (N, 3, 32, 32) and labels (N,)."""


def in_memory(*folders: Path) -> Images:
    """All images of folders by class."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    found = [item for folder in folders for item in datasets.ImageFolder(folder, transform)]
    return torch.stack([image for image, _ in found]), torch.tensor([label for _, label in found])


def score(config: Config, training: Images, test: Images, epochs: int, seed: int) -> float:
    """Train on `training`; return the accuracy on `test`, 0 to 1."""
    torch.manual_seed(seed)
    model = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optim = optimizer(config, model)
    size = config["batch_size"]
    steps = epochs * -(-len(training[1]) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=steps)
    for _ in range(epochs):
        model.train()
        for images, labels in shuffled(training, config, size):
            loss = functional.cross_entropy(model(images), labels)
            optim.zero_grad()
            loss.backward()
            optim.step()
            schedule.step()
    batches = zip(*(part.split(TEST_BATCH) for part in test), strict=True)
    return accuracy(model, batches, torch.device("cpu"))


def shuffled(training: Images, config: Config, size: int) -> Iterator[Images]:
    """An epoch's batches, cropped and flipped where `config` says so."""
    images, labels = training
    for rows in torch.randperm(len(labels)).split(size):
        batch = images[rows]
        if config["crop"]:
            batch = cropped(batch)
        if config["flip"]:
            mirrored = torch.rand(len(batch)) < 0.5
            batch = torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(3), batch)
        yield batch.contiguous(memory_format=torch.channels_last), labels[rows]


def cropped(batch: Tensor) -> Tensor:
    """Move each image (B, 3, S, S) by up to PADDING pixels, as RandomCrop(S, PADDING) does: what
    comes in is black."""
    black = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]).view(1, 3, 1, 1)
    padded = functional.pad(batch - black, [PADDING] * 4)
    count, _, side, _ = batch.shape
    moves = torch.randint(0, 2 * PADDING + 1, (2, count, 1))
    y, x = moves + torch.arange(side)
    which = torch.arange(count).view(-1, 1, 1)
    return padded[which, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2) + black
