"""Figures as plain data, {"data": [traces], "layout": {...}, "alt": text}, for plotly.js.

What is shown is computed here; fonts, grids and the page's light or dark colours are added where it
is drawn. Text goes through `plain`, since plotly reads some HTML in it. Everything is drawn as SVG:
what plotly draws with WebGL is missing on many a remote desktop.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.reports.importance import Importances

Figure = dict[str, Any]
Trace = dict[str, Any]
Epochs = Sequence[Mapping[str, Any]]
"""Epochs in order, each {"epoch": number from 1, metric: value, ...}."""

BLUE, GREY, GREEN, PURPLE, ORANGE = "#3b7dd8", "#9aa3af", "#2a9d6f", "#8b6fc0", "#e0653a"
AMBER, RED, TEAL, PALE, SKY = "#d9a02b", "#d64545", "#2f9fb0", "#c9ced6", "#6fb5e8"
SCALE = ("#8aa9cf", "#6f86c4", PURPLE, "#b8659a", ORANGE)
"""From low to high, readable on a light and on a dark ground."""
SERIES_COLORS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, RED, TEAL, GREY)
"""Of what is told apart in a figure, in turn."""
METRIC_COLORS = {
    "train_loss": GREY,
    "val_loss": BLUE,
    "train_top1": GREY,
    "val_top1": BLUE,
    "val_top5": GREEN,
    "val_macro_f1": ORANGE,
    "val_precision_at_5": GREEN,
    "val_precision_at_k": ORANGE,
    "lr": PURPLE,
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
LARGEST_MATRIX = 100
"""Most classes of a confusion matrix that is drawn."""
COUNTED_MATRIX = 20
"""Most classes of one whose cells show their counts."""


def plain(text: Any) -> str:
    """Escape `text` for plotly, which reads HTML. Quotes stay: plotly knows no entity for them."""
    return html.escape(str(text), quote=False)


def short(text: str, most: int = 22) -> str:
    """Cut `text` to `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def figure(traces: Sequence[Trace], *, alt: str, height: int, **layout: Any) -> Figure:
    """Return a figure; `alt` says what it shows to those who do not see it, `height` is in
    pixels."""
    return {"data": list(traces), "layout": {"height": height, **layout}, "alt": alt}


def axis(title: str, **options: Any) -> dict[str, Any]:
    """Return the layout of an axis."""
    return {"title": {"text": plain(title)}, **options}


def finite(value: Any) -> float | None:
    """Return `value` if it is a finite number, else None, which is drawn as a gap."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def rounded(value: float | None) -> float | None:
    """Return a number with six digits, more than a figure shows: pages stay small."""
    return None if value is None else float(f"{value:.6g}")


def tick(value: float) -> str:
    """Return a number for an axis: 0.02, 64, 1e-4."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    digits, _, exponent = f"{value:.3e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def epoch_axis(most: int) -> dict[str, Any]:
    """Return an axis of `most` epochs; few of them get whole ticks only."""
    return axis("epoch", dtick=1) if most <= 6 else axis("epoch")


def curves(
    series: Mapping[str, Epochs],
    metrics: Sequence[str],
    *,
    mark: int | None = None,
) -> Figure | None:
    """Draw metrics by epoch: a colour for each metric, a dash for each of `series` ({label:
    epochs}). `mark` is an epoch to point out. Return None if no metric was recorded."""
    traces = [
        _curve(epochs, metric, label if len(series) > 1 else "", index)
        for metric in metrics
        for index, (label, epochs) in enumerate(series.items())
        if any(finite(row.get(metric)) is not None for row in epochs)
    ]
    if not traces:
        return None
    most = max(len(epochs) for epochs in series.values())
    line = {"type": "line", "x0": mark, "x1": mark, "yref": "paper", "y0": 0, "y1": 1,
            "line": {"color": ORANGE, "width": 1, "dash": "dot"}}  # fmt: skip
    return figure(
        traces,
        alt=_ends(series, metrics),
        height=300,
        xaxis=epoch_axis(most),
        shapes=[line] if mark is not None else [],
        showlegend=len(metrics) > 1,  # it tells, too, which of them were recorded
        hovermode="x unified",
    )


def _ends(series: Mapping[str, Epochs], metrics: Sequence[str]) -> str:
    """Return where the curves begin and end, in words."""
    told = []
    for metric in metrics:
        for label, epochs in series.items():
            values = [v for row in epochs if (v := finite(row.get(metric))) is not None]
            if values:
                name = f"{metric} of {label}" if len(series) > 1 else metric
                told.append(f"{name} from {values[0]:.4g} to {values[-1]:.4g}")
    return f"By epoch: {', '.join(told)}."


def _curve(epochs: Epochs, metric: str, label: str, index: int) -> Trace:
    """Draw the `index`-th series; the legend names each metric once."""
    name = f"{metric}, {label}" if label else metric
    return {
        "type": "scatter", "mode": "lines" if len(epochs) > 1 else "markers", "name": plain(metric),
        "legendgroup": plain(metric), "showlegend": index == 0,
        "x": [row["epoch"] for row in epochs], "y": [finite(row.get(metric)) for row in epochs],
        "line": {"color": METRIC_COLORS.get(metric, BLUE), "width": 2,
                 "dash": DASHES[index % len(DASHES)]},
        "hovertemplate": f"{plain(name)}: %{{y:.4g}}<extra></extra>",
    }  # fmt: skip


def importance(found: Importances) -> Figure | None:
    """Draw a bar for each parameter, the most important one on top, pale where chance gives as
    much. Return None without importances."""
    if not found.shares:
        return None
    rows = sorted(found.shares.items(), key=lambda item: item[1])
    notes = [f" ({note})" if (note := found.note(name)) else "" for name, _ in rows]
    bars = {
        "type": "bar", "orientation": "h",
        "y": [plain(name) for name, _ in rows], "x": [share for _, share in rows],
        "text": [_percent(share) + note for (_, share), note in zip(rows, notes, strict=True)],
        "textposition": "outside", "cliponaxis": False,
        "marker": {"color": [BLUE if name in found.outstanding else PALE for name, _ in rows]},
        "hovertemplate": "%{y}: %{x:.1%}",
    }  # fmt: skip
    told = ", ".join(f"{name} {share:.0%}" for name, share in found.shares.items())
    return figure(
        [bars],
        alt=f"Parameter importance: {told}.",
        height=20 + 30 * len(rows),
        margin={"l": 48, "r": 16, "t": 4, "b": 8},
        xaxis={"visible": False, "range": [0, 1.5 * max(share for _, share in rows)]},
        yaxis={"automargin": True, "showgrid": False},
        bargap=0.4,
        showlegend=False,
        hovermode="closest",
    )


def _percent(share: float) -> str:
    return " &lt;1%" if 0 < share < 0.01 else f" {share:.0%}"


def confusion(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Figure | None:
    """Draw a confusion matrix of (C, C) counts, rows actual, columns predicted; colours are shares
    of the row. Return None without counts, and for more than LARGEST_MATRIX classes."""
    if not counts or len(classes) > LARGEST_MATRIX:
        return None
    names = [plain(name) for name in classes]
    places = list(range(len(names)))
    texts = [plain(short(name, 16)) for name in classes]
    ticks = {"tickvals": places, "ticktext": texts, "showgrid": False, "zeroline": False}
    cells = {
        "type": "heatmap", "z": [_shares(row) for row in counts], "zmin": 0, "zmax": 1,
        "colorscale": [[0, "rgba(59,125,216,0.04)"], [1, BLUE]], "showscale": False,
        "xgap": 1, "ygap": 1, "hoverongaps": False,
        "text": [
            [_cell_text(names, i, j, row) for j in places] for i, row in enumerate(counts)
        ],
        "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip
    right = sum(row[i] for i, row in enumerate(counts))
    return figure(
        [cells],
        alt=f"Confusion matrix: {right:,} of {sum(map(sum, counts)):,} images are on the diagonal.",
        height=160 + max(180, min(34 * len(names), 880)),
        xaxis=axis("predicted", automargin=True, **ticks),
        yaxis=axis("actual", automargin=True, autorange="reversed", **ticks),
        annotations=_counts(counts) if len(names) <= COUNTED_MATRIX else [],
        hovermode="closest",
    )


def _shares(row: Sequence[int]) -> list[float]:
    total = sum(row)
    return [count / total if total else 0.0 for count in row]


def _cell_text(names: Sequence[str], i: int, j: int, row: Sequence[int]) -> str:
    share = _shares(row)[j]
    return f"{names[i]} predicted as {names[j]}<br>{row[j]:,} of {sum(row):,} ({share:.1%})"


def _counts(counts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Return the counts that are not zero as text on the cells."""
    return [
        {
            "x": j, "y": i, "text": f"{count:,}", "showarrow": False,
            "bgcolor": "rgba(0,0,0,0)",
            "font": {"size": 11} | ({"color": "#ffffff"} if _shares(row)[j] > 0.5 else {}),
        }
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        if count
    ]  # fmt: skip


BINS = 30
LOG_FROM = 30.0
"""An axis whose ends lie further apart than this factor is logarithmic."""


def cost_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """Return an axis for costs, logarithmic where `values` span orders of magnitude."""
    wide = min(values) > 0 and max(values) > LOG_FROM * min(values)
    return axis(title, tickformat=".3~s") | ({"type": "log", "dtick": 1} if wide else {})


def distributions(found: Mapping[str, Any] | None) -> dict[str, Figure | None]:
    """Draw histograms over the queries of neighbours.json; {} without it."""
    if found is None:
        return {}
    return {
        "precision": _precision(found["precision_at_5"]),
        "distance": _distance(found["mean_distance"], found["right"]),
    }


def _precision(values: Sequence[float]) -> Figure:
    places = sorted(set(values))
    bars = {
        "type": "bar", "x": places, "y": [values.count(place) for place in places],
        "width": 0.12, "marker": {"color": BLUE},
        "hovertemplate": "precision@5 %{x:.2f}: %{y:,} queries<extra></extra>",
    }  # fmt: skip
    return figure(
        [bars],
        alt=f"Precision@5 of {len(values):,} queries, {sum(values) / len(values):.3f} on average.",
        height=280,
        xaxis=axis("precision@5", range=[-0.1, 1.1], tickvals=[i / 5 for i in range(6)]),
        yaxis=axis("queries"),
        showlegend=False,
    )


def _distance(values: Sequence[float], right: Sequence[bool]) -> Figure:
    """Draw right and wrong votes in the same bins."""
    low, high = min(values), max(values)
    width = (high - low) / BINS or 1.0

    def counted(wanted: bool, name: str, color: str) -> Trace:
        counts = [0] * BINS
        for value, good in zip(values, right, strict=True):
            if good == wanted:
                counts[min(BINS - 1, int((value - low) / width))] += 1
        centres = [low + (i + 0.5) * width for i in range(BINS)]
        return {
            "type": "bar", "name": name, "x": centres, "y": counts, "width": width,
            "marker": {"color": color}, "opacity": 0.6,
            "hovertemplate": f"%{{x:.4g}}: %{{y:,}} {name}<extra></extra>",
        }  # fmt: skip

    traces = [counted(True, "right by vote", BLUE), counted(False, "wrong by vote", ORANGE)]
    told = f"{sum(right):,} are right by vote, {len(right) - sum(right):,} wrong"
    return figure(
        traces,
        alt=f"Mean distance to the neighbours of {len(values):,} queries: {told}.",
        height=280,
        barmode="overlay",
        xaxis=axis("mean distance to the k nearest"),
        yaxis=axis("queries"),
    )
