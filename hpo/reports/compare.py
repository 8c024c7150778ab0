"""Comparison of studies, architectures and trained runs.

Imports no torch: parameters and multiply-adds that were counted before are in the cache.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hpo import __version__
from hpo.config.base import is_function_name, is_timm
from hpo.config.train import TrainConfig
from hpo.data.dataset import describe
from hpo.errors import DiskFull, HpoError, InputError
from hpo.formatting import (
    Cell,
    Table,
    duration,
    measured_cell,
    number_cell,
    plus_minus,
    setting_cell,
    text_cell,
)
from hpo.intervals import Interval, of_mean, wilson
from hpo.io import atomic_write, short_hash
from hpo.paths import Home
from hpo.search.status import StudyStatus, read_status
from hpo.storage.database import Database
from hpo.storage.records import Trial
from hpo.trained.run import RunDir, TrainedRun, load_run

SCORES = ("top1", "top5", "macro_precision", "macro_recall", "macro_f1")
MOST_FREQUENT = 20
COUNTED = ("parameters", "flops")
"""Costs of a network that are counted once per host; see `hpo.training.profiling`."""
COUNTS_FOLDER = "costs"


@dataclass(frozen=True)
class StudyEntry:
    """The trials of one architecture in one study."""

    study: str
    architecture: str
    metric: str
    best: float | None
    best_trial: int | None
    interval: Interval | None
    """Of the best value, if it counts images or was measured in folds."""
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
    intervals: dict[str, Interval]
    """Of the scores: by the images that they count, or over several seeds; the wider one."""
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


def compare(
    database: Database,
    names: Sequence[str],
    *,
    top: int = 5,
    device: str = "cpu",
    latency: bool = False,
) -> Comparison:
    """Compare studies by name and trained runs by directory, in the order given.

    Parameters and multiply-adds of the best network of each are those that are known on this host,
    else they are counted by building it, once; `latency` also times those on `device` that their
    study did not. Raises NotFound for a name that is neither.
    """
    if len(set(names)) < len(names):
        raise InputError("a study or run is named twice; name each once")
    costs = _Costs(device, latency)
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

    def __init__(self, device: str, latency: bool) -> None:
        self.device, self.latency = device, latency
        self.notes: list[str] = []
        if latency:
            self.notes.append(f"latency_ms: timed here on {device}, unless a study has its own")

    def measure(self, name: str, config: TrainConfig, classes: int | None) -> dict[str, float]:
        """Return the costs of a network of so many classes, None: as its data set has; {} with a
        note if it cannot be built here."""
        try:
            classes = classes or len(describe(config.data)["train"])
            found = _counted(config, classes, Home.default().cache)
            if self.latency:
                found |= _measured(config, ["latency_ms"], classes, self.device)
            return found
        except HpoError as error:
            self.notes.append(f"{name}: the network cannot be built here ({error})")
            return {}


def _counted(config: TrainConfig, classes: int, cache: Path) -> dict[str, float]:
    """Return COUNTED of the network of `config`: as `cache` knows them, else by building it. Raises
    what `models.build` raises."""
    path = _counts_file(config, classes, cache)
    found = None if path is None else _read_counts(path)
    if found is None:
        found = _measured(config, COUNTED, classes, "cpu")
        if path is not None:
            content = json.dumps(found).encode()
            with suppress(DiskFull):  # it is counted again
                atomic_write(path, lambda file: file.write(content))
    return found


def _counts_file(config: TrainConfig, classes: int, cache: Path) -> Path | None:
    """Return the file of a network's counts; None for one of the user's, which may change."""
    if is_function_name(config.model.architecture):
        return None
    versions = [__version__, version("torch"), version("torchvision")]
    versions += [version("timm")] if is_timm(config.model.architecture) else []
    model = config.model.model_dump(mode="json", exclude={"weights"})
    key = short_hash([model, config.data.image_size, classes, versions])
    return cache / COUNTS_FOLDER / f"{key}.json"


def _read_counts(path: Path) -> dict[str, float] | None:
    try:
        found = json.loads(path.read_bytes())
        return {name: float(found[name]) for name in COUNTED}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measured(
    config: TrainConfig, names: Sequence[str], classes: int, device: str
) -> dict[str, float]:
    """Build the network of `config` to measure the costs `names`, which takes torch and seconds."""
    from hpo.training.device import torch_device
    from hpo.training.profiling import network_costs

    return network_costs(config, names, classes=classes, device=torch_device(device))


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
        interval=status.noise.interval(ranked[0]) if ranked else None,
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
    names = (*COUNTED, "latency_ms")
    known = {name: best.values[name] for name in names if name in best.values}
    classes = len(status.validated) or None
    found = costs.measure(entry.name, status.file.config(best.params), classes) | known
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
        intervals={score: found for score in SCORES if (found := _interval(run, part, score))},
        f1_by_class=_f1_by_class(run, part),
        curve=run.seeds[0].epochs,
        **costs.measure(name, run.config, len(run.classes)),
    )


def _interval(run: TrainedRun, part: str, score: str) -> Interval | None:
    """Return the wider one of the intervals of a score: by the images that it counts (top-1 and
    top-5), and over several seeds."""
    results = [one.metrics[part] for one in run.seeds]
    values = [result[score] for result in results if score in result]
    images = sum(row["support"] for row in results[0].get("per_class", {}).values())
    found = [of_mean(values)] if values else []
    if values and images and score in ("top1", "top5"):
        found.append(wilson(statistics.fmean(values), images))
    known = [one.within(0.0, 1.0) for one in found if one is not None]
    return max(known, key=lambda one: one.high - one.low, default=None)


def _f1_by_class(run: TrainedRun, part: str) -> dict[str, float]:
    """Return F1 of the most frequent classes, means over seeds."""
    by_seed = [one.metrics[part].get("per_class", {}) for one in run.seeds]
    names = sorted(by_seed[0], key=lambda name: -by_seed[0][name]["support"])[:MOST_FREQUENT]
    return {name: statistics.fmean(rows[name]["f1"] for rows in by_seed) for name in names}


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
