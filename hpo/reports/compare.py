"""Comparison of studies, architectures and trained runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpo.config.metrics import direction_of
from hpo.config.train import TrainConfig
from hpo.data.dataset import describe
from hpo.errors import HpoError, InputError
from hpo.formatting import (
    Cell,
    Table,
    duration,
    measured_cell,
    number,
    number_cell,
    plus_minus,
    setting_cell,
    text_cell,
)
from hpo.reports.figures import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    TEAL,
    Figure,
    Trace,
    axis,
    cost_axis,
    epoch_axis,
    figure,
    finite,
    plain,
    short,
)
from hpo.reports.page import render
from hpo.search.status import StudyStatus, read_status
from hpo.storage.database import Database
from hpo.storage.records import Trial
from hpo.trained.run import RunDir, TrainedRun, load_run
from hpo.training.device import torch_device
from hpo.training.profiling import network_costs

SCORES = ("top1", "top5", "macro_precision", "macro_recall", "macro_f1")
MOST_FREQUENT = 20


@dataclass(frozen=True)
class StudyEntry:
    """The trials of one architecture in one study."""

    study: str
    architecture: str
    metric: str
    best: float | None
    best_trial: int | None
    mean_top: float | None
    """Mean value of the best `top` complete trials, or of all if there are fewer."""
    top: int
    trials: int
    """All that ran, pruned and failed ones included."""
    complete: int
    pruned: int
    epochs: int
    seconds: float
    """Training time of all its epochs."""
    parameters: float | None = None
    flops: float | None = None
    latency_ms: float | None = None
    """Latency of the best trial's network as its study measured it, else as measured now."""
    curve: tuple[dict[str, float], ...] = ()
    """The best trial's epochs: {"epoch", metric: value, ...}."""

    @property
    def name(self) -> str:
        """Return the label of the entry."""
        return f"{self.study}: {self.architecture}"


@dataclass(frozen=True)
class RunEntry:
    """A trained run, means over its seeds."""

    name: str
    architecture: str
    part: str
    """Part that the scores are of (`TrainedRun.measured_part`)."""
    seeds: int
    epochs: int
    seconds: float
    """Training time of all seeds."""
    scores: dict[str, float | None]
    std: dict[str, float | None]
    """Sample standard deviations (n - 1) over the seeds; None of a single one."""
    f1_by_class: dict[str, float]
    """F1 of the MOST_FREQUENT most frequent classes."""
    parameters: float | None = None
    flops: float | None = None
    latency_ms: float | None = None
    curve: tuple[dict[str, float], ...] = ()
    """The first seed's epochs."""


@dataclass(frozen=True)
class Comparison:
    """Studies and runs, ready to be shown."""

    entries: tuple[StudyEntry, ...]
    runs: tuple[RunEntry, ...]
    notes: tuple[str, ...]
    """Costs that could not be measured, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "studies": [asdict(one) for one in self.entries],
            "runs": [asdict(one) for one in self.runs],
            "notes": list(self.notes),
        }


COUNTED = ("parameters", "flops")


def compare(
    database: Database,
    names: Sequence[str],
    *,
    top: int = 5,
    device: str = "cpu",
    latency: bool = False,
) -> Comparison:
    """Compare studies by name and trained runs by directory, in the order given.

    Parameters and multiply-adds are counted by building the best network of each; `latency` also
    times those on `device` that their study did not. Raises NotFound for a name that is neither.
    """
    if len(set(names)) < len(names):
        raise InputError("a study or run is named twice; name each once")
    costs = _Costs(device, (*COUNTED, *(("latency_ms",) if latency else ())))
    entries: list[StudyEntry] = []
    runs: list[RunEntry] = []
    for name in names:
        if RunDir(Path(name)).exists or RunDir(Path(name).absolute().parent).exists:
            runs.append(_run(load_run(Path(name)), costs))
        else:
            entries += _entries(read_status(database, name), top, costs)
    return Comparison(tuple(entries), tuple(runs), tuple(costs.notes))


class _Costs:
    """Counts and times networks, with notes on those that cannot be built."""

    def __init__(self, device: str, wanted: tuple[str, ...]) -> None:
        self.device, self.wanted = torch_device(device), wanted
        self.notes: list[str] = []
        if "latency_ms" in wanted:
            self.notes.append(f"latency_ms: timed here on {device}, unless a study has its own")

    def measure(self, name: str, config: TrainConfig, classes: int | None) -> dict[str, float]:
        """Return the wanted costs of a network; {} with a note if it cannot be built here."""
        try:
            if classes is None:
                classes = len(describe(config.data)["train"])
            return network_costs(config, self.wanted, classes=classes, device=self.device)
        except HpoError as error:
            self.notes.append(f"{name}: the network cannot be built here ({error})")
            return {}


def _entries(status: StudyStatus, top: int, costs: _Costs) -> list[StudyEntry]:
    """Return an entry for each architecture, in the order of their first trials."""
    tried: dict[str, list[Trial]] = {}
    for trial in status.trials:
        if trial.attempts:
            tried.setdefault(_architecture(status, trial), []).append(trial)
    return [_entry(status, name, trials, top, costs) for name, trials in tried.items()]


def _architecture(status: StudyStatus, trial: Trial) -> str:
    fixed = status.file.train.get("model", {}).get("architecture")
    default = TrainConfig.model_validate({}).model.architecture
    return str(trial.params.get("model.architecture", fixed or default))


def _entry(
    status: StudyStatus, architecture: str, trials: Sequence[Trial], top: int, costs: _Costs
) -> StudyEntry:
    ranked = [trial for trial in status.ranked() if trial in trials]
    values = [trial.value for trial in ranked[:top] if trial.value is not None]
    entry = StudyEntry(
        study=status.row.name,
        architecture=architecture,
        metric=status.file.metric,
        best=ranked[0].value if ranked else None,
        best_trial=ranked[0].number if ranked else None,
        mean_top=statistics.fmean(values) if values else None,
        top=top,
        trials=len(trials),
        complete=len(ranked),
        pruned=sum(trial.state == "pruned" for trial in trials),
        epochs=sum(len(trial.epochs) for trial in trials),
        seconds=sum(trial.seconds for trial in trials),
    )
    if not ranked:
        return entry
    best = ranked[0]
    known = {name: best.values[name] for name in (*COUNTED, "latency_ms") if name in best.values}
    found = costs.measure(entry.name, status.file.config(best.params), None) | known
    curve = tuple({"epoch": float(row.epoch), **row.metrics} for row in best.epochs)
    return replace(entry, curve=curve, **found)  # type: ignore[arg-type]


def _run(run: TrainedRun, costs: _Costs) -> RunEntry:
    part = run.measured_part
    spread: Mapping[str, Mapping[str, float | None]] = run.summary[part]
    name = str(run.path)
    return RunEntry(
        name=name,
        architecture=run.config.model.architecture,
        part=part,
        seeds=len(run.seeds),
        epochs=sum(int(one.metrics["epochs"]) for one in run.seeds),
        seconds=sum(float(one.metrics["seconds"]) for one in run.seeds),
        scores={score: spread[score]["mean"] for score in SCORES if score in spread},
        std={score: spread[score]["std"] for score in SCORES if score in spread},
        f1_by_class=_f1_by_class(run, part),
        curve=run.seeds[0].epochs,
        **costs.measure(name, run.config, len(run.classes)),
    )


def _f1_by_class(run: TrainedRun, part: str) -> dict[str, float]:
    """Return F1 of the most frequent classes, means over seeds."""
    by_seed = [one.metrics[part].get("per_class", {}) for one in run.seeds]
    names = sorted(by_seed[0], key=lambda name: -by_seed[0][name]["support"])[:MOST_FREQUENT]
    return {name: statistics.fmean(rows[name]["f1"] for rows in by_seed) for name in names}


COLORS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, RED, TEAL, GREY)
CURVES = {"loss": ("train_loss", "val_loss"), "top1": ("train_top1", "val_top1")}
COSTS = {
    "parameters": "parameters of the best network",
    "flops": "multiply-adds of one image",
    "latency_ms": "milliseconds for one image",
    "seconds": "seconds of training, all trials",
}
LONGEST = 48
"""Most characters of a name in a legend."""


def entries_table(found: Comparison) -> Table:
    """Return a row for each study and architecture."""
    tops = {entry.top for entry in found.entries}
    mean = f"mean of top {tops.pop()}" if tops else "mean of top"
    heads = ("study", "architecture", "metric", "best", mean, "trials", "pruned", "epochs", "time")
    rows = [
        [
            text_cell(one.study),
            text_cell(one.architecture),
            text_cell(one.metric),
            number_cell(one.best),
            number_cell(one.mean_top),
            setting_cell(one.trials),
            setting_cell(one.pruned),
            setting_cell(one.epochs),
            Cell(duration(one.seconds), one.seconds, "number"),
            *_cost_cells(one),
        ]
        for one in found.entries
    ]
    return Table((*heads, "parameters", "flops", "latency_ms"), rows)


def runs_table(found: Comparison) -> Table:
    """Return a row for each trained run: mean ± standard deviation over the seeds."""
    scores = _scores(found.runs)
    heads = ("run", "architecture", "measured on", "seeds", *scores, "time")
    rows = [
        [
            text_cell(one.name),
            text_cell(one.architecture),
            text_cell(one.part),
            setting_cell(one.seeds),
            *(_spread_cell(one, score) for score in scores),
            Cell(duration(one.seconds), one.seconds, "number"),
            *_cost_cells(one),
        ]
        for one in found.runs
    ]
    return Table((*heads, "parameters", "flops", "latency_ms"), rows)


def _scores(runs: Sequence[RunEntry]) -> list[str]:
    """Return the scores that some run has."""
    return [score for score in SCORES if any(score in one.scores for one in runs)]


def _cost_cells(one: StudyEntry | RunEntry) -> list[Cell]:
    return [measured_cell(name, getattr(one, name)) for name in ("parameters", "flops",
                                                                 "latency_ms")]  # fmt: skip


def _spread_cell(run: RunEntry, score: str) -> Cell:
    mean = run.scores.get(score)
    return Cell(plus_minus(mean, run.std.get(score)), mean, "number")


def figures_of(found: Comparison) -> dict[str, Figure | None]:
    """Return every figure of the page by name, None where there is nothing to draw."""
    shown: list[StudyEntry | RunEntry] = [*found.entries, *found.runs]
    curves = {one.name: one.curve for one in shown if one.curve}
    return {
        **{f"cost-{name}": against_cost(found.entries, name) for name in COSTS},
        **{f"curves-{name}": overlaid(curves, metrics) for name, metrics in CURVES.items()},
        "scores": score_bars(found.runs),
        "classes": class_bars(found.runs),
    }


def against_cost(entries: Sequence[StudyEntry], name: str) -> Figure | None:
    """Draw the best value of each entry against one of its costs. Return None if no cost is known
    or the entries have different metrics."""
    shown = [one for one in entries if one.best is not None and getattr(one, name) is not None]
    metrics = {one.metric for one in shown}
    if len(metrics) != 1:
        return None
    values = [getattr(one, name) for one in shown]
    metric = metrics.pop()
    kind = "lowest" if direction_of(metric) == "minimize" else "best"
    return figure(
        [_point(place, one, name) for place, one in enumerate(entries) if one in shown],
        height=340,
        xaxis=cost_axis(COSTS[name], values),
        yaxis=axis(f"{kind} {metric}"),
        hovermode="closest",
    )


def _point(place: int, entry: StudyEntry, name: str) -> Trace:
    label = plain(entry.name)
    text = f"{label}<br>{plain(entry.metric)} {number(entry.best)}"
    return {
        "type": "scatter", "mode": "markers", "name": _label(entry.name),
        "x": [getattr(entry, name)],
        "y": [entry.best], "text": [text], "hovertemplate": "%{text}, %{x:.4s}<extra></extra>",
        "marker": {"color": _color(place), "size": 11},
    }  # fmt: skip


def _label(name: str) -> str:
    """Shorten a name for a legend: the end of a long path."""
    return plain(name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}")


def _color(place: int) -> str:
    return COLORS[place % len(COLORS)]


def overlaid(
    series: Mapping[str, Sequence[Mapping[str, float]]], metrics: tuple[str, str]
) -> Figure | None:
    """Draw the curves of several trainings in one figure: a colour for each, the training metric
    dashed, the validation metric solid. Return None if neither was recorded."""
    traces = [
        _curve(label, place, epochs, metric)
        for place, (label, epochs) in enumerate(series.items())
        for metric in metrics
        if any(finite(row.get(metric)) is not None for row in epochs)
    ]
    if not traces:
        return None
    return figure(
        traces,
        height=380,
        xaxis=epoch_axis(max(len(epochs) for epochs in series.values())),
        yaxis=axis(f"{metrics[0]} dashed, {metrics[1]} solid"),
        hovermode="closest",
    )


def _curve(label: str, place: int, epochs: Sequence[Mapping[str, float]], metric: str) -> Trace:
    training = metric.startswith("train_")
    return {
        "type": "scatter", "mode": "lines" if len(epochs) > 1 else "markers",
        "name": _label(label), "legendgroup": plain(label),
        # Runs that trained on the validation images, too, have no solid line for the legend.
        "showlegend": not training or not any("val_loss" in row for row in epochs),
        "x": [row["epoch"] for row in epochs], "y": [finite(row.get(metric)) for row in epochs],
        "line": {"color": _color(place), "width": 2, "dash": "dash" if training else "solid"},
        "hovertemplate": f"{plain(label)}, {metric}: %{{y:.4g}}<extra></extra>",
    }  # fmt: skip


def score_bars(runs: Sequence[RunEntry]) -> Figure | None:
    """Draw top-1, top-5, precision, recall and F1 of each run as bars."""
    return _bars(runs, [one.scores for one in runs], _scores(runs))


def class_bars(runs: Sequence[RunEntry]) -> Figure | None:
    """Draw F1 of the most frequent classes as bars, the runs side by side."""
    names = list(dict.fromkeys(name for one in runs for name in one.f1_by_class))
    return _bars(runs, [one.f1_by_class for one in runs], names)


def _bars(
    runs: Sequence[RunEntry], columns: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Figure | None:
    if not runs or not names:
        return None
    places = list(range(len(names)))
    traces = [
        {
            "type": "bar", "name": _label(one.name), "marker": {"color": _color(place)},
            "x": places, "y": [finite(column.get(name)) for name in names],
            "hovertemplate": f"{plain(one.name)}<br>%{{y:.4f}}<extra></extra>",
        }
        for place, (one, column) in enumerate(zip(runs, columns, strict=True))
    ]  # fmt: skip
    ticks = [plain(short(name.replace("_", " "))) for name in names]
    return figure(
        traces,
        height=340,
        barmode="group",
        xaxis={"tickvals": places, "ticktext": ticks, "automargin": True},
        yaxis={"range": [0, 1]},
        showlegend=True,
        hovermode="closest",
    )


def comparison_report(found: Comparison, title: str) -> str:
    """Return the page of a comparison as HTML."""
    drawn = figures_of(found)
    names = [name for name, figure in drawn.items() if figure is not None]
    return render(
        "compare.html",
        drawn,
        title=title,
        entries=entries_table(found),
        runs=runs_table(found),
        costs=[name for name in names if name.startswith("cost-")],
        curves=[name for name in names if name.startswith("curves-")],
        notes=found.notes,
    )
