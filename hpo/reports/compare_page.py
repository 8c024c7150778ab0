"""The page of a comparison: dots with their intervals, values against costs, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpo.config.metrics import direction_of
from hpo.formatting import number
from hpo.intervals import Interval
from hpo.reports.compare import (
    SCORES,
    Comparison,
    RunEntry,
    StudyEntry,
    entries_table,
    runs_table,
)
from hpo.reports.figures import (
    GREY,
    SERIES_COLORS,
    Figure,
    Trace,
    axis,
    cost_axis,
    epoch_axis,
    figure,
    finite,
    plain,
    rounded,
    short,
)
from hpo.reports.page import render

CURVES = {"loss": ("train_loss", "val_loss"), "top1": ("train_top1", "val_top1")}
COSTS = {
    "parameters": "parameters of the best network",
    "flops": "multiply-adds of one image",
    "latency_ms": "milliseconds for one image",
    "seconds": "seconds of training, all trials",
}
LONGEST = 48
"""Most characters of a name in a legend."""


def figures_of(found: Comparison) -> dict[str, Figure | None]:
    """Return every figure of the page by name, None where there is nothing to draw."""
    shown: list[StudyEntry | RunEntry] = [*found.entries, *found.runs]
    curves = {one.name: one.curve for one in shown if one.curve}
    return {
        **{f"cost-{name}": against_cost(found.entries, name) for name in COSTS},
        **{f"curves-{name}": overlaid(curves, metrics) for name, metrics in CURVES.items()},
        "best": best_dots(found.entries),
        "scores": score_dots(found.runs),
        "classes": class_dots(found.runs),
    }


def against_cost(entries: Sequence[StudyEntry], name: str) -> Figure | None:
    """Draw the best value of each entry against one of its costs. Return None where fewer than two
    different costs are known or the entries have different metrics."""
    shown = [one for one in entries if one.best is not None and getattr(one, name) is not None]
    metrics = {one.metric for one in shown}
    values = [getattr(one, name) for one in shown]
    if len(metrics) != 1 or len(set(values)) < 2:
        return None
    metric = metrics.pop()
    kind = "lowest" if direction_of(metric) == "minimize" else "best"
    return figure(
        [_point(place, one, name) for place, one in enumerate(entries) if one in shown],
        alt=f"{kind} {metric} against {COSTS[name]}: "
        + ", ".join(f"{one.name} {number(one.best)} at {getattr(one, name):.3g}" for one in shown)
        + ".",
        height=340,
        xaxis=cost_axis(COSTS[name], values),
        yaxis=axis(f"{kind} {metric}"),
        hovermode="closest",
    )


def _point(place: int, entry: StudyEntry, name: str) -> Trace:
    label = plain(entry.name)
    text = f"{label}<br>{plain(entry.metric)} {number(entry.best)}"
    best, interval = entry.best or 0.0, entry.interval
    ends = {} if interval is None else {"error_y": {
        "type": "data", "symmetric": False, "array": [rounded(interval.high - best)],
        "arrayminus": [rounded(best - interval.low)], "thickness": 1.5, "width": 4,
    }}  # fmt: skip
    return {
        "type": "scatter", "mode": "markers", "name": _label(entry.name),
        "x": [getattr(entry, name)],
        "y": [best], "text": [text], "hovertemplate": "%{text}, %{x:.4s}<extra></extra>",
        "marker": {"color": _color(place), "size": 11}, **ends,
    }  # fmt: skip


def _label(name: str) -> str:
    """Shorten a name for a legend: the end of a long path."""
    return plain(name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}")


def _color(place: int) -> str:
    return SERIES_COLORS[place % len(SERIES_COLORS)]


def overlaid(
    series: Mapping[str, Sequence[Mapping[str, float]]], metrics: tuple[str, str]
) -> Figure | None:
    """Draw the curves of several trainings in one figure: a colour for each, the training metric
    dashed, the validation metric solid. Return None if neither was recorded."""
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
        alt=f"{metrics[0]} and {metrics[1]} by epoch of {', '.join(series)}.",
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
        # Runs that trained on the validation images, too, have no solid line for the legend.
        "showlegend": not training or not any("val_loss" in row for row in epochs),
        "x": [row["epoch"] for row in epochs], "y": [finite(row.get(metric)) for row in epochs],
        "line": {"color": _color(place), "width": 2, "dash": "dash" if training else "solid"},
        "hovertemplate": f"{plain(label)}, {metric}: %{{y:.4g}}<extra></extra>",
    }  # fmt: skip


def best_dots(entries: Sequence[StudyEntry]) -> Figure | None:
    """Draw the best value of each entry with its interval, and the mean of its best trials. Return
    None if there is none or the entries have different metrics."""
    shown = [(place, one) for place, one in enumerate(entries) if one.best is not None]
    metrics = {one.metric for _, one in shown}
    if len(metrics) != 1:
        return None
    metric, rows = metrics.pop(), list(range(len(shown)))
    means = {
        "type": "scatter", "mode": "markers", "name": f"mean of top {shown[0][1].top}",
        "x": [rounded(one.mean_top) for _, one in shown], "y": rows,
        "marker": {"color": GREY, "symbol": "line-ns-open", "size": 12, "line": {"width": 2}},
        "hovertemplate": "mean of the best trials %{x:.4~g}<extra></extra>",
    }  # fmt: skip
    bests = _dots(
        f"best {metric}",
        [(row, one.best, one.interval) for row, (_, one) in zip(rows, shown, strict=True)],
        [_color(place) for place, _ in shown],
        [one.name for _, one in shown],
    )
    told = ", ".join(f"{one.name} {number(one.best)}" for _, one in shown)
    return _rows(
        [means, bests], [one.name for _, one in shown], metric, f"Best {metric} of each: {told}."
    )


def score_dots(runs: Sequence[RunEntry]) -> Figure | None:
    """Draw top-1, top-5, precision, recall and F1 of each run, with their intervals."""
    columns = [(one.scores, one.intervals) for one in runs]
    return _by_run(runs, columns, [score for score in SCORES if any(score in one.scores
                                                                     for one in runs)])  # fmt: skip


def class_dots(runs: Sequence[RunEntry]) -> Figure | None:
    """Draw F1 of the most frequent classes, the runs in one row."""
    names = list(dict.fromkeys(name for one in runs for name in one.f1_by_class))
    return _by_run(runs, [(one.f1_by_class, {}) for one in runs], names)


def _by_run(
    runs: Sequence[RunEntry],
    columns: Sequence[tuple[Mapping[str, float | None], Mapping[str, Interval]]],
    names: Sequence[str],
) -> Figure | None:
    """Draw a row for each name, in it a dot for each run that has a value."""
    if not runs or not names:
        return None
    step = 0.6 / max(1, len(runs) - 1)
    traces = []
    for place, (one, (values, intervals)) in enumerate(zip(runs, columns, strict=True)):
        height = (place - (len(runs) - 1) / 2) * min(step, 0.2)
        points = [
            (row + height, values[name], intervals.get(name))
            for row, name in enumerate(names)
            if finite(values.get(name)) is not None
        ]
        label = _label(one.name)
        color = [_color(place)] * len(points)
        traces.append(_dots(label, points, color, [one.name] * len(points)))
    told = "; ".join(
        f"{one.name} " + ", ".join(f"{name} {number(values[name])}" for name in names[:5]
                                   if name in values)
        for one, (values, _) in zip(runs, columns, strict=True)
    )  # fmt: skip
    return _rows(traces, [name.replace("_", " ") for name in names], "", f"{told}.")


def _dots(
    name: str,
    points: Sequence[tuple[float, float | None, Interval | None]],
    colors: Sequence[str],
    labels: Sequence[str],
) -> Trace:
    """Return dots at (row, value) with the intervals of the values, where there are some."""
    values = [value or 0.0 for _, value, _ in points]
    above = [0.0 if one is None else one.high - v for v, (*_, one) in zip(values, points,
                                                                          strict=True)]  # fmt: skip
    below = [0.0 if one is None else v - one.low for v, (*_, one) in zip(values, points,
                                                                         strict=True)]  # fmt: skip
    text = [
        f"{plain(label)}<br>{number(value)}" + (f", 95 % {one}" if one else "")
        for label, (_, value, one) in zip(labels, points, strict=True)
    ]
    return {
        "type": "scatter", "mode": "markers", "name": plain(name), "text": text,
        "x": [rounded(value) for value in values], "y": [row for row, *_ in points],
        "error_x": {"type": "data", "symmetric": False, "array": [rounded(one) for one in above],
                    "arrayminus": [rounded(one) for one in below], "thickness": 1.5, "width": 4,
                    "color": colors[0] if len(set(colors)) == 1 else GREY},
        "marker": {"color": list(colors), "size": 10},
        "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip


def _rows(traces: Sequence[Trace], names: Sequence[str], title: str, alt: str) -> Figure:
    """Return a figure with a row for each of `names`, the first one on top."""
    ticks = [plain(short(name, 32)) for name in names]
    return figure(
        traces,
        alt=alt,
        height=90 + 34 * len(names),
        xaxis=axis(title),
        yaxis={"tickvals": list(range(len(names))), "ticktext": ticks, "automargin": True,
               "range": [len(names) - 0.5, -0.5]},
        showlegend=True,
        hovermode="closest",
    )  # fmt: skip


def _equal_costs(entries: Sequence[StudyEntry]) -> list[str]:
    """Return the costs, in words, that several entries share."""
    found = {name: [getattr(one, name) for one in entries] for name in COSTS}
    return [
        COSTS[name]
        for name, values in found.items()
        if len(values) > 1 and len(set(values)) == 1 and values[0] is not None
    ]


def comparison_report(found: Comparison, title: str) -> str:
    """Return the page of a comparison as HTML."""
    drawn = figures_of(found)
    names = [name for name, figure in drawn.items() if figure is not None]
    return render(
        "compare.html",
        drawn,
        title=title,
        entries=entries_table(found),
        runs=runs_table(found),
        costs=[name for name in names if name.startswith("cost-")],
        equal_costs=_equal_costs(found.entries),
        curves=[name for name in names if name.startswith("curves-")],
        notes=found.notes,
    )
