"""What a trained run sees in single images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor, nn

from hpo.definition.config import TrainConfig
from hpo.engine.images import Images, Pixels, Sizing, decode, open_file
from hpo.engine.learner import autocast
from hpo.engine.runtime import torch_device
from hpo.errors import DataError, InputError
from hpo.results.evaluate import eval_batches, load_network
from hpo.results.runs import Run


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one image."""

    path: Path
    top: tuple[tuple[str, float], ...]
    """(class, probability), the most likely first."""


def predict(run: Run, images: Sequence[Path], *, device: str, k: int = 5) -> list[Prediction]:
    """The `k` most likely classes (all, where there are fewer) of each image, in the given order.

    Preprocessing is that of evaluation. Probabilities are the softmax of each seed's network,
    averaged over the seeds of `run`.

    Raises DataError naming a file that is missing, is no image, or has more pixels than
    data.max_pixels; InputError for k below 1 or an unknown device.
    """
    chosen = torch_device(device)
    pictures = open_pictures(run, images, k)
    networks = [load_network(run.config, run.about, one.files.weights, chosen) for one in run.seeds]
    probabilities = torch.cat(list(_probabilities(networks, run, pictures, chosen)))
    values, places = probabilities.topk(min(k, len(run.classes)), dim=1)
    return [
        Prediction(path, tuple((run.classes[i], p) for i, p in zip(where, top, strict=True)))
        for path, where, top in zip(pictures.paths, places.tolist(), values.tolist(), strict=True)
    ]


def open_pictures(run: Run, images: Sequence[Path], k: int) -> Pictures:
    """`images` as `run` wants them. Raises as `predict` does."""
    if k < 1:
        raise InputError(f"{k} answers: at least 1")
    if not images:
        raise InputError("no images: give at least one file")
    return Pictures([Path(one) for one in images], Sizing.of(run.config.data))


def _probabilities(
    networks: Sequence[nn.Module], run: Run, pictures: Pictures, device: torch.device
) -> Iterator[Tensor]:
    """(B, C) on the CPU, batch by batch."""
    with torch.inference_mode():
        for pixels, _ in eval_batches(unhelped(run.config), run.about, pictures, device):
            with autocast(device, run.config.runtime.precision):
                answers = [network(pixels).float().softmax(dim=1) for network in networks]
            yield torch.stack(answers).mean(dim=0).cpu()


def unhelped(config: TrainConfig) -> TrainConfig:
    """Without processes that decode: a few images are quicker read here."""
    return config.model_copy(update={"data": config.data.model_copy(update={"loader_workers": 0})})


class Pictures(Images):
    """Files from anywhere, without labels, decoded when they are asked for.

    Sizes come from the headers: raises DataError for a file whose header cannot be read.
    """

    streamed = True

    def __init__(self, paths: Sequence[Path], sizing: Sizing) -> None:
        self.paths, self.sizing = paths, sizing
        self.names = tuple(str(path) for path in paths)
        self.labels = np.zeros(len(paths), np.int64)
        targets = [self._target(path) for path in paths]
        self.sizes = np.array([(height, width) for width, height in targets], np.int64)

    def open(self, name: str) -> Image.Image:
        return open_file(name)

    def pixels(self, i: int) -> Pixels:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd metadata is of no interest here
                return np.array(decode(self, self.names[i], self.sizing))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{self.names[i]}: cannot be read as an image: {error}") from error

    def _target(self, path: Path) -> tuple[int, int]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with self.open(str(path)) as image:
                    size = image.size
        except PIL.UnidentifiedImageError as error:
            raise DataError(f"{path}: not an image that Pillow can read") from error
        except (OSError, SyntaxError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(f"{path}: cannot be read: {reason}") from error
        refused = self.sizing.refuse(*size)
        if refused:
            raise DataError(f"{path}: {refused}")
        return self.sizing.target(*size)
