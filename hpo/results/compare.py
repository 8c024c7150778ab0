"""Studies, the architectures in them, and trained runs beside each other."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hpo.definition.config import TrainConfig
from hpo.engine.costs import network_costs
from hpo.engine.datasets import describe
from hpo.engine.runtime import torch_device
from hpo.errors import HpoError, InputError
from hpo.results.comparison import MOST_FREQUENT, SCORES, Comparison, Entry, RunEntry
from hpo.results.runs import PARTS, Run, RunDir, load_run
from hpo.results.training import as_page
from hpo.search.status import StudyStatus, TrialStatus, read_status
from hpo.storage.db import Database

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
    times those on `device` that their study did not. Raises NotFound for what is neither.
    """
    if len(set(names)) < len(names):
        raise InputError("a study or run is named twice; name each once")
    costs = _Costs(device, (*COUNTED, *(("latency_ms",) if latency else ())))
    entries: list[Entry] = []
    runs: list[RunEntry] = []
    for name in names:
        if RunDir(Path(name)).exists or RunDir(Path(name).absolute().parent).exists:
            runs.append(_run(load_run(Path(name)), costs))
        else:
            entries += _entries(read_status(database, name), top, costs)
    return Comparison(tuple(entries), tuple(runs), tuple(costs.notes))


class _Costs:
    """Counts and times networks; says where it could not."""

    def __init__(self, device: str, wanted: tuple[str, ...]) -> None:
        self.device, self.wanted = torch_device(device), wanted
        self.notes: list[str] = []
        if "latency_ms" in wanted:
            self.notes.append(f"latency_ms: timed here on {device}, unless a study has its own")

    def of(self, name: str, config: TrainConfig, classes: int | None) -> dict[str, float]:
        try:
            if classes is None:
                classes = len(describe(config.data)["train"])
            found = network_costs(config, self.wanted, classes=classes, device=self.device)
        except HpoError as error:
            self.notes.append(f"{name}: the network cannot be built here ({error})")
            return {}
        return found


def _entries(status: StudyStatus, top: int, costs: _Costs) -> list[Entry]:
    """One for each architecture that was tried, in the order in which they came."""
    tried: dict[str, list[TrialStatus]] = {}
    for trial in status.trials:
        if trial.attempts:
            tried.setdefault(_architecture(status, trial), []).append(trial)
    return [_entry(status, name, trials, top, costs) for name, trials in tried.items()]


def _architecture(status: StudyStatus, trial: TrialStatus) -> str:
    fixed = status.file.train.get("model", {}).get("architecture")
    default = TrainConfig.model_validate({}).model.architecture
    return str(trial.params.get("model.architecture", fixed or default))


def _entry(
    status: StudyStatus, architecture: str, trials: Sequence[TrialStatus], top: int, costs: _Costs
) -> Entry:
    ranked = [trial for trial in status.ranked() if trial in trials]
    values = [trial.value for trial in ranked[:top] if trial.value is not None]
    entry = Entry(
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
    found = costs.of(entry.name, status.file.config(best.params), None) | known
    curve = tuple({"epoch": float(row.epoch), **row.metrics} for row in best.epochs)
    return replace(entry, curve=curve, **found)  # type: ignore[arg-type]


def _run(run: Run, costs: _Costs) -> RunEntry:
    part = next(part for part in PARTS if run.summary[part] is not None)
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
        curve=tuple(as_page(run)["seeds"][0]["epochs"]),
        **costs.of(name, run.config, len(run.classes)),
    )


def _f1_by_class(run: Run, part: str) -> dict[str, float]:
    """F1 of the most frequent classes, means over seeds."""
    by_seed = [one.metrics[part].get("per_class", {}) for one in run.seeds]
    names = sorted(by_seed[0], key=lambda name: -by_seed[0][name]["support"])[:MOST_FREQUENT]
    return {name: statistics.fmean(rows[name]["f1"] for rows in by_seed) for name in names}
