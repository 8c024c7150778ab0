"""Figures of a study: history, curves, slices, parallel coordinates, workers, time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from hpo.config.parameters import Choice, Float, Int, Parameter, canonical_json
from hpo.formatting import duration, number, setting
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
    SERIES_COLORS,
    SKY,
    TEAL,
    Figure,
    Trace,
    axis,
    epoch_axis,
    figure,
    finite,
    plain,
    rounded,
    short,
    tick,
)
from hpo.search.status import StudyStatus, words_of
from hpo.storage.records import WORTHLESS, Attempt, Trial

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
HOVER = "trial %{{customdata}}<br>{}%{{y:.4~g}}<extra></extra>"
"""Of a point that knows its trial's number."""
BAND = "rgba(128,140,158,0.10)"
"""Ground of every other choice in a slice: points spread within their column."""
MOST_TOLD = 300
"""Trials of a study whose history shows the parameters of each under the mouse."""
MOST_POINTS = 15_000
"""Of the curves of all trials: a page of a large study stays small, its figures readable."""
BRIGHT = 0.1
"""Share of the complete trials, the best, that parallel coordinates have in colour at first."""
FEWEST_BRIGHT = 3
MOST_AXES = 10
"""Parameters in parallel coordinates."""
ARCHITECTURE = "model.architecture"
MOST_BARS = 2_000
"""The last attempts that the timeline draws."""


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


def _full(status: StudyStatus, trial: Trial) -> str:
    """Return the hover text of a trial: with its parameters, unless there are many trials."""
    head = f"<b>trial {trial.number}</b> {trial.state}"
    epoch = f" in epoch {trial.best_epoch}" if trial.best_epoch else ""
    value = f"{plain(status.file.metric)} {number(trial.value)}{epoch}"
    few = len(status.trials) <= MOST_TOLD  # else the page would be large
    params = [f"{plain(name)} = {plain(setting(one))}" for name, one in trial.params.items() if few]
    reason = [plain(short(trial.reason, 100))] if trial.reason else []
    return "<br>".join([head, value, *params, *reason])


def _points(
    x: Sequence[Any], y: Sequence[float | None], text: Sequence[str], **trace: Any
) -> Trace:
    return {
        "type": "scatter", "mode": "markers", "x": list(x), "y": [rounded(one) for one in y],
        "text": list(text), "hovertemplate": "%{text}<extra></extra>", **trace,
    }  # fmt: skip


def best_in_words(status: StudyStatus) -> str:
    """Return which trial is the best, as the end of a sentence."""
    best = status.best
    return (
        "no trial is complete"
        if best is None
        else f"the best is trial {best.number} with {number(best.value)}"
    )


def optimization_history(status: StudyStatus) -> Figure | None:
    """Draw the objective of every trial and the best so far; trials without a value are marked at
    the bottom."""
    shown = [*measured_trials(status), *(t for t in status.trials if t.state in WITHOUT_VALUE)]
    if not shown:
        return None
    by_state = {state: [t for t in shown if t.state == state] for state in STATE_COLORS}
    counts = ", ".join(f"{len(trials)} {state}" for state, trials in by_state.items() if trials)
    traces = [_state_points(status, state, trials) for state, trials in by_state.items() if trials]
    return figure(
        [_best_so_far(status), *traces],
        alt=f"{status.file.metric} of the trials in their order, {counts}: "
        f"{best_in_words(status)}.",
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
    y = [float(f"{value:.6g}") for value in y]
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
    """Draw the metric after each epoch of every trial, or of `drawn_curves`; a cross marks where
    one was pruned."""
    best = status.best
    others = [t for t in drawn_curves(status) if t is not best]
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
        alt=f"{status.file.metric} after each epoch of {len(drawn_curves(status))} trials, "
        f"{len(pruned)} of them pruned: {best_in_words(status)}.",
        height=420,
        xaxis=epoch_axis(max(len(t.epochs) for t in status.trials)),
        yaxis=axis(status.file.metric) | ({"range": bounds} if bounds else {}),
        hovermode="closest",
    )


def drawn_curves(status: StudyStatus) -> list[Trial]:
    """Return the trials whose curves are drawn: all with an epoch; of too many the best complete
    ones and an even selection of the others."""
    trials = [t for t in status.trials if t.epochs]
    points = sum(len(t.epochs) for t in trials)
    if points <= MOST_POINTS:
        return trials
    most = max(2, len(trials) * MOST_POINTS // points)
    best = {t.number for t in status.ranked()[: most // 2]}
    others = [t.number for t in trials if t.number not in best]
    some = {others[i * len(others) // (most // 2)] for i in range(most // 2)} if others else set()
    return [t for t in trials if t.number in best | some]


def _after(status: StudyStatus, trial: Trial) -> float | None:
    """Return the metric after the last epoch of `trial`."""
    return finite(trial.epochs[-1].metrics.get(status.file.metric)) if trial.epochs else None


def _lines(
    status: StudyStatus, trials: Sequence[Trial], name: str, color: str, width: float = 1.2
) -> Trace:
    """Draw many curves as one trace with gaps: a trace for each would be slow."""
    x: list[int | None] = []
    y: list[float | None] = []
    numbers: list[int] = []
    for trial in trials:
        values = [finite(row.metrics.get(status.file.metric)) for row in trial.epochs]
        x += [*(row.epoch for row in trial.epochs), None]
        y += [*map(rounded, values), None]
        numbers += [trial.number] * (len(values) + 1)
    single = all(len(t.epochs) == 1 for t in trials)
    return {
        "type": "scatter", "mode": "markers" if single else "lines", "name": name,
        "x": x, "y": y, "customdata": numbers, "hovertemplate": HOVER.format("epoch %{x}: "),
        "line": {"color": color, "width": width}, "marker": {"color": color},
        "opacity": 1.0 if width > 2 else 0.55,
    }  # fmt: skip


def _pruned_bounds(status: StudyStatus, trials: Sequence[Trial]) -> Trace:
    marker = {"color": GREY, "symbol": "x-thin-open", "size": 7}
    x, y = [t.epochs[-1].epoch for t in trials], [_after(status, t) for t in trials]
    numbers = [t.number for t in trials]
    return _points(x, y, [], name="pruned here", marker=marker, customdata=numbers,
                   hovertemplate=HOVER.format("epoch %{x}: "))  # fmt: skip


def slice_plot(status: StudyStatus, name: str) -> Figure | None:
    """Draw the objective against one parameter, coloured by trial number, without the trials that
    did not use it."""
    trials = [t for t in measured_trials(status) if name in t.params]
    if not trials:
        return None
    parameter = status.file.space[name]
    places = [place_of(parameter, t.params[name]) for t in trials]
    if isinstance(parameter, Choice):
        # Spread by trial number, so that points do not cover each other and pages stay the same.
        places = [x + JITTER * ((t.number * 0.618) % 1 - 0.5)
                  for x, t in zip(places, trials, strict=True)]  # fmt: skip
    numbers = [t.number for t in trials]
    own = "" if isinstance(parameter, Choice) else f"{plain(name)} = %{{x:.4~g}}<br>"
    marker = {
        "color": numbers, "size": 8 if len(trials) < 200 else 6, "opacity": 0.9,
        "colorscale": [[i / (len(SCALE) - 1), color] for i, color in enumerate(SCALE)],
        "symbol": [SYMBOLS.get(t.state, "circle") for t in trials],
    }  # fmt: skip
    hover = HOVER.format(f"{own}{plain(status.file.metric)} ")
    values = [t.value for t in trials]
    return figure(
        [
            _points(
                [rounded(x) for x in places],
                values,
                [],
                marker=marker,
                customdata=numbers,
                hovertemplate=hover,
            )
        ],
        alt=_slice_in_words(status, name, trials),
        height=280,
        xaxis=axis(name) | _parameter_axis(parameter),
        yaxis=_value_axis(status, status.file.metric),
        shapes=_bands(parameter),
        showlegend=False,
        hovermode="closest",
    )


def _slice_in_words(status: StudyStatus, name: str, trials: Sequence[Trial]) -> str:
    best = status.best
    own = best is not None and name in best.params
    chosen = f": the best one has {setting(best.params[name])}" if best and own else ""
    return f"{status.file.metric} against {name} of {len(trials)} trials{chosen}."


def _bands(parameter: Parameter) -> list[dict[str, Any]]:
    """Return a ground for every other choice: a point stands for the choice of its column."""
    if not isinstance(parameter, Choice):
        return []
    return [
        {"type": "rect", "layer": "below", "line": {"width": 0}, "fillcolor": BAND, "yref": "paper",
         "x0": place - 0.5, "x1": place + 0.5, "y0": 0, "y1": 1}
        for place in range(0, len(parameter.choices), 2)
    ]  # fmt: skip


def place_of(parameter: Parameter, value: Any) -> float:
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
    return {"type": "log", "tickvals": ticks, "ticktext": [tick(one) for one in ticks]}


def parallel_axes(status: StudyStatus, shares: Mapping[str, float]) -> list[str]:
    """Return the parameters of the parallel coordinates in the order of the space: all, or of too
    many the most important ones by `shares`, the first ones without."""
    names = list(status.file.space)
    chosen = set(sorted(names, key=lambda name: -shares.get(name, 0.0))[:MOST_AXES])
    return [name for name in names if name in chosen]


def parallel_coordinate(status: StudyStatus, names: Sequence[str]) -> Figure | None:
    """Draw each complete trial as a line over the parameters `names`, pale; in colour by rank the
    best tenth, or those that are brushed."""
    ranked = status.ranked()
    if not ranked:
        return None
    bright = ranked[: max(FEWEST_BRIGHT, math.ceil(BRIGHT * len(ranked)))]
    groups: list[list[Trial]] = [[] for _ in SCALE]
    for rank, trial in enumerate(bright):
        groups[-1 - rank * len(SCALE) // len(bright)].append(trial)
    bounds = _bounds([t.value for t in ranked if t.value is not None])
    pale = _parallel_lines(status, names, ranked, bounds, width=1, color=GREY)
    traces = [
        _parallel_lines(status, names, trials, bounds, width=1.2 + 0.3 * i, color=SCALE[i])
        for i, trials in enumerate(groups)
        if trials
    ]
    titles = _axis_titles([*names, status.file.metric])
    scale = [number(one) if len(ranked) > 1 else "" for one in bounds]
    return figure(
        [pale | {"opacity": 0.3 if len(ranked) < 200 else 0.12}, *traces],
        alt=f"Parameters of the best {len(bright)} of {len(ranked)} complete trials, "
        f"{best_in_words(status)}: "
        + ", ".join(f"{name} = {setting(ranked[0].params[name])}" for name in names
                    if name in ranked[0].params) + ".",
        height=430,
        xaxis={"tickvals": list(range(len(titles))), "ticktext": titles, "side": "top",
               "range": [-0.3, len(titles) - 0.45], "tickangle": 0},
        yaxis={"visible": False, "range": [-0.2, 1.06]},
        annotations=[
            label for i, name in enumerate(names)
            for label in _axis_labels(i, status.file.space[name])
        ] + [_label(len(names), 0.0, scale[0], -9), _label(len(names), 1.0, scale[1], 9)],
        margin={"l": 16, "r": 16, "t": 50, "b": 8},
        showlegend=False,
        hovermode="closest",
    ) | {"brush": True}  # fmt: skip


def _axis_titles(names: Sequence[str]) -> list[str]:
    """Return the last part of each name on a line of its own, so that axes may be close."""
    parts = [name.rpartition(".") for name in names]
    return [
        plain(short(f"{head}.", 14)) + f"<br>{plain(last)}" if head else plain(last)
        for head, _, last in parts
    ]


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _height(parameter: Parameter, value: Any) -> float:
    """Return 0 to 1 from the lowest to the highest value; below 0 if the parameter was not used."""
    if value is None:
        return -0.14
    if isinstance(parameter, Choice):
        return (place_of(parameter, value) + 0.5) / len(parameter.choices)
    assert isinstance(parameter, Float | Int)
    low, high, place = float(parameter.low), float(parameter.high), float(value)
    if parameter.log:
        low, high, place = math.log(low), math.log(high), math.log(place)
    return (place - low) / (high - low) if low < high else 0.5


def _parallel_lines(
    status: StudyStatus,
    names: Sequence[str],
    trials: Sequence[Trial],
    bounds: tuple[float, float],
    **line: Any,
) -> Trace:
    low, high = bounds
    y: list[float | None] = []
    numbers: list[int] = []
    for trial in trials:
        heights = [_height(status.file.space[name], trial.params.get(name)) for name in names]
        row = [*heights, ((trial.value or 0.0) - low) / (high - low)]
        y += [*(round(height, 3) for height in row), None]
        numbers += [trial.number] * (len(row) + 1)
    return {
        "type": "scatter", "mode": "lines", "y": y, "line": line,
        "x": [*range(len(names) + 1), None] * len(trials), "customdata": numbers,
        "hovertemplate": "trial %{customdata}<extra></extra>",
    }  # fmt: skip


def _axis_labels(index: int, parameter: Parameter) -> list[dict[str, Any]]:
    if isinstance(parameter, Choice):
        labels = [
            _label(index, _height(parameter, one), short(setting(one), 14), 0)
            for one in parameter.choices
        ]
    else:
        assert isinstance(parameter, Float | Int)
        labels = [_label(index, 0.0, tick(parameter.low), -9),
                  _label(index, 1.0, tick(parameter.high), 9)]  # fmt: skip
    return labels + ([_label(index, -0.14, "not used", 0)] if parameter.when else [])


def _label(x: float, y: float, text: str, shift: int) -> dict[str, Any]:
    return {
        "x": x, "y": y, "text": plain(text), "showarrow": False, "xanchor": "left", "xshift": 5,
        "yshift": shift, "font": {"size": 11},
    }  # fmt: skip


def worker_timeline(status: StudyStatus) -> Figure | None:
    """Draw each attempt as a bar in its worker's row, from its start to its end, in the colour of
    its trial's state. Return None without any."""
    attempts = sorted(
        ((attempt, trial) for trial in status.trials for attempt in trial.attempts),
        key=lambda pair: pair[0].started,
    )[-MOST_BARS:]
    if not attempts:
        return None
    workers = list(dict.fromkeys(attempt.worker for attempt, _ in attempts))
    names = [plain(name) for name in workers]
    traces = [
        _bars(status, state, [pair for pair in attempts if pair[1].state == state])
        for state in STATE_COLORS
        if any(trial.state == state for _, trial in attempts)
    ]
    return figure(
        traces,
        alt=f"{len(attempts)} attempts of {len(workers)} workers over time.",
        height=max(200, 60 + 28 * len(workers)),
        barmode="overlay",
        xaxis={"type": "date"},
        yaxis={"categoryorder": "array", "categoryarray": names, "automargin": True},
        hovermode="closest",
    )


def _bars(status: StudyStatus, state: str, pairs: list[tuple[Attempt, Trial]]) -> Trace:
    ends = [status.end_of(attempt) for attempt, _ in pairs]
    return {
        "type": "bar", "orientation": "h", "name": state, "marker": {"color": STATE_COLORS[state]},
        "y": [plain(attempt.worker) for attempt, _ in pairs],
        "base": [_moment(attempt.started) for attempt, _ in pairs],
        "x": [1000 * (end - one.started) for end, (one, _) in zip(ends, pairs, strict=True)],
        "text": [_attempt_in_words(status, attempt, trial) for attempt, trial in pairs],
        "textposition": "none", "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def _attempt_in_words(status: StudyStatus, attempt: Attempt, trial: Trial) -> str:
    took = duration(status.end_of(attempt) - attempt.started)
    return f"trial {trial.number}, {words_of(attempt)}, {took}"


def value_against_time(status: StudyStatus) -> Figure | None:
    """Draw the best value of each trial against its training time for an epoch, architectures in
    their colours where several are searched. Return None without a value."""
    trials = [one for one in measured_trials(status) if one.value is not None and one.seconds]
    if not trials:
        return None
    groups: dict[str, list[Trial]] = {}
    for one in trials:
        groups.setdefault(str(one.params.get(ARCHITECTURE, "trials")), []).append(one)
    traces = [
        {
            "type": "scatter", "mode": "markers", "name": plain(name),
            "x": [one.seconds / len(one.epochs) for one in found],
            "y": [one.value for one in found],
            "text": [f"trial {one.number}, {one.state}: {number(one.value)}" for one in found],
            "hovertemplate": "%{text}, %{x:.3g} s an epoch<extra></extra>",
            "marker": {"color": SERIES_COLORS[place % len(SERIES_COLORS)], "size": 8},
        }
        for place, (name, found) in enumerate(groups.items())
    ]  # fmt: skip
    return figure(
        traces,
        alt=f"{status.file.metric} of {len(trials)} trials against their seconds an epoch.",
        height=360,
        xaxis=axis("seconds an epoch", type="log"),
        yaxis=axis(status.file.metric),
        hovermode="closest",
    )
