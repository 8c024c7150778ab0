"""Counts and scores of a classifier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Counts = NDArray[np.int64]
Scores = NDArray[np.float64]


def top_k_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """How many labels are among the k largest logits; () int64 on the device of `logits`.

    `logits` (N, C), `labels` (N,) int64. With fewer than k classes every label counts.
    """
    largest = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (largest == labels[:, None]).any(dim=1).sum()


def confusion_matrix(labels: Counts, predictions: Counts, classes: int) -> Counts:
    """(classes, classes) int64: rows are true classes, columns predicted ones."""
    pairs = np.asarray(labels) * classes + np.asarray(predictions)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


@dataclass(frozen=True)
class ClassificationReport:
    """Precision, recall and F1 of each class, (C,) fractions, and their plain means over the
    classes that occur, as true ones or among the predictions; the balanced accuracy is the mean
    recall over those that have images. `support` counts the images of each class."""

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
    """Scores from a confusion matrix (C, C), true classes in rows; 0 where a score is undefined.

    As scikit-learn's precision_recall_fscore_support with zero_division = 0: of each class with all
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
    """The area under the ROC curve of each class against the rest, (N, C) and (N,) -> the mean
    over the classes that have images and are not those of all; NaN where there is none.

    By ranks (Mann and Whitney's U), equal ones sharing theirs.
    """
    found = []
    for number in np.unique(labels):
        positive = labels == number
        hits, others = int(positive.sum()), int((~positive).sum())
        if others:
            _, place, counts = np.unique(
                probabilities[:, number], return_inverse=True, return_counts=True
            )
            ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
            found.append((ranks[positive].sum() - hits * (hits + 1) / 2) / (hits * others))
    return float(np.mean(found)) if found else math.nan


def _mean(values: Scores, counts: Counts) -> float:
    """The mean of `values` where `counts` are not 0; 0 where all are."""
    there = counts > 0
    return float(values[there].mean()) if there.any() else 0.0


def _ratio(part: Any, whole: Any) -> Scores:
    scores: Scores = np.zeros(np.shape(whole))
    np.divide(part, whole, out=scores, where=np.asarray(whole) != 0)
    return scores
