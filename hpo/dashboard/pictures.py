"""Pictures of a trial as SVG: its curves, and, of one whose predictions are kept, its confusion
matrix and its worst mistakes."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import escape

from hpo.errors import DataError
from hpo.formatting import printable
from hpo.paths import Home
from hpo.reports.figures import LARGEST_MATRIX, short
from hpo.search import predictions
from hpo.search.predictions import Mistake, Predictions
from hpo.search.status import StudyStatus
from hpo.storage.database import Database
from hpo.storage.records import Trial

COLORS = ("#3b7dd8", "#d9772b", "#2a9d6f", "#8b6fc0", "#d64545")
CURVES = ("train_loss", "val_loss", "train_top1", "val_top1", "val_macro_f1")
CELL = 26
TILE, TILES = 150, 4

Picture = Callable[[Database, StudyStatus, Trial], str | None]


def curves(database: Database, status: StudyStatus, trial: Trial) -> str | None:
    """Draw loss and accuracy after each epoch; None without two epochs."""
    if len(trial.epochs) < 2:
        return None
    names = [name for name in dict.fromkeys((*CURVES, status.file.metric))
             if any(name in row.metrics for row in trial.epochs)]  # fmt: skip
    losses = [name for name in names if name.endswith("loss")]
    shares = [name for name in names if name not in losses]
    parts = [_panel(trial, group, 10 + 430 * place) for place, group in enumerate((losses, shares))]
    return _svg(860, 250, f"curves of trial {trial.number}", parts)


def _panel(trial: Trial, names: Sequence[str], left: int) -> str:
    values = [row.metrics.get(name, math.nan) for row in trial.epochs for name in names]
    known = [value for value in values if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    last = max(1, trial.epochs[-1].epoch - 1)

    def at(epoch: int, value: float) -> str:
        share = (value - low) / ((high - low) or 1.0)
        return f"{left + 50 + 350 * (epoch - 1) / last:.1f},{195 - 150 * share:.1f}"

    lines = []
    for place, name in enumerate(names):
        rows = [(row.epoch, row.metrics.get(name, math.nan)) for row in trial.epochs]
        points = " ".join(at(epoch, value) for epoch, value in rows if math.isfinite(value))
        color = COLORS[place % len(COLORS)]
        lines.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
        lines.append(_text(left + 50 + 125 * place, 22, name, fill=color))
    ticks = (_text(left + 44, y, f"{value:.3g}", end=True) for y, value in ((199, low), (49, high)))
    ends = (_text(left + 50, 220, "1"), _text(left + 400, 220, str(last + 1), end=True))
    frame = f'<path d="M{left + 50} 45V195H{left + 400}" fill="none" stroke="#98a4b3"/>'
    return "".join((frame, *lines, *ticks, *ends, _text(left + 200, 240, "epoch")))


def confusion(database: Database, status: StudyStatus, trial: Trial) -> str | None:
    """Draw the confusion matrix on the validation images; None where no predictions are kept, or
    there are too many classes."""
    found = _predictions(database, status, trial)
    if found is None or len(found.classes) > LARGEST_MATRIX:
        return None
    margin = 34 + 6 * min(15, max(map(len, found.classes)))
    size = margin + CELL * len(found.classes)
    parts = [_text(margin, 14, "predicted (columns), actual (rows)")]
    for row, (name, counts) in enumerate(zip(found.classes, found.confusion, strict=True)):
        y = margin + CELL * row
        parts.append(_text(margin - 6, y + 17, short(name, 15), end=True))
        x = margin + CELL * row
        turned = f' transform="rotate(-90 {x + 17} {margin - 6})"'
        parts.append(_text(x + 17, margin - 6, short(name, 12), more=turned))
        for column, count in enumerate(counts):
            parts.append(_cell(margin + CELL * column, y, count, sum(counts), right=row == column))
    return _svg(size + 10, size + 10, f"confusion matrix of trial {trial.number}", parts)


def _cell(x: int, y: int, count: int, total: int, *, right: bool) -> str:
    share = count / total if total else 0.0
    color = "#2a9d6f" if right else "#d64545"
    box = (
        f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{color}" '
        f'fill-opacity="{0.04 + 0.8 * share:.2f}"/>'
    )
    return box + (_text(x + CELL / 2, y + 17, str(count), middle=True) if count else "")


def mistakes(database: Database, status: StudyStatus, trial: Trial) -> str | None:
    """Draw the worst mistakes on the validation images; None where there are none, or no
    predictions are kept."""
    found = _predictions(database, status, trial)
    worst = found.worst() if found else []
    if not worst:
        return None
    rows = -(-len(worst) // TILES)
    parts = [_tile(one, place % TILES * TILE, place // TILES * TILE)
             for place, one in enumerate(worst)]  # fmt: skip
    return _svg(TILES * TILE, rows * TILE, f"worst mistakes of trial {trial.number}", parts)


def _tile(one: Mistake, x: int, y: int) -> str:
    image = ""
    if one.thumbnail:
        data = base64.b64encode(one.thumbnail).decode()
        image = (
            f'<image x="{x + 5}" y="{y + 5}" width="96" height="96" '
            f'href="data:image/jpeg;base64,{data}"/>'
        )
    said = f"{short(one.predicted, 14)} {one.probability:.0%}"
    is_ = f"is {short(one.actual, 14)} {one.of_actual:.0%}"
    return (
        image
        + _text(x + 5, y + 117, said, fill="#d64545")
        + _text(x + 5, y + 133, is_)
        + _text(x + 5, y + 146, short(one.name, 22), size=9)
    )


PICTURES: dict[str, Picture] = {"curves": curves, "confusion": confusion, "mistakes": mistakes}


def names_of(database: Database, status: StudyStatus, trial: Trial) -> list[str]:
    """Return which pictures of a trial there are; draws none."""
    found = _predictions(database, status, trial)
    there = {
        "curves": len(trial.epochs) > 1,
        "confusion": found is not None and len(found.classes) <= LARGEST_MATRIX,
        "mistakes": found is not None and found.wrong > 0,
    }
    return [name for name in PICTURES if there[name]]


_KEPT: dict[tuple[str, int, int], Predictions] = {}
"""The last predictions that were read, by study, trial and attempt. They never change, pages ask
for them every few seconds, and they may be in an object store."""
MOST_KEPT = 16


def _predictions(database: Database, status: StudyStatus, trial: Trial) -> Predictions | None:
    """Return what is kept of a complete trial; None for a damaged file, which `hpo storage check`
    tells."""
    if trial.state != "complete" or not trial.attempts:
        return None
    last = trial.attempts[-1]
    key = (status.row.uuid, last.number, last.k)
    if (known := _KEPT.get(key)) is not None:
        return known
    try:
        found = predictions.find(database, Home.default(), status.row.uuid, last)
    except DataError:
        return None
    if found is not None:
        for old in list(_KEPT)[: 1 - MOST_KEPT]:
            _KEPT.pop(old, None)
        _KEPT[key] = found
    return found


def _svg(width: int, height: int, label: str, parts: Iterable[str]) -> str:
    ground = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(label)}" font-family="sans-serif" '
        f'font-size="11">{ground}{"".join(parts)}</svg>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    end: bool = False,
    middle: bool = False,
    fill: str = "#1d2430",
    size: int = 0,
    more: str = "",
) -> str:
    anchor = "end" if end else "middle" if middle else "start"
    font = f' font-size="{size}"' if size else ""
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{fill}"{font}{more}>'
        f"{escape(printable(text))}</text>"
    )
