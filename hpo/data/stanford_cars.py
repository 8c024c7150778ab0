"""Stanford Cars in the layout of torchvision's StanfordCars, with its bounding boxes.

The annotations (Krause et al. 2013, the devkit's README) are MATLAB structures: `annotations` with
bbox_x1, bbox_y1, bbox_x2, bbox_y2 (pixels from 1, the last ones included), class (from 1) and
fname; `class_names` in cars_meta.mat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hpo.data.cache import file_digests
from hpo.data.folders import Listing
from hpo.data.images import ImageReader, open_file, too_large
from hpo.data.sources import DatasetSource
from hpo.errors import DataError

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels from 0, the last two not included."""

BASE = "stanford_cars"
META = "devkit/cars_meta.mat"
ANNOTATIONS = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
CORNERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
FIELDS = (*CORNERS, "class", "fname")


@dataclass(frozen=True)
class BoxReader:
    """Images of a folder, by relative path; those in `boxes` are cropped."""

    root: Path
    max_pixels: int
    boxes: dict[str, tuple[Box, str]] = field(default_factory=dict)
    """Box of an image, and the file it comes from, by name."""

    def open(self, name: str) -> Image.Image:
        """Return one image, cropped to its box if it has one. Raises ValueError if the image is too
        large or its box is outside it."""
        image = open_file(self.root / name)
        if name not in self.boxes:
            return image
        if reason := too_large(image.size, self.max_pixels):  # all of it is decoded for its box
            image.close()
            raise ValueError(reason)
        box, source = self.boxes[name]
        if box[2] > image.width or box[3] > image.height:
            image.close()
            raise ValueError(
                f"its box {_shown(box)} in {source} is outside the image of {image.width} x "
                f"{image.height} pixels"
            )
        with image:
            return image.crop(box)


class StanfordCarsSource(DatasetSource):
    """The folder stanford_cars under `root`; with `crop`, images are cropped to their boxes."""

    def __init__(self, root: Path, *, crop: bool, max_pixels: int) -> None:
        self.root, self.crop = root, crop
        self.boxes: dict[str, tuple[Box, str]] = {}
        self.reader: ImageReader = BoxReader(root, max_pixels, self.boxes)

    def listing(self, *, test: bool) -> Listing:
        """Return names and labels by part. Raises DataError for files that are missing or cannot be
        used."""
        parts = ("train", "test") if test else ("train",)
        self._require(parts)
        classes = _class_names(self.root / BASE / META)
        items = {part: self._items(part, classes) for part in parts}
        known = {label for _, label in items["train"]}
        if missing := [name for label, name in enumerate(classes) if label not in known]:
            raise DataError(
                f"{self.root / BASE / ANNOTATIONS['train']}: no image of class {missing[0]!r} "
                f"({len(missing)} of the {len(classes)} classes in {META} have none)"
            )
        return Listing(classes, items, self._unused(parts, items), sealed=not test)

    def digests(self, names: Sequence[str], cache: Path | None) -> dict[str, str]:
        """Return the content digest of each file."""
        return file_digests(self.root, names, cache, self.tick)

    def variant(self, name: str) -> str:
        """Return the box to which an image is cropped."""
        return _shown(self.boxes[name][0]) if name in self.boxes else ""

    def _require(self, parts: Sequence[str]) -> None:
        base = self.root / BASE
        needed = [META, *(ANNOTATIONS[part] for part in parts), *(f"cars_{one}" for one in parts)]
        for one in needed:
            if not (base / one).exists():
                raise DataError(f"{base / one}: not there. {layout(self.root)}")

    def _items(self, part: str, classes: Sequence[str]) -> list[tuple[str, int]]:
        file = self.root / BASE / ANNOTATIONS[part]
        there = set(_image_names(self.root / BASE / f"cars_{part}"))
        label_of: dict[str, int] = {}
        for number, row in enumerate(_annotations(file), 1):
            image, label, box = _parsed(row, file, number, len(classes))
            name = f"{BASE}/cars_{part}/{image}"
            if image not in there:
                raise DataError(f"{file}: names {image}, which cars_{part}/ does not have")
            if name in label_of:
                raise DataError(f"{file}: names {image} twice")
            label_of[name] = label
            if self.crop:
                self.boxes[name] = box, file.name
        return list(label_of.items())

    def _unused(self, parts: Sequence[str], items: dict[str, list[tuple[str, int]]]) -> list[str]:
        warnings = []
        for part in parts:
            extra = len(_image_names(self.root / BASE / f"cars_{part}")) - len(items[part])
            if extra:
                warnings.append(f"{extra} images of cars_{part}/ have no annotation")
        return warnings


def layout(root: Path) -> str:
    """Return the expected layout of the files, for a message."""
    return (
        "torchvision cannot download Stanford Cars any more; get it elsewhere and lay it out as\n"
        f"  {root / BASE}/\n"
        "    devkit/cars_meta.mat\n"
        "    devkit/cars_train_annos.mat\n"
        "    cars_test_annos_withlabels.mat\n"
        "    cars_train/00001.jpg ...  8,144 images\n"
        "    cars_test/00001.jpg ...   8,041 images\n"
        "or set data.root to the folder that holds stanford_cars/"
    )


def _image_names(folder: Path) -> list[str]:
    return [one.name for one in folder.iterdir() if one.suffix.lower() in (".jpg", ".jpeg", ".png")]


def _loaded(file: Path, key: str) -> Any:
    """Return the array `key` of a MATLAB file with one dimension."""
    from scipy.io import loadmat

    try:
        content = loadmat(file, squeeze_me=True)
    except MemoryError:
        raise
    except Exception as error:  # scipy raises anything for a file of another kind
        raise DataError(f"{file}: cannot be read as a MATLAB file ({error})") from error
    if key not in content:
        has = ", ".join(sorted(name for name in content if not name.startswith("__"))) or "nothing"
        raise DataError(f"{file}: has no {key!r}; it has {has}")
    return np.atleast_1d(content[key])


def _class_names(file: Path) -> tuple[str, ...]:
    names = _loaded(file, "class_names").tolist()
    if len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise DataError(f"{file}: 'class_names' must be a list of two names or more")
    if len(set(names)) < len(names):
        raise DataError(f"{file}: 'class_names' contains a name twice")
    return tuple(names)


def _annotations(file: Path) -> Any:
    rows = _loaded(file, "annotations")
    if missing := [name for name in FIELDS if name not in (rows.dtype.names or ())]:
        raise DataError(
            f"{file}: 'annotations' has no field {missing[0]!r}; needed: {', '.join(FIELDS)}"
        )
    return rows


def _parsed(row: Any, file: Path, number: int, classes: int) -> tuple[str, int, Box]:
    """Return file name, label from 0, and box of one annotation."""
    try:
        x1, y1, x2, y2 = (int(row[name]) for name in CORNERS)
        label = int(row["class"])
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: annotation {number} has no whole numbers ({error})") from error
    if not 1 <= label <= classes:
        raise DataError(f"{file}: annotation {number} has class {label}: allowed: 1 to {classes}")
    if x1 < 1 or y1 < 1 or x2 < x1 or y2 < y1:
        raise DataError(
            f"{file}: annotation {number} has the box {x1},{y1},{x2},{y2}: allowed: from 1, with "
            "x1 <= x2 and y1 <= y2"
        )
    return str(row["fname"]), label - 1, (x1 - 1, y1 - 1, x2, y2)


def _shown(box: Box) -> str:
    left, top, right, bottom = box
    return f"{left + 1},{top + 1},{right},{bottom}"
