"""What augmentation costs, against torchvision's v2 transforms picture by picture.

    python -m benchmarks.augment [RUNS]

From uint8 pictures in memory to one normalised float32 batch, crops included: ours through the
loader of a training, torchvision's as a Compose for each picture and a stack. Both on one CPU
thread, in turn, RUNS times (default 9) after one untimed run each, with fresh draws every time;
what counts is the processor's time, so that what else the machine does weighs less.
Prints a table for 64 pictures of 224 pixels and one for 128 of 32: medians in milliseconds
(smallest to largest), and the ratio of the medians, with the hardware and the versions.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2

from benchmarks.host import machine, versions
from hpo.config.augment import PRESETS, AugmentConfig
from hpo.data.images import Images
from hpo.extras import DISTRIBUTION
from hpo.training.loader import TrainBatches

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BILINEAR = v2.InterpolationMode.BILINEAR
Transforms = Callable[[int], list[v2.Transform]]
"""torchvision's transforms for pictures of so many pixels."""


class Pictures(Images):
    """Noise, squares of one size."""

    def __init__(self, count: int, size: int) -> None:
        rng = np.random.default_rng(0)
        self.names = tuple(str(number) for number in range(count))
        self.labels = rng.integers(0, 10, count)
        self.sizes = np.full((count, 2), size)
        self._pixels = rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)

    def pixels(self, i: int) -> Any:
        return self._pixels[i]

    def stacked(self) -> Any:
        return self._pixels


def affine(degrees: float) -> v2.Transform:
    return v2.RandomAffine(
        degrees, translate=(0.1, 0.1), scale=(0.9, 1.1), shear=10, interpolation=BILINEAR
    )


def padded(size: int) -> v2.Transform:
    return v2.RandomCrop(size, padding=4)


def jitter(width: float) -> v2.Transform:
    return v2.ColorJitter(width, width, width, 0.1)


def heavy(size: int) -> list[v2.Transform]:
    crop = v2.RandomResizedCrop(size, scale=(0.6, 1.0))
    shape = [affine(15), v2.RandomPerspective(0.2, 0.5)]
    return [crop, v2.RandomHorizontalFlip(), *shape, jitter(0.3), v2.RandomGrayscale(0.1)]


AFFINE = {"translate": 0.1, "scale": (0.9, 1.1), "shear": 10.0}
JITTER = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1}
TURN = {"rotation": 15.0}
VIEWPOINT = {"perspective": 0.2, "perspective_probability": 1.0}

CASES: dict[str, tuple[dict[str, Any], Transforms]] = {
    "nothing": ({}, lambda _: []),
    "horizontal flip": ({"horizontal_flip": 0.5}, lambda _: [v2.RandomHorizontalFlip()]),
    "vertical flip": ({"vertical_flip": 0.5}, lambda _: [v2.RandomVerticalFlip()]),
    "padded crop": ({"crop_padding": 4}, lambda size: [padded(size)]),
    "random resized crop": (
        {"random_resized_crop": (0.6, 1.0)},
        lambda size: [v2.RandomResizedCrop(size, scale=(0.6, 1.0))],
    ),
    "rotation": (TURN, lambda _: [v2.RandomRotation(15, interpolation=BILINEAR)]),
    "affine": (AFFINE, lambda _: [affine(0)]),
    "perspective": (VIEWPOINT, lambda _: [v2.RandomPerspective(0.2, 1.0)]),
    "all three": (
        {**TURN, **AFFINE, **VIEWPOINT},
        lambda _: [affine(15), v2.RandomPerspective(0.2, 1.0)],
    ),
    "colour jitter": (JITTER, lambda _: [jitter(0.3)]),
    "grayscale": ({"grayscale": 0.5}, lambda _: [v2.RandomGrayscale(0.5)]),
    "erasing": ({"erasing": 0.5}, lambda _: [v2.RandomErasing(0.5)]),
    "randaugment": (
        {"policy": "randaugment"},
        lambda _: [v2.RandAugment(interpolation=BILINEAR)],
    ),
    "trivialaugment": (
        {"policy": "trivialaugment"},
        lambda _: [v2.TrivialAugmentWide(interpolation=BILINEAR)],
    ),
    "mixup": ({"mixup": 0.2}, lambda _: [v2.MixUp(alpha=0.2, num_classes=10)]),
    "cutmix": ({"cutmix": 1.0}, lambda _: [v2.CutMix(alpha=1.0, num_classes=10)]),
    "preset basic": (PRESETS["basic"], lambda size: [padded(size), v2.RandomHorizontalFlip()]),
    "preset advanced": (
        PRESETS["advanced"],
        lambda size: [padded(size), v2.RandomHorizontalFlip(), jitter(0.2)],
    ),
    "preset heavy": (PRESETS["heavy"], heavy),
}


def ours(fields: dict[str, Any], pictures: Pictures) -> Callable[[int], object]:
    """One epoch, which is one batch."""
    batches = TrainBatches(
        pictures,
        mean=MEAN,
        std=STD,
        augment=AugmentConfig(**fields),
        image_size=int(pictures.sizes[0, 0]),
        batch_size=len(pictures),
        device=torch.device("cpu"),
    )
    return lambda run: list(batches.epoch(run))


def theirs(transforms: list[v2.Transform], pictures: Pictures) -> Callable[[int], object]:
    """The same picture by picture; mixing belongs to the batch."""
    mixing = [one for one in transforms if isinstance(one, v2.MixUp | v2.CutMix)]
    single = [one for one in transforms if one not in mixing]
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    # Erasing comes last, as in torchvision's references: after normalisation 0 is the mean.
    late = [one for one in single if isinstance(one, v2.RandomErasing)]
    early = [one for one in single if one not in late]
    transform = v2.Compose([*early, *finish, *late])
    labels = torch.from_numpy(pictures.labels)
    tensors = [torch.from_numpy(p).permute(2, 0, 1).contiguous() for p in pictures.stacked()]

    def batch(_: int) -> object:
        made = torch.stack([transform(one) for one in tensors])
        return [mix(made, labels) for mix in mixing] or made

    return batch


def measure(calls: list[Callable[[int], object]], runs: int) -> list[list[float]]:
    """Milliseconds of the processor for each call, in turn; the first of each is not kept."""
    times: list[list[float]] = [[] for _ in calls]
    for run in range(runs + 1):
        for call, kept in zip(calls, times, strict=True):
            began = time.process_time()
            call(run)
            kept.append((time.process_time() - began) * 1000)
    return [kept[1:] for kept in times]


def num_views(times: list[float]) -> str:
    return f"{statistics.median(times):8.1f} ({min(times):.1f} to {max(times):.1f})"


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{machine()}; 1 thread")
    print(f"{versions(DISTRIBUTION, 'torch', 'torchvision')}; {runs} runs each, in turn")
    for count, size in ((64, 224), (128, 32)):
        pictures = Pictures(count, size)
        print(f"\n{count} pictures of {size} pixels, ms: median (smallest to largest)")
        print(f"{'':20} {'hpo':>30} {'torchvision':>30} {'ratio':>7}")
        for name, (fields, transforms) in CASES.items():
            calls = [ours(fields, pictures), theirs(transforms(size), pictures)]
            mine, other = measure(calls, runs)
            ratio = statistics.median(other) / statistics.median(mine)
            print(f"{name:20} {num_views(mine):>30} {num_views(other):>30} {ratio:7.1f}")


if __name__ == "__main__":
    main()
