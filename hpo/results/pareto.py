"""The Pareto front of a study of several objectives: a table and figures."""

from __future__ import annotations

from hpo.results.figures import BLUE, ORANGE, Figure, Trace, axis, figure, plain
from hpo.results.table import Cell, Table, measured, measured_cell, setting, setting_cell, text_cell
from hpo.search.status import StudyStatus, TrialStatus

LOG_FROM = 30.0
"""An axis whose ends lie further apart than this many times is logarithmic."""


def front_table(status: StudyStatus) -> Table:
    """Trials that no other beats in all objectives, best first metric first; for a study of
    several objectives."""
    names, searched = status.file.objectives, list(status.file.space)
    rows = [
        [
            Cell(str(trial.number), trial.number, "number"),
            *(measured_cell(name, trial.values[name]) for name in names),
            *(setting_cell(trial.params[n]) if n in trial.params else text_cell(None)
              for n in searched),
        ]
        for trial in status.front()
    ]  # fmt: skip
    return Table(("trial", *names, *searched), rows)


def front_figure(status: StudyStatus, name: str) -> Figure | None:
    """The first objective against objective `name`: complete trials, those of the front on top,
    joined where there are two objectives. None where no trial is complete."""
    front = sorted(status.front(), key=lambda trial: trial.values[name])
    if not front:
        return None
    done = [trial for trial in status.ranked() if trial not in front]
    mode = "lines+markers" if len(status.file.objectives) == 2 else "markers"
    line = {"color": ORANGE, "width": 1.5, "shape": "hv"}
    traces = [
        _points(status, name, done, "complete", mode="markers", marker={"color": BLUE, "size": 8}),
        _points(status, name, front, "front", mode=mode, line=line,
                marker={"color": ORANGE, "size": 10}),
    ]  # fmt: skip
    values = [trial.values[name] for trial in [*done, *front]]
    wide = min(values) > 0 and max(values) > LOG_FROM * min(values)
    return figure(
        traces,
        height=360,
        xaxis=axis(name) | ({"type": "log", "dtick": 1} if wide else {}),
        yaxis=axis(status.file.metric),
        hovermode="closest",
    )


def _points(
    status: StudyStatus, name: str, trials: list[TrialStatus], label: str, **trace: object
) -> Trace:
    return {
        "type": "scatter", "name": label, "x": [trial.values[name] for trial in trials],
        "y": [trial.values[status.file.metric] for trial in trials],
        "text": [_hover(trial) for trial in trials],
        "hovertemplate": "%{text}<extra></extra>", **trace,
    }  # fmt: skip


def _hover(trial: TrialStatus) -> str:
    values = [f"{name} {measured(name, value)}" for name, value in trial.values.items()]
    params = [f"{plain(name)} = {plain(setting(one))}" for name, one in trial.params.items()]
    return "<br>".join([f"<b>trial {trial.number}</b>", *values, *params])
