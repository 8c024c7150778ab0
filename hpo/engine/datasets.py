"""Data sets: which pictures there are, which part each belongs to, and the doors to them.

`open_data` gives training and validation; `open_test` is the only door to the test split. Where the
folders do not say which part a picture belongs to, a hash of its content and `data.split_seed`
does, class by class, and identical files stay together.

As torchvision's ImageFolder does, pictures are converted to RGB without regard to transparency, and
a rotation in the EXIF data is ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path

import numpy as np
from PIL import Image

from hpo.definition.data import DataConfig
from hpo.engine.cache import Index, Store, file_digests, short_hash
from hpo.engine.folders import Listing, list_folder
from hpo.engine.images import Images, Pixels, Sizing, Source, concat
from hpo.engine.split import Item, Parts, duplicates, limited, split
from hpo.errors import DataError

__all__ = ["Data", "Images", "concat", "describe", "open_data", "open_test"]

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's training pictures, as torchvision's weights use it."""


@dataclass(frozen=True)
class Data:
    """What a search may see: training and validation."""

    classes: tuple[str, ...]
    train: Images
    val: Images
    mean: tuple[float, ...]
    """Of red, green and blue in 0..1: of the whole training pictures, or ImageNet's."""
    std: tuple[float, ...]
    fingerprint: str
    """Of the contents of the pictures for training and validation, and their classes."""
    unreadable: tuple[str, ...]
    """Names of files that were left out, each with the reason."""
    has_test: bool
    warnings: tuple[str, ...]


def open_data(config: DataConfig, cache: Path) -> Data:
    """Training and validation pictures, decoded into `cache` if they are not there yet.

    Raises DataError for a folder that cannot be used and for unreadable pictures (left out with
    `data.skip_unreadable`), HpoError when the disk is full. No test picture is decoded.
    """
    listing, parts = _parts(config, cache)
    train, seen = _open(config, cache, parts["train"])
    val, seen_val = _open(config, cache, parts["val"])
    _check_labels(listing.classes, parts["train"], train, "train")
    if not len(val):
        raise DataError(f"{_where(config)}: none of the validation pictures can be read")
    mean, std = IMAGENET if config.normalize == "imagenet" else seen.mean_std()
    return Data(
        classes=listing.classes,
        train=train,
        val=val,
        mean=mean,
        std=std,
        fingerprint=_fingerprint(listing.classes, parts),
        unreadable=tuple(_named(parts["train"], seen) + _named(parts["val"], seen_val)),
        has_test="test" in parts,
        warnings=tuple(listing.warnings + duplicates(parts)),
    )


def open_test(config: DataConfig, cache: Path) -> Images | None:
    """The test pictures, decoded into a file of their own; None where there is no test split.

    Only retraining and evaluation may call this. Raises as `open_data` does.
    """
    _, parts = _parts(config, cache)
    if "test" not in parts:
        return None
    images, _ = _open(config, cache, parts["test"])
    if not len(images):
        raise DataError(f"{_where(config)}: none of the test pictures can be read")
    return images


def describe(config: DataConfig) -> dict[str, dict[str, int]]:
    """Pictures per part and class, test included; nothing is decoded and nothing is written."""
    listing, parts = _parts(config, None)
    counts = {part: Counter(item.label for item in items) for part, items in parts.items()}
    return {
        part: {name: count[label] for label, name in enumerate(listing.classes)}
        for part, count in counts.items()
    }


def _open(config: DataConfig, cache: Path, items: list[Item]) -> tuple[Images, Index]:
    source: Source = FolderSource(_root(config)) if config.dataset == "folder" else DigitsSource()
    images, index = Store(cache, config.cache_limit_gb * 1e9).open(
        source,
        [item.name for item in items],
        [item.label for item in items],
        [item.digest for item in items],
        Sizing.of(config),
    )
    if index.bad and not config.skip_unreadable:
        shown = "".join(f"\n  {line}" for line in _named(items, index)[:10])
        more = f"\n  and {len(index.bad) - 10} more" if len(index.bad) > 10 else ""
        raise DataError(
            f"{_where(config)}: {len(index.bad)} files cannot be read as images; repair or remove "
            f"them, or set data.skip_unreadable = true:{shown}{more}"
        )
    return images, index


def _named(items: Sequence[Item], index: Index) -> list[str]:
    return [f"{items[i].name} ({reason})" for i, reason in index.bad.items()]


def _check_labels(
    classes: tuple[str, ...], items: Sequence[Item], images: Images, part: str
) -> None:
    left = set(images.labels.tolist())
    for label in sorted({item.label for item in items} - left):
        raise DataError(f"class {classes[label]!r}: none of its {part} pictures can be read")


# Parts


def _parts(config: DataConfig, cache: Path | None) -> tuple[Listing, Parts]:
    """Every picture's part, in an order that depends on contents alone."""
    listing = _list_digits() if config.dataset == "digits" else list_folder(_root(config))
    names = [name for items in listing.parts.values() for name, _ in items]
    if config.dataset == "digits":
        digests = {name: short_hash(DigitsSource.pixels(name).tolist()) for name in names}
    elif cache or "val" not in listing.parts or config.limit_train:
        digests = file_digests(_root(config), names, cache)
    else:
        digests = dict.fromkeys(names, "")  # only counted
    given = {
        part: sorted(
            (Item(name, label, digests[name]) for name, label in items),
            key=lambda item: (item.label, item.digest, item.name),
        )
        for part, items in listing.parts.items()
    }
    parts = _completed(config, given)
    for part in parts.keys() - given.keys() | {"train"}:
        _check_split(config, listing.classes, part, parts[part])
    if config.limit_train is not None:
        if config.limit_train < len(listing.classes):
            raise DataError(
                f"data.limit_train = {config.limit_train}: at least {len(listing.classes)}, one "
                "picture for each class"
            )
        parts["train"] = limited(parts["train"], config.limit_train, config.split_seed)
    return listing, parts


def _completed(config: DataConfig, given: Parts) -> Parts:
    """Split what the folders leave open: everything, or validation off the training pictures."""
    if "all" in given:
        fractions = {"val": config.val_fraction}
        if config.test_fraction:
            fractions["test"] = config.test_fraction
        return split(given["all"], fractions, config.split_seed)
    if "val" in given:
        return dict(given)
    parts = split(given["train"], {"val": config.val_fraction}, config.split_seed)
    return {**given, **parts}


def _check_split(
    config: DataConfig, classes: tuple[str, ...], part: str, items: Sequence[Item]
) -> None:
    """Every class must stand in a part that we made."""
    have = {item.label for item in items}
    for label, name in enumerate(classes):
        if label not in have:
            raise DataError(
                f"{_where(config)}: class {name!r} has too few different pictures to leave one for "
                f"{part}: 1 for each of train, val and test is needed; add pictures, or set "
                "data.test_fraction = 0"
            )


def _fingerprint(classes: tuple[str, ...], parts: Parts) -> str:
    seen = {
        part: sorted((item.label, item.digest) for item in parts[part]) for part in ("train", "val")
    }
    return short_hash([classes, seen])[:16]


# Folders


@dataclass(frozen=True)
class FolderSource:
    """Pictures of a folder, by relative path."""

    root: Path

    def open(self, name: str) -> Image.Image:
        return Image.open(self.root / name)


def _root(config: DataConfig) -> Path:
    return Path(config.root or "")


def _where(config: DataConfig) -> str:
    return config.root or config.dataset


# Digits


@dataclass(frozen=True)
class DigitsSource:
    """scikit-learn's handwritten digits, 8 x 8, grey values 0..16 stretched to 0..255."""

    @staticmethod
    def pixels(name: str) -> Pixels:
        images, _ = _digits()
        picture: Pixels = images[int(name.removeprefix("digits/"))]
        return picture

    def open(self, name: str) -> Image.Image:
        return Image.fromarray(self.pixels(name))


@once
def _digits() -> tuple[Pixels, list[int]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.tolist()


def _list_digits() -> Listing:
    _, labels = _digits()
    items = [(f"digits/{i}", label) for i, label in enumerate(labels)]
    return Listing(tuple("0123456789"), {"all": items})
