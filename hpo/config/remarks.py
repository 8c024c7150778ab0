"""Remarks on a study file that is valid but may not do what its author expects: parameters without
effect, samplers that draw at random, pruners that can never act."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from hpo.config.base import NONE, flatten, list_path, toml_repr
from hpo.config.parameters import Choice
from hpo.config.strategies import (
    ASHA,
    GP,
    NSGA2,
    QMC,
    TPE,
    CmaEs,
    Hyperband,
    Median,
    Patient,
    Percentile,
    Strategy,
    Threshold,
)
from hpo.config.study import StudyFile
from hpo.config.train import LOSSES

ON = "ON"
"""Stands for every value but 0, false and none."""

EFFECTIVE_WITH: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "optimizer.momentum": {"optimizer.name": ("sgd", "rmsprop")},
    "optimizer.nesterov": {"optimizer.name": ("sgd",)},
    "optimizer.betas": {"optimizer.name": ("adam", "adamw")},
    "label_smoothing": {"loss": LOSSES},
    "focal_gamma": {"loss": ("focal",)},
    "schedule.min_lr": {"schedule.name": ("cosine", "plateau")},
    "schedule.step_size": {"schedule.name": ("step",)},
    "schedule.gamma": {"schedule.name": ("step",)},
    "schedule.factor": {"schedule.name": ("plateau",)},
    "schedule.patience": {"schedule.name": ("plateau",)},
    "schedule.metric": {"schedule.name": ("plateau",)},
    "schedule.pct_start": {"schedule.name": ("onecycle",)},
    "schedule.rates": {"schedule.name": ("replay",)},
    "early_stopping.metric": {"early_stopping.patience": (ON,)},
    "early_stopping.min_delta": {"early_stopping.patience": (ON,)},
    "augment.policy_ops": {"augment.policy": ("randaugment",)},
    "augment.policy_magnitude": {"augment.policy": ("randaugment", "trivialaugment")},
    "augment.perspective_probability": {"augment.perspective": (ON,)},
    **{
        f"retrieval.{name}": {"task": ("retrieval",)}
        for name in ("k", "distance", "standardize", "pca")
    },
    **{
        f"model.cnn.{name}": {"model.architecture": ("small_cnn",)}
        for name in (
            *("filters", "kernels", "strides", "norm", "pool", "pool_sizes", "residual"),
            *("adaptive_pool", "hidden", "dropout"),
        )
    },
}
"""{field: {other field: values of it with which the first has an effect}}."""


def remarks(file: StudyFile) -> list[str]:
    """Return a line for each thing that a study of `file` does not do."""
    return [*_without_effect(file), *_drawn_at_random(file), *_never_pruning(file)]


# Parameters without effect


def _without_effect(file: StudyFile) -> Iterator[str]:
    """Yield searched parameters, and given fields, that change nothing in some trials or in all."""
    given = [one for one in flatten(file.train) if one in EFFECTIVE_WITH] if file.text else []
    for name in [*file.space, *given]:
        for parent, values in EFFECTIVE_WITH.get(list_path(name), {}).items():
            possible = _possible(file, name, parent)
            useless = [one for one in possible if not _is_among(one, values)]
            if useless and (name in file.space or len(useless) == len(possible)):
                yield _effect(name, parent, values, useless, possible)


def _effect(
    name: str, parent: str, values: tuple[Any, ...], useless: list[Any], possible: list[Any]
) -> str:
    needs = " or ".join("on" if one == ON else str(one) for one in values)
    if len(useless) == len(possible):
        found = " or ".join(_plainly(one) for one in useless[:3])
        return f"{name} has no effect: it is used only with {parent} = {needs}, never with {found}"
    useful = [one for one in possible if _is_among(one, values)]
    allowed = toml_repr(useful[0] if len(useful) == 1 else useful)
    found = " or ".join(_plainly(one) for one in useless[:3])
    return (
        f"{name} has no effect in trials with {parent} = {found}; add to it: "
        f'when = {{"{parent}" = {allowed}}}'
    )


def _possible(file: StudyFile, name: str, parent: str) -> list[Any]:
    """Return the values that `parent` can have in a trial that has `name`."""
    if parent not in file.space:
        found = flatten(file.config(file.space.corners()[0]).to_dict())
        return [found.get(parent, NONE)]
    when = file.space[name].when if name in file.space else {}
    return list(when.get(parent, file.space[parent].bounds()))


def _is_among(value: Any, values: tuple[Any, ...]) -> bool:
    return value in values or (ON in values and value not in (0, NONE))


def _plainly(value: Any) -> str:
    return value if isinstance(value, str) else toml_repr(value)


# Samplers that draw at random


def _drawn_at_random(file: StudyFile) -> Iterator[str]:
    sampler, trials = file.study.sampler, _most_trials(file)
    first = getattr(sampler, "n_startup_trials", getattr(sampler, "population_size", 0))
    option = "n_startup_trials" if hasattr(sampler, "n_startup_trials") else "population_size"
    if isinstance(sampler, TPE | GP | CmaEs | NSGA2) and first >= trials:
        yield (
            f"{sampler.name} draws all {trials} trials at random: it learns from the first "
            f"{first} ({option})"
        )
        return
    alone = _independent(file, sampler)
    if alone:
        yield f"{sampler.name} draws at random: " + "; ".join(
            f"{', '.join(names)} ({why})" for why, names in alone.items()
        )
    if isinstance(sampler, GP) and trials > MOST_OF_GP:
        of = "" if trials == math.inf else f" (of {trials})"
        yield (
            f"gp grows slow beyond some {MOST_OF_GP} trials{of}: a minute for each at "
            "5,000; tpe does not"
        )


def _most_trials(file: StudyFile) -> float:
    """Return the number of trials, infinite without a limit."""
    return math.inf if file.study.trials is None else file.study.trials


MOST_OF_GP = 500


def _independent(file: StudyFile, sampler: Strategy) -> dict[str, list[str]]:
    """Return {reason: parameters that `sampler` does not model but draws independently}."""
    if not isinstance(sampler, GP | CmaEs | QMC):
        return {}
    found: dict[str, list[str]] = {}
    for name, parameter in file.space.items():
        if len(parameter.bounds()) < 2:
            continue
        if parameter.when:
            found.setdefault("not every trial has it", []).append(name)
        elif isinstance(parameter, Choice) and not isinstance(sampler, GP):
            found.setdefault("choices, not a range", []).append(name)
    if isinstance(sampler, CmaEs) and len(file.space.ranges) == 1:
        found["the only range, and it needs two"] = file.space.ranges
    return found


# Pruners that can never act


def _never_pruning(file: StudyFile) -> Iterator[str]:
    pruner, epochs, trials = file.study.pruner, file.max_epochs, _most_trials(file)
    for option, value, why in _obstacles(pruner, epochs, trials):
        yield f"{pruner.name} never ends a trial: {option} = {value}, and {why}"


def _obstacles(pruner: Strategy, epochs: int, trials: float) -> Iterator[tuple[str, Any, str]]:
    """Yield (option, its value, what it cannot reach) of options that are not at their default. The
    pruner is never asked after a trial's last epoch."""
    short = f"no trial has more than {epochs} epoch{'s' * (epochs > 1)}"
    few = f"there are {trials} trials"
    limits: dict[str, tuple[float, str]] = {}
    """{option: (the least value with which it never acts, why)}."""
    if isinstance(pruner, Median | Percentile | Threshold):
        limits["n_warmup_steps"] = epochs, short
    if isinstance(pruner, Median | Percentile):
        limits |= {"n_startup_trials": (trials, few), "n_min_trials": (trials, few)}
    if isinstance(pruner, Percentile):
        limits["percentile"] = 100, "no trial is outside of that"
    if isinstance(pruner, Hyperband):
        limits["min_resource"] = epochs, short
    if isinstance(pruner, ASHA | Hyperband):
        limits["bootstrap_count"] = trials, few
    if isinstance(pruner, ASHA):
        rung = pruner.min_resource * pruner.reduction_factor**pruner.min_early_stopping_rate
        why = f"its first question comes after epoch {rung}; {short}"
        rungs = dict.fromkeys(("min_resource", "min_early_stopping_rate"), (0.0, why))
        limits |= rungs if rung >= epochs else {}
    if isinstance(pruner, Patient):
        limits["patience"] = epochs - 1, short
        for option, value, why in _obstacles(pruner.wrapped_pruner, epochs, trials):
            yield f"wrapped_pruner.{option}", value, why
    for option, (limit, why) in limits.items():
        value = getattr(pruner, option)
        if value != type(pruner).model_fields[option].default and value >= limit:
            yield option, value, why
