"""The training that everybody without hpo writes: a small network, two loaders, a loop.

As in PyTorch's own tutorials: ImageFolder, a transform for each picture, DataLoader, a loop over
its batches, cosine annealing. Notebook, Optuna and Ray call `epochs`; so their searches differ in
nothing but who calls it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.peers.search import Config

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of CIFAR-10, as everybody copies them."""
CLASSES = 10


def network() -> nn.Module:
    """Three convolutions of 32, 64 and 128 filters, with batch norm, for images of 32 pixels."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES))


def optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    rates = {"lr": config["lr"], "weight_decay": config["weight_decay"]}
    if config["optimizer"] == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=config["momentum"], **rates)
    return torch.optim.AdamW(model.parameters(), **rates)


def loaders(
    data: Path, config: Config, loader_workers: int
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    plain = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    augmented = [transforms.RandomCrop(32, padding=4)] if config["crop"] else []
    augmented += [transforms.RandomHorizontalFlip()] if config["flip"] else []
    train = datasets.ImageFolder(data / "train", transforms.Compose([*augmented, *plain]))
    val = datasets.ImageFolder(data / "val", transforms.Compose(plain))
    options: dict[str, Any] = {"num_workers": loader_workers}
    options["persistent_workers"] = loader_workers > 0
    size = config["batch_size"]
    return DataLoader(train, size, shuffle=True, **options), DataLoader(val, size, **options)


def epochs(
    data: Path, config: Config, count: int, *, seed: int, loader_workers: int
) -> Iterator[float]:
    """Train; yield the validation accuracy after each epoch."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, val = loaders(data, config, loader_workers)
    model = network().to(device)
    optim = optimizer(config, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=count * len(train))
    for _ in range(count):
        model.train()
        for images, labels in train:
            loss = functional.cross_entropy(model(images.to(device)), labels.to(device))
            optim.zero_grad()
            loss.backward()
            optim.step()
            schedule.step()
        yield accuracy(model, val, device)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterator[Any] | DataLoader[Any], device: Any) -> float:
    """Share of images that are named right."""
    model.eval()
    right = total = 0
    for images, labels in batches:
        answers: Tensor = model(images.to(device)).argmax(1).cpu()
        right += int((answers == labels).sum())
        total += len(labels)
    return right / total
