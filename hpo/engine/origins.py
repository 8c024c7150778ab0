"""Where pictures come from: which there are, what stands in them, and how one is opened.

Folders and scikit-learn's digits are here; torchvision's data sets, Stanford Cars and data sets of
the user's own each have a module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path

import numpy as np
from PIL import Image

from hpo.engine.cache import file_digests, short_hash
from hpo.engine.control import ProgressCallback, no_progress
from hpo.engine.folders import Listing, list_folder
from hpo.engine.images import ImageReader, Pixels, open_file


class DatasetSource(ABC):
    """A data set that was not opened yet."""

    reader: ImageReader
    """Opens the pictures by the names that `listing` gives."""
    tick: ProgressCallback = staticmethod(no_progress)
    """Called while many pictures are looked at."""

    @abstractmethod
    def listing(self, *, test: bool) -> Listing:
        """Names and labels by part; nothing is decoded that can be told apart without. Where the
        test part is kept apart, it is looked at with `test` alone (see `Listing.sealed`).

        Raises DataError for what cannot be used.
        """

    @abstractmethod
    def digests(self, names: Sequence[str], cache: Path | None) -> dict[str, str]:
        """Digest of the content of each picture, which decides its part where we split."""

    def variant(self, name: str) -> str:
        """What else decides the pixels of a picture; part of the key of its cache."""
        return ""


# Folders


@dataclass(frozen=True)
class FolderReader:
    """Pictures of a folder, by relative path."""

    root: Path

    def open(self, name: str) -> Image.Image:
        return open_file(self.root / name)


class FolderSource(DatasetSource):
    """Images by class under a folder."""

    def __init__(self, root: Path, *, grouped: bool = False) -> None:
        self.root, self.grouped, self.reader = root, grouped, FolderReader(root)

    def listing(self, *, test: bool) -> Listing:
        return list_folder(self.root, grouped=self.grouped)

    def digests(self, names: Sequence[str], cache: Path | None) -> dict[str, str]:
        return file_digests(self.root, names, cache, self.tick)


# Digits


@dataclass(frozen=True)
class DigitsReader:
    """scikit-learn's handwritten digits, 8 x 8, grey values 0..16 stretched to 0..255."""

    @staticmethod
    def pixels(name: str) -> Pixels:
        images, _ = _digits()
        picture: Pixels = images[int(name.removeprefix("digits/"))]
        return picture

    def open(self, name: str) -> Image.Image:
        return Image.fromarray(self.pixels(name))


class DigitsSource(DatasetSource):
    """All of the digits, not split yet."""

    def __init__(self) -> None:
        self.reader = DigitsReader()

    def listing(self, *, test: bool) -> Listing:
        _, labels = _digits()
        items = [(f"digits/{i}", label) for i, label in enumerate(labels)]
        return Listing(tuple("0123456789"), {"all": items})

    def digests(self, names: Sequence[str], cache: Path | None) -> dict[str, str]:
        return {name: short_hash(DigitsReader.pixels(name).tolist()) for name in names}


@once
def _digits() -> tuple[Pixels, list[int]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.tolist()
