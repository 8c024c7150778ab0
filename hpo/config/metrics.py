"""Metrics of an epoch and costs of a network: what a study may optimize and a training may watch.

Three kinds: fixed names; `val_recall:CLASS`, the recall of one class; and `module:function` of the
user's own, where `:minimize` behind it turns it round. A metric's name tells its direction, and is
the same in files, in the database and in reports.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema

from hpo.config.base import TIMM
from hpo.config.retrieval import RETRIEVED
from hpo.errors import nearest

AUC = "val_macro_auc"
TOP5 = "val_top5"
RECALL = "val_recall:"
"""Before the name of a class: the part of its images that is named right."""
CLASSIFIED = (
    "val_top1",
    TOP5,
    "val_loss",
    "val_macro_f1",
    "val_balanced_accuracy",
    AUC,
    "train_top1",
    "train_loss",
)
METRICS: tuple[str, ...] = tuple(dict.fromkeys([*CLASSIFIED, *RETRIEVED]))
"""Those with a fixed name, of either task."""
_OWN = r"([A-Za-z_][\w.]*:[A-Za-z_]\w*)(:minimize|:maximize)?"
_MEANT = {
    ("val_top1",): "acc accuracy acc1 top1 top_1 top1_accuracy top1_acc accuracy_score",
    ("val_top5",): "acc5 top5 top_5 top5_accuracy top5_acc",
    ("val_loss",): "loss cross_entropy crossentropy nll log_loss logloss",
    ("val_macro_f1", "val_f1"): "f1 f1_score f1score macro_f1 f1_macro fscore f_score f1_weighted",
    (AUC,): "auc roc_auc roc auroc macro_auc auc_macro roc_auc_score roc_auc_ovr auc_roc",
    ("val_balanced_accuracy", "val_recall"): (
        "balanced_accuracy balanced_acc bal_acc bacc macro_recall recall_macro uar "
        "balanced_accuracy_score mean_per_class_accuracy"
    ),
    (f"{RECALL}CLASS", "val_recall"): "recall sensitivity class_recall",
    ("val_precision",): "precision macro_precision precision_macro",
}
"""What other tools call them, without the part of the images in front."""


def user_function(metric: str) -> str | None:
    """Return the `module:function` that `metric` (or another field) names, or None."""
    found = None if metric.startswith((RECALL, TIMM)) else re.fullmatch(_OWN, metric)
    return found[1] if found else None


def recall_class(metric: str) -> str | None:
    """Return the class whose recall `metric` is; None for other metrics."""
    return metric.removeprefix(RECALL) if metric.startswith(RECALL) else None


def direction(metric: str) -> Literal["minimize", "maximize"]:
    """Return the direction of `metric`: losses, distances and `...:minimize` are minimized, others
    maximized."""
    if recall_class(metric) is not None or metric.endswith(":maximize"):
        return "maximize"
    lower = metric.endswith(("_loss", "_distance", ":minimize"))
    return "minimize" if lower else "maximize"


def suggestion(metric: str, allowed: Iterable[str]) -> str:
    """Return the end of a message about a metric that is none of `allowed`."""
    name = re.sub(r"[\s\-]+", "_", metric.strip().lower())
    part, _, rest = name.partition("_")
    if part in ("val", "valid", "validation", "test", "eval", "dev", "train"):
        name = rest
    names = list(allowed)
    for right, others in _MEANT.items():
        if name in others.split():
            found = [one for one in right if one in names or (RECALL in one and AUC in names)]
            found = [one.replace("val_", "train_") if part == "train" else one for one in found]
            if found := [one for one in found if RECALL in one or one in names]:
                other = f" (of a retrieval {found[1]!r})" if found[1:] else ""
                return f"did you mean {found[0]!r}{other}?"
    return nearest(metric, names, most=len(names))


def metric_name(value: Any) -> str:
    """Return `value` if it may name a metric; raises ValueError in words otherwise."""
    if not isinstance(value, str):
        raise ValueError("a metric's name")
    module = value.partition(":")[0]
    if value == RECALL:
        raise ValueError(f"name a class behind it, as in {RECALL}cat")
    if ":" in value and module.startswith(("val_", "train_")) and recall_class(value) is None:
        raise ValueError(f"of a single class there is its recall alone, {RECALL}CLASS")
    if value in METRICS or recall_class(value) is not None or user_function(value):
        return value
    if ":" in value:
        raise ValueError(
            "a function of your own is module:function, or module:function:minimize where less is "
            "better"
        )
    raise ValueError(suggestion(value, METRICS))


METRIC_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"enum": list(METRICS)},
        {"type": "string", "pattern": f"^{RECALL}.+$"},
        {"type": "string", "pattern": f"^{_OWN}$"},
    ]
}
Metric = Annotated[str, BeforeValidator(metric_name), WithJsonSchema(METRIC_SCHEMA)]


COSTS = ("latency_ms", "parameters", "flops", "epoch_seconds", "peak_memory_mb")


def _objective(value: Any) -> str:
    return str(value) if value in COSTS else metric_name(value)


Objective = Annotated[
    str,
    BeforeValidator(_objective),
    WithJsonSchema({"anyOf": [{"enum": list(COSTS)}, *METRIC_SCHEMA["anyOf"]]}),
]
MOST_OBJECTIVES = 4
"""Beyond it nearly every trial lies on the Pareto front."""


def direction_of(objective: str) -> Literal["minimize", "maximize"]:
    """Return the direction of a metric or cost; costs are minimized."""
    return "minimize" if objective in COSTS else direction(objective)


def worst_value(objective: str) -> float:
    """Return the value that all trials are better than: what Optuna gets for a trial that diverged
    or is infeasible, so that its samplers learn from it and it is never the best."""
    return math.inf if direction_of(objective) == "minimize" else -math.inf
