"""What a trained run sees in images from anywhere: files, folders and patterns, a few at a time."""

from __future__ import annotations

import glob
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hpo.definition.config import TrainConfig
from hpo.engine.cache import content_digest, threaded, try_read
from hpo.engine.folders import images_below
from hpo.engine.images import ImageReader, Images, Pixels, Sizing, decode, open_file
from hpo.engine.learner import autocast
from hpo.engine.runtime import torch_device
from hpo.errors import InputError
from hpo.results.evaluate import eval_batches, load_network
from hpo.results.runs import Run
from hpo.results.trained_on import TrainedOn

CHUNK = 64
"""Images in memory at once."""


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one image, or why it cannot be read."""

    path: Path
    top: tuple[tuple[str, float], ...] = ()
    """(class, probability), the most likely first."""
    trained_on: bool | None = None
    """Whether it is among the images that the run was trained on; None where that is unknown."""
    error: str | None = None

    @property
    def cells(self) -> Sequence[tuple[Any, ...]]:
        """A row for each class: its name, its probability."""
        return self.top

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "image": str(self.path),
            "top": self.top,
            "trained_on": self.trained_on,
            "error": self.error,
        }


@dataclass(frozen=True)
class Selection:
    """The files that were asked for."""

    files: tuple[Path, ...]
    left_out: Counter[str] = field(default_factory=Counter)
    """Files in folders that are no images by their extension: how many of each."""

    @property
    def note(self) -> str | None:
        """A line on what was left out."""
        if not self.left_out:
            return None
        kinds = ", ".join(f"{kind or 'without'} {n:,}" for kind, n in self.left_out.most_common(8))
        return f"files of other extensions in these folders are left out: {kinds}"


def select(paths: Sequence[Path]) -> Selection:
    """`paths` in their order: files as they are, also such as cannot be read; of folders the images
    below them, by the rules of `data.root`; of a pattern (`*`, `?`, `[`; `**` for any folders) that
    is no file what it matches.

    Raises InputError for folders or patterns without any image, and for no paths.
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


def predict(run: Run, images: Sequence[Path], *, device: str, k: int = 5) -> list[Prediction]:
    """All of `predictions`."""
    return list(predictions(run, images, device=device, k=k))


def predictions(
    run: Run, images: Sequence[Path], *, device: str, k: int = 5
) -> Iterator[Prediction]:
    """The `k` most likely classes (all, where there are fewer) of each image file, in the given
    order; what is missing, no image, or has more pixels than data.max_pixels has an error instead.

    Preprocessing is that of evaluation. Probabilities are the softmax of each seed's network,
    averaged over the seeds of `run`. However many files there are, few are in memory.

    Raises InputError for k below 1 or an unknown device.
    """
    chosen = torch_device(device)
    chunks = read_images(run, images, k)
    networks = [load_network(run.config, run.about, one.files.weights, chosen) for one in run.seeds]
    for chunk in chunks:
        found: dict[int, Prediction] = {}
        if len(chunk):
            probabilities = torch.cat(list(_probabilities(networks, run, chunk, chosen)))
            values, places = probabilities.topk(min(k, len(run.classes)), dim=1)
            rows = zip(chunk.good, places.tolist(), values.tolist(), chunk.trained_on, strict=True)
            for i, where, top, known in rows:
                named = tuple((run.classes[c], p) for c, p in zip(where, top, strict=True))
                found[i] = Prediction(chunk.paths[i], named, known)
        for i, path in enumerate(chunk.paths):
            yield found.get(i) or Prediction(path, error=chunk.bad[i])


def _probabilities(
    networks: Sequence[nn.Module], run: Run, images: Images, device: torch.device
) -> Iterator[Tensor]:
    """(B, C) on the CPU, batch by batch."""
    with torch.inference_mode():
        for pixels, _ in eval_batches(unhelped(run.config), run.about, images, device):
            with autocast(device, run.config.runtime.precision):
                answers = [network(pixels).float().softmax(dim=1) for network in networks]
            yield torch.stack(answers).mean(dim=0).cpu()


def unhelped(config: TrainConfig) -> TrainConfig:
    """Without processes that decode: images that are in memory need none."""
    return config.model_copy(update={"data": config.data.model_copy(update={"loader_workers": 0})})


class Chunk(Images):
    """Some files from anywhere, without labels, decoded into memory."""

    streamed = True  # of several sizes

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
        return self._pixels[i]


def read_images(run: Run, images: Sequence[Path], k: int) -> Iterator[Chunk]:
    """`images` as `run` wants them, a few at a time. Raises InputError for k below 1."""
    if k < 1:
        raise InputError(f"{k} answers: at least 1")
    trained, sizing = TrainedOn.load(run.files.trained_on), Sizing.of(run.config.data)
    return _chunks(iter(images), sizing, trained)


def _chunks(images: Iterator[Path], sizing: Sizing, trained: TrainedOn | None) -> Iterator[Chunk]:
    while paths := list(islice(images, CHUNK)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is of no interest here
            look = partial(try_read, _read, _Anywhere(), sizing)
            read = list(threaded(look, map(str, paths)))
        yield Chunk(paths, read, trained)


@dataclass(frozen=True)
class _Read:
    pixels: Pixels
    digest: str
    """Of the file's content."""


def _read(source: ImageReader, name: str, sizing: Sizing) -> _Read:
    return _Read(np.array(decode(source, name, sizing)), content_digest(Path(name)))


class _Anywhere:
    """Files by their paths."""

    @staticmethod
    def open(name: str) -> Image.Image:
        return open_file(name)
