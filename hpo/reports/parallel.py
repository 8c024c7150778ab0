"""Parallel coordinates: each complete trial is a line over its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hpo.config.parameters import Choice, Float, Int, Parameter
from hpo.formatting import number, setting
from hpo.reports.figures import GREY, SCALE, Figure, Trace, figure, plain, short, tick
from hpo.reports.study_figures import best_in_words, place_of
from hpo.search.status import StudyStatus
from hpo.storage.records import Trial

BRIGHT = 0.1
"""Share of the complete trials, the best, that are in colour at first."""
FEWEST_BRIGHT = 3
MOST_AXES = 10
"""Parameters that are drawn."""


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
    titles = _titles([*names, status.file.metric])
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


def _titles(names: Sequence[str]) -> list[str]:
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
