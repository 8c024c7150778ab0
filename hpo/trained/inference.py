"""TrainedModel: the networks of a trained run, evaluated and asked for predictions."""

from __future__ import annotations

import hashlib
import os
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from hpo.config.data import DataConfig
from hpo.config.train import TrainConfig
from hpo.control import Control, NullControl
from hpo.data.cache import ImageCache, content_digest, file_digests, map_threaded, try_read
from hpo.data.csv_labels import csv_test_rows
from hpo.data.dataset import FolderReader, open_test
from hpo.data.folders import folder_to_test, list_folder
from hpo.data.images import ImageReader, Images, Pixels, Sizing, decode, open_file
from hpo.errors import DataError, InputError
from hpo.paths import Home
from hpo.trained.run import (
    NOTHING_SEEN,
    Certainty,
    Overlap,
    RunMetadata,
    SeedDir,
    TrainedRun,
    absent_classes,
    certainties,
    load_run,
    spread,
)
from hpo.trained.seen import Seen, seen_by
from hpo.training import inputs, models
from hpo.training.arithmetic import set_arithmetic
from hpo.training.checkpoint import load_trained
from hpo.training.device import default_device, torch_device
from hpo.training.evaluation import (
    Embedded,
    Evaluation,
    Network,
    Scored,
    embed,
    evaluate_all,
    full_scores,
)
from hpo.training.feature_cache import (
    NO_AUGMENT,
    Features,
    Preprocessing,
    build_cache,
    find_cut_or_warn,
)
from hpo.training.learner import memory_format
from hpo.training.loader import EvalBatches
from hpo.training.memory import is_lack
from hpo.training.tasks import Rows, Task, task_of

T = TypeVar("T")


@dataclass(frozen=True, eq=False, repr=False)
class TrainedModel:
    """The networks of a configuration's seeds, on one device in eval mode, which answer together.

    >>> import hpo
    >>> config = {"epochs": 1, "batch_size": 64, "data": {"dataset": "digits"},
    ...           "model": {"cnn": {"filters": [4]}}}
    >>> hpo.train(config, out="model", progress=None).path.name
    'model'
    >>> model = hpo.TrainedModel.load("model", device="cpu")
    >>> model.classes[:3], model.config.epochs
    (('0', '1', '2'), 1)
    >>> import numpy
    >>> [prediction] = model.predict([numpy.zeros((8, 8), "uint8")], k=2)
    >>> len(prediction.rows)
    2
    """

    config: TrainConfig
    """The configuration, complete."""
    metadata: RunMetadata
    files: tuple[SeedDir, ...]
    """The files of each seed."""
    networks: tuple[nn.Module, ...]
    """The network of each seed."""
    device: torch.device
    control: Control = field(default_factory=NullControl)
    run: TrainedRun | None = None
    """What `load` read."""

    def __repr__(self) -> str:
        seeds = [int(one.root.name.removeprefix("seed-")) for one in self.files]
        where = self.files[0].root.parent if self.files else None
        return f"TrainedModel({str(where)!r}, seeds={seeds}, device={str(self.device)!r})"

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | None = None) -> TrainedModel:
        """Open the folder of a run, or that of one seed of it.

        `device` is by default the first GPU, else the CPU. Raises NotFound where there is no run
        or none of its seeds is finished, InputError for an unknown device.
        """
        return cls.of_run(load_run(Path(path)), torch_device(device or default_device()))

    @classmethod
    def of_run(cls, run: TrainedRun, device: torch.device) -> TrainedModel:
        """Load the networks of all seeds of `run`; of a task whose seeds do not answer together the
        first."""
        seeds = run.seeds if task_of(run.config).averages else run.seeds[:1]
        files = tuple(one.files for one in seeds)
        return cls.of_seeds(run.config, run.metadata, files, device, run=run)

    @classmethod
    def of_seeds(
        cls,
        config: TrainConfig,
        metadata: RunMetadata,
        files: tuple[SeedDir, ...],
        device: torch.device,
        control: Control | None = None,
        *,
        run: TrainedRun | None = None,
    ) -> TrainedModel:
        """Load the networks in `files`. `control` is asked between batches."""
        networks = tuple(load_network(config, metadata, one.weights, device) for one in files)
        return cls(config, metadata, files, networks, device, control or NullControl(), run)

    @property
    def task(self) -> Task:
        """What the model answers."""
        return task_of(self.config)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the networks' outputs."""
        return self.metadata.classes

    @property
    def path(self) -> Path:
        """The folder that was loaded."""
        return self.loaded.path

    @property
    def summary(self) -> dict[str, Any]:
        """Scores over the seeds, as in summary.json: "test", "val" and "train" (each None, or
        {"top1": {"mean": .., "std": ..}, ..}), "ensemble", "seeds", "notes" and more."""
        return self.loaded.summary

    @property
    def loaded(self) -> TrainedRun:
        """The run that `load` read."""
        assert self.run is not None, "only of a run that was loaded"
        return self.run

    @cached_property
    def seen(self) -> Seen | str:
        """Digests of the images that the run has seen, or why they are unknown."""
        return seen_by(self.loaded, Home.default().cache)

    def predict(
        self, images: Iterable[str | os.PathLike[str] | Image.Image | NDArray[Any]], *, k: int = 5
    ) -> list[Prediction]:
        """Return the `k` most likely classes with their probabilities, means over the seeds, for
        each image: a path, a PIL image, or an array of uint8, (H, W), (H, W, 3) or (H, W, 4). Of a
        retrieval the `k` nearest training images.

        What cannot be read has its `error` instead. Raises InputError for an array of another kind.
        """
        return list(predictions(self, [_as_image(one) for one in images], k=k))

    def evaluate(
        self, data: str | os.PathLike[str] | None = None, *, force: bool = False
    ) -> RunEvaluation:
        """Measure each seed, and several together, on the test split of the run's own data, or on
        `data`: a folder of images by class, or a CSV file of them.

        Raises DataError where there is no test split, for unknown classes, and, unless `force`,
        where the run was trained on some of these images.
        """
        folder, device = None if data is None else Path(data), str(self.device)
        return evaluate_run(
            self.loaded, data=folder, home=Home.default(), device=device, force=force
        )

    def batches(
        self, images: Images, features: Features | None = None, micro_batch: int = 0
    ) -> EvalBatches:
        """Return `images`, or `features` of them, preprocessed as in validation; by default as many
        at once."""
        mean, std = self.metadata.mean, self.metadata.std
        at_once = micro_batch or self.config.runtime.micro_batch
        return inputs.eval_batches(images, self.config, mean, std, self.device, at_once, features)

    def score(
        self, images: Images, others: Mapping[str, Network] | None = None
    ) -> dict[str, Evaluation]:
        """Evaluate the first network by "" and `others` by name in one pass over `images`; the
        evaluations keep their logits."""
        return self._evaluate({"": self.networks[0], **(others or {})}, images)

    def probabilities(self, images: Images) -> Tensor:
        """Return the mean probabilities of the networks, (N, C) float32 on the CPU."""
        named = {str(number): network for number, network in enumerate(self.networks)}
        found = [torch.from_numpy(one.logits) for one in self._evaluate(named, images).values()]
        return torch.stack([logits.softmax(dim=1) for logits in found]).mean(dim=0)

    def _evaluate(self, networks: Mapping[str, Network], images: Images) -> dict[str, Evaluation]:
        def evaluated(micro_batch: int) -> dict[str, Evaluation]:
            return evaluate_all(
                networks,
                self.batches(images, micro_batch=micro_batch),
                classes=len(self.classes),
                device=self.device,
                precision=self.config.runtime.precision,
                control=self.control,
                logits=True,
            )

        return self._fitting(evaluated)

    def _fitting(self, work: Callable[[int], T]) -> T:
        """Return what `work` makes of as many images at once as fit the memory of the device: those
        of training, or half as often as that is too many. Raises RuntimeError where one is."""
        micro_batch = self.config.runtime.micro_batch or self.config.batch_size
        while True:
            try:
                return work(micro_batch)
            except RuntimeError as error:
                if micro_batch == 1 or not is_lack(error):
                    raise
            micro_batch //= 2

    def embed(self, images: Images, cache: Path | None = None) -> Embedded:
        """Return the features of `images` in the first network; what its frozen layers make of them
        is kept under `cache`, as in training."""
        model, config = self.networks[0], self.config
        suffix, kept = None, None
        if config.frozen and cache is not None:
            frozen = models.set_trainable(model, config.model.trainable_blocks)
            cut = find_cut_or_warn(model, frozen, config, self.device)
            how = Preprocessing(self.metadata.mean, self.metadata.std, config, self.device)
            found = build_cache(
                model, cut, how, [(images, NO_AUGMENT)], cache, self.control, epoch=0
            )
            kept = found.get((images, NO_AUGMENT))
            suffix = cut.suffix(model) if cut and kept else None

        def embedded(micro_batch: int) -> Embedded:
            return embed(
                model,
                images,
                self.batches(images, kept, micro_batch),
                classes=len(self.classes),
                device=self.device,
                precision=config.runtime.precision,
                control=self.control,
                suffix=suffix,
            )[0]

        return self._fitting(embedded)


def load_network(
    config: TrainConfig, metadata: RunMetadata, weights: Path, device: torch.device
) -> nn.Module:
    """Return the trained network in `weights`, on `device` in eval mode."""
    model = load_trained(
        weights, config.model, classes=len(metadata.classes), image_size=config.data.image_size
    )
    layout = memory_format(config.runtime.memory_format)
    return model.to(device, memory_format=layout)  # type: ignore[call-overload, no-any-return]


def _as_image(image: str | os.PathLike[str] | Image.Image | NDArray[Any]) -> Path | Image.Image:
    """Return an array as an image, a path as it is. Raises InputError for an array that is none."""

    if isinstance(image, str | os.PathLike):
        return Path(image)
    if isinstance(image, Image.Image):
        return image
    shape: tuple[int, ...] = getattr(image, "shape", ())
    dtype = getattr(image, "dtype", type(image).__name__)
    if str(dtype) != "uint8" or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))):
        raise InputError(
            f"an image of {dtype} and shape {tuple(shape)}: a path, a PIL image, or an array of "
            "uint8 and shape (H, W), (H, W, 3) or (H, W, 4)"
        )
    return Image.fromarray(image)


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
    seen: Overlap | str = NOTHING_SEEN
    """Which of the images the run has seen, or why that is unknown."""

    @property
    def trained_on(self) -> tuple[str, ...] | None:
        """Names of the images that the run was trained on; None if unknown."""
        return None if isinstance(self.seen, str) else self.seen.trained

    @property
    def validated_on(self) -> tuple[str, ...] | None:
        """Names of the others that chose the epoch; None if unknown."""
        return None if isinstance(self.seen, str) else self.seen.validated

    @property
    def overlap(self) -> str | None:
        """Return a line on the images that the run has seen, if any or if unknown."""
        if isinstance(self.seen, str):
            return self.seen
        return f"{self.seen.text()}. The scores are too good." if self.seen else None

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

    @property
    def certainties(self) -> list[Certainty]:
        """Return how sure the scores are that count images."""
        return certainties(self.summary, self.images, len(self.seeds))


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
    `force`, if the run has seen images of `data`; InputError for an unknown device.
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
    seen = seen_by(run, home.cache)
    known = seen if isinstance(seen, str) else seen.among(images)
    if isinstance(known, Overlap) and known and data is not None and not force:
        raise DataError(
            f"{where}: {known.text()}. Their scores would be too good: give images that the run "
            "has not seen, or evaluate these all the same with --force"
        )
    set_arithmetic(run.config.runtime, chosen)  # as in training: it changes the last bits
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
    listing = list_folder(root, grouped=grouped, learnt=False)
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
    validated_on: bool | None = None
    """Whether it was used for validation instead, which chose the epoch; None if unknown."""
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "image": str(self.path),
            **self.task.as_dict(self.rows),
            "trained_on": self.trained_on,
            "validated_on": self.validated_on,
            "error": self.error,
        }


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
    seen = model.seen
    for chunk in read_images(iter(images), Sizing.of(model.config.data)):
        answered = answer(chunk, k) if len(chunk) else []
        pairs = zip(chunk.good, answered, *_marks(seen, chunk), strict=True)
        found = {i: Prediction(chunk.paths[i], task, *rest) for i, *rest in pairs}
        for i, path in enumerate(chunk.paths):
            yield found.get(i) or Prediction(path, task, error=chunk.bad[i])


def _marks(seen: Seen | str, images: Images) -> list[Sequence[bool | None]]:
    """Return whether each of `images` was trained on, and whether it was validated on."""
    if isinstance(seen, str):
        return [[None] * len(images)] * 2
    validated = seen.validated.marks(images) if seen.validated else [None] * len(images)
    return [seen.trained.marks(images), validated]


class Chunk(Images):
    """Unlabelled images in memory, with the reasons why others cannot be read."""

    streamed = True  # of several sizes
    in_memory = True

    def __init__(self, paths: Sequence[Path], read: Sequence[_Read | str]) -> None:
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

    def pixels(self, i: int) -> Pixels:
        """Return the pixels of one image."""
        return self._pixels[i]


def read_images(images: Iterator[Path | Image.Image], sizing: Sizing) -> Iterator[Chunk]:
    """Yield `images`, a file or in memory each, CHUNK at a time and as `sizing` says."""
    numbered = enumerate(images)
    while chunk := list(islice(numbered, CHUNK)):
        given = {f"image {i}": one for i, one in chunk if isinstance(one, Image.Image)}
        paths = [Path(f"image {i}") if isinstance(one, Image.Image) else one for i, one in chunk]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata
            look = partial(try_read, _read, _Anywhere(given), sizing)
            read = list(map_threaded(look, [*map(str, paths)]))
        yield Chunk(paths, read)


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
