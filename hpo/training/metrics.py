"""Metrics of a classifier: counts, scores, and what each needs.

Imports no torch: a supervisor checks studies as well.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpo.config.metrics import AUC, TOP5, recall_class, user_function
from hpo.config.train import TrainConfig
from hpo.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

KEY = "metric"
"""Name of the field at fault in messages: it belongs to a study, a schedule or early stopping."""
MOST_NAMED = 20
"""Classes named in a message."""


def asked(config: TrainConfig, *metrics: str) -> tuple[str, ...]:
    """Return the names among `metrics`, and among those that `config` watches, that are not
    measured in every epoch anyway, or not on all data."""
    watched = [*metrics]
    if config.schedule.name == "plateau":
        watched.append(config.schedule.metric)
    if config.early_stopping.patience is not None:
        watched.append(config.early_stopping.metric)
    if config.task != "classification":
        return ()
    return tuple(dict.fromkeys(name for name in watched if _is_special(name)))


def _is_special(name: str) -> bool:
    return name in (AUC, TOP5) or recall_class(name) is not None or user_function(name) is not None


def require_supported(asked: Sequence[str], validation: Mapping[str, int]) -> None:
    """Raise ConfigError if the `asked` metrics cannot be measured on `validation`, {class:
    images}."""
    for name in asked:
        if name == TOP5 and len(validation) <= 5:
            raise ConfigError(
                f"{name!r}: of {len(validation)} classes the right one is always in the top five; "
                "use val_top1",
                key=KEY,
            )
        if name == AUC and sum(count > 0 for count in validation.values()) < 2:
            raise ConfigError(f"{name!r}: needs validation images of at least two classes", key=KEY)
        if (one := recall_class(name)) is not None:
            classes = list(validation)
            if not validation[classes[class_index(one, classes, name)]]:
                raise ConfigError(f"{name!r}: no validation image belongs to this class", key=KEY)


def class_index(name: str, classes: Sequence[str], metric: str) -> int:
    """Return the index of the class `name`, whatever its Unicode form. Raises ConfigError if there
    is none."""
    for form in (str, _composed):
        places = [i for i, one in enumerate(classes) if form(one) == form(name)]
        if len(places) == 1:
            return places[0]
    shown = ", ".join(classes[:MOST_NAMED])
    more = f", ... ({len(classes)} in all)" if len(classes) > MOST_NAMED else ""
    raise ConfigError(f"{metric!r}: no class is called {name!r}; there are {shown}{more}", key=KEY)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


Counts = NDArray[np.int64]
Scores = NDArray[np.float64]


def top_k_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Count the labels among the k largest logits; () int64 on the device of `logits`.

    `logits` (N, C), `labels` (N,) int64. With fewer than k classes every label counts.
    """
    largest = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (largest == labels[:, None]).any(dim=1).sum()


def confusion_matrix(labels: Counts, predictions: Counts, classes: int) -> Counts:
    """Return the confusion matrix, (classes, classes) int64: true classes in rows, predicted ones
    in columns."""
    pairs = np.asarray(labels) * classes + np.asarray(predictions)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


@dataclass(frozen=True)
class ClassificationReport:
    """Precision, recall and F1 of each class, (C,) fractions, and their unweighted means over the
    classes that occur as true or predicted class; balanced accuracy is the mean recall over classes
    that have images. `support` counts the images of each class."""

    precision: Scores
    recall: Scores
    f1: Scores
    support: Counts
    accuracy: float
    macro_precision: float
    macro_recall: float
    macro_f1: float
    balanced_accuracy: float


def classification_report(confusion: Counts) -> ClassificationReport:
    """Compute scores from a confusion matrix (C, C) with true classes in rows; 0 if a score is
    undefined.

    As scikit-learn's precision_recall_fscore_support with zero_division = 0: per class with all
    labels, the means with its default ones.
    """
    hits = np.diagonal(confusion)
    predicted, support = confusion.sum(axis=0), confusion.sum(axis=1)
    precision, recall = _ratio(hits, predicted), _ratio(hits, support)
    f1 = _ratio(2 * hits, predicted + support)
    return ClassificationReport(
        precision=precision,
        recall=recall,
        f1=f1,
        support=support,
        accuracy=float(_ratio(hits.sum(), support.sum())),
        macro_precision=_mean(precision, predicted + support),
        macro_recall=_mean(recall, predicted + support),
        macro_f1=_mean(f1, predicted + support),
        balanced_accuracy=_mean(recall, support),
    )


def macro_auc(probabilities: NDArray[np.float32], labels: Counts) -> float:
    """Return the mean, over the classes that have some but not all images, of the area under the
    ROC curve of the class against the rest, from probabilities (N, C) and labels (N,); NaN if there
    is no such class.

    By ranks (Mann and Whitney's U); ties share their mean rank.
    """
    areas = []
    for number in np.unique(labels):
        positive = labels == number
        hits, others = int(positive.sum()), int((~positive).sum())
        if others:
            _, place, counts = np.unique(
                probabilities[:, number], return_inverse=True, return_counts=True
            )
            ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
            areas.append((ranks[positive].sum() - hits * (hits + 1) / 2) / (hits * others))
    return float(np.mean(areas)) if areas else math.nan


def _mean(values: Scores, counts: Counts) -> float:
    """Return the mean of `values` with non-zero `counts`; 0 if there are none."""
    there = counts > 0
    return float(values[there].mean()) if there.any() else 0.0


def _ratio(part: Any, whole: Any) -> Scores:
    scores: Scores = np.zeros(np.shape(whole))
    np.divide(part, whole, out=scores, where=np.asarray(whole) != 0)
    return scores
