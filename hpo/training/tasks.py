"""Tasks: the metrics of an epoch, the files of a trained seed, and the predictions for an image."""

from __future__ import annotations

import base64
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from hpo.config.model import ModelConfig
from hpo.config.train import TrainConfig
from hpo.control import Control
from hpo.data.images import Images
from hpo.data.thumbnails import thumbnail
from hpo.errors import InputError
from hpo.io import write_text
from hpo.training import models
from hpo.training.evaluation import (
    Embedded,
    Evaluation,
    Network,
    Scored,
    evaluate,
    full_scores,
    mean_evaluation,
    measure,
    need_probabilities,
    save_logits,
    width,
)
from hpo.training.inputs import Batches, TrainingData
from hpo.training.learner import Learner
from hpo.training.retrieval import Found, Index, Validation, require_components

Rows = tuple[tuple[Any, ...], ...]
"""Predictions for one image: a row for each class or neighbour, best first."""

EXAMPLES = 12
"""Queries that a report shows with their neighbours."""
SHOWN = 5
"""Neighbours of each."""


@dataclass(frozen=True)
class Validated:
    """A network after an epoch, on the validation images."""

    metrics: dict[str, float]
    predictions: dict[str, torch.Tensor] = field(default_factory=dict)
    """`predicted` (N,) int64, the most likely class of each image in order, and `confidence` (N, 2)
    float32, the probabilities of that class and of the true one; empty for a retrieval."""


class Model(Protocol):
    """A trained network as a task uses it."""

    @property
    def config(self) -> TrainConfig:
        """Its configuration."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the network's outputs."""

    def score(
        self, images: Images, others: Mapping[str, Network] | None = None
    ) -> dict[str, Evaluation]:
        """Return evaluations with logits: the network's by "", those of `others` by name."""

    def embed(self, images: Images, cache: Path | None = None) -> Embedded:
        """Return the features of `images`."""

    def probabilities(self, images: Images) -> torch.Tensor:
        """Return (N, C), means over its networks."""


class SeedFiles(Protocol):
    """Files of a trained seed."""

    @property
    def test_logits(self) -> Path:
        """Answers to the test images."""

    @property
    def index(self) -> Path:
        """Features of the gallery."""

    @property
    def neighbours(self) -> Path:
        """Examples for the report."""


class Task(ABC):
    """The differences between classification and retrieval."""

    columns: tuple[str, ...]
    """Column names of a prediction; the last column is numeric."""
    averages: bool
    """Whether several seeds predict together, by the mean of their probabilities."""

    def require(  # noqa: B027  (by default nothing is required)
        self, config: TrainConfig, images: int, classes: int
    ) -> None:
        """Raise ConfigError if `images` training images are not enough for `config`."""

    def require_export(self) -> None:  # noqa: B027  (by default it can)
        """Raise InputError if the network alone, as ONNX, cannot predict."""

    @abstractmethod
    def validate(
        self,
        learner: Learner,
        batches: Batches,
        data: TrainingData,
        asked: Sequence[str],
        control: Control,
        epoch: int,
    ) -> Validated:
        """Return the val_ metrics of an epoch, including the `asked` ones, and the predictions."""

    def save(  # noqa: B027  (by default the weights are enough)
        self, model: Model, files: SeedFiles, train: Images, cache: Path
    ) -> None:
        """Write the files that `predict` needs in addition to the weights."""

    @abstractmethod
    def test(
        self,
        model: Model,
        files: SeedFiles,
        images: Images,
        train: Images,
        others: Mapping[str, Network],
    ) -> dict[str, Scored]:
        """Evaluate on the test images and store what reports and ensembles need: the network by "",
        and `others`, exported from it, by name."""

    def test_on_training(self, model: Model, files: SeedFiles, train: Images) -> dict[str, Any]:
        """Return scores on the training images if there are no others; empty if not applicable."""
        return {}

    @abstractmethod
    def evaluate(self, model: Model, files: SeedFiles, images: Images) -> Scored:
        """Evaluate on labelled images without storing anything."""

    def combine(self, found: Sequence[Scored]) -> Scored | None:
        """Combine several seeds into one; None if they cannot predict together."""
        return None

    @abstractmethod
    def predictor(self, model: Model, files: SeedFiles) -> Callable[[Images, int], list[Rows]]:
        """Return a function of images and k that returns the k best predictions for each image."""

    def answers(self, k: int, classes: int) -> int:
        """Return the maximum number of rows for an image."""
        return k

    @abstractmethod
    def as_dict(self, rows: Rows) -> dict[str, Any]:
        """Return a prediction as a JSON-serialisable dictionary."""


class Classification(Task):
    """The most likely classes of an image."""

    columns: tuple[str, ...] = ("class", "probability")
    averages = True

    def validate(
        self,
        learner: Learner,
        batches: Batches,
        data: TrainingData,
        asked: Sequence[str],
        control: Control,
        epoch: int,
    ) -> Validated:
        """Return scores and predictions of the classifier on the validation images."""
        assert batches.val is not None
        evaluation = evaluate(
            learner.eval_forward,
            batches.val,
            classes=data.classes,
            device=learner.device,
            precision=learner.config.runtime.precision,
            control=control,
            epoch=epoch,
            probabilities=need_probabilities(asked),
        )
        predictions = {
            "predicted": torch.from_numpy(evaluation.predictions),
            "confidence": torch.from_numpy(evaluation.confidence),
        }
        return Validated(measure(evaluation, asked, data.names), predictions)

    def test(
        self,
        model: Model,
        files: SeedFiles,
        images: Images,
        train: Images,
        others: Mapping[str, Network],
    ) -> dict[str, Scored]:
        """Evaluate, and store the network's logits for ensembles."""
        evaluations = model.score(images, others)
        save_logits(files.test_logits, evaluations[""], images.names)
        return {**evaluations}

    def evaluate(self, model: Model, files: SeedFiles, images: Images) -> Evaluation:
        """Return the network's scores with its logits."""
        return model.score(images)[""]

    def combine(self, found: Sequence[Scored]) -> Evaluation | None:
        """Return scores of the mean probabilities; None for a single seed."""
        members = [one for one in found if isinstance(one, Evaluation) and one.logits is not None]
        if len(members) < 2:
            return None
        return mean_evaluation([one.logits for one in members], members[0].labels)  # type: ignore[misc]

    def predictor(self, model: Model, files: SeedFiles) -> Callable[[Images, int], list[Rows]]:
        """Predict by the mean of the seeds' probabilities."""
        return partial(self._predict, model)

    def _predict(self, model: Model, images: Images, k: int) -> list[Rows]:
        best = model.probabilities(images).topk(self.answers(k, len(model.classes)), dim=1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [
            tuple((model.classes[c], p) for c, p in zip(places, values, strict=True))
            for places, values in pairs
        ]

    def answers(self, k: int, classes: int) -> int:
        """Return k, or the number of classes if that is smaller."""
        return min(k, classes)

    def as_dict(self, rows: Rows) -> dict[str, Any]:
        """Return (class, probability) pairs as `top`."""
        return {"top": rows}


class Retrieval(Task):
    """The training images nearest to an image, by the network's features."""

    columns: tuple[str, ...] = ("nearest", "class", "distance")
    averages = False

    def require(self, config: TrainConfig, images: int, classes: int) -> None:
        """Raise ConfigError for more principal components than there can be."""
        if config.retrieval.pca:
            bare = config.model.model_copy(update={"weights": None})
            features = _width(bare.model_dump_json(), config.data.image_size, classes)
            require_components(config.retrieval.pca, images, features)

    def require_export(self) -> None:
        """Raise InputError: a network cannot predict without its index."""
        raise InputError("a retrieval has no ONNX files: leave --onnx and --quantize out")

    def validate(
        self,
        learner: Learner,
        batches: Batches,
        data: TrainingData,
        asked: Sequence[str],
        control: Control,
        epoch: int,
    ) -> Validated:
        """Look the validation images up among the training images."""
        assert data.val is not None
        assert batches.gallery is not None
        assert batches.val is not None
        validation = Validation(data.train, batches.gallery, data.val, batches.val)
        metrics = validation.measure(
            learner.eval_model,
            learner.eval_forward,
            learner.config,
            classes=data.classes,
            device=learner.device,
            control=control,
            epoch=epoch,
        )
        return Validated(metrics)

    def save(self, model: Model, files: SeedFiles, train: Images, cache: Path) -> None:
        """Write the index of the training images; outputs of frozen layers are cached below
        `cache`. Raises as `Index.fit`."""
        embedded = model.embed(train, cache)
        Index.fit(embedded, model.config.retrieval).save(files.index)

    def test(
        self,
        model: Model,
        files: SeedFiles,
        images: Images,
        train: Images,
        others: Mapping[str, Network],
    ) -> dict[str, Scored]:
        """Look the images up in the index, and store examples for the report."""
        found = self.evaluate(model, files, images)
        save_examples(files, found, images, train, "test")
        return {"": found}

    def test_on_training(self, model: Model, files: SeedFiles, train: Images) -> dict[str, Any]:
        """Look each training image up among the others, and store examples for the report."""
        index = Index.load(files.index)
        found = index.search(index.gallery, classes=len(model.classes))
        save_examples(files, found, train, train, "training")
        return full_scores(found, model.classes)

    def evaluate(self, model: Model, files: SeedFiles, images: Images) -> Found:
        """Look the images up in the index of the seed."""
        index = Index.load(files.index)
        return index.search(model.embed(images), classes=len(model.classes))

    def predictor(self, model: Model, files: SeedFiles) -> Callable[[Images, int], list[Rows]]:
        """Predict from the index of the seed; an image is never its own neighbour. Raises DataError
        for an unreadable index."""
        return partial(self._predict, model, Index.load(files.index))

    def _predict(self, model: Model, index: Index, images: Images, k: int) -> list[Rows]:
        neighbours, gallery = index.search(model.embed(images), k), index.gallery
        return [
            tuple(
                (gallery.names[place], model.classes[gallery.labels[place]], float(far))
                for place, far in zip(places[:k], distances[:k], strict=True)
                if place >= 0
            )
            for places, distances in zip(neighbours.indices, neighbours.distances, strict=True)
        ]

    def as_dict(self, rows: Rows) -> dict[str, Any]:
        """Return image, class and distance of each neighbour as `nearest`."""
        names = ("image", "class", "distance")
        return {"nearest": [dict(zip(names, row, strict=True)) for row in rows]}


TASKS: Mapping[str, Task] = {"classification": Classification(), "retrieval": Retrieval()}


def task_of(config: TrainConfig) -> Task:
    """Return the task of a configuration."""
    return TASKS[config.task]


@cache
def _width(config: str, image_size: int, classes: int) -> int:
    """Return the number of features of a network; `config` is its configuration as JSON."""
    parsed = ModelConfig.model_validate_json(config)
    model = models.build(parsed, classes=classes, image_size=image_size)
    return width(model, image_size)


def save_examples(
    files: SeedFiles, found: Found, queries: Images, gallery: Images, part: str
) -> None:
    """Write the data of the report: each query's precision and mean distance, and some queries with
    their neighbours as thumbnails. `part` names the queries."""
    data = {
        "part": part,
        "k": found.k,
        "precision_at_5": found.precision(5).tolist(),
        "mean_distance": found.mean_distances.tolist(),
        "right": (found.votes == found.labels).tolist(),
        "examples": [_example(place, found, queries, gallery) for place in _chosen(found)],
    }
    write_text(files.neighbours, json.dumps(data, indent=2) + "\n")


def _chosen(found: Found) -> list[int]:
    """Choose queries: half of them with a wrong vote, if there are enough; both kinds evenly
    spread."""
    right = np.flatnonzero(found.votes == found.labels).tolist()
    wrong = np.flatnonzero(found.votes != found.labels).tolist()
    some = _spread(wrong, max(EXAMPLES // 2, EXAMPLES - len(right)))
    return sorted(some + _spread(right, EXAMPLES - len(some)))


def _spread(places: Sequence[int], count: int) -> list[int]:
    if len(places) <= count:
        return list(places)
    return [places[i * len(places) // count] for i in range(count)]


def _example(place: int, found: Found, queries: Images, gallery: Images) -> dict[str, Any]:
    near = zip(found.indices[place, :SHOWN], found.distances[place, :SHOWN], strict=True)
    return {
        **_thumbnail(queries, place),
        "vote": int(found.votes[place]),
        "neighbours": [
            {**_thumbnail(gallery, int(one)), "distance": float(far)}
            for one, far in near
            if one >= 0
        ],
    }


def _thumbnail(images: Images, place: int) -> dict[str, Any]:
    data = base64.b64encode(thumbnail(images.pixels(place))).decode()
    return {
        "name": images.names[place],
        "label": int(images.labels[place]),
        "thumbnail": f"data:image/jpeg;base64,{data}",
    }
