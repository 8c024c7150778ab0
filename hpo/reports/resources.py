"""Figures of what a study spends: its workers over time, and values against training time."""

from __future__ import annotations

from datetime import UTC, datetime

from hpo.formatting import duration, number
from hpo.reports.figures import (
    SERIES_COLORS,
    Figure,
    Trace,
    axis,
    figure,
    plain,
)
from hpo.reports.study_figures import STATE_COLORS, measured_trials
from hpo.search.status import StudyStatus
from hpo.storage.records import Attempt, Trial

ARCHITECTURE = "model.architecture"
MOST_BARS = 2_000
"""The last attempts that the timeline draws."""


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
    ends = [attempt.ended or status.now for attempt, _ in pairs]
    return {
        "type": "bar", "orientation": "h", "name": state, "marker": {"color": STATE_COLORS[state]},
        "y": [plain(attempt.worker) for attempt, _ in pairs],
        "base": [_moment(attempt.started) for attempt, _ in pairs],
        "x": [1000 * (end - one.started) for end, (one, _) in zip(ends, pairs, strict=True)],
        "text": [_said(status, attempt, trial) for attempt, trial in pairs],
        "textposition": "none", "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def _said(status: StudyStatus, attempt: Attempt, trial: Trial) -> str:
    how = attempt.outcome.words if attempt.outcome else "running"
    took = duration((attempt.ended or status.now) - attempt.started)
    return f"trial {trial.number}, {how}, {took}"


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
