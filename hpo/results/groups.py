"""Trials grouped by the value of one searched parameter: the tables of a grid."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hpo.definition.objectives import COSTS, direction_of
from hpo.definition.parameters import Choice, Float, Int, Parameter, canonical
from hpo.errors import NotFound, nearest
from hpo.results.table import Cell, Table, measured, measured_cell, setting, text_cell
from hpo.search.status import StudyStatus, TrialStatus

SHOWN = ("val_top1", "val_loss", "train_top1", "train_loss")
MOST_VALUES = 12
"""Different values up to which each has a row; a range with more, or with more than BINS and no
step, is cut into BINS parts."""
BINS = 4


@dataclass(frozen=True)
class Group:
    """Trials of one value, or of a part of the range."""

    label: str
    key: float | str
    complete: tuple[TrialStatus, ...]
    pruned: int
    """Trials that were pruned: in no mean, since they ended early."""

    def values(self, metric: str) -> list[float]:
        """`metric` at the best epoch of each complete trial that has it; costs as measured."""
        found = [_at_best(trial, metric) for trial in self.complete]
        return [value for value in found if value is not None and math.isfinite(value)]


def _at_best(trial: TrialStatus, metric: str) -> float | None:
    if metric in COSTS:
        return trial.values.get(metric)
    row = next((row for row in trial.epochs if row.epoch == trial.best_epoch), None)
    return row.metrics.get(metric) if row else None


def group_by(status: StudyStatus, name: str) -> list[Group]:
    """Complete and pruned trials by their value of the searched parameter `name`, in the order of
    the values; trials that did not use it are left out. Raises NotFound for another name."""
    if name not in status.file.space:
        raise NotFound(f"{name!r} is not searched here; {nearest(name, status.file.space)}")
    used = [t for t in status.trials if name in t.params and t.state in ("complete", "pruned")]
    parameter = status.file.space[name]
    sorted_into = _sorter(parameter, [t.params[name] for t in used])
    groups: dict[tuple[Any, str], list[TrialStatus]] = {}
    for trial in used:
        groups.setdefault(sorted_into(trial.params[name]), []).append(trial)
    return [
        Group(
            label,
            key,
            tuple(t for t in found if t.state == "complete"),
            sum(t.state == "pruned" for t in found),
        )
        for (key, label), found in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def _sorter(parameter: Parameter, values: Sequence[Any]) -> Callable[[Any], tuple[float, str]]:
    """What gives a value its place in the table and its label."""
    if isinstance(parameter, Choice):
        places = {canonical(one): place for place, one in enumerate(parameter.choices)}
        return lambda value: (places[canonical(value)], setting(value))
    assert isinstance(parameter, Float | Int)
    if len(set(values)) <= (MOST_VALUES if parameter.step else BINS):
        return lambda value: (float(value), setting(value))
    bounds = _bounds(float(parameter.low), float(parameter.high), parameter.log)

    def binned(value: Any) -> tuple[float, str]:
        place = min(sum(value >= bound for bound in bounds[1:]), BINS - 1)
        return bounds[place], f"{setting(bounds[place])} to {setting(bounds[place + 1])}"

    return binned


def _bounds(low: float, high: float, log: bool) -> list[float]:
    """BINS parts of equal size, on a log axis where the parameter is searched on one."""
    shares = [place / BINS for place in range(BINS + 1)]
    if log:
        return [low * (high / low) ** share for share in shares]
    return [low + (high - low) * share for share in shares]


def metrics_of(status: StudyStatus) -> list[str]:
    """Metrics that a table of groups shows: what the study optimizes, then top-1 and losses."""
    recorded = {name for trial in status.trials for row in trial.epochs for name in row.metrics}
    names = dict.fromkeys([*status.file.objectives, *SHOWN])
    return [name for name in names if name in recorded or name in COSTS]


def group_table(status: StudyStatus, name: str) -> Table:
    """A row for each value of `name`: complete and pruned trials, then of each metric mean ±
    standard deviation (n - 1) and best. Raises NotFound as `group_by`."""
    metrics = metrics_of(status)
    heads = [head for metric in metrics for head in (metric, f"best {metric}")]
    rows = [
        [
            Cell(group.label, group.key, "name"),
            Cell(str(len(group.complete)), len(group.complete), "number"),
            Cell(str(group.pruned) if group.pruned else "", group.pruned, "number"),
            *(cell for metric in metrics for cell in _cells(metric, group.values(metric))),
        ]
        for group in group_by(status, name)
    ]
    return Table((name, "complete", "pruned", *heads), rows)


def _cells(metric: str, values: Sequence[float]) -> list[Cell]:
    if not values:
        return [text_cell(None, "number"), text_cell(None, "number")]
    found = _summed_up(metric, values)
    spread = "" if found["std"] is None else f" ± {measured(metric, found['std'])}"
    return [
        Cell(measured(metric, found["mean"]) + spread, found["mean"], "number"),
        measured_cell(metric, found["best"]),
    ]


def _summed_up(metric: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean, sample standard deviation (n - 1; None of a single one) and best of `values`."""
    if not values:
        return {"mean": None, "std": None, "best": None}
    best = min(values) if direction_of(metric) == "minimize" else max(values)
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "best": best}


def group_data(status: StudyStatus, name: str) -> list[dict[str, Any]]:
    """The same as plain data, numbers in full: {"value", "complete": [trial numbers], "pruned":
    count, metric: {"mean", "std", "best"}, ...} each. Raises NotFound as `group_by`."""
    return [
        {
            "value": group.label,
            "complete": [trial.number for trial in group.complete],
            "pruned": group.pruned,
            **{one: _summed_up(one, group.values(one)) for one in metrics_of(status)},
        }
        for group in group_by(status, name)
    ]
