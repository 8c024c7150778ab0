"""Trials of a study as a table: the best first, and of the parameters those that matter most."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.table import Table

from hpo.cli.console import GAP, HEAD, Text, broken
from hpo.cli.tables import plain_table, state_text
from hpo.formatting import duration, measured, number, plural, setting, short_names
from hpo.search.status import StudyStatus
from hpo.storage.records import Outcome, Trial

MOST = 40
"""Most trials on a terminal, unless all are asked for."""
BINS = 4
"""Parts of equal counts into which values of a range are grouped."""


@dataclass(frozen=True)
class TrialColumn:
    """A column that may be left out: a parameter, or where trials come from."""

    name: str
    head: str
    text: Callable[[Trial], str]
    is_number: bool = True

    def width(self, trials: Sequence[Trial]) -> int:
        """Return how many characters it takes, with the gap before it."""
        cells = max((cell_len(self.text(one)) for one in trials), default=0)
        head = broken(self.head, max(HEAD, cells))
        return GAP + max(cells, *map(cell_len, head.splitlines()))


def trials_table(
    status: StudyStatus, width: int, *, most: int | None = None, wide: bool = False
) -> tuple[Table, str]:
    """Return the table, of up to `most` trials and of the columns that fit into `width` (`wide`:
    of all), and what it leaves out in words."""
    trials = best_first(status)
    shown = trials[:most]
    fixed = _fixed(status)
    columns, space = optional_columns(status), width - _taken(fixed, shown)
    kept = columns if wide else _that_fit(columns, shown, space)
    heads = [*fixed, *(one.head for one in kept)]
    numbers = {*fixed, *(one.head for one in kept if one.is_number)} - {"state"}
    table = plain_table(*heads, right=numbers)
    best = status.best
    for trial in shown:
        table.add_row(
            *(state_text(text) if head == "state" else text for head, text in
              ((head, text(trial)) for head, text in fixed.items())),
            *(Text(one.text(trial)) for one in kept),
            style="bold" if best is not None and trial.number == best.number else None,
        )  # fmt: skip
    missing = (len(columns) - len(kept), "column"), (len(trials) - len(shown), "trial")
    return table, " and ".join(plural(count, f"more {noun}") for count, noun in missing if count)


def best_first(status: StudyStatus) -> list[Trial]:
    """Return all trials: complete, unfinished, pruned, each the best first; then the others."""
    groups = ((Outcome.COMPLETE,), ("running", "interrupted", "paused"), (Outcome.PRUNED,))
    ranked = [trial for states in groups for trial in status.ranked(*states)]
    known = {trial.number for trial in ranked}
    return [*ranked, *(trial for trial in status.trials if trial.number not in known)]


def _fixed(status: StudyStatus) -> dict[str, Callable[[Trial], str]]:
    """Return the columns that are always shown."""
    costs = {
        name: lambda trial, name=name: measured(name, trial.values.get(name))
        for name in status.file.objectives[1:]
    }
    return {
        "trial": lambda trial: str(trial.number),
        "state": lambda trial: str(trial.state),
        "epochs": lambda trial: str(len(trial.epochs)),
        status.file.metric: lambda trial: number(trial.value),
        **costs,
        "time": lambda trial: duration(trial.seconds) if trial.epochs else "",
    }


def _taken(fixed: Mapping[str, Callable[[Trial], str]], trials: Sequence[Trial]) -> int:
    columns = [TrialColumn(head, head, text) for head, text in fixed.items()]
    return sum(one.width(trials) for one in columns) - GAP


def optional_columns(status: StudyStatus) -> list[TrialColumn]:
    """Return a column for each searched parameter, under its short name, and one for where the
    trials come from."""
    names = short_names(list(status.file.space))
    return [
        TrialColumn("origin", "origin", _origin, False),
        *(TrialColumn(name, head, _value_of(name)) for name, head in names.items()),
    ]


def _origin(trial: Trial) -> str:
    """Return in a word where a trial comes from; of one that was taken over, its study."""
    return trial.origin.removeprefix("from ").partition(" ")[0].rstrip(":,")


def _value_of(name: str) -> Callable[[Trial], str]:
    return lambda trial: setting(trial.params[name]) if name in trial.params else ""


def _that_fit(
    columns: Sequence[TrialColumn], trials: Sequence[Trial], space: int
) -> list[TrialColumn]:
    """Return the columns that differ between trials and fit into `space`, in their order; the most
    telling are chosen first."""
    differing = [one for one in columns if len(trials) < 2 or len(_texts(one, trials)) > 1]
    chosen = []
    for one in sorted(differing, key=lambda one: -_told(one, trials)):
        if (width := one.width(trials)) <= space:
            chosen.append(one.name)
            space -= width
    return [one for one in columns if one.name in chosen]


def _texts(column: TrialColumn, trials: Sequence[Trial]) -> set[str]:
    return {column.text(trial) for trial in trials} - {""}


def _told(column: TrialColumn, trials: Sequence[Trial]) -> float:
    """Return what part of the variance of the values a column explains; it only orders columns."""
    if column.name == "origin":
        return -2.0
    used = [one for one in trials if one.value is not None and column.name in one.params]
    values = [one.value or 0.0 for one in used]
    return explained([one.params[column.name] for one in used], values)


def explained(settings: Sequence[Any], values: Sequence[float]) -> float:
    """Return epsilon squared of a one-way analysis of variance: the part of the variance of
    `values` between groups of equal settings (numbers of many values: BINS groups of neighbours),
    less what chance gives (Kelley 1935); -1 where there are too few."""
    finite = [(s, v) for s, v in zip(settings, values, strict=True) if v - v == 0]
    labels = _groups([one for one, _ in finite])
    total, count = _squares([v for _, v in finite]), len(finite)
    members: dict[Any, list[float]] = {}
    for label, (_, value) in zip(labels, finite, strict=True):
        members.setdefault(label, []).append(value)
    if not total or count <= len(members):
        return -1.0
    within = sum(_squares(one) for one in members.values()) / (count - len(members))
    return 1 - within * (count - 1) / total


def _groups(settings: Sequence[Any]) -> list[Any]:
    """Return a label for each setting."""
    texts = [setting(one) for one in settings]
    numbers = all(isinstance(one, int | float) for one in settings)
    if not numbers or len(Counter(texts)) <= BINS:
        return texts
    order = sorted(settings)
    bounds = [order[len(order) * place // BINS] for place in range(1, BINS)]
    return [sum(one >= bound for bound in bounds) for one in settings]


def _squares(values: Sequence[float]) -> float:
    """Return the sum of squared differences from the mean."""
    mean = statistics.fmean(values) if values else 0.0
    return sum((one - mean) ** 2 for one in values)
