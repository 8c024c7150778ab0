"""Evaluation and prediction with a trained run."""

from __future__ import annotations

import glob
import hashlib
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image

from hpo.config.data import DataConfig
from hpo.config.train import TrainConfig
from hpo.control import Control
from hpo.data.cache import ImageCache, content_digest, file_digests, map_threaded, try_read
from hpo.data.csv_labels import csv_test_rows
from hpo.data.dataset import FolderReader, open_test
from hpo.data.folders import folder_to_test, images_below, list_folder
from hpo.data.images import ImageReader, Images, Pixels, Sizing, decode, open_file
from hpo.errors import DataError, InputError
from hpo.paths import Home
from hpo.trained.model import TrainedModel
from hpo.trained.run import UNKNOWN, TrainedOn, TrainedRun, absent_classes, overlap_text, spread
from hpo.training.device import torch_device
from hpo.training.evaluation import Scored, full_scores
from hpo.training.tasks import Rows, Task, task_of


def whole_note(config: TrainConfig) -> str | None:
    """Return a warning if the network was trained on images cropped to their boxes; else None."""
    if not config.data.crop_to_box:
        return None
    return (
        "the run was trained on images cropped to their boxes (data.crop_to_box); these have "
        "none and are taken whole: crop them to the object first"
    )


@dataclass(frozen=True)
class RunEvaluation:
    """Scores of every seed of a run on the same images."""

    data: str
    """Name of the images: the test split of the run's data, or a folder or file."""
    images: int
    classes: tuple[str, ...]
    seeds: Mapping[int, Scored]
    together: Scored | None = None
    """Of the mean of the seeds' probabilities; None for one seed, and where they cannot answer
    together."""
    note: str | None = None
    """A warning about the scores."""
    trained_on: tuple[str, ...] | None = None
    """Names of the images that the run was trained on; None if unknown."""

    @property
    def overlap(self) -> str | None:
        """Return a line on the images that were trained on, if any or if unknown."""
        if self.trained_on is None:
            return UNKNOWN
        if not self.trained_on:
            return None
        return f"{overlap_text(self.trained_on, self.images)}. The scores are too good."

    @property
    def absent(self) -> str | None:
        """Return a line on the classes without images, if any."""
        return absent_classes(next(iter(self.scores().values())))

    def scores(self) -> dict[int, dict[str, Any]]:
        """Return the scores of each seed (see `hpo.training.evaluation.full_scores`)."""
        return {seed: full_scores(found, self.classes) for seed, found in self.seeds.items()}

    @property
    def ensemble(self) -> dict[str, Any] | None:
        """Return the scores of the ensemble."""
        return None if self.together is None else full_scores(self.together, self.classes)

    @property
    def summary(self) -> dict[str, dict[str, float | None]]:
        """Return mean and standard deviation (n - 1; None for one seed) of each score."""
        return spread(list(self.scores().values()))


def evaluate_run(
    run: TrainedRun,
    *,
    data: Path | None = None,
    home: Home,
    device: str,
    control: Control | None = None,
    force: bool = False,
) -> RunEvaluation:
    """Evaluate every seed of `run`, and several as an ensemble, on the test split of its data, or
    on `data`: a folder (its test/ if it has one) with a folder per class, or a CSV file (its split
    test if it has splits).

    Raises DataError if there is no test split, for classes that the run does not know, and, unless
    `force`, if the run was trained on images of `data`; InputError
    for an unknown device.
    """
    chosen, note = torch_device(device), None
    if data is None:
        images = open_test(run.config.data, home.cache)
        where = f"the test split of {run.config.data.title}"
    else:
        where, note = str(folder_to_test(data)), whole_note(run.config)
        images = open_labelled(Path(where), run.classes, run.config.data, home.cache)
    if images is None:
        raise DataError(
            f"{run.config.data.title} has no test split; "
            "give a folder of images by class, or a CSV file of them, with --data PATH"
        )
    trained = TrainedOn.load(run.files.trained_on)
    known = None if trained is None else tuple(trained.among(images))
    if known and data is not None and not force:
        raise DataError(
            f"{where}: {overlap_text(known, len(images))}. Their scores would be too good: give "
            "images that the run has not seen, or evaluate these all the same with --force"
        )
    if run.config.runtime.threads:
        # As in training: the number of threads changes the last bits.
        torch.set_num_threads(run.config.runtime.threads)
    task, found = task_of(run.config), {}
    for one in run.seeds:
        model = TrainedModel.of_seeds(run.config, run.metadata, (one.files,), chosen, control)
        found[one.seed] = task.evaluate(model, one.files, images)
    together = task.combine(list(found.values()))
    return RunEvaluation(where, len(images), run.classes, found, together, note, known)


def open_labelled(data: Path, classes: tuple[str, ...], config: DataConfig, cache: Path) -> Images:
    """Open the images of a folder by class or of a CSV file, labelled by their index in `classes`,
    at the size of `config`. Raises DataError for other classes and for unreadable images."""
    if data.is_file():
        rows = csv_test_rows(data, skip_missing=config.skip_unreadable)
        root, listed = data.parent, [(row.file, row.label) for row in rows]
    else:
        root, listed = data, _listed(data, grouped=config.group_by is not None)
    # A Mac writes names in another form of Unicode than Linux.
    place = {unicodedata.normalize("NFC", name): label for label, name in enumerate(classes)}
    listed = [(name, unicodedata.normalize("NFC", label)) for name, label in listed]
    unknown = sorted({label for _, label in listed} - {*place})
    if unknown:
        raise DataError(
            f"{data}: the run does not know the classes {', '.join(unknown)}; it was trained on "
            f"{', '.join(classes)}"
        )
    names, labels = [name for name, _ in listed], [place[label] for _, label in listed]
    digests = file_digests(root, names, cache)
    images, index = ImageCache(cache, config.cache_limit_gb * 1e9).open(
        FolderReader(root), names, labels, [digests[name] for name in names], Sizing.of(config)
    )
    if index.bad and not (config.skip_unreadable and len(images)):
        shown = "".join(f"\n  {names[i]} ({why})" for i, why in list(index.bad.items())[:10])
        raise DataError(f"{data}: {len(index.bad)} files cannot be read as images:{shown}")
    images.files = tuple(digests[name] for name in images.names)
    return images


def _listed(root: Path, *, grouped: bool) -> list[tuple[str, str]]:
    """Return name and class of each image of a folder by class."""
    listing = list_folder(root, grouped=grouped)
    if "all" not in listing.parts:
        raise DataError(f"{root}: has train/ but no test/; give a folder with one folder per class")
    return [(name, listing.classes[label]) for name, label in listing.parts["all"]]


CHUNK = 64
"""Images in memory at once."""


@dataclass(frozen=True)
class Prediction:
    """What a model answers to one image, or why the image cannot be read."""

    path: Path
    task: Task = field(repr=False)
    rows: Rows = ()
    """(class, probability), or of a retrieval (name, class, distance) of each neighbour; the best
    first."""
    trained_on: bool | None = None
    """Whether the run was trained on it; None if unknown."""
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "image": str(self.path),
            **self.task.as_dict(self.rows),
            "trained_on": self.trained_on,
            "error": self.error,
        }


@dataclass(frozen=True)
class Selection:
    """Image files to predict."""

    files: tuple[Path, ...]
    left_out: Counter[str] = field(default_factory=Counter)
    """Files in folders that are no images by their extension: count by extension."""

    @property
    def note(self) -> str | None:
        """Return a line on the files that were left out, if any."""
        if not self.left_out:
            return None
        kinds = ", ".join(f"{kind or 'without'} {n:,}" for kind, n in self.left_out.most_common(8))
        return f"files of other extensions in these folders are left out: {kinds}"


def select(paths: Sequence[Path]) -> Selection:
    """Expand `paths` in their order: files as they are, even unreadable ones; folders to the images
    below them, by the rules of `data.root`; patterns (`*`, `?`, `[`; `**` for any folders) that are
    no files to what they match.

    Raises InputError if no image is left.
    """
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in _matched(paths):
        if not path.is_dir():
            files.append(path)
            continue
        images, others = images_below(path)
        files += map(Path, images)
        left_out.update(PurePath(one).suffix.lower() for one in others)
    found = Selection(tuple(files), left_out)
    if not files:
        given = ", ".join(map(str, paths))
        why = f"; {found.note}" if found.note else ""
        raise InputError(f"no images in {given}{why}" if paths else "no images: give a file")
    return found


def _matched(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.exists() or not glob.has_magic(str(path)):
            yield path
        else:
            yield from map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207


def predictions(
    model: TrainedModel, images: Sequence[Path | Image.Image], *, k: int = 5
) -> Iterator[Prediction]:
    """Yield the answers of a loaded `model` to each image, a file or in memory, in the given order:
    its `k` most likely classes by the mean of the seeds' probabilities, or the `k` training images
    nearest to it by the features of the first seed; all, where there are fewer. What is missing, no
    image, or has more pixels than data.max_pixels has an error instead. Images in memory are called
    "image 0" and so on, by their place.

    Preprocessing is that of evaluation. However many files there are, few are in memory.

    Raises InputError for k below 1, DataError for an unreadable index.
    """
    if k < 1:
        raise InputError(f"{k} answers: at least 1")
    task = model.task
    answer = task.predictor(model, model.files[0])
    trained = TrainedOn.load(model.loaded.files.trained_on)
    for chunk in read_images(iter(images), Sizing.of(model.config.data), trained):
        answered = answer(chunk, k) if len(chunk) else []
        pairs = zip(chunk.good, answered, chunk.trained_on, strict=True)
        found = {i: Prediction(chunk.paths[i], task, rows, known) for i, rows, known in pairs}
        for i, path in enumerate(chunk.paths):
            yield found.get(i) or Prediction(path, task, error=chunk.bad[i])


class Chunk(Images):
    """Unlabelled images in memory, with the reasons why others cannot be read."""

    streamed = True  # of several sizes
    in_memory = True

    def __init__(
        self, paths: Sequence[Path], read: Sequence[_Read | str], trained: TrainedOn | None
    ) -> None:
        self.paths = tuple(paths)
        there = {i: one for i, one in enumerate(read) if not isinstance(one, str)}
        self.good = tuple(there)
        """Positions in `paths` of those that could be read."""
        self.bad = {i: one for i, one in enumerate(read) if isinstance(one, str)}
        """Why the others could not."""
        self._pixels = [one.pixels for one in there.values()]
        self.files = tuple(one.digest for one in there.values())
        self.names = tuple(str(paths[i]) for i in there)
        self.labels = np.zeros(len(there), np.int64)
        self.sizes = np.array([one.shape[:2] for one in self._pixels], np.int64).reshape(-1, 2)
        self.trained_on: Sequence[bool | None] = (
            [None] * len(there) if trained is None else trained.marks(self)
        )

    def pixels(self, i: int) -> Pixels:
        """Return the pixels of one image."""
        return self._pixels[i]


def read_images(
    images: Iterator[Path | Image.Image], sizing: Sizing, trained: TrainedOn | None
) -> Iterator[Chunk]:
    """Yield `images`, a file or in memory each, CHUNK at a time and as `sizing` says."""
    numbered = enumerate(images)
    while chunk := list(islice(numbered, CHUNK)):
        given = {f"image {i}": one for i, one in chunk if isinstance(one, Image.Image)}
        paths = [Path(f"image {i}") if isinstance(one, Image.Image) else one for i, one in chunk]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata
            look = partial(try_read, _read, _Anywhere(given), sizing)
            read = list(map_threaded(look, map(str, paths)))
        yield Chunk(paths, read, trained)


@dataclass(frozen=True)
class _Read:
    pixels: Pixels
    digest: str
    """Digest of the file's content, or of the pixels of an image in memory."""


def _read(source: ImageReader, name: str, sizing: Sizing) -> _Read:
    assert isinstance(source, _Anywhere)
    return _Read(np.array(decode(source, name, sizing)), source.digest(name))


@dataclass(frozen=True)
class _Anywhere:
    """Images in memory by their names, and files by their paths."""

    given: Mapping[str, Image.Image]

    def open(self, name: str) -> Image.Image:
        return self.given[name].copy() if name in self.given else open_file(name)

    def digest(self, name: str) -> str:
        if name not in self.given:
            return content_digest(Path(name))
        return hashlib.blake2b(self.given[name].tobytes(), digest_size=16).hexdigest()
