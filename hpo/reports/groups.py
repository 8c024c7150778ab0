"""Trials grouped by a searched parameter, and the Pareto front: tables and figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hpo.config.metrics import COSTS, direction_of
from hpo.config.parameters import Choice, Float, Int, Parameter, canonical_json
from hpo.errors import NotFound, nearest
from hpo.formatting import (
    Cell,
    Table,
    mean_and_spread,
    measured,
    measured_cell,
    setting,
    setting_cell,
    text_cell,
)
from hpo.reports.figures import BLUE, ORANGE, Figure, Trace, axis, cost_axis, figure, plain
from hpo.search.status import StudyStatus
from hpo.storage.records import Trial

SHOWN = ("val_top1", "val_loss", "train_top1", "train_loss")
MOST_VALUES = 12
"""Most different values that get a row each; a range with more, or with more than BINS and no
step, is cut into BINS equal parts."""
BINS = 4


@dataclass(frozen=True)
class Group:
    """Trials with one value of a parameter, or with values in one part of its range."""

    label: str
    key: float | str
    complete: tuple[Trial, ...]
    pruned: int
    """Number of pruned trials, which count in no mean: they ended early."""

    def values(self, metric: str) -> list[float]:
        """Return `metric` at the best epoch of each complete trial; costs as measured."""
        found = [_at_best(trial, metric) for trial in self.complete]
        return [value for value in found if value is not None and math.isfinite(value)]


def _at_best(trial: Trial, metric: str) -> float | None:
    if metric in COSTS:
        return trial.values.get(metric)
    row = next((row for row in trial.epochs if row.epoch == trial.best_epoch), None)
    return row.metrics.get(metric) if row else None


def group_by(status: StudyStatus, name: str) -> list[Group]:
    """Group complete and pruned trials by their value of the searched parameter `name`, in the
    order of the values; trials that did not use it are left out. Raises NotFound for another
    name."""
    if name not in status.file.space:
        raise NotFound(f"{name!r} is not searched here; {nearest(name, status.file.space)}")
    used = [t for t in status.trials if name in t.params and t.state in ("complete", "pruned")]
    parameter = status.file.space[name]
    group_of = _sorter(parameter, [t.params[name] for t in used])
    groups: dict[tuple[Any, str], list[Trial]] = {}
    for trial in used:
        groups.setdefault(group_of(trial.params[name]), []).append(trial)
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
    """Return a function that gives a value its sort key and label."""
    if isinstance(parameter, Choice):
        places = {canonical_json(one): place for place, one in enumerate(parameter.choices)}
        return lambda value: (places[canonical_json(value)], setting(value))
    assert isinstance(parameter, Float | Int)
    if len(set(values)) <= (MOST_VALUES if parameter.step else BINS):
        # 0.3 of a range with steps may be 0.30000000000000004.
        return lambda value: (float(f"{value:.12g}"), setting(value))
    bounds = _bounds(float(parameter.low), float(parameter.high), parameter.log)

    def binned(value: Any) -> tuple[float, str]:
        place = min(sum(value >= bound for bound in bounds[1:]), BINS - 1)
        return bounds[place], f"{setting(bounds[place])} to {setting(bounds[place + 1])}"

    return binned


def _bounds(low: float, high: float, log: bool) -> list[float]:
    """Return the bounds of BINS equal parts, of the logarithm for a parameter on a log scale."""
    shares = [place / BINS for place in range(BINS + 1)]
    if log:
        return [low * (high / low) ** share for share in shares]
    return [low + (high - low) * share for share in shares]


def metrics_of(status: StudyStatus) -> list[str]:
    """Return the metrics that the data of groups have: the objectives, then top-1 and losses."""
    recorded = {name for trial in status.trials for row in trial.epochs for name in row.metrics}
    names = dict.fromkeys([*status.file.objectives, *SHOWN])
    return [name for name in names if name in recorded or name in COSTS]


def group_table(status: StudyStatus, name: str) -> Table:
    """Return a row for each value of `name`: complete and pruned trials, then mean ± standard
    deviation (n - 1) and best of each objective; `group_data` has all metrics. Raises NotFound as
    `group_by`."""
    metrics = status.file.objectives
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
    found = _statistics(metric, values)
    assert found["mean"] is not None
    spread = mean_and_spread(found["mean"], found["std"])
    return [
        Cell(spread, found["mean"], "number"),
        measured_cell(metric, found["best"]),
    ]


def _statistics(metric: str, values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, sample standard deviation (n - 1; None for a single value) and best."""
    if not values:
        return {"mean": None, "std": None, "best": None}
    best = min(values) if direction_of(metric) == "minimize" else max(values)
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "best": best}


def group_data(status: StudyStatus, name: str) -> list[dict[str, Any]]:
    """Return the same as plain data, numbers in full: {"value", "complete": [trial numbers],
    "pruned": count, metric: {"mean", "std", "best"}, ...} each. Raises NotFound as `group_by`."""
    return [
        {
            "value": group.label,
            "complete": [trial.number for trial in group.complete],
            "pruned": group.pruned,
            **{one: _statistics(one, group.values(one)) for one in metrics_of(status)},
        }
        for group in group_by(status, name)
    ]


def front_table(status: StudyStatus) -> Table:
    """Return the Pareto front of a study of several objectives, sorted by the first."""
    names, searched = status.file.objectives, list(status.file.space)
    rows = [
        [
            Cell(str(trial.number), trial.number, "number"),
            *(measured_cell(name, trial.values[name]) for name in names),
            *(setting_cell(trial.params[n]) if n in trial.params else text_cell(None)
              for n in searched),
        ]
        for trial in status.front()
    ]  # fmt: skip
    return Table(("trial", *names, *searched), rows)


def front_figure(status: StudyStatus, name: str) -> Figure | None:
    """Draw the first objective against objective `name`: complete trials, the Pareto front on top,
    joined by a line for two objectives. Return None if no trial is complete."""
    front = sorted(status.front(), key=lambda trial: trial.values[name])
    if not front:
        return None
    done = [trial for trial in status.ranked() if trial not in front]
    mode = "lines+markers" if len(status.file.objectives) == 2 else "markers"
    line = {"color": ORANGE, "width": 1.5, "shape": "hv"}
    traces = [
        _points(status, name, done, "complete", mode="markers", marker={"color": BLUE, "size": 8}),
        _points(status, name, front, "front", mode=mode, line=line,
                marker={"color": ORANGE, "size": 10}),
    ]  # fmt: skip
    values = [trial.values[name] for trial in [*done, *front]]
    return figure(
        traces,
        alt=f"{status.file.metric} against {name}: {len(front)} of {len(values)} complete trials "
        "are on the Pareto front.",
        height=360,
        xaxis=cost_axis(name, values),
        yaxis=axis(status.file.metric),
        hovermode="closest",
    )


def _points(
    status: StudyStatus, name: str, trials: list[Trial], label: str, **trace: object
) -> Trace:
    return {
        "type": "scatter", "name": label, "x": [trial.values[name] for trial in trials],
        "y": [trial.values[status.file.metric] for trial in trials],
        "text": [_hover(trial) for trial in trials],
        "hovertemplate": "%{text}<extra></extra>", **trace,
    }  # fmt: skip


def _hover(trial: Trial) -> str:
    values = [f"{name} {measured(name, value)}" for name, value in trial.values.items()]
    params = [f"{plain(name)} = {plain(setting(one))}" for name, one in trial.params.items()]
    return "<br>".join([f"<b>trial {trial.number}</b>", *values, *params])
