"""What a network's answers on labelled images are worth, as plain data for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpo.engine.learner import Evaluation
from hpo.engine.metrics import classification_report
from hpo.engine.retrieval import Found


def scores(evaluation: Evaluation | Found, classes: Sequence[str]) -> dict[str, Any]:
    """loss, top1, top5 of more than five classes (of a retrieval precision_at_5, precision_at_k,
    mean_distance, and of the neighbours' vote top1), macro_precision, macro_recall, macro_f1,
    balanced_accuracy (fractions, each a float); `per_class`: precision, recall, f1 and support of
    each class by name; `confusion`: rows are true classes, columns predicted ones, in the order of
    `classes`."""
    found = classification_report(evaluation.confusion)
    columns = (found.precision, found.recall, found.f1, found.support)
    rows = zip(classes, *(column.tolist() for column in columns), strict=True)
    return {
        **_own(evaluation),
        "macro_precision": found.macro_precision,
        "macro_recall": found.macro_recall,
        "macro_f1": found.macro_f1,
        "balanced_accuracy": found.balanced_accuracy,
        "per_class": {
            name: {"precision": precision, "recall": recall, "f1": f1, "support": support}
            for name, precision, recall, f1, support in rows
        },
        "confusion": evaluation.confusion.tolist(),
    }


def _own(evaluation: Evaluation | Found) -> dict[str, float]:
    """The scores that its task has alone."""
    if isinstance(evaluation, Evaluation):
        fifth = {"top5": evaluation.top5} if evaluation.classes > 5 else {}
        return {"loss": evaluation.loss, "top1": evaluation.top1, **fifth}
    names = ("precision_at_5", "precision_at_k", "top1", "mean_distance")
    found = evaluation.metrics()
    return {name: found[f"val_{name}"] for name in names}


def plain_scores(evaluation: Evaluation, classes: Sequence[str]) -> dict[str, float]:
    """Of `scores` the single numbers."""
    found = scores(evaluation, classes)
    return {name: value for name, value in found.items() if isinstance(value, float)}
