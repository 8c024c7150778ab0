"""What a first study of a folder of images tries: network, weights, image size, epochs, trials.

Times are rough, of a network as large as MobileNetV2: they only choose among sizes, and `hpo check`
measures. The budget of time itself is kept exactly, whatever was chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hpo.config.recommended import SMALL
from hpo.formatting import plural

FEW = 5_000
"""Training images below which pretrained networks learn their head first, then the last blocks."""
CORE_S, GPU_S = 0.08, 0.002
"""Seconds to train one image at 224 px: of one CPU core, and of a GPU with larger networks."""
HEAD_ALONE = 0.35
"""Cost of an epoch in which the head alone learns, relative to others."""
FULL_TRAININGS = 12
"""Trainings to their last epoch that are worth a search, in sum: most trials stop before."""
LADDER = ((224, 2, 12), (224, 1, 10), (160, 1, 8), (128, 1, 6), (96, 1, 5), (96, 1, 3))
"""Image size, number of architectures and epochs, the best first."""


@dataclass(frozen=True)
class FolderSummary:
    """Summary of a folder of images, found without opening files but for some sizes."""

    classes: int
    images: int
    """Images for training; all of them where the folder has no split."""
    side: int
    """Median of the shorter side of some images, in pixels."""
    parts: tuple[str, ...]
    """Which of train, val and test it has; empty: it has no parts."""
    listed: bool = False
    """Whether a CSV file lists the images: the one looked at, or the folder's metadata.csv."""


@dataclass(frozen=True)
class Wish:
    """What the user asks of a first study, and what it will run on."""

    max_time: str = ""
    """Longest time by the clock, as the user wrote it; empty: no limit."""
    seconds: float = math.inf
    """The same in seconds."""
    quick: bool = False
    """A small search, of minutes."""
    from_scratch: bool = False
    """Random weights."""
    trials: int | None = None
    cores: int = 1
    gpu: bool = False

    def within(self, max_time: str, seconds: float) -> Wish:
        """Return the same with a longest time."""
        return replace(self, max_time=max_time, seconds=seconds)

    @property
    def options(self) -> str:
        """The options of `hpo init` that ask for it, but for the time."""
        given = {"--quick": self.quick, "--from-scratch": self.from_scratch}
        return " ".join(name for name, is_given in given.items() if is_given)


@dataclass(frozen=True)
class Starter:
    """What a first study is like."""

    architectures: tuple[str, ...]
    image_size: int
    epochs: tuple[int, ...]
    """Of each phase: the head, then the last blocks; or of the whole training."""
    pretrained: bool = False
    stem: str = "default"
    blocks: tuple[int | str, ...] = ()
    """Choices for the trainable blocks of the second phase."""
    trials: int | None = None
    """None: the default."""
    limit_train: int | None = None

    @property
    def said(self) -> str:
        """The choice in a line."""
        start = "pretrained weights" if self.pretrained else "random weights"
        names = " or ".join(self.architectures)
        if len(self.epochs) > 1:
            head = plural(self.epochs[0], "epoch")
            how = f"{head} of the head, then {self.epochs[1]} of the last blocks"
        else:
            how = plural(self.epochs[0], "epoch")
        limit = f", {self.limit_train:,} training images" if self.limit_train else ""
        return f"{names} at {self.image_size} px from {start}, {how}{limit}"


def choose(folder: FolderSummary, wish: Wish) -> Starter:
    """Return what a first study of `folder` is like: the best that `wish` has time for."""
    if folder.side <= SMALL:
        found = _scratch(folder, ("resnet18",), max(16, folder.side), "small")
    elif wish.from_scratch:
        found = _scratch(folder, ("mobilenet_v2",), 128 if folder.side >= 128 else 96)
    else:
        found = _pretrained(folder, wish)
    found = _quick(found, folder) if wish.quick else _in_time(found, folder, wish)
    return replace(found, trials=wish.trials or found.trials)


def _scratch(
    folder: FolderSummary, architectures: tuple[str, ...], size: int, stem: str = "default"
) -> Starter:
    return Starter(architectures, size, (30 if folder.images < FEW else 15,), stem=stem)


def _pretrained(folder: FolderSummary, wish: Wish) -> Starter:
    """Return the first of LADDER that the time is enough for."""
    names: tuple[str, ...] = ("mobilenet_v2", "mobilenet_v3_large")
    blocks: tuple[int | str, ...] = (3, 8, "all")
    if wish.gpu:
        names, blocks = ("resnet50", "convnext_tiny"), (1, 2, "all")
    own = 224 if folder.side >= 200 else max(96, folder.side // 32 * 32)
    few = folder.images < FEW
    for size, count, epochs in LADDER:
        phases = (max(1, epochs // 4), epochs - max(1, epochs // 4)) if few else (epochs,)
        found = Starter(names[:count], min(size, own), phases, True, blocks=blocks if few else ())
        if _search_s(found, folder, wish) <= wish.seconds:
            break
    return found


def _quick(found: Starter, folder: FolderSummary) -> Starter:
    """Return a search of minutes: one architecture, small images, few of them, few epochs."""
    return replace(
        found,
        architectures=found.architectures[:1],
        image_size=min(found.image_size, 96),
        epochs=(1, 3) if len(found.epochs) > 1 else (4 if found.pretrained else 6,),
        trials=8,
        limit_train=max(500, 5 * folder.classes) if folder.images > 1_000 else None,
    )


def _in_time(found: Starter, folder: FolderSummary, wish: Wish) -> Starter:
    """Return `found` with fewer epochs and images, as far as the time demands it."""
    if not found.pretrained:
        fits = min(1.0, wish.seconds / _search_s(found, folder, wish))
        found = replace(found, epochs=(max(3, int(found.epochs[0] * fits)),))
    if (fits := wish.seconds / _search_s(found, folder, wish)) >= 0.5:
        return found
    limit = max(20 * folder.classes, int(folder.images * fits))
    return replace(found, limit_train=limit) if limit < 0.8 * folder.images else found


def _search_s(found: Starter, folder: FolderSummary, wish: Wish) -> float:
    """Return roughly how many seconds a search takes."""
    image_s = GPU_S if wish.gpu else CORE_S / wish.cores
    if found.stem == "small":
        image_s *= 0.5 * (found.image_size / 32) ** 2  # of ResNet-18, at 32 px
    else:
        image_s *= (found.image_size / 224) ** 2
    head = found.epochs[0] if len(found.epochs) > 1 else 0
    epochs = sum(found.epochs) - head + head * HEAD_ALONE
    return FULL_TRAININGS * epochs * folder.images * image_s
