"""Labelled pictures: how one is decoded, and the forms in which a data set holds them.

Mapped from a file, streamed from the original files, or sets joined: the same pixels.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache as once
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpo.definition.data import DataConfig
from hpo.errors import DataError

# Pillow warns of large pictures when it opens them; `data.max_pixels` refuses them by the header,
# before anything is decoded.
Image.MAX_IMAGE_PIXELS = None

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is opened, by content and not by name: of Pillow's other formats some run programs (EPS)."""

Pixels = NDArray[np.uint8]
Numbers = NDArray[np.int64]


class Source(Protocol):
    """Where pictures come from, by name; must pickle, because streaming opens it elsewhere."""

    def open(self, name: str) -> Image.Image:
        """The picture, not decoded yet; a context manager."""


@dataclass(frozen=True)
class Sizing:
    """The size at which pictures are kept."""

    squash: bool
    image_size: int
    resize_size: int
    max_pixels: int

    @classmethod
    def of(cls, config: DataConfig) -> Sizing:
        squash = config.resize == "squash"
        side = config.image_size if squash else config.resize_size
        return cls(squash, config.image_size, side, config.max_pixels)

    def target(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing, rounded as torchvision's Resize rounds."""
        side = self.resize_size
        if self.squash:
            return side, side
        if width <= height:
            return side, int(side * height / width)
        return int(side * width / height), side

    def refuse(self, width: int, height: int) -> str | None:
        """Why a picture of this size is not decoded; None if it may be."""
        target = self.target(width, height)
        return too_large((width, height), self.max_pixels) or too_large(
            target, self.max_pixels, " after resizing"
        )


def too_large(size: tuple[int, int], max_pixels: int, what: str = "") -> str | None:
    """Why a picture of this width and height is not decoded; None if it may be."""
    width, height = size
    if width * height <= max_pixels:
        return None
    return f"{width} x {height} pixels{what}, data.max_pixels allows {max_pixels}"


def open_file(path: Path | str) -> Image.Image:
    """The picture in a file, not decoded yet. Raises whatever Pillow raises on a broken file."""
    return Image.open(path, formats=_formats())


@once
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(one for one in FORMATS if one in Image.OPEN)


def decode(source: Source, name: str, sizing: Sizing) -> Image.Image:
    """One picture as torchvision's ImageFolder and Resize give it: RGB, bilinear, EXIF orientation
    ignored. Raises ValueError for one that is too large, whatever Pillow raises on a broken file.
    """
    with source.open(name) as image:
        if reason := sizing.refuse(*image.size):
            raise ValueError(reason)
        if isinstance(image.info.get("transparency"), bytes):
            del image.info["transparency"]  # only makes Pillow warn; RGB has none
        rgb = image.convert("RGB")
    target = sizing.target(*rgb.size)
    return rgb if rgb.size == target else rgb.resize(target, Image.Resampling.BILINEAR)


def array_digest(pixels: Pixels) -> str:
    """32 hex digits of a picture's shape and values."""
    data = repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class Images(ABC):
    """Labelled pictures, uint8 RGB. `labels`: (N,); `sizes`: (N, 2), height and width of each."""

    names: tuple[str, ...]
    labels: Numbers
    sizes: Numbers
    streamed = False
    """Whether `pixels` decodes a file at every call."""
    content = ""
    """Digest of the pictures and their size; empty where it is not known."""
    files: tuple[str, ...] = ()
    """A digest of the content of each image's file, 32 hex digits; empty where it is not known."""

    @property
    def parts(self) -> tuple[Images, ...]:
        """The sets of which this one is joined, in their order."""
        return (self,)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def identities(self) -> tuple[str, ...]:
        """A digest of the pixels of each picture: pictures that agree in it are one. Looks at all
        of them, unless it was known when they were opened."""
        return tuple(array_digest(self.pixels(i)) for i in range(len(self)))

    @abstractmethod
    def pixels(self, i: int) -> Pixels:
        """Picture `i`, (H, W, 3)."""

    @property
    def uniform(self) -> bool:
        """Whether all pictures are squares of one size, and `stacked` has them."""
        return not self.streamed and bool((self.sizes == self.sizes[0, 0]).all())

    def stacked(self) -> Pixels:
        """All pictures, (N, S, S, 3). Raises ValueError unless `uniform`."""
        raise ValueError("pictures of several sizes, or streamed ones, have no single array")


class Mapped(Images):
    """Pictures in a file that is mapped into memory: one copy per host."""

    def __init__(self, file: Path, sizes: Numbers, labels: Numbers, names: tuple[str, ...]) -> None:
        self.file, self.sizes, self.labels, self.names = file, sizes, labels, names
        self._ends = np.cumsum(sizes.prod(1) * 3)
        # Copy on write: torch wants writable memory, and nobody writes.
        self._data: Pixels = np.asarray(np.memmap(file, np.uint8, "c"))

    def __reduce__(self) -> tuple[Any, ...]:
        return Mapped, (self.file, self.sizes, self.labels, self.names)

    def pixels(self, i: int) -> Pixels:
        height, width = self.sizes[i]
        end = self._ends[i]
        return self._data[end - height * width * 3 : end].reshape(height, width, 3)

    def stacked(self) -> Pixels:
        if not self.uniform:
            return super().stacked()
        side = int(self.sizes[0, 0])
        return self._data.reshape(len(self), side, side, 3)


class Streamed(Images):
    """Pictures that are decoded whenever they are asked for."""

    streamed = True

    def __init__(
        self,
        source: Source,
        sizing: Sizing,
        sizes: Numbers,
        labels: Numbers,
        names: tuple[str, ...],
    ) -> None:
        self.source, self.sizing = source, sizing
        self.sizes, self.labels, self.names = sizes, labels, names

    def pixels(self, i: int) -> Pixels:
        # A copy, because torch wants writable memory.
        try:
            return np.array(decode(self.source, self.names[i], self.sizing))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"{self.names[i]}: could be read when the search began, not any more ({error}); "
                "put the file back"
            ) from error


class Joined(Images):
    """Sets of pictures, one after the other."""

    def __init__(self, *sets: Images) -> None:
        self._sets = sets
        self._ends = np.cumsum([len(one) for one in sets])
        self.names = tuple(name for one in sets for name in one.names)
        self.labels = np.concatenate([one.labels for one in sets])
        self.sizes = np.concatenate([one.sizes for one in sets])
        self.streamed = any(one.streamed for one in sets)
        self.files = tuple(file for one in sets for file in one.files)

    @property
    def parts(self) -> tuple[Images, ...]:
        return tuple(one for part in self._sets for one in part.parts)

    @cached_property
    def identities(self) -> tuple[str, ...]:
        return tuple(identity for one in self._sets for identity in one.identities)

    def pixels(self, i: int) -> Pixels:
        place = int(np.searchsorted(self._ends, i, side="right"))
        return self._sets[place].pixels(i - int(self._ends[place - 1]) if place else i)

    def stacked(self) -> Pixels:
        if not self.uniform:
            return super().stacked()
        return np.concatenate([part.stacked() for part in self._sets])


def concat(*sets: Images) -> Images:
    """All sets as one, in this order."""
    return sets[0] if len(sets) == 1 else Joined(*sets)
