"""Data set sources: folders, digits, and functions of the user's.

Folders and scikit-learn's digits are defined here; torchvision's data sets, Stanford Cars, CSV
files and user data sets each have a module.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache as once
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hpo.control import ProgressCallback, no_progress
from hpo.data import user_code
from hpo.data.cache import file_digests
from hpo.data.folders import Listing, list_folder
from hpo.data.images import ImageReader, Pixels, array_digest, image_digest, open_file, too_large
from hpo.errors import ConfigError, DataError
from hpo.io import short_hash


class DatasetSource(ABC):
    """A data set that is not opened yet."""

    reader: ImageReader
    """Opens the images by the names in `listing`."""
    tick: ProgressCallback = staticmethod(no_progress)
    """Called repeatedly while many images are read."""

    @abstractmethod
    def listing(self, *, test: bool) -> Listing:
        """Return names and labels by part, decoding only if necessary. A separate test part is
        looked at only if `test` (see `Listing.sealed`).

        Raises DataError for a data set that cannot be used.
        """

    @abstractmethod
    def digests(self, names: Sequence[str], cache: Path | None) -> dict[str, str]:
        """Return the content digest of each image, which decides its part if we split."""

    def variant(self, name: str) -> str:
        """Return anything else that decides the pixels of an image; part of its cache key."""
        return ""


# Folders


@dataclass(frozen=True)
class FolderReader:
    """Images of a folder, by relative path."""

    root: Path

    def open(self, name: str) -> Image.Image:
        """Return the image, not decoded yet."""
        return open_file(self.root / name)


class FolderSource(DatasetSource):
    """Images in class folders below a root folder."""

    def __init__(self, root: Path, *, grouped: bool = False) -> None:
        self.root, self.grouped, self.reader = root, grouped, FolderReader(root)

    def listing(self, *, test: bool) -> Listing:
        """Return names and labels by part (see `list_folder`)."""
        return list_folder(self.root, grouped=self.grouped)

    def digests(self, names: Sequence[str], cache: Path | None) -> dict[str, str]:
        """Return the content digest of each file."""
        return file_digests(self.root, names, cache, self.tick)


# Digits


@dataclass(frozen=True)
class DigitsReader:
    """scikit-learn's handwritten digits, 8 x 8, grey values 0..16 stretched to 0..255."""

    @staticmethod
    def pixels(name: str) -> Pixels:
        """Return one digit, (8, 8) uint8."""
        images, _ = _digits()
        image: Pixels = images[int(name.removeprefix("digits/"))]
        return image

    def open(self, name: str) -> Image.Image:
        """Return one digit as an image."""
        return Image.fromarray(self.pixels(name))


class DigitsSource(DatasetSource):
    """All digits, not split yet."""

    def __init__(self) -> None:
        self.reader = DigitsReader()

    def listing(self, *, test: bool) -> Listing:
        """Return all digits in one part."""
        _, labels = _digits()
        items = [(f"digits/{i}", label) for i, label in enumerate(labels)]
        return Listing(tuple("0123456789"), {"all": items})

    def digests(self, names: Sequence[str], cache: Path | None) -> dict[str, str]:
        """Return the digest of the pixels of each digit."""
        return {name: short_hash(DigitsReader.pixels(name).tolist()) for name in names}


@once
def _digits() -> tuple[Pixels, list[int]]:
    """Return the images (N, 8, 8) uint8 and the labels, from the file that scikit-learn brings:
    importing scikit-learn for it would take a second in every worker."""
    found = find_spec("sklearn")
    file = Path(str(found and found.origin)).with_name("datasets") / "data" / "digits.csv.gz"
    rows = np.loadtxt(file, delimiter=",", dtype=np.int64)
    grey, labels = rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]
    return np.rint(grey * (255 / 16)).astype(np.uint8), labels.tolist()


Label = str | int
Split = Sequence[tuple[Any, Any]]

_ITEM = re.compile(r"(train|val|test)\[(\d+)\]")
"""Name of an image that is not a file: its index in what the function returned."""


@dataclass
class UserReader:
    """Images by path, or by index; another process calls the function again."""

    function: str
    root: Path
    splits: dict[str, Split] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the images: the other process calls the function itself."""
        return {"function": self.function, "root": self.root, "splits": {}}

    def split(self, part: str) -> Split | None:
        """Return what the function returns for `part`; None if it has no such part."""
        if part not in self.splits:
            items = _asked(self.function, self.root, part)
            if items is None:
                return None
            self.splits[part] = items
        return self.splits[part]

    def open(self, name: str) -> Image.Image:
        """Return one image."""
        if not (match := _ITEM.fullmatch(name)):
            return open_file(self.root / name)
        split = self.split(match[1])
        assert split is not None  # it had this image
        image, _ = _item(self.function, split, match[1], int(match[2]))
        return image if isinstance(image, Image.Image) else Image.fromarray(image)


class UserSource(DatasetSource):
    """The data set that the function `module:function` returns for `root`."""

    def __init__(self, function: str, root: Path, *, max_pixels: int) -> None:
        self.function, self.root, self.max_pixels = function, root.absolute(), max_pixels
        self._own = UserReader(function, self.root)
        self.reader: ImageReader = self._own
        self._digests: dict[str, str] = {}

    def listing(self, *, test: bool) -> Listing:
        """Return names and labels by part, after reading every item. Raises DataError for items
        that cannot be used."""
        labelled: dict[str, list[tuple[str, Label]]] = {}
        for part in ("train", "val", "test") if test else ("train", "val"):
            split = self._own.split(part)
            if split is not None:
                labelled[part] = list(self._items(part, split))
        if "train" not in labelled:
            raise DataError(f"{self.function}: returned None for 'train'; only val and test may "
                            "be None")  # fmt: skip
        classes = self._classes(labelled["train"])
        place = {label: i for i, label in enumerate(classes)}
        for part, items in labelled.items():
            for name, label in items:
                if label not in place:
                    raise DataError(
                        f"{self.function}: {name} of {part} is of class {label!r}, which no "
                        "training image has"
                    )
        parts = {part: [(name, place[label]) for name, label in items]
                 for part, items in labelled.items()}  # fmt: skip
        return Listing(tuple(map(str, classes)), parts, sealed=not test)

    def digests(self, names: Sequence[str], cache: Path | None) -> dict[str, str]:
        """Return the digest of each image in memory, and of the content of each file."""
        files = [name for name in names if name not in self._digests]
        return {**self._digests, **file_digests(self.root, files, cache, self.tick)}

    def _items(self, part: str, split: Split) -> Iterator[tuple[str, Label]]:
        """Yield name and label of each image; the digests of those in memory are computed here."""
        for i in range(len(split)):
            self.tick()
            image, label = _item(self.function, split, part, i)
            if isinstance(image, str | Path):
                path = self.root / image  # an absolute one stays what it is
                below = path.is_relative_to(self.root)
                yield str(path.relative_to(self.root) if below else path), label
                continue
            name = f"{part}[{i}]"
            if isinstance(image, Image.Image):  # maybe not decoded yet
                self._require_size(name, image)
                self._digests[name] = image_digest(image)
            else:
                self._digests[name] = array_digest(image)
            yield name, label

    def _require_size(self, name: str, image: Image.Image) -> None:
        if reason := too_large(image.size, self.max_pixels):
            raise DataError(f"{self.function}: {name}: {reason}")

    def _classes(self, items: Sequence[tuple[str, Label]]) -> list[Label]:
        labels = {label for _, label in items}
        if len({type(label) for label in labels}) > 1:
            raise DataError(f"{self.function}: some labels are names, some numbers; use one kind")
        if len(labels) < 2:
            raise DataError(
                f"{self.function}: {len(items)} training images of {len(labels)} classes; at least "
                "two classes are needed"
            )
        return sorted(labels)


def _asked(name: str, root: Path, part: str) -> Split | None:
    try:
        function = user_code.load(name, "data.dataset")
    except ConfigError as error:  # nothing that another configuration would mend
        raise DataError(str(error)) from error
    try:
        returned = function(str(root), part)
    except Exception as error:  # user code may raise anything; report it as the user's error
        raise DataError(
            f"{name}(root, {part!r}) raised {user_code.describe_error(error)}"
        ) from error
    if returned is None:
        return None
    if not hasattr(returned, "__len__") or not hasattr(returned, "__getitem__"):
        raise DataError(
            f"{name}(root, {part!r}) returned {type(returned).__name__}: allowed: a sequence "
            "of (image, label), with len() and [i], or None if there is no such split"
        )
    if not len(returned):
        raise DataError(f"{name}(root, {part!r}) returned no images; return None where "
                        "there is no such split")  # fmt: skip
    split: Split = returned
    return split


def _item(function: str, split: Split, part: str, i: int) -> tuple[Any, Label]:
    """Return image and label at one index, validated."""
    where = f"{function}: {part}[{i}]"
    try:
        item = split[i]
    except Exception as error:
        raise DataError(f"{where} raised {user_code.describe_error(error)}") from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        got = f"{type(item).__name__} of {len(item)}" if isinstance(item, tuple | list) else (
            type(item).__name__)  # fmt: skip
        raise DataError(f"{where} is {got}: allowed: (image, label)")
    image, label = item
    if isinstance(label, np.integer):
        label = int(label)
    if not isinstance(label, str | int) or isinstance(label, bool):
        raise DataError(f"{where} has the label {label!r}: allowed: a name (str) or a number (int)")
    if not _is_image(image):
        kind = type(image).__name__
        if isinstance(image, np.ndarray):
            kind = f"an array of {image.dtype}, shape {image.shape}"
        raise DataError(
            f"{where}: the image is {kind}: allowed: a PIL image, a path, or a uint8 array of "
            "shape (H, W) or (H, W, 3)"
        )
    return image, label


def _is_image(image: Any) -> bool:
    if not isinstance(image, np.ndarray):
        return isinstance(image, str | Path | Image.Image)
    shaped = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
    return image.dtype == np.uint8 and shaped and image.size > 0
