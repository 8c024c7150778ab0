"""Evaluation: metrics, logits and embeddings of a network on labelled images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpo.config.metrics import (
    AUC,
    TOP5,
    own_function,
    recalled,
)
from hpo.control import Control
from hpo.data import user_code
from hpo.data.arrays import (
    read_arrays,
    write_arrays,
)
from hpo.data.images import (
    Images,
    Numbers,
)
from hpo.errors import ConfigError, DataError
from hpo.training import models
from hpo.training.inputs import TrainingData
from hpo.training.learner import (
    Batch,
    Evaluation,
    Judge,
    autocast,
    evaluate,
)
from hpo.training.metrics import (
    KEY,
    Counts,
    class_named,
    classification_report,
    macro_auc,
    require_supported,
)

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Embedded:
    """N images as vectors, in their order."""

    features: Vectors
    """(N, D)."""
    labels: Numbers
    """(N,) int64."""
    names: tuple[str, ...]
    identities: tuple[str, ...]
    """As those of `Images`."""

    def __len__(self) -> int:
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
    judged: nn.Module | None = None,
) -> tuple[Embedded, Evaluation]:
    """`images`, which `batches` gives in their order, as `model` sees them in eval mode, and what
    its classifier makes of them. `model` comes from `models.build`; `judged` is its suffix, where
    `batches` hold what its prefix makes of the images."""
    with _Listening(classifier(model)) as heard:
        found = evaluate(
            judged or model,
            batches,
            classes=classes,
            device=device,
            precision=precision,
            control=control,
            epoch=epoch,
        )
    features = torch.cat(heard.parts).numpy()
    return Embedded(features, images.labels, images.names, images.identities), found


def classifier(model: nn.Module) -> nn.Module:
    """The first layer of the head of `model` that learns to tell classes: its input, pooled, are
    the features."""
    head = model.get_submodule(models.family(model).head)
    return next(part for part in head.modules() if isinstance(part, nn.Linear | nn.Conv2d))


def width(model: nn.Module, image_size: int) -> int:
    """How many features `model` gives, D, from shapes alone, which costs milliseconds."""
    tensors = dict(model.state_dict(keep_vars=True))
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    model.eval()
    with torch.no_grad(), _Listening(classifier(model), lambda heard: heard) as heard:
        torch.func.functional_call(model, shapes, (images,))
    return heard.parts[0].shape[1]


def pooled(features: Tensor) -> Tensor:
    """(B, D) float32: the mean over the places of a map (B, D, H, W), which squeezenet has before
    its classifier; vectors as they are."""
    return (features.float().mean((2, 3)) if features.ndim == 4 else features.float()).flatten(1)


class _Listening:
    """Keeps what comes into a layer, pooled, batch by batch; `keep` says where."""

    def __init__(self, layer: nn.Module, keep: Callable[[Tensor], Tensor] = Tensor.cpu) -> None:
        self.parts: list[Tensor] = []
        self._keep = keep
        self._handle = layer.register_forward_pre_hook(self._hear)

    def _hear(self, layer: nn.Module, inputs: Sequence[Any]) -> None:
        self.parts.append(self._keep(pooled(inputs[0])))

    def __enter__(self) -> _Listening:
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
    return any(name == AUC or own_function(name) for name in asked)


def measure(found: Evaluation, asked: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Return the validation metrics, given the class `names`. If probabilities are not finite
    because training diverged, metrics that need them are not either.

    Raises ConfigError if a user function does not return a finite number.
    """
    report = classification_report(found.confusion)
    values = {"val_loss": found.loss, "val_top1": found.top1}
    if found.classes > 5:
        values[TOP5] = found.top5
    values |= {"val_macro_f1": report.macro_f1, "val_balanced_accuracy": report.balanced_accuracy}
    for name in asked:
        if (one := recalled(name)) is not None:
            values[name] = float(report.recall[class_named(one, names, name)])
        elif name == AUC or own_function(name):
            values[name] = _of_probabilities(name, found)
    return values


def _of_probabilities(name: str, found: Evaluation) -> float:
    probabilities = found.probabilities
    assert probabilities is not None  # see need_probabilities
    if not np.isfinite(probabilities).all():
        return math.nan
    if name == AUC:
        return macro_auc(probabilities, found.labels)
    function = user_code.load(str(own_function(name)), KEY)
    given = probabilities.copy(), found.labels.copy()  # theirs to change
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
        if function := own_function(name):
            user_code.load(function, KEY)


Network = Callable[[Tensor], Tensor]
"""Maps (B, 3, S, S) to logits (B, C) on the same device."""


@dataclass(frozen=True)
class Answers:
    """A network on a set of images, in the set's order."""

    logits: NDArray[np.float32]
    """(N, C)."""
    labels: Counts
    """(N,) true classes."""
    evaluation: Evaluation


def ask(
    networks: Mapping[str, Network],
    batches: Iterable[Batch],
    *,
    classes: int,
    device: torch.device,
    precision: str,
    control: Control,
) -> dict[str, Answers]:
    """Run all `networks`, in eval mode, in one pass over `batches`.

    `control.step` is asked before every batch and told of the images before it.
    """
    judges = {name: Judge(classes, device) for name in networks}
    kept: dict[str, list[Tensor]] = {name: [] for name in networks}
    images = 0
    with torch.inference_mode():
        for pixels, labels in batches:
            control.step(epoch=0, images=images)
            for name, network in networks.items():
                with autocast(device, precision):
                    logits = network(pixels).float()
                judges[name].add(logits, labels)
                kept[name].append(logits.cpu())
            images = len(labels)
        control.step(epoch=0, images=images)
    found = {name: judge.result() for name, judge in judges.items()}
    return {
        name: Answers(torch.cat(kept[name]).numpy(), one.labels, one) for name, one in found.items()
    }


def mean_evaluation(logits: Sequence[NDArray[np.float32]], labels: Counts) -> Evaluation:
    """The mean of the members' probabilities, judged. `logits` are (N, C) for each member."""
    stacked = torch.stack([torch.from_numpy(one).double() for one in logits])
    # As logarithms, so that no small probability becomes 0.
    mean = stacked.log_softmax(dim=2).logsumexp(dim=0) - math.log(len(logits))
    judge = Judge(mean.shape[1], torch.device("cpu"))
    judge.add(mean, torch.from_numpy(labels))
    return judge.result()


@dataclass(frozen=True)
class Stored:
    """Answers as a file has them: `names` (N,) of the images beside them."""

    logits: NDArray[np.float32]
    labels: Counts
    names: NDArray[np.str_]


def save_answers(path: Path, answers: Answers, names: Sequence[str]) -> None:
    """Write as NPZ (logits, labels, names), whole or not at all. Raises DiskFull."""
    write_arrays(
        path,
        compressed=True,
        logits=answers.logits,
        labels=answers.labels,
        names=np.array(names, np.str_),
    )


def load_answers(path: Path) -> Stored:
    """What `save_answers` wrote. Raises DataError for a file that is damaged."""
    found = read_arrays(path, "remove it, and test the weights beside it: hpo evaluate")
    try:
        return Stored(found["logits"], found["labels"], found["names"])
    except KeyError as error:
        raise DataError(f"{path} cannot be read: it has no {error}; remove it") from error
