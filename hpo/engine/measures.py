"""Metrics of a classifier's validation: of every epoch, and those that are asked for alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpo.definition.goals import AUC, TOP5, own_function, recalled
from hpo.engine import modules, own
from hpo.engine.goals import KEY, class_named, require_supported
from hpo.engine.inputs import TrainingData
from hpo.engine.learner import Evaluation
from hpo.engine.metrics import classification_report, macro_auc
from hpo.errors import ConfigError


def need_probabilities(asked: Sequence[str]) -> bool:
    return any(name == AUC or own_function(name) for name in asked)


def measure(found: Evaluation, asked: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """The metrics of validation, classes called `names`. Where probabilities are not finite, the
    training having diverged, what needs them is not either.

    Raises ConfigError where a function of the user's own gives no finite number.
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
    function = modules.load(str(own_function(name)), KEY)
    given = probabilities.copy(), found.labels.copy()  # theirs to change
    return _number(own.call_user_function(function, repr(name), KEY, *given), name)


def _number(value: Any, name: str) -> float:
    """What a function of the user's own gave, if it is one finite number."""
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
    """Raise ConfigError where validation of `data` cannot measure what is `asked`, or a function of
    the user's own is not there."""
    if data.val is None or not asked:
        return
    support = np.bincount(np.asarray(data.val.labels), minlength=data.classes)
    names = data.names or tuple(str(number) for number in range(data.classes))
    require_supported(asked, dict(zip(names, support.tolist(), strict=True)))
    require_functions(asked)


def require_functions(asked: Sequence[str]) -> None:
    """Raise ConfigError where a function of the user's own among `asked` is not there."""
    for name in asked:
        if function := own_function(name):
            modules.load(function, KEY)
