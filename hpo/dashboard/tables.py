"""Tables of hpo's own pages, and the figure of a study's history."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

from hpo.formatting import (
    Cell,
    Table,
    duration,
    number,
    number_cell,
    setting_cell,
    text_cell,
)
from hpo.reports.study_figures import STATE_COLORS
from hpo.search.status import StudyStatus
from hpo.storage.records import Trial, WorkerRow

HIDDEN = ("seconds", "images_per_s")
"""Of an epoch's metrics, those that have columns of their own, or none."""
WIDTH, HEIGHT, EDGE = 1000, 120, 8


def studies_table(found: Iterable[StudyStatus]) -> Table:
    """Return a row for each study, with a link to its page."""
    rows = [
        [
            text_cell(one.row.name, "name"),
            text_cell(one.state, "state"),
            text_cell(one.finished_of),
            text_cell(one.file.metric),
            number_cell(one.best.value if one.best else None),
            Cell(str(len(one.live_workers)), len(one.live_workers), "number"),
            text_cell("" if one.eta_s is None else f"about {duration(one.eta_s)}"),
        ]
        for one in found
    ]
    return Table(("study", "state", "trials", "metric", "best", "workers", "time left"), rows)


def trials_table(status: StudyStatus, trials: Sequence[Trial]) -> Table:
    """Return a row for each of `trials`: every metric at its best epoch, why it ended, where it
    ran, its parameters."""
    metrics = _metrics(status.trials, status.file.metric)
    names = list(status.file.space)
    hosts = {worker.id: f"{worker.host} {worker.device}" for worker in status.workers}
    rows = []
    for trial in trials:
        first, *others = (number_cell(value) for value in _at_best(trial, metrics))
        rows.append(
            [
                Cell(str(trial.number), trial.number, "number"),
                text_cell(trial.state, f"state {trial.state}"),
                first,
                text_cell(f"{trial.best_epoch or '-'} of {len(trial.epochs)}"),
                text_cell(duration(trial.seconds) if trial.epochs else None),
                text_cell(trial.reason, "reason"),
                *(setting_cell(trial.params.get(name, "")) for name in names),
                *others,
                text_cell(hosts.get(trial.attempts[-1].worker) if trial.attempts else None),
                text_cell(trial.origin),
            ]
        )
    head = ("trial", "state", metrics[0], "best epoch", "time", "reason")
    return Table((*head, *names, *metrics[1:], "ran on", "origin"), rows)


def _metrics(trials: Iterable[Trial], first: str) -> list[str]:
    """Return the metrics that any epoch has, the first objective first."""
    found = {name for trial in trials for row in trial.epochs for name in row.metrics}
    return [first, *sorted(found - {first, *HIDDEN})]


def _at_best(trial: Trial, metrics: Iterable[str]) -> list[float | None]:
    row = next((row for row in trial.epochs if row.epoch == trial.best_epoch), None)
    return [_finite(row.metrics.get(name)) if row else None for name in metrics]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def workers_table(status: StudyStatus) -> Table:
    """Return a row for each live worker."""
    rows = [
        [
            text_cell(one.host),
            text_cell(one.device),
            text_cell("" if one.number is None else str(one.number)),
            text_cell(f"{one.epoch or 1} of {one.epochs}" if one.epochs else ""),
            number_cell(one.value),
            number_cell(one.images_per_s, digits=0),
            text_cell(_seen(status, one)),
            text_cell(one.reason),
            text_cell(one.id, "name"),
        ]
        for one in status.live_workers
    ]
    head = (
        "host",
        "device",
        "trial",
        "epoch",
        status.file.metric,
        "images/s",
        "seen",
        "",
        "worker",
    )
    return Table(head, rows)


def _seen(status: StudyStatus, worker: WorkerRow) -> str:
    return f"{duration(max(0.0, status.now - worker.seen))} ago"


def epochs_table(trial: Trial) -> Table:
    """Return a row for each epoch of a trial, with all that was measured."""
    names = sorted({name for row in trial.epochs for name in row.metrics})
    rows = [
        [
            Cell(str(row.epoch), row.epoch, "number"),
            *(number_cell(_finite(row.metrics.get(name))) for name in names),
        ]
        for row in trial.epochs
    ]
    return Table(("epoch", *names), rows)


def attempts_table(status: StudyStatus, trial: Trial) -> Table:
    """Return a row for each attempt at a trial: who, how long, and how it ended."""
    rows = [
        [
            Cell(str(one.k), one.k, "number"),
            text_cell(one.worker, "name"),
            text_cell(duration((one.ended or status.now) - one.started)),
            text_cell(one.outcome.words if one.outcome else "running"),
            text_cell(one.reason, "reason"),
        ]
        for one in trial.attempts
    ]
    return Table(("attempt", "worker", "time", "outcome", "reason"), rows)


def history_svg(status: StudyStatus) -> Markup | None:
    """Draw the best value of each trial and the best so far, WIDTH x HEIGHT; None without two
    values. Values far below the others are drawn at the edge."""
    from hpo.reports.study_figures import focus, is_maximized, measured_trials

    maximize = is_maximized(status)
    trials = [one for one in measured_trials(status) if _finite(one.value) is not None]
    values = [one.value for one in trials if one.value is not None]
    if len(values) < 2:
        return None
    low, high = focus(values, maximize=maximize) or (min(values), max(values))
    last = max(one.number for one in trials)

    def at(place: int, value: float) -> str:
        share = (min(max(value, low), high) - low) / ((high - low) or 1.0)
        x = EDGE + (WIDTH - 2 * EDGE) * place / (last or 1)
        return f"{x:.1f},{HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * share:.1f}"

    best: float | None = None
    line, dots = [], []
    for one, value in zip(trials, values, strict=True):
        x, y = at(one.number, value).split(",")
        color = STATE_COLORS.get(one.state, "gray")
        title = escape(f"trial {one.number}, {one.state}: {number(value)}")
        dots.append(
            f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"><title>{title}</title></circle>'
        )
        if one.state == "complete" and (best is None or (value > best) == maximize):
            best = value
        if best is not None:
            line.append(at(one.number, best))
    label = escape(f"{status.file.metric} of {len(values)} trials, {number(low)} to {number(high)}")
    path = f'<polyline points="{" ".join(line)}" fill="none" stroke="currentColor"/>'
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{path}{''.join(dots)}</svg>"
    )
