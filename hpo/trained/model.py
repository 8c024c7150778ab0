"""TrainedModel: trained networks with their configuration, preprocessing and classes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hpo.config.train import TrainConfig
from hpo.control import Control, NullControl
from hpo.data.images import Images
from hpo.errors import InputError
from hpo.paths import Home
from hpo.trained.run import RunMetadata, SeedDir, TrainedRun, load_run
from hpo.training import inputs, models
from hpo.training.checkpoint import load_trained
from hpo.training.device import default_device, torch_device
from hpo.training.evaluation import Embedded, Evaluation, Network, embed, evaluate_all
from hpo.training.feature_cache import (
    NO_AUGMENT,
    Features,
    Preprocessing,
    build_cache,
    find_cut_or_warn,
)
from hpo.training.learner import memory_format
from hpo.training.loader import EvalBatches
from hpo.training.tasks import Task, task_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from hpo.trained.inference import Prediction, RunEvaluation


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

    def predict(
        self, images: Iterable[str | os.PathLike[str] | Image | NDArray[Any]], *, k: int = 5
    ) -> list[Prediction]:
        """Return the `k` most likely classes with their probabilities, means over the seeds, for
        each image: a path, a PIL image, or an array of uint8, (H, W), (H, W, 3) or (H, W, 4). Of a
        retrieval the `k` nearest training images.

        What cannot be read has its `error` instead. Raises InputError for an array of another kind.
        """
        from hpo.trained.inference import predictions

        return list(predictions(self, [_as_image(one) for one in images], k=k))

    def evaluate(
        self, data: str | os.PathLike[str] | None = None, *, force: bool = False
    ) -> RunEvaluation:
        """Measure each seed, and several together, on the test split of the run's own data, or on
        `data`: a folder of images by class, or a CSV file of them.

        Raises DataError where there is no test split, for unknown classes, and, unless `force`,
        where the run was trained on some of these images.
        """
        from hpo.trained.inference import evaluate_run

        folder, device = None if data is None else Path(data), str(self.device)
        return evaluate_run(
            self.loaded, data=folder, home=Home.default(), device=device, force=force
        )

    def batches(self, images: Images, features: Features | None = None) -> EvalBatches:
        """Return `images`, or `features` of them, preprocessed as in validation."""
        mean, std = self.metadata.mean, self.metadata.std
        micro_batch = self.config.runtime.micro_batch
        return inputs.eval_batches(
            images, self.config, mean, std, self.device, micro_batch, features
        )

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
        return evaluate_all(
            networks,
            self.batches(images),
            classes=len(self.classes),
            device=self.device,
            precision=self.config.runtime.precision,
            control=self.control,
            logits=True,
        )

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
        return embed(
            model,
            images,
            self.batches(images, kept),
            classes=len(self.classes),
            device=self.device,
            precision=config.runtime.precision,
            control=self.control,
            suffix=suffix,
        )[0]


def load_network(
    config: TrainConfig, metadata: RunMetadata, weights: Path, device: torch.device
) -> nn.Module:
    """Return the trained network in `weights`, on `device` in eval mode."""
    model = load_trained(
        weights, config.model, classes=len(metadata.classes), image_size=config.data.image_size
    )
    layout = memory_format(config.runtime.memory_format)
    return model.to(device, memory_format=layout)  # type: ignore[call-overload, no-any-return]


def _as_image(image: str | os.PathLike[str] | Image | NDArray[Any]) -> Path | Image:
    """Return an array as an image, a path as it is. Raises InputError for an array that is none."""
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
