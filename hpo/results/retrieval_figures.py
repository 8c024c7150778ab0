"""Figures of an image retrieval: how precise its queries are, and how far their neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpo.results.figures import BLUE, ORANGE, Figure, Trace, axis, figure

BINS = 30


def distributions(found: Mapping[str, Any] | None) -> dict[str, Figure | None]:
    """Histograms over the queries of what `hpo.results.retrieval.keep_examples` wrote; nothing
    without it."""
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
        height=280,
        xaxis=axis("precision@5", range=[-0.1, 1.1], tickvals=[i / 5 for i in range(6)]),
        yaxis=axis("queries"),
        showlegend=False,
    )


def _distance(values: Sequence[float], right: Sequence[bool]) -> Figure:
    """Right and wrong votes apart, in the same bins."""
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
    return figure(
        traces,
        height=280,
        barmode="overlay",
        xaxis=axis("mean distance to the k nearest"),
        yaxis=axis("queries"),
    )
