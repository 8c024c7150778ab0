"""Figures of a study: history, intermediate values, slices, parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from hpo.config.space import Choice, Float, Int, Parameter, canonical_json
from hpo.formatting import number, setting
from hpo.reports.figures import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    SCALE,
    SKY,
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
from hpo.search.status import StudyStatus
from hpo.storage.records import WORTHLESS, Trial

STATE_COLORS = {
    "complete": BLUE,
    "pruned": GREY,
    "paused": SKY,
    "running": GREEN,
    "interrupted": PURPLE,
    "diverged": AMBER,
    "infeasible": TEAL,
    "failed": RED,
    "waiting": PALE,
}
SYMBOLS = {"failed": "x", "diverged": "triangle-up", "infeasible": "square-open",
           "pruned": "circle-open", "paused": "circle-open"}  # fmt: skip
WITHOUT_VALUE = ("failed", *WORTHLESS)
"""States whose value, if any, was not measured."""
JITTER = 0.36


def is_maximized(status: StudyStatus) -> bool:
    """Return whether more of the objective is better."""
    return status.file.direction == "maximize"


def measured_trials(status: StudyStatus) -> list[Trial]:
    """Return the trials whose value was measured, by the best epoch that they reached."""
    return [t for t in status.trials if t.value is not None and t.state not in WITHOUT_VALUE]


def focus(values: Sequence[float], *, maximize: bool) -> list[float] | None:
    """Return an axis range for the better three quarters of `values` if a few bad ones would
    squeeze them into a line; None if all of them fit."""
    if len(values) < 8:
        return None
    ordered = sorted(values, reverse=maximize)
    best, worst = ordered[0], ordered[-1]
    limit = ordered[3 * (len(ordered) - 1) // 4]
    spread = abs(limit - best)
    if not spread or abs(worst - best) <= 3 * spread:
        return None
    sign = 1 if maximize else -1
    return sorted([best + sign * 0.12 * spread, limit - sign * 0.4 * spread])


def value_range(status: StudyStatus) -> list[float] | None:
    """Return the range of the objective's axis in history and slices."""
    values = [t.value for t in measured_trials(status) if t.value is not None]
    return focus(values, maximize=is_maximized(status))


def hidden(status: StudyStatus) -> int:
    """Return the number of measured trials outside `value_range`."""
    bounds = value_range(status)
    values = [t.value for t in measured_trials(status) if t.value is not None]
    return 0 if bounds is None else sum(not bounds[0] <= value <= bounds[1] for value in values)


def _value_axis(status: StudyStatus, title: str) -> dict[str, Any]:
    bounds = value_range(status)
    return axis(title) | ({"range": bounds} if bounds else {})


def _brief(status: StudyStatus, trial: Trial, name: str) -> str:
    """Return the hover text of a trial in a figure of parameter `name`."""
    value = f"{plain(status.file.metric)} {number(trial.value)}"
    own = setting(trial.params[name]) if name in trial.params else "not used"
    return f"trial {trial.number} {trial.state}<br>{value}<br>{plain(name)} = {plain(own)}"


def _full(status: StudyStatus, trial: Trial) -> str:
    """Return the hover text of a trial with all its parameters."""
    head = f"<b>trial {trial.number}</b> {trial.state}"
    epoch = f" in epoch {trial.best_epoch}" if trial.best_epoch else ""
    value = f"{plain(status.file.metric)} {number(trial.value)}{epoch}"
    params = [f"{plain(name)} = {plain(setting(one))}" for name, one in trial.params.items()]
    reason = [plain(short(trial.reason, 100))] if trial.reason else []
    return "<br>".join([head, value, *params, *reason])


def _points(
    x: Sequence[Any], y: Sequence[float | None], text: Sequence[str], **trace: Any
) -> Trace:
    return {
        "type": "scatter", "mode": "markers", "x": list(x), "y": list(y), "text": list(text),
        "hovertemplate": "%{text}<extra></extra>", **trace,
    }  # fmt: skip


def optimization_history(status: StudyStatus) -> Figure | None:
    """Draw the objective of every trial and the best so far; trials without a value are marked at
    the bottom."""
    shown = [*measured_trials(status), *(t for t in status.trials if t.state in WITHOUT_VALUE)]
    if not shown:
        return None
    by_state = {state: [t for t in shown if t.state == state] for state in STATE_COLORS}
    traces = [_state_points(status, state, trials) for state, trials in by_state.items() if trials]
    return figure(
        [_best_so_far(status), *traces],
        height=400,
        xaxis=axis("trial", range=[-1, len(status.trials)]),
        yaxis=_value_axis(status, status.file.metric),
        # An axis of their own, so that they claim no value.
        yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
        hovermode="closest",
    )


def _best_so_far(status: StudyStatus) -> Trace:
    better: Callable[[float, float], float] = max if is_maximized(status) else min
    x: list[int] = []
    y: list[float] = []
    for trial in status.trials:
        if trial.state == "complete" and trial.value is not None:
            x.append(trial.number)
            y.append(better(y[-1], trial.value) if y else trial.value)
    return {
        "type": "scatter", "mode": "lines", "name": "best so far", "x": x, "y": y,
        "line": {"color": ORANGE, "width": 2, "shape": "hv"}, "hoverinfo": "skip",
    }  # fmt: skip


def _state_points(status: StudyStatus, state: str, trials: Sequence[Trial]) -> Trace:
    color = STATE_COLORS[state]
    marker = {"color": color, "size": 8, "symbol": SYMBOLS.get(state, "circle")}
    numbers, text = [t.number for t in trials], [_full(status, t) for t in trials]
    if state in WITHOUT_VALUE:
        low = [0.03 for _ in trials]
        return _points(numbers, low, text, yaxis="y2", name=state, marker=marker)
    return _points(numbers, [t.value for t in trials], text, name=state, marker=marker)


def intermediate_values(status: StudyStatus) -> Figure | None:
    """Draw the metric after each epoch of every trial; a cross marks where one was pruned."""
    best = status.best
    others = [t for t in status.trials if t.epochs and t is not best]
    traces = []
    for state in STATE_COLORS:
        trials = [t for t in others if t.state == state]
        if trials:
            traces.append(_lines(status, trials, state, STATE_COLORS[state]))
    pruned = [t for t in others if t.state == "pruned"]
    if pruned:
        traces.append(_pruned_bounds(status, pruned))
    if best is not None and best.epochs:
        traces.append(_lines(status, [best], f"best (trial {best.number})", ORANGE, width=3))
    if not traces:
        return None
    last = [value for t in status.trials if (value := _after(status, t)) is not None]
    bounds = focus(last, maximize=is_maximized(status))
    return figure(
        traces,
        height=420,
        xaxis=epoch_axis(max(len(t.epochs) for t in status.trials)),
        yaxis=axis(status.file.metric) | ({"range": bounds} if bounds else {}),
        hovermode="closest",
    )


def _after(status: StudyStatus, trial: Trial) -> float | None:
    """Return the metric after the last epoch of `trial`."""
    return finite(trial.epochs[-1].metrics.get(status.file.metric)) if trial.epochs else None


def _lines(
    status: StudyStatus, trials: Sequence[Trial], name: str, color: str, width: float = 1.2
) -> Trace:
    """Draw many curves as one trace with gaps: a trace for each would be slow."""
    x: list[int | None] = []
    y: list[float | None] = []
    text: list[str] = []
    for trial in trials:
        for row in trial.epochs:
            value = row.metrics.get(status.file.metric)
            x.append(row.epoch)
            y.append(finite(value))
            text.append(f"trial {trial.number} {trial.state}<br>epoch {row.epoch}: {number(value)}")
        x.append(None)
        y.append(None)
        text.append("")
    single = all(len(t.epochs) == 1 for t in trials)
    return {
        "type": "scatter", "mode": "markers" if single else "lines", "name": name,
        "x": x, "y": y, "text": text, "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": color, "width": width}, "marker": {"color": color},
        "opacity": 1.0 if width > 2 else 0.55,
    }  # fmt: skip


def _pruned_bounds(status: StudyStatus, trials: Sequence[Trial]) -> Trace:
    marker = {"color": GREY, "symbol": "x-thin-open", "size": 7}
    x, y = [t.epochs[-1].epoch for t in trials], [_after(status, t) for t in trials]
    text = [_full(status, t) for t in trials]
    return _points(x, y, text, name="pruned here", marker=marker)


def slice_plot(status: StudyStatus, name: str) -> Figure | None:
    """Draw the objective against one parameter, coloured by trial number, without the trials that
    did not use it."""
    trials = [t for t in measured_trials(status) if name in t.params]
    if not trials:
        return None
    parameter = status.file.space[name]
    places = [_place(parameter, t.params[name]) for t in trials]
    if isinstance(parameter, Choice):
        # Spread by trial number, so that points do not cover each other and pages stay the same.
        places = [x + JITTER * ((t.number * 0.618) % 1 - 0.5)
                  for x, t in zip(places, trials, strict=True)]  # fmt: skip
    text = [_brief(status, t, name) for t in trials]
    marker = {
        "color": [t.number for t in trials], "size": 8, "opacity": 0.9,
        "colorscale": [[i / (len(SCALE) - 1), color] for i, color in enumerate(SCALE)],
        "symbol": [SYMBOLS.get(t.state, "circle") for t in trials],
    }  # fmt: skip
    return figure(
        [_points(places, [t.value for t in trials], text, marker=marker)],
        height=280,
        xaxis=axis(name) | _parameter_axis(parameter),
        yaxis=_value_axis(status, status.file.metric),
        showlegend=False,
        hovermode="closest",
    )


def _place(parameter: Parameter, value: Any) -> float:
    """Return the position of `value` on its axis: the index of a choice."""
    if isinstance(parameter, Choice):
        return [canonical_json(one) for one in parameter.choices].index(canonical_json(value))
    return float(value)


def _parameter_axis(parameter: Parameter) -> dict[str, Any]:
    if isinstance(parameter, Choice):
        texts = [plain(short(setting(one))) for one in parameter.choices]
        places = list(range(len(texts)))
        return {"tickvals": places, "ticktext": texts, "range": [-0.5, len(texts) - 0.5]}
    assert isinstance(parameter, Float | Int)
    low, high = float(parameter.low), float(parameter.high)
    if parameter.log:
        low, high = math.log10(low), math.log10(high)
    pad = 0.04 * (high - low) or 0.5
    return {"range": [low - pad, high + pad]} | (_log_ticks(low, high) if parameter.log else {})


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    """Return ticks at powers of ten from 10**low to 10**high, with some between a few of them."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    parts = (1,) if high - low > 2.5 else (1, 2, 5)
    ticks = [part * 10.0**decade for decade in decades for part in parts]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:.4g}" for tick in ticks]}


def parallel_coordinate(status: StudyStatus) -> Figure | None:
    """Draw each complete trial as a line over its parameters, coloured by rank, the best on top."""
    ranked = status.ranked()
    if not ranked:
        return None
    names = list(status.file.space)
    groups: list[list[Trial]] = [[] for _ in SCALE]
    for rank, trial in enumerate(reversed(ranked)):
        groups[rank * len(SCALE) // len(ranked)].append(trial)
    low, high = _bounds([t.value for t in ranked if t.value is not None])
    traces = []
    for index, trials in enumerate(groups):
        heights = [
            [*(_height(status.file.space[name], t.params.get(name)) for name in names),
             ((t.value or 0.0) - low) / (high - low)]
            for t in trials
        ]  # fmt: skip
        traces.append(_parallel_lines(status, trials, heights, index))
    titles = [plain(name).replace(".", ".<br>") for name in [*names, status.file.metric]]
    scale = (number(low), number(high)) if len(ranked) > 1 else ("", "")
    return figure(
        traces,
        height=430,
        xaxis={"tickvals": list(range(len(titles))), "ticktext": titles, "side": "top",
               "range": [-0.35, len(titles) - 0.8], "fixedrange": True},
        yaxis={"visible": False, "range": [-0.2, 1.06], "fixedrange": True},
        annotations=[
            label for i, name in enumerate(names)
            for label in _axis_labels(i, status.file.space[name])
        ] + [_label(len(names), 0.0, scale[0], -9), _label(len(names), 1.0, scale[1], 9)],
        margin={"l": 16, "r": 60, "t": 50, "b": 8},
        showlegend=False,
        hovermode="closest",
    )  # fmt: skip


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _height(parameter: Parameter, value: Any) -> float:
    """Return 0 to 1 from the lowest to the highest value; below 0 if the parameter was not used."""
    if value is None:
        return -0.14
    if isinstance(parameter, Choice):
        return (_place(parameter, value) + 0.5) / len(parameter.choices)
    assert isinstance(parameter, Float | Int)
    low, high, place = float(parameter.low), float(parameter.high), float(value)
    if parameter.log:
        low, high, place = math.log(low), math.log(high), math.log(place)
    return (place - low) / (high - low) if low < high else 0.5


def _parallel_lines(
    status: StudyStatus, trials: Sequence[Trial], heights: Sequence[list[float]], index: int
) -> Trace:
    x: list[int | None] = []
    y: list[float | None] = []
    text: list[str] = []
    for trial, row in zip(trials, heights, strict=True):
        x += [*range(len(row)), None]
        y += [*row, None]
        text += [_brief(status, trial, name) for name in status.file.space]
        text += [f"trial {trial.number}<br>{plain(status.file.metric)} {number(trial.value)}", ""]
    return {
        "type": "scatter", "mode": "lines+markers", "x": x, "y": y, "text": text,
        "hovertemplate": "%{text}<extra></extra>", "opacity": 0.35 + 0.13 * index,
        "line": {"color": SCALE[index], "width": 1 + 0.3 * index},
        "marker": {"color": SCALE[index], "size": 4},
    }  # fmt: skip


def _axis_labels(index: int, parameter: Parameter) -> list[dict[str, Any]]:
    if isinstance(parameter, Choice):
        labels = [
            _label(index, _height(parameter, one), short(setting(one), 14), 0)
            for one in parameter.choices
        ]
    else:
        assert isinstance(parameter, Float | Int)
        labels = [_label(index, 0.0, setting(parameter.low), -9),
                  _label(index, 1.0, setting(parameter.high), 9)]  # fmt: skip
    return labels + ([_label(index, -0.14, "not used", 0)] if parameter.when else [])


def _label(x: float, y: float, text: str, shift: int) -> dict[str, Any]:
    return {
        "x": x, "y": y, "text": plain(text), "showarrow": False, "xanchor": "left", "xshift": 5,
        "yshift": shift, "font": {"size": 11},
    }  # fmt: skip
