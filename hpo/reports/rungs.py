"""The rungs of a study whose trials pause: a table, and a figure of the values there."""

from __future__ import annotations

from hpo.formatting import Cell, Table, number, number_cell, setting_cell, text_cell
from hpo.reports.figures import BLUE, GREY, ORANGE, Figure, Trace, axis, figure, finite, plain
from hpo.search.status import StudyStatus
from hpo.storage.records import Trial

JITTER = 0.5


def rung_table(status: StudyStatus) -> Table:
    """Return a row for each rung: how many trials reached it, went on and wait there, and the value
    with which one may go on; the end is the last row. No rows without a scheduler."""
    metric = status.file.metric
    rows = [
        [
            Cell(f"after epoch {rung.epoch}", rung.epoch, "name"),
            setting_cell(rung.reached),
            setting_cell(rung.went_on),
            setting_cell(rung.paused),
            number_cell(rung.threshold),
        ]
        for rung in status.count_rungs()
    ]
    if rows:
        last, none = status.file.max_epochs, text_cell(None)
        complete = setting_cell(len(status.ranked()))
        rows.append([Cell(f"the end, epoch {last}", last, "name"), complete, none, none, none])
    return Table(("rung", "reached", "went on", "paused there", f"{metric} to go on"), rows)


def rung_figure(status: StudyStatus) -> Figure | None:
    """Draw the best value of each trial up to each rung, those that went on in another colour than
    those that did not, and the value with which one may go on. Return None without any."""
    rungs = status.count_rungs()
    points = {True: _empty("went on", BLUE), False: _empty("did not", GREY)}
    for place, rung in enumerate(rungs):
        for trial in status.trials:
            value = _best_up_to(status, trial, rung.epoch)
            if value is not None:
                went_on = len(trial.epochs) > rung.epoch
                _add(points[went_on], place, trial, value)
    if not any(trace["x"] for trace in points.values()):
        return None
    lines = [
        {"type": "line", "x0": place - 0.4, "x1": place + 0.4, "y0": rung.threshold,
         "y1": rung.threshold, "line": {"color": ORANGE, "width": 1.5, "dash": "dot"}}
        for place, rung in enumerate(rungs)
        if rung.threshold is not None
    ]  # fmt: skip
    names = [f"epoch {rung.epoch}" for rung in rungs]
    told = [f"{len(points[went]['x'])} values of trials that {did}"
            for went, did in ((True, "went on"), (False, "did not"))]  # fmt: skip
    return figure(
        [points[False], points[True]],
        alt=f"{status.file.metric} at each rung: {' and '.join(told)}.",
        height=340,
        xaxis=axis("rung", tickvals=list(range(len(rungs))), ticktext=names,
                   range=[-0.5, len(rungs) - 0.5]),
        yaxis=axis(status.file.metric),
        shapes=lines,
        hovermode="closest",
    )  # fmt: skip


def _best_up_to(status: StudyStatus, trial: Trial, epochs: int) -> float | None:
    """Return the best value of a trial in its first `epochs`; None if it had fewer."""
    if len(trial.epochs) < epochs:
        return None
    best = status.ranking.best_epoch(trial.epochs[:epochs])
    return finite(best.metrics[status.file.metric]) if best else None


def _empty(name: str, color: str) -> Trace:
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": [], "y": [], "text": [],
        "marker": {"color": color, "size": 8}, "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip


def _add(trace: Trace, place: int, trial: Trial, value: float) -> None:
    # Spread by trial number, so that points do not cover each other and pages stay the same.
    trace["x"].append(place + JITTER * ((trial.number * 0.618) % 1 - 0.5))
    trace["y"].append(value)
    trace["text"].append(f"trial {trial.number} {plain(trial.state)}<br>{number(value)}")
