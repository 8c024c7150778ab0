"""The tables and figures of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpo.definition.objectives import direction_of
from hpo.results.comparison import SCORES, Comparison, Entry, RunEntry
from hpo.results.figures import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    TEAL,
    Figure,
    Trace,
    axis,
    epoch_axis,
    figure,
    finite,
    plain,
    short,
)
from hpo.results.table import (
    Cell,
    Table,
    duration,
    measured_cell,
    number,
    number_cell,
    setting_cell,
    text_cell,
)

COLORS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, RED, TEAL, GREY)
CURVES = {"loss": ("train_loss", "val_loss"), "top1": ("train_top1", "val_top1")}
COSTS = {
    "parameters": "parameters of the best network",
    "flops": "multiply-adds of one image",
    "latency_ms": "milliseconds for one image",
    "seconds": "seconds of training, all trials",
}
LONGEST = 48
"""Characters of a legend's entry."""
LOG_FROM = 30.0
"""Costs whose ends lie further apart than this many times stand on a logarithmic axis."""


def entries_table(found: Comparison) -> Table:
    """Studies by architecture, a row each."""
    tops = {entry.top for entry in found.entries}
    mean = f"mean of top {tops.pop()}" if tops else "mean of top"
    heads = ("study", "architecture", "metric", "best", mean, "trials", "pruned", "epochs", "time")
    rows = [
        [
            text_cell(one.study),
            text_cell(one.architecture),
            text_cell(one.metric),
            number_cell(one.best),
            number_cell(one.mean_top),
            setting_cell(one.trials),
            setting_cell(one.pruned),
            setting_cell(one.epochs),
            Cell(duration(one.seconds), one.seconds, "number"),
            *_cost_cells(one),
        ]
        for one in found.entries
    ]
    return Table((*heads, "parameters", "flops", "latency_ms"), rows)


def runs_table(found: Comparison) -> Table:
    """Trained runs, a row each: mean ± standard deviation over the seeds."""
    scores = _scores(found.runs)
    heads = ("run", "architecture", "measured on", "seeds", *scores, "time")
    rows = [
        [
            text_cell(one.name),
            text_cell(one.architecture),
            text_cell(one.part),
            setting_cell(one.seeds),
            *(_spread_cell(one, score) for score in scores),
            Cell(duration(one.seconds), one.seconds, "number"),
            *_cost_cells(one),
        ]
        for one in found.runs
    ]
    return Table((*heads, "parameters", "flops", "latency_ms"), rows)


def _scores(runs: Sequence[RunEntry]) -> list[str]:
    """Those that some run has."""
    return [score for score in SCORES if any(score in one.scores for one in runs)]


def _cost_cells(one: Entry | RunEntry) -> list[Cell]:
    return [measured_cell(name, getattr(one, name)) for name in ("parameters", "flops",
                                                                 "latency_ms")]  # fmt: skip


def _spread_cell(run: RunEntry, score: str) -> Cell:
    mean, std = run.scores.get(score), run.std.get(score)
    return Cell(number(mean) + ("" if std is None else f" ± {number(std)}"), mean, "number")


def figures_of(found: Comparison) -> dict[str, Figure | None]:
    """Every figure of the page by name; None where there is nothing to draw."""
    shown: list[Entry | RunEntry] = [*found.entries, *found.runs]
    curves = {one.name: one.curve for one in shown if one.curve}
    return {
        **{f"cost-{name}": against_cost(found.entries, name) for name in COSTS},
        **{f"curves-{name}": overlaid(curves, metrics) for name, metrics in CURVES.items()},
        "scores": score_bars(found.runs),
        "classes": class_bars(found.runs),
    }


def against_cost(entries: Sequence[Entry], name: str) -> Figure | None:
    """The best value of each entry against a cost of it; None where no cost is known, or where
    the entries have different metrics."""
    shown = [one for one in entries if one.best is not None and getattr(one, name) is not None]
    metrics = {one.metric for one in shown}
    if len(metrics) != 1:
        return None
    values = [getattr(one, name) for one in shown]
    wide = min(values) > 0 and max(values) > LOG_FROM * min(values)
    metric = metrics.pop()
    kind = "lowest" if direction_of(metric) == "minimize" else "best"
    return figure(
        [_point(place, one, name) for place, one in enumerate(entries) if one in shown],
        height=340,
        xaxis=axis(COSTS[name]) | ({"type": "log", "dtick": 1} if wide else {}),
        yaxis=axis(f"{kind} {metric}"),
        hovermode="closest",
    )


def _point(place: int, entry: Entry, name: str) -> Trace:
    label = plain(entry.name)
    text = f"{label}<br>{plain(entry.metric)} {number(entry.best)}"
    return {
        "type": "scatter", "mode": "markers", "name": _label(entry.name),
        "x": [getattr(entry, name)],
        "y": [entry.best], "text": [text], "hovertemplate": "%{text}, %{x:.4s}<extra></extra>",
        "marker": {"color": _color(place), "size": 11},
    }  # fmt: skip


def _label(name: str) -> str:
    """For a legend: of a long path its end."""
    return plain(name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}")


def _color(place: int) -> str:
    return COLORS[place % len(COLORS)]


def overlaid(
    series: Mapping[str, Sequence[Mapping[str, float]]], metrics: tuple[str, str]
) -> Figure | None:
    """Curves of several trainings laid over each other: a colour for each, the training metric
    dashed, the validation metric solid. None where nothing of it was recorded."""
    traces = [
        _curve(label, place, epochs, metric)
        for place, (label, epochs) in enumerate(series.items())
        for metric in metrics
        if any(finite(row.get(metric)) is not None for row in epochs)
    ]
    if not traces:
        return None
    return figure(
        traces,
        height=380,
        xaxis=epoch_axis(max(len(epochs) for epochs in series.values())),
        yaxis=axis(f"{metrics[0]} dashed, {metrics[1]} solid"),
        hovermode="closest",
    )


def _curve(label: str, place: int, epochs: Sequence[Mapping[str, float]], metric: str) -> Trace:
    training = metric.startswith("train_")
    return {
        "type": "scatter", "mode": "lines" if len(epochs) > 1 else "markers",
        "name": _label(label), "legendgroup": plain(label),
        # Runs that trained on the validation images too have no solid line to stand for them.
        "showlegend": not training or not any("val_loss" in row for row in epochs),
        "x": [row["epoch"] for row in epochs], "y": [finite(row.get(metric)) for row in epochs],
        "line": {"color": _color(place), "width": 2, "dash": "dash" if training else "solid"},
        "hovertemplate": f"{plain(label)}, {metric}: %{{y:.4g}}<extra></extra>",
    }  # fmt: skip


def score_bars(runs: Sequence[RunEntry]) -> Figure | None:
    """Top-1, top-5, precision, recall and F1 of each run side by side."""
    return _bars(runs, [one.scores for one in runs], _scores(runs))


def class_bars(runs: Sequence[RunEntry]) -> Figure | None:
    """F1 of the most frequent classes, the runs side by side."""
    names = list(dict.fromkeys(name for one in runs for name in one.f1_by_class))
    return _bars(runs, [one.f1_by_class for one in runs], names)


def _bars(
    runs: Sequence[RunEntry], columns: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Figure | None:
    if not runs or not names:
        return None
    places = list(range(len(names)))
    traces = [
        {
            "type": "bar", "name": _label(one.name), "marker": {"color": _color(place)},
            "x": places, "y": [finite(column.get(name)) for name in names],
            "hovertemplate": f"{plain(one.name)}<br>%{{y:.4f}}<extra></extra>",
        }
        for place, (one, column) in enumerate(zip(runs, columns, strict=True))
    ]  # fmt: skip
    ticks = [plain(short(name.replace("_", " "))) for name in names]
    return figure(
        traces,
        height=340,
        barmode="group",
        xaxis={"tickvals": places, "ticktext": ticks, "automargin": True},
        yaxis={"range": [0, 1]},
        showlegend=True,
        hovermode="closest",
    )
