"""Training a configuration, and the model that it leaves: evaluate, predict."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from hpo.errors import InputError
from hpo.formatting import printable
from hpo.paths import Home

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch.nn import Module

    from hpo.config.train import TrainConfig
    from hpo.control import Control
    from hpo.trained.inference import Prediction, RunEvaluation
    from hpo.trained.retrieval import Lookup
    from hpo.trained.run import Run

Progress = Callable[[str], object]
"""Takes each line of progress."""


def print_line(line: str) -> None:
    """Print a line at once; control codes in it are shown, not obeyed."""
    print(printable(line), flush=True)


@dataclass(frozen=True, repr=False)
class TrainedModel:
    """What `hpo train` wrote: the networks of its seeds, with their configuration, preprocessing
    and classes. Its networks are loaded once, at the first prediction.

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
    >>> len(prediction.top)
    2
    """

    run: Run
    device: str

    def __repr__(self) -> str:
        seeds = [one.seed for one in self.run.seeds]
        return f"TrainedModel({str(self.path)!r}, seeds={seeds}, device={self.device!r})"

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | None = None) -> TrainedModel:
        """Open the folder of a run, or that of one seed of it. `device` is by default the first
        GPU, else the CPU. Raises NotFound where there is none, or no seed is finished."""
        from hpo.trained.run import load_run
        from hpo.workers.process import first_device

        return cls(load_run(Path(path)), first_device(device))

    @property
    def path(self) -> Path:
        """The folder."""
        return self.run.path

    @property
    def config(self) -> TrainConfig:
        """The configuration, complete."""
        return self.run.config

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the network's outputs."""
        return self.run.classes

    @property
    def summary(self) -> dict[str, Any]:
        """Scores over the seeds, as in summary.json: "test", "val" and "train" (each None, or
        {"top1": {"mean": .., "std": ..}, ..}), "ensemble", "seeds", "notes" and more."""
        return self.run.summary

    def predict(
        self, images: Iterable[str | os.PathLike[str] | Image | NDArray[Any]], *, k: int = 5
    ) -> list[Prediction] | list[Lookup]:
        """Return the `k` most likely classes with their probabilities, means over the seeds, for
        each image: a path, a PIL image, or an array of uint8, (H, W), (H, W, 3) or (H, W, 4). Of a
        retrieval the `k` nearest training images.

        What cannot be read has its `error` instead. Raises InputError for an array of another kind.
        """
        from hpo.trained.inference import predictions
        from hpo.trained.retrieval import lookups

        given = [_as_image(one) for one in images]
        if self.config.task == "retrieval":
            return list(lookups(self.run, given, device=self.device, k=k))
        networks = self._networks
        return list(predictions(self.run, given, device=self.device, k=k, networks=networks))

    @cached_property
    def _networks(self) -> list[Module]:
        from hpo.trained.inference import load_networks
        from hpo.training.device import torch_device

        return load_networks(self.run, torch_device(self.device))

    def evaluate(
        self, data: str | os.PathLike[str] | None = None, *, force: bool = False
    ) -> RunEvaluation:
        """Measure each seed, and several together, on the test split of the run's own data, or on
        `data`: a folder of images by class, or a CSV file of them.

        Raises DataError where there is no test split, for unknown classes, and, unless `force`,
        where the run was trained on some of these images.
        """
        from hpo.trained.inference import evaluate_run

        folder = None if data is None else Path(data)
        return evaluate_run(
            self.run, data=folder, home=Home.default(), device=self.device, force=force
        )


def _as_image(image: str | os.PathLike[str] | Image | NDArray[Any]) -> Path | Image:
    """Raises InputError for an array that is no image."""
    from PIL import Image

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


class TrainOptions(TypedDict, total=False):
    """Options of `train`, as `Study.retrain` takes them, too."""

    seeds: int
    keep_validation: bool
    onnx: bool
    quantize: Sequence[str]
    device: str | None
    control: Control | None
    progress: Progress | None


def train(
    config: TrainConfig | Mapping[str, Any] | str | os.PathLike[str],
    *,
    provenance: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str],
    seeds: int = 1,
    keep_validation: bool = False,
    onnx: bool = False,
    quantize: Sequence[str] = (),
    device: str | None = None,
    control: Control | None = None,
    progress: Progress | None = print_line,
) -> TrainedModel:
    """Train a configuration (or its file, or its fields as a dict) on training and validation
    images over its full schedule, with `seeds` seeds, then open the test set, once per seed.

    The folder `out` gets weights (safetensors), curves, metrics, the confusion matrix and
    report.html; interrupted, the same call goes on. `keep_validation` trains on the training images
    alone and chooses the best epoch by validation. `onnx` and `quantize` ("dynamic", "static") also
    write ONNX. `device` is by default the first GPU, else the CPU. `provenance` is that of an
    exported trial; a file has its own. `control` can stop the training between batches.

    Raises ConfigError for a configuration that is wrong, Conflict where `out` holds the run of
    another one, TrialFailed for a loss that is not finite.

    >>> import hpo
    >>> model = hpo.train({"epochs": 1, "batch_size": 64, "data": {"dataset": "digits"},
    ...                    "model": {"cnn": {"filters": [4]}}}, out="small", progress=None)
    >>> 0.0 <= model.summary["test"]["top1"]["mean"] <= 1.0
    True
    """
    from hpo.config.study import load_config
    from hpo.config.train import TrainConfig
    from hpo.reports.page import write_report
    from hpo.reports.training import training_report
    from hpo.trained.retrain import retrain
    from hpo.workers.process import first_device

    if isinstance(config, Mapping):
        config = TrainConfig.parse(config)
    elif not isinstance(config, TrainConfig):
        config, provenance = load_config(Path(config))
    place = first_device(device)
    run = retrain(
        config,
        provenance or {},
        seeds=seeds,
        out=Path(out),
        home=Home.default(),
        device=place,
        keep_validation=keep_validation,
        onnx=onnx,
        quantize=quantize,
        control=control,
        progress=progress or (lambda line: None),
    )
    write_report(run.files.root / "report.html", training_report(run))
    return TrainedModel(run, place)
