"""What a good trial's kept weights answer on the validation images, in a small file beside them.

Of each image its name, class, prediction and two probabilities; of the worst mistakes a thumbnail,
so that whoever reads the file needs neither the images nor the network.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.data.arrays import read_arrays, write_arrays
from hpo.data.images import Images, Numbers
from hpo.data.thumbnails import thumbnail
from hpo.errors import DataError
from hpo.paths import Home
from hpo.search import sync
from hpo.storage.database import Database
from hpo.storage.records import Attempt

MOST_IMAGES = 200_000
"""Of more validation images no predictions are kept: the file would no longer be small."""
PICTURED = 12
"""Worst mistakes that have a thumbnail."""


@dataclass(frozen=True)
class Mistake:
    """A validation image that was not recognized."""

    name: str
    actual: str
    predicted: str
    probability: float
    """Of the predicted class."""
    of_actual: float
    """Probability of the actual class."""
    thumbnail: bytes | None
    """JPEG of at most 96 x 96; None of all but the worst, and of images that could not be read."""


@dataclass(frozen=True)
class Predictions:
    """Predictions for N validation images, of all folds where there are some."""

    classes: tuple[str, ...]
    names: Sequence[str]
    labels: Numbers
    """(N,) true classes."""
    predicted: Numbers
    """(N,) most likely classes."""
    confidence: NDArray[np.float32]
    """(N, 2): probabilities of the most likely class and of the true one."""
    thumbnails: Mapping[int, bytes]
    """JPEGs of the worst mistakes by place."""

    @property
    def confusion(self) -> list[list[int]]:
        """(C, C) counts: actual classes in rows, predicted ones in columns."""
        size = len(self.classes)
        cells = np.bincount(self.labels * size + self.predicted, minlength=size * size)
        return [[int(cell) for cell in row] for row in cells.reshape(size, size)]

    @property
    def wrong(self) -> int:
        """Number of images that were not recognized."""
        return int((self.labels != self.predicted).sum())

    def worst(self, most: int = PICTURED) -> list[Mistake]:
        """Return the mistakes that gave the actual class the least probability, worst first."""
        return [self._mistake(place) for place in worst(self.labels, self.predicted,
                                                        self.confidence)[:most]]  # fmt: skip

    def _mistake(self, place: int) -> Mistake:
        predicted, actual = (float(one) for one in self.confidence[place])
        return Mistake(
            str(self.names[place]),
            self.classes[self.labels[place]],
            self.classes[self.predicted[place]],
            predicted,
            actual,
            self.thumbnails.get(place),
        )


def worst(labels: Numbers, predicted: Numbers, confidence: NDArray[np.float32]) -> list[int]:
    """Return the places of all mistakes by the probability of the actual class, lowest first."""
    wrong = np.flatnonzero(labels != predicted)
    order = np.lexsort((wrong, -confidence[wrong, 0], confidence[wrong, 1]))
    return [int(place) for place in wrong[order]]


def save(
    path: Path, classes: Sequence[str], sets: Sequence[Images], found: Sequence[Mapping[str, Any]]
) -> bool:
    """Write the predictions of the networks of all folds, or of one: their validation `sets` and
    what each `found` (see `hpo.training.tasks.Validated`), atomically. Return False, and write
    nothing, where some have none or there are too many images. Raises DiskFull."""
    if not all(found) or sum(map(len, sets)) > MOST_IMAGES:
        return False
    labels = np.concatenate([np.asarray(images.labels, np.int64) for images in sets])
    predicted = np.concatenate([np.asarray(one["predicted"], np.int64) for one in found])
    confidence = np.concatenate([np.asarray(one["confidence"], np.float32) for one in found])
    pictures = _pictures(sets, worst(labels, predicted, confidence)[:PICTURED])
    write_arrays(
        path,
        compressed=True,
        classes=np.array(classes, np.str_),
        names=np.array([name for images in sets for name in images.names], np.str_),
        labels=labels.astype(np.int32),
        predicted=predicted.astype(np.int32),
        confidence=confidence,
        pictured=np.array(list(pictures), np.int64),
        sizes=np.array([len(one) for one in pictures.values()], np.int64),
        pictures=np.frombuffer(b"".join(pictures.values()), np.uint8),
    )
    return True


def _pictures(sets: Sequence[Images], places: Sequence[int]) -> dict[int, bytes]:
    """Return the thumbnails of the images at these places, counted through all sets."""
    ends = np.cumsum([len(images) for images in sets])
    pictures = {}
    for place in places:
        which = int(np.searchsorted(ends, place, side="right"))
        images = sets[which]
        with suppress(DataError):  # its file has gone meanwhile
            pictures[place] = thumbnail(images.pixels(place - int(ends[which]) + len(images)))
    return pictures


def load(path: Path) -> Predictions:
    """Read what `save` wrote. Raises DataError for a damaged file."""
    advice = "remove it; the report goes on without"
    arrays = read_arrays(path, advice)
    try:
        ends = np.cumsum(arrays["sizes"])
        parts = np.split(arrays["pictures"], ends[:-1]) if len(ends) else []
        found = Predictions(
            tuple(str(name) for name in arrays["classes"]),
            arrays["names"],
            arrays["labels"].astype(np.int64),
            arrays["predicted"].astype(np.int64),
            arrays["confidence"],
            {int(place): part.tobytes()
             for place, part in zip(arrays["pictured"], parts, strict=True)},
        )  # fmt: skip
        _require_consistent(found)
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; {advice}") from error


def _require_consistent(found: Predictions) -> None:
    """Raise ValueError unless all images have one class and one prediction among the classes."""
    images, classes = len(found.names), range(len(found.classes))
    columns = (found.labels, found.predicted)
    if any(one.shape != (images,) for one in columns) or found.confidence.shape != (images, 2):
        raise ValueError("its columns have different lengths")
    if images and not all(one.min() in classes and one.max() in classes for one in columns):
        raise ValueError("it names classes that it does not have")


def find(database: Database, home: Home, uuid: str, last: Attempt) -> Predictions | None:
    """Return the predictions that a trial's `last` attempt left, here or in the study's artifacts;
    None where none were kept. Raises StorageError, and DataError for a damaged file."""
    path = home.study(uuid).predictions(last.number, last.k)
    if path.exists():
        return load(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        return load(copy) if sync.fetch(database, home, uuid, path, copy) else None
