"""What a study may optimize: metrics of an epoch, and costs of the trained network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema

from hpo.definition.goals import METRIC_SCHEMA, direction, metric_name

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
    """Costs are minimized, metrics go their own way."""
    return "minimize" if objective in COSTS else direction(objective)


def losses(values: Mapping[str, float]) -> tuple[float, ...]:
    """Values by objective with less being better in each: those that are maximized negated."""
    return tuple(
        value if direction_of(name) == "minimize" else -value for name, value in values.items()
    )


def dominates(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether `one` is at least as good in every objective and better in some; both have the same
    objectives in the same order."""
    mine, theirs = losses(one), losses(other)
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def front_of(values: Mapping[int, Mapping[str, float]]) -> list[int]:
    """The numbers of those that no other beats in all objectives, best first objective first."""
    front: list[int] = []
    # In this order a later one cannot beat an earlier one, so one pass will do.
    for number in sorted(values, key=lambda number: (losses(values[number]), number)):
        if not any(dominates(values[other], values[number]) for other in front):
            front.append(number)
    return front


def worst(objective: str) -> float:
    """The value that no trial has and all are better than: what Optuna is told of a trial that
    diverged or is infeasible, so that its samplers learn from it and it is never the best, whatever
    comes later."""
    return math.inf if direction_of(objective) == "minimize" else -math.inf
