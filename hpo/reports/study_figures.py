"""Figures of a study: history, intermediate values, slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from hpo.config.parameters import Choice, Float, Int, Parameter, canonical_json
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
    rounded,
    short,
    tick,
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
HOVER = "trial %{{customdata}}<br>{}%{{y:.4~g}}<extra></extra>"
"""Of a point that knows its trial's number."""
BAND = "rgba(128,140,158,0.10)"
"""Ground of every other choice in a slice: points spread within their column."""
MOST_TOLD = 300
"""Trials of a study whose history shows the parameters of each under the mouse."""
MOST_POINTS = 15_000
"""Of the curves of all trials: a page of a large study stays small, its figures readable."""


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
