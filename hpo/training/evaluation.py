"""Evaluation: metrics, logits and embeddings of a network on labelled images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hpo.config.metrics import AUC, TOP5, recall_class, user_function
from hpo.control import Control
from hpo.data import user_code
from hpo.data.arrays import read_arrays, write_arrays
from hpo.data.images import Images, Numbers
from hpo.errors import ConfigError, DataError
from hpo.training import models
from hpo.training.inputs import TrainingData
from hpo.training.learner import Batch, RunningMeans, autocast
from hpo.training.metrics import (
    KEY,
    Counts,
    class_index,
    classification_report,
    confusion_matrix,
    macro_auc,
    require_supported,
    top_k_correct,
)


@dataclass(frozen=True)
class Evaluation:
    """Predictions of a classifier for N labelled images, in order, and their scores."""

    loss: float
    """Mean cross-entropy, without label smoothing."""
    top1: float
    top5: float
    """Fraction of the images whose class is among the min(5, classes) most likely ones."""
    labels: Counts
    """(N,) true classes."""
    predictions: Counts
    """(N,) most likely classes."""
    classes: int
    probabilities: NDArray[np.float32] | None = None
    """(N, C); None unless requested."""
    logits: NDArray[np.float32] | None = None
    """(N, C); None unless requested."""
    confidence: NDArray[np.float32] | None = None
    """(N, 2): probabilities of the most likely class and of the true one."""

    @cached_property
    def confusion(self) -> Counts:
        """(C, C) int64: true classes in rows, predicted ones in columns."""
        return confusion_matrix(self.labels, self.predictions, self.classes)

    @property
    def headline(self) -> dict[str, float]:
        """loss, top1, and top5 if there are more than five classes."""
        fifth = {"top5": self.top5} if self.classes > 5 else {}
        return {"loss": self.loss, "top1": self.top1, **fifth}


class EvalAccumulator:
    """Accumulates the scores of a network batch by batch, without synchronising with `device`."""

    def __init__(
        self,
        classes: int,
        device: torch.device,
        *,
        probabilities: bool = False,
        logits: bool = False,
    ) -> None:
        self._classes = classes
        self._first, self._fifth = RunningMeans(device), RunningMeans(device)
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._confidence: list[Tensor] = []
        self._probabilities: list[Tensor] | None = [] if probabilities else None
        self._logits: list[Tensor] | None = [] if logits else None

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add `logits` (B, C) and `labels` (B,) int64 of at least one image."""
        loss, images = functional.cross_entropy(logits, labels), len(labels)
        self._first.add(loss, top_k_correct(logits, labels, 1), images)
        self._fifth.add(loss, top_k_correct(logits, labels, 5), images)
        predicted, shares = logits.argmax(dim=1), logits.softmax(dim=1)
        self._seen.append((labels, predicted))
        self._confidence.append(shares.gather(1, torch.stack((predicted, labels), dim=1)).float())
        if self._probabilities is not None:
            self._probabilities.append(shares)
        if self._logits is not None:
            self._logits.append(logits.cpu())

    def result(self) -> Evaluation:
        """Return the scores of all batches; waits for the device."""
        loss, top1 = self._first.read()
        truths, predictions = (_joined(column) for column in zip(*self._seen, strict=True))
        return Evaluation(
            loss=loss,
            top1=top1,
            top5=self._fifth.read()[1],
            labels=truths,
            predictions=predictions,
            classes=self._classes,
            probabilities=_rows(self._probabilities),
            logits=_rows(self._logits),
            confidence=_rows(self._confidence),
        )


def _joined(parts: Sequence[Tensor]) -> Counts:
    joined: Counts = torch.cat(list(parts)).cpu().numpy().astype(np.int64)
    return joined


def _rows(parts: Sequence[Tensor] | None) -> NDArray[np.float32] | None:
    return None if parts is None else torch.cat(list(parts)).cpu().numpy()


Network = Callable[[Tensor], Tensor]
"""Maps (B, 3, S, S) to logits (B, C) on the same device."""


def evaluate_all(
    networks: Mapping[str, Network],
    batches: Iterable[Batch],
    *,
    classes: int,
    device: torch.device,
    precision: str,
    control: Control,
    epoch: int = 0,
    probabilities: bool = False,
    logits: bool = False,
) -> dict[str, Evaluation]:
    """Evaluate all `networks`, in eval mode, in one pass over `batches`.

    `control.step` is called before every batch with the number of images of the one before.
    """
    kept = {"probabilities": probabilities, "logits": logits}
    scores = {name: EvalAccumulator(classes, device, **kept) for name in networks}
    images = 0
    with torch.inference_mode():
        for pixels, labels in batches:
            control.step(epoch=epoch, images=images)
            for name, network in networks.items():
                with autocast(device, precision):
                    outputs = network(pixels).float()
                scores[name].add(outputs, labels)
            images = len(labels)
        control.step(epoch=epoch, images=images)
    return {name: accumulator.result() for name, accumulator in scores.items()}


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    classes: int,
    device: torch.device,
    precision: str,
    control: Control,
    epoch: int = 0,
    probabilities: bool = False,
) -> Evaluation:
    """Evaluate `model`, which is on `device`, in eval mode; as `evaluate_all`."""
    return evaluate_all(
        {"": model.eval()},
        batches,
        classes=classes,
        device=device,
        precision=precision,
        control=control,
        epoch=epoch,
        probabilities=probabilities,
    )[""]


class Scored(Protocol):
    """Predictions for labelled images."""

    @property
    def headline(self) -> dict[str, float]:
        """The scores specific to the task, by name."""

    @property
    def confusion(self) -> Counts:
        """(C, C) int64: true classes in rows, predicted ones in columns."""


Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Embedded:
    """Feature vectors of N images, in order."""

    features: Vectors
    """(N, D)."""
    labels: Numbers
    """(N,) int64."""
    names: tuple[str, ...]
    identities: tuple[str, ...]
    """Digests of the pixels, as `Images.identities`."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)


def embed(
    model: nn.Module,
    images: Images,
    batches: Iterable[Batch],
    *,
    classes: int,
    device: torch.device,
    precision: str,
    control: Control,
    epoch: int = 0,
    suffix: nn.Module | None = None,
) -> tuple[Embedded, Evaluation]:
    """Return the feature vectors of `images`, in the order of `batches`, computed by `model` in
    eval mode, and the evaluation of its classifier. `model` comes from `models.build`; `suffix`
    replaces it if `batches` hold cached features."""
    with _InputCapture(classifier(model)) as captured:
        evaluation = evaluate(
            suffix or model,
            batches,
            classes=classes,
            device=device,
            precision=precision,
            control=control,
            epoch=epoch,
        )
    features = torch.cat(captured.parts).numpy()
    return Embedded(features, images.labels, images.names, images.identities), evaluation


def classifier(model: nn.Module) -> nn.Module:
    """Return the first layer of the head of `model` with weights; its pooled input is the feature
    vector."""
    head = model.get_submodule(models.family(model).head)
    return next(part for part in head.modules() if isinstance(part, nn.Linear | nn.Conv2d))


def width(model: nn.Module, image_size: int) -> int:
    """Return the number of features of `model`, D, from shapes alone, which takes milliseconds."""
    tensors = dict(model.state_dict(keep_vars=True))
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    model.eval()
    with torch.no_grad(), _InputCapture(classifier(model), lambda features: features) as captured:
        torch.func.functional_call(model, shapes, (images,))
    return captured.parts[0].shape[1]


def pooled(features: Tensor) -> Tensor:
    """Return feature vectors (B, D) float32: the mean over the positions of a map (B, D, H, W), as
    before the classifier of squeezenet; vectors are returned as they are."""
    return (features.float().mean((2, 3)) if features.ndim == 4 else features.float()).flatten(1)


class _InputCapture:
    """Records the pooled input of a layer, batch by batch; `keep` decides where."""

    def __init__(self, layer: nn.Module, keep: Callable[[Tensor], Tensor] = Tensor.cpu) -> None:
        self.parts: list[Tensor] = []
        self._keep = keep
        self._handle = layer.register_forward_pre_hook(self._capture)

    def _capture(self, layer: nn.Module, inputs: Sequence[Any]) -> None:
        self.parts.append(self._keep(pooled(inputs[0])))

    def __enter__(self) -> _InputCapture:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handle.remove()


def need_probabilities(asked: Sequence[str]) -> bool:
    """Return whether any of the `asked` metrics needs class probabilities."""
    return any(name == AUC or user_function(name) for name in asked)


def measure(evaluation: Evaluation, asked: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Return the validation metrics, given the class `names`. If probabilities are not finite
    because training diverged, metrics that need them are not either.

    Raises ConfigError if a user function does not return a finite number.
    """
    report = classification_report(evaluation.confusion)
    values = {"val_loss": evaluation.loss, "val_top1": evaluation.top1}
    if evaluation.classes > 5:
        values[TOP5] = evaluation.top5
    values |= {"val_macro_f1": report.macro_f1, "val_balanced_accuracy": report.balanced_accuracy}
    for name in asked:
        if (one := recall_class(name)) is not None:
            values[name] = float(report.recall[class_index(one, names, name)])
        elif name == AUC or user_function(name):
            values[name] = _of_probabilities(name, evaluation)
    return values


def _of_probabilities(name: str, evaluation: Evaluation) -> float:
    probabilities = evaluation.probabilities
    assert probabilities is not None  # see need_probabilities
    if not np.isfinite(probabilities).all():
        return math.nan
    if name == AUC:
        return macro_auc(probabilities, evaluation.labels)
    function = user_code.load(str(user_function(name)), KEY)
    given = probabilities.copy(), evaluation.labels.copy()  # theirs to change
    return _number(models.call_user_function(function, repr(name), KEY, *given), name)


def _number(value: Any, name: str) -> float:
    """Return the result of a user function as a float. Raises ConfigError unless it is one finite
    number."""
    try:
        array = np.asarray(value)
        number = float(array) if array.shape == () and array.dtype.kind in "biuf" else None
    except (TypeError, ValueError, RuntimeError):  # an array of torch on another device, ragged
        number = None
    if number is None:
        raise ConfigError(f"{name!r} returned {type(value).__name__}, not one number", key=KEY)
    if not math.isfinite(number):
        raise ConfigError(f"{name!r} returned {number}, not a finite number", key=KEY)
    return number


def require_measurable(asked: Sequence[str], data: TrainingData) -> None:
    """Raise ConfigError if the `asked` metrics cannot be measured on the validation images of
    `data`, or a user function cannot be found."""
    if data.val is None or not asked:
        return
    support = np.bincount(np.asarray(data.val.labels), minlength=data.classes)
    names = data.names or tuple(str(number) for number in range(data.classes))
    require_supported(asked, dict(zip(names, support.tolist(), strict=True)))
    require_functions(asked)


def require_functions(asked: Sequence[str]) -> None:
    """Raise ConfigError if a user function among the `asked` metrics cannot be found."""
    for name in asked:
        if function := user_function(name):
            user_code.load(function, KEY)


def mean_evaluation(logits: Sequence[NDArray[np.float32]], labels: Counts) -> Evaluation:
    """Evaluate the mean of the members' probabilities; `logits` are (N, C) for each member."""
    stacked = torch.stack([torch.from_numpy(one).double() for one in logits])
    # As logarithms, so that no small probability becomes 0.
    mean = stacked.log_softmax(dim=2).logsumexp(dim=0) - math.log(len(logits))
    scores = EvalAccumulator(mean.shape[1], torch.device("cpu"))
    scores.add(mean, torch.from_numpy(labels))
    return scores.result()


@dataclass(frozen=True)
class StoredLogits:
    """Logits (N, C), labels (N,) and names (N,) of test images, as stored in a file."""

    logits: NDArray[np.float32]
    labels: Counts
    names: NDArray[np.str_]


def save_logits(path: Path, evaluation: Evaluation, names: Sequence[str]) -> None:
    """Write an evaluation with logits as NPZ (logits, labels, names), atomically. Raises
    DiskFull."""
    assert evaluation.logits is not None
    write_arrays(
        path,
        compressed=True,
        logits=evaluation.logits,
        labels=evaluation.labels,
        names=np.array(names, np.str_),
    )


def load_logits(path: Path) -> StoredLogits:
    """Read what `save_logits` wrote. Raises DataError for a damaged file."""
    arrays = read_arrays(path, "remove it, and test the weights beside it: hpo evaluate")
    try:
        return StoredLogits(arrays["logits"], arrays["labels"], arrays["names"])
    except KeyError as error:
        raise DataError(f"{path} cannot be read: it has no {error}; remove it") from error


def full_scores(predictions: Scored, classes: Sequence[str]) -> dict[str, Any]:
    """Return the headline scores, macro_precision, macro_recall, macro_f1, balanced_accuracy
    (fractions, each a float); `per_class`: precision, recall, f1 and support of each class by name;
    `confusion`: true classes in rows, predicted ones in columns, in the order of `classes`."""
    report = classification_report(predictions.confusion)
    columns = (report.precision, report.recall, report.f1, report.support)
    rows = zip(classes, *(column.tolist() for column in columns), strict=True)
    return {
        **predictions.headline,
        "macro_precision": report.macro_precision,
        "macro_recall": report.macro_recall,
        "macro_f1": report.macro_f1,
        "balanced_accuracy": report.balanced_accuracy,
        "per_class": {
            name: {"precision": precision, "recall": recall, "f1": f1, "support": support}
            for name, precision, recall, f1, support in rows
        },
        "confusion": predictions.confusion.tolist(),
    }


def plain_scores(predictions: Scored, classes: Sequence[str]) -> dict[str, float]:
    """Return the single numbers of `full_scores`."""
    scores = full_scores(predictions, classes)
    return {name: value for name, value in scores.items() if isinstance(value, float)}
