"""A trial on frozen layers with their outputs kept, against the same trial without.

    python -m benchmarks.frozen [--data FOLDER] [--size 96] [--images 512] [--epochs 3] [--cuts]

MobileNetV2 of torchvision, then a network of one's own with the same layers. Both trials train the
same head on the same images, in one process and in turn: no augmentation, weights drawn from the
seed, checkpoints written as in a search. Seconds of an epoch are those that `hpo`
reports, with evaluation; the first epoch with kept features computes them. Then the same for image
retrieval, trials that differ in k, distance and PCA: the wall time of a whole trial, images opened
and the network built. `--data` is a folder of images by class; else random ones are made. `--cuts`
also shows, for ResNet-50, what one image costs to compute and to read at each cut: the reason for
the rule in `hpo/training/feature_cache.py`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models as zoo

from benchmarks.host import machine, versions
from hpo.config.model import ModelConfig
from hpo.config.train import TrainConfig
from hpo.control import NullControl
from hpo.data.dataset import open_data
from hpo.extras import DISTRIBUTION
from hpo.paths import Home
from hpo.training import models
from hpo.training.inputs import TrainingData
from hpo.training.partition import partition
from hpo.training.tracing import MORE
from hpo.training.train import EpochResult, train

CPU = torch.device("cpu")


class Own(nn.Module):
    """As people write them around the layers of another."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = zoo.mobilenet_v2().features
        self.fc = nn.Linear(1280, classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.features(images)
        logits: Tensor = self.fc(functional.adaptive_avg_pool2d(maps, 1).view(images.size(0), -1))
        return logits


def own(classes: int, image_size: int) -> nn.Module:
    """What `model.architecture = "benchmarks.frozen:own"` names."""
    return Own(classes)


NETWORKS = {"MobileNetV2": "mobilenet_v2", "a network of one's own": "benchmarks.frozen:own"}


def arguments() -> argparse.Namespace:
    """What is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of images by class")
    parser.add_argument("--size", type=int, default=96, help="side of the images, pixels")
    parser.add_argument("--images", type=int, default=512, help="random images that are made")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cuts", action="store_true", help="also cuts of ResNet-50")
    return parser.parse_args()


def random_images(root: Path, count: int, size: int) -> Path:
    """`count` images of noise in 10 classes."""
    source = np.random.default_rng(0)
    for number in range(count):
        folder = root / f"class{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = source.integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def configuration(
    data: Path, size: int, epochs: int, threads: int, architecture: str = "mobilenet_v2"
) -> TrainConfig:
    """The trial: only the head is trained."""
    return TrainConfig.parse(
        {
            "epochs": epochs,
            "batch_size": 64,
            "data": {"dataset": "folder", "root": str(data), "image_size": size,
                     "normalize": "imagenet", "test_fraction": 0.0},
            "model": {"architecture": architecture, "trainable_blocks": 0},
            "optimizer": {"name": "adam", "lr": 1e-3},
            "runtime": {"precision": "float32", "memory_format": "channels_last",
                        "threads": threads},
        }
    )  # fmt: skip


def trial(config: TrainConfig, home: Home, cache: Path | None) -> list[EpochResult]:
    """All epochs of it."""
    data = open_data(config.data, home.cache)
    seen = TrainingData(len(data.classes), data.train, data.val, data.mean, data.std)
    files = home.root / "checkpoints"
    return list(
        train(
            config,
            seen,
            NullControl(),
            device=CPU,
            checkpoint=lambda epoch: files / f"{epoch}.ckpt",
            cache=cache,
        )
    )


def epochs(args: argparse.Namespace, data: Path, home: Home, architecture: str) -> None:
    """Print the comparison."""
    config = configuration(data, args.size, args.epochs, args.threads, architecture)
    found = {
        "computed in every epoch": trial(config, home, None),
        "kept, computed once": trial(config, home, home.cache),
        "kept, another trial": trial(config, home, home.cache),
    }
    rest: dict[str, float] = {}
    print(
        f"{'seconds per epoch':26}{'first':>9}{'later':>9}{'least':>9}{'most':>9}{'val_loss':>12}"
    )
    for name, results in found.items():
        seconds = [one.metrics["seconds"] for one in results]
        later = seconds[1:]
        rest[name] = statistics.median(later)
        loss = results[-1].metrics["val_loss"]
        print(
            f"{name:26}{seconds[0]:9.3f}{rest[name]:9.4f}{min(later):9.4f}{max(later):9.4f}{loss:12.6f}"
        )
    slow, *fast = rest.values()
    print(f"after the first epoch {slow / max(fast):.0f} to {slow / min(fast):.0f} times faster\n")


WAYS = (
    {"k": 5},
    {"k": 10, "distance": "cosine"},
    {"k": 10, "standardize": True, "pca": 32},
    {"k": 5, "distance": "cosine", "pca": 32},
)


def retrievals(args: argparse.Namespace, data: Path, home: Home) -> None:
    """Print seconds of whole trials of a frozen retrieval, one after another."""
    base = configuration(data, args.size, 1, args.threads).to_dict() | {"task": "retrieval"}
    configs = [TrainConfig.parse(base | {"retrieval": way}) for way in WAYS]
    open_data(configs[0].data, home.cache)  # decoded before: that is not measured
    print(
        f"{'seconds per trial':26}{'first':>9}{'later':>9}{'least':>9}{'most':>9}{'precision':>12}"
    )
    rest = []
    for name, cache in (("computed in every trial", None), ("kept, computed once", home.cache)):
        seconds = []
        for config in configs:
            began = time.perf_counter()
            (result,) = trial(config, home, cache)
            seconds.append(time.perf_counter() - began)
        later = seconds[1:]
        rest.append(statistics.median(later))
        precision = result.metrics["val_precision_at_k"]
        print(
            f"{name:26}{seconds[0]:9.3f}{rest[-1]:9.4f}{min(later):9.4f}{max(later):9.4f}{precision:12.6f}"
        )
    print(f"after the first trial {rest[0] / rest[1]:.0f} times faster\n")


def cuts(size: int, threads: int) -> None:
    """Print what one image costs at each cut of ResNet-50: computed, and read from memory."""
    torch.set_num_threads(threads)
    model = models.build(ModelConfig(architecture="resnet50"), classes=10, image_size=size).eval()
    images = torch.rand(16, 3, size, size).contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    noise = torch.randn(MORE, 3, size, size)
    print(
        f"{'ResNet-50, blocks trained':26}{'KiB':>9}{'x pixels':>10}{'compute':>10}{'read ms':>9}"
    )
    for blocks in (0, 1, 2, 3):
        cut = partition(model, models.set_trainable(model, blocks), noise, max_bytes=1 << 40)
        assert cut is not None
        begun = cut.prefix(model).eval()
        with torch.no_grad():
            rows = begun(images)
            compute = least(lambda begun=begun: begun(images))  # type: ignore[misc]
        # Far more rows than caches hold, read in random order.
        kept = torch.empty(max(64, 400_000_000 // rows[0].nbytes), *rows.shape[1:]).fill_(1)
        order = torch.randperm(len(kept))[:16]
        read = least(lambda kept=kept, order=order: kept.index_select(0, order))  # type: ignore[misc]
        size_kib, times = rows[0].nbytes / 1024, rows[0].nbytes / (3 * size**2)
        print(f"{blocks:<26}{size_kib:9.0f}{times:10.2f}{compute / 16:10.3f}{read / 16:9.4f}")


def least(work: object) -> float:
    """Shortest wall time of three, in milliseconds."""
    assert callable(work)
    found = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        found.append((time.perf_counter() - began) * 1000)
    return min(found)


def main() -> None:
    args = arguments()
    print(f"{machine()}; {args.threads} threads")
    print(versions(DISTRIBUTION, "torch", "torchvision"))
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        data = args.data or random_images(root / "images", args.images, args.size)
        many = sum(1 for one in data.rglob("*") if one.is_file())
        print(
            f"{many} images at {args.size} px, batch 64, n = 1 trial each of {args.epochs} epochs;"
        )
        print("median, least and most of the epochs after the first\n")
        for number, (name, architecture) in enumerate(NETWORKS.items()):
            print(f"{name}, frozen")
            epochs(args, data, Home(root / f"runs{number}"), architecture)
        print(f"As image retrieval, n = {len(WAYS)} trials, another k, distance or PCA each\n")
        retrievals(args, data, Home(root / "retrievals"))
    if args.cuts:
        cuts(args.size, args.threads)


if __name__ == "__main__":
    main()
