"""A data set of the user's own: `module:function` from their own Python path."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hpo.engine import modules
from hpo.engine.cache import file_digests
from hpo.engine.folders import Listing
from hpo.engine.images import ImageReader, array_digest, image_digest, open_file, too_large
from hpo.engine.origins import DatasetSource
from hpo.errors import ConfigError, DataError

Label = str | int
Split = Sequence[tuple[Any, Any]]

_ITEM = re.compile(r"(train|val|test)\[(\d+)\]")
"""Name of a picture that is no file: its place in what the function returned."""


@dataclass
class UserReader:
    """Pictures by path, or by their place; another process asks the function again."""

    function: str
    root: Path
    splits: dict[str, Split] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self.function, "root": self.root, "splits": {}}

    def split(self, part: str) -> Split | None:
        """What the function returns for `part`; None where it has no such part."""
        if part not in self.splits:
            found = _asked(self.function, self.root, part)
            if found is None:
                return None
            self.splits[part] = found
        return self.splits[part]

    def open(self, name: str) -> Image.Image:
        if not (match := _ITEM.fullmatch(name)):
            return open_file(self.root / name)
        split = self.split(match[1])
        assert split is not None  # it had this picture
        picture, _ = _item(self.function, split, match[1], int(match[2]))
        return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)


class UserSource(DatasetSource):
    """What the function `module:function` returns for `root`."""

    def __init__(self, function: str, root: Path, *, max_pixels: int) -> None:
        self.function, self.root, self.max_pixels = function, root.absolute(), max_pixels
        self._own = UserReader(function, self.root)
        self.reader: ImageReader = self._own
        self._digests: dict[str, str] = {}

    def listing(self, *, test: bool) -> Listing:
        found: dict[str, list[tuple[str, Label]]] = {}
        for part in ("train", "val", "test") if test else ("train", "val"):
            split = self._own.split(part)
            if split is not None:
                found[part] = list(self._items(part, split))
        if "train" not in found:
            raise DataError(f"{self.function}: returned None for 'train'; only val and test may "
                            "be None")  # fmt: skip
        classes = self._classes(found["train"])
        place = {label: i for i, label in enumerate(classes)}
        for part, items in found.items():
            for name, label in items:
                if label not in place:
                    raise DataError(
                        f"{self.function}: {name} of {part} is of class {label!r}, which no "
                        "training image has"
                    )
        parts = {part: [(name, place[label]) for name, label in items]
                 for part, items in found.items()}  # fmt: skip
        return Listing(tuple(map(str, classes)), parts, sealed=not test)

    def digests(self, names: Sequence[str], cache: Path | None) -> dict[str, str]:
        files = [name for name in names if name not in self._digests]
        return {**self._digests, **file_digests(self.root, files, cache, self.tick)}

    def _items(self, part: str, split: Split) -> Iterator[tuple[str, Label]]:
        """Name and label of each; the content of those in memory is seen here."""
        for i in range(len(split)):
            self.tick()
            picture, label = _item(self.function, split, part, i)
            if isinstance(picture, str | Path):
                path = self.root / picture  # an absolute one stays what it is
                below = path.is_relative_to(self.root)
                yield str(path.relative_to(self.root) if below else path), label
                continue
            name = f"{part}[{i}]"
            if isinstance(picture, Image.Image):  # maybe not decoded yet
                self._require_size(name, picture)
                self._digests[name] = image_digest(picture)
            else:
                self._digests[name] = array_digest(picture)
            yield name, label

    def _require_size(self, name: str, picture: Image.Image) -> None:
        if reason := too_large(picture.size, self.max_pixels):
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
        function = modules.load(name, "data.dataset")
    except ConfigError as error:  # nothing that another configuration would mend
        raise DataError(str(error)) from error
    try:
        found = function(str(root), part)
    except Exception as error:  # whatever the user's code raises is told, not shown as our fault
        raise DataError(f"{name}(root, {part!r}) raised {modules.describe_error(error)}") from error
    if found is None:
        return None
    if not hasattr(found, "__len__") or not hasattr(found, "__getitem__"):
        raise DataError(
            f"{name}(root, {part!r}) returned {type(found).__name__}: allowed: a sequence "
            "of (picture, label), with len() and [i], or None where there is no such split"
        )
    if not len(found):
        raise DataError(f"{name}(root, {part!r}) returned no images; return None where "
                        "there is no such split")  # fmt: skip
    split: Split = found
    return split


def _item(function: str, split: Split, part: str, i: int) -> tuple[Any, Label]:
    """Picture and label at one place, judged."""
    where = f"{function}: {part}[{i}]"
    try:
        item = split[i]
    except Exception as error:
        raise DataError(f"{where} raised {modules.describe_error(error)}") from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        got = f"{type(item).__name__} of {len(item)}" if isinstance(item, tuple | list) else (
            type(item).__name__)  # fmt: skip
        raise DataError(f"{where} is {got}: allowed: (picture, label)")
    picture, label = item
    if isinstance(label, np.integer):
        label = int(label)
    if not isinstance(label, str | int) or isinstance(label, bool):
        raise DataError(f"{where} has the label {label!r}: allowed: a name (str) or a number (int)")
    if not _is_picture(picture):
        kind = type(picture).__name__
        if isinstance(picture, np.ndarray):
            kind = f"an array of {picture.dtype}, shape {picture.shape}"
        raise DataError(
            f"{where} has as its picture {kind}: allowed: a PIL image, a path, or a uint8 array of "
            "shape (H, W) or (H, W, 3)"
        )
    return picture, label


def _is_picture(picture: Any) -> bool:
    if not isinstance(picture, np.ndarray):
        return isinstance(picture, str | Path | Image.Image)
    shaped = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)
    return picture.dtype == np.uint8 and shaped and picture.size > 0
