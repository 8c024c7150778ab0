"""What a study may optimize: metrics of an epoch, and costs of the trained network."""

from __future__ import annotations

from typing import Literal, get_args

from hpo.definition.config import Metric, direction

Cost = Literal["latency_ms", "parameters", "flops", "epoch_seconds", "peak_memory_mb"]
Objective = Literal[Metric, Cost]
COSTS: tuple[str, ...] = get_args(Cost)
MOST_OBJECTIVES = 4
"""Beyond it nearly every trial lies on the Pareto front."""


def direction_of(objective: str) -> Literal["minimize", "maximize"]:
    """Costs are minimized, metrics go their own way."""
    return "minimize" if objective in COSTS else direction(objective)


def dominates(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether `one` is at least as good in every objective and better in some; {objective: value}
    with the same keys."""
    signs = {name: -1 if direction_of(name) == "minimize" else 1 for name in one}
    gains = [sign * (one[name] - other[name]) for name, sign in signs.items()]
    return min(gains) >= 0 and max(gains) > 0
