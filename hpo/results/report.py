"""Reports as one HTML file that opens without network: of a study, and of a retrained model.

plotly.js is part of the file, and its content policy lets the page load nothing at all. Names come
from outside (classes, reasons, paths): Jinja escapes them in the text, `tojson` inside scripts.
"""

from __future__ import annotations

import secrets
import shlex
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from optuna.trial import FrozenTrial, TrialState

from hpo.definition.fields import flatten
from hpo.paths import Home
from hpo.results import compare_figures, figures, pareto, retrieval_figures, study_figures
from hpo.results.comparison import Comparison
from hpo.results.groups import group_table
from hpo.results.runs import write_whole
from hpo.results.table import (
    Cell,
    Table,
    count,
    duration,
    measured_cell,
    number,
    number_cell,
    setting_cell,
    settings_table,
    text_cell,
)
from hpo.search.status import StudyStatus, TrialStatus, read_status
from hpo.search.study import Study, load
from hpo.storage import records
from hpo.storage.db import Database
from hpo.storage.leases import FINAL
from hpo.storage.optuna_rdb import FencedStorage

MIN_COMPLETE = 8
"""Complete trials below which importances would be noise: PED-ANOVA compares the best tenth, two
trials at the least, with the rest."""
LOSSES = ("train_loss", "val_loss")
ACCURACIES = ("train_top1", "val_top1", "val_top5", "val_precision_at_5", "val_precision_at_k")
SCORES = ("precision_at_5", "precision_at_k", "top1", "top5", "loss", "mean_distance")
MOST_CONFUSED = 10


def importances(database: Database, name: str) -> dict[str, float]:
    """{parameter: share of the whole}, largest first, by PED-ANOVA (Watanabe et al., 2023,
    https://arxiv.org/abs/2304.10255) over the complete trials; empty where they are fewer than
    MIN_COMPLETE or tell nothing. Raises NotFound."""
    study = load(database, name)
    with warnings.catch_warnings():
        # About experimental parts, and conditional parameters that few trials used.
        warnings.filterwarnings("ignore", module="optuna")
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.simplefilter("ignore", UserWarning)
        found = study.optuna_study(FencedStorage(database))
        complete = found.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if len(complete) < MIN_COMPLETE or len({trial.values[0] for trial in complete}) < 2:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        shares = optuna.importance.get_param_importances(
            found, evaluator=evaluator, target=_first_value(study)
        )
    # Equal shares are what Optuna gives where it could tell nothing.
    informative = len(shares) == 1 or len(set(shares.values())) > 1
    return dict(shares) if informative else {}


def _first_value(study: Study) -> Callable[[FrozenTrial], float] | None:
    """Of several objectives the first, smaller is better; None of a single one, which it knows."""
    if len(study.file.objectives) == 1:
        return None
    sign = -1.0 if study.maximize else 1.0
    return lambda trial: sign * trial.values[0]


def write_report(path: Path, page: str) -> None:
    """Write `page`, never seen half written. Raises InputError where that cannot be."""
    write_whole(path, page)


def _render(template: str, figures_by_name: Mapping[str, Any], **values: Any) -> str:
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {
        "number": number,
        "duration": duration,
        "count": count,
        "quoted": shlex.quote,
    }
    drawn = {name: figure for name, figure in figures_by_name.items() if figure is not None}
    page = environment.get_template(template).render(
        figures=drawn,
        plotly=get_plotlyjs(),
        nonce=secrets.token_urlsafe(16),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **values,
    )
    # A file name that is not UTF-8 holds lone surrogates.
    return page.encode(errors="replace").decode()


# ---- a study ----


def study_report(database: Database, name: str) -> str:
    """The page of a study, whatever its state. Raises NotFound."""
    status = read_status(database, name)
    shares = importances(database, name)
    best = status.best
    return _render(
        "study.html",
        _study_figures(status, shares),
        status=status,
        best=best,
        states=[
            (state, status.count(state), color)
            for state, color in study_figures.STATE_COLORS.items()
            if status.count(state)
        ],
        complete=status.count("complete", "diverged"),
        min_complete=MIN_COMPLETE,
        hidden=study_figures.hidden(status),
        parameters=list(status.file.space),
        slices=[f"slice-{index}" for index in range(len(status.file.space))],
        searched=None if best is None else settings_table(best.params.items()),
        fixed=None if best is None else settings_table(_fixed(status, best)),
        commands=None if best is None else _commands(database, status, best),
        front=pareto.front_table(status) if len(status.file.objectives) > 1 else None,
        fronts=[f"front-{name}" for name in status.file.objectives[1:]],
        groups=[
            (name, table) for name in status.file.space if (table := group_table(status, name)).rows
        ],
        trials=_trials_table(status),
        workers=_workers_table(status),
        versions=_versions(status),
        fingerprints=_fingerprints(database, status),
        storage=database.shown,
    )


def _study_figures(status: StudyStatus, shares: Mapping[str, float]) -> dict[str, Any]:
    best = status.best
    epochs = [{"epoch": row.epoch, **row.metrics} for row in best.epochs] if best else []
    mark = best.best_epoch if best else None
    slices = {
        f"slice-{index}": study_figures.slice_of(status, name)
        for index, name in enumerate(status.file.space)
    }
    return {
        "history": study_figures.history(status),
        "intermediate": study_figures.intermediate(status),
        "importance": figures.importance(shares),
        "parallel": study_figures.parallel(status),
        **slices,
        **{
            f"front-{name}": pareto.front_figure(status, name)
            for name in status.file.objectives[1:]
        },
        **_curve_figures({"best": epochs}, mark),
    }


def _curve_figures(
    series: Mapping[str, figures.Epochs], mark: int | None = None
) -> dict[str, figures.Figure | None]:
    return {
        "loss": figures.curves(series, LOSSES, mark=mark),
        "accuracy": figures.curves(series, ACCURACIES, mark=mark),
        "lr": figures.curves(series, ["lr"], mark=mark),
    }


def _fixed(status: StudyStatus, best: TrialStatus) -> list[tuple[str, Any]]:
    """All settings of the best trial that were not searched."""
    whole = flatten(status.file.config(best.params).to_dict())
    return [(name, value) for name, value in whole.items() if name not in best.params]


def _commands(database: Database, status: StudyStatus, best: TrialStatus) -> list[str]:
    """What to type next, for this database."""
    study, file = shlex.quote(status.row.name), shlex.quote(f"{status.row.name}.best.toml")
    storage = storage_option(database)
    return [
        f"hpo export {study} --trial {best.number} -o {file}{storage}",
        f"hpo train {file} --seeds 3",
    ]


def storage_option(database: Database) -> str:
    """What a command needs to find this storage: nothing for the default one, and nothing where a
    password would be shown (then it is HPO_STORAGE that holds it)."""
    is_default = database.url.database == str(Home.default().database)
    if is_default or database.url.password is not None:
        return ""
    return f" --storage {shlex.quote(database.shown)}"


def _trials_table(status: StudyStatus) -> Table:
    names = list(status.file.space)
    costs = status.file.objectives[1:]
    headers = ("trial", "state", status.file.metric, *costs, "best epoch", "epochs", "seconds")
    rows = [_trial_row(trial, names, costs) for trial in status.trials]
    return Table((*headers, *names, "reason"), rows)


def _trial_row(trial: TrialStatus, names: Iterable[str], costs: Iterable[str]) -> list[Cell]:
    return [
        Cell(str(trial.number), trial.number, "number"),
        text_cell(trial.state, f"state {trial.state}"),
        number_cell(trial.value),
        *(measured_cell(name, trial.values.get(name)) for name in costs),
        setting_cell(trial.best_epoch) if trial.best_epoch else number_cell(None),
        Cell(str(len(trial.epochs)), len(trial.epochs), "number"),
        number_cell(trial.seconds if trial.epochs else None, digits=1),
        *(
            setting_cell(trial.params[name]) if name in trial.params else number_cell(None)
            for name in names
        ),
        text_cell(trial.reason, "reason"),
    ]


def _workers_table(status: StudyStatus) -> Table:
    """Who worked, with how many trials ended and how long."""
    attempts = [attempt for trial in status.trials for attempt in trial.attempts]
    rows = []
    for worker in status.workers:
        own = [a for a in attempts if a.worker == worker.id]
        ended = sum(a.outcome in FINAL for a in own)
        busy = sum((a.ended or status.now) - a.started for a in own)
        rows.append(
            [
                text_cell(worker.id, "name"),
                text_cell(worker.host),
                text_cell(worker.device),
                Cell(str(ended), ended, "number"),
                Cell(duration(busy), busy, "number"),
                text_cell(worker.reason or "at work"),
            ]
        )
    return Table(("worker", "host", "device", "trials ended", "busy", "state"), rows)


def _versions(status: StudyStatus) -> list[tuple[str, str]]:
    """Each program with the versions that the workers had, oldest worker first."""
    found: dict[str, dict[str, None]] = {}
    for worker in status.workers:
        for name, version in worker.versions.items():
            found.setdefault(name, {})[version] = None
    return [(name, ", ".join(versions)) for name, versions in found.items()]


def _fingerprints(database: Database, status: StudyStatus) -> list[tuple[str, str]]:
    """The images that the trials saw, as the first worker found them: (settings, fingerprint)."""
    resolved = records.read_resolved(database, status.row.uuid)
    return [
        (key.removeprefix("data "), str(value))
        for key, value in resolved.items()
        if key.startswith("data ")
    ]


# ---- several studies and runs ----


def comparison_report(found: Comparison, title: str) -> str:
    """The page of `hpo compare`."""
    drawn = compare_figures.figures_of(found)
    names = [name for name, figure in drawn.items() if figure is not None]
    return _render(
        "compare.html",
        drawn,
        title=title,
        entries=compare_figures.entries_table(found),
        runs=compare_figures.runs_table(found),
        costs=[name for name in names if name.startswith("cost-")],
        curves=[name for name in names if name.startswith("curves-")],
        notes=found.notes,
    )


# ---- a retrained model ----


def training_report(run: Mapping[str, Any]) -> str:
    """The page of `hpo train`, from plain data:

    {"title", "config": nested, "provenance": nested or None, "classes": [C names], "notes": [...],
     "seeds": [{"seed", "epochs": [{"epoch", metric: value, ...}], "test": result or None,
     "validation": {"loss", "top1", "top5"} of the kept epoch, a result, or None}],
     "summary": {metric: {"mean", "std", "n"}} or None, "ensemble": result or None (may lack),
     "onnx": [{"file", "precision", "bytes", "latency_ms", "max_difference" or None, scores}] (may
     lack), "retrieval": what `hpo.results.retrieval.keep_examples` writes, or None or absent}

    A result is {"loss", "top1", "top5" (of a retrieval "precision_at_5", "precision_at_k",
    "mean_distance", "top1"), "macro": {"precision", "recall", "f1"}, "per_class":
    [{"class", "precision", "recall", "f1", "support"}], "confusion": (C, C) counts, rows true}.
    """
    classes, seeds = list(run["classes"]), list(run["seeds"])
    measured_on = _measured_on(seeds)
    results = [seed[measured_on] for seed in seeds] if measured_on else []
    results = [result for result in results if "confusion" in result]
    counts = _summed([result["confusion"] for result in results])
    series = {f"seed {seed['seed']}": seed["epochs"] for seed in seeds}
    retrieval = run.get("retrieval")
    return _render(
        "training.html",
        {
            **_curve_figures(series),
            "confusion": figures.confusion(classes, counts),
            **retrieval_figures.distributions(retrieval),
        },
        title=run["title"],
        classes=classes,
        notes=list(run["notes"]),
        seeds=seeds,
        measured_on=measured_on,
        summary=_summary_rows(run["summary"]),
        detailed=bool(results),
        by_seed=_seeds_table(seeds, measured_on, run.get("ensemble")),
        ensemble=run.get("ensemble"),
        onnx=_onnx_table(run.get("onnx", [])),
        per_class=_per_class_table([result["per_class"] for result in results]),
        confused=_confused_table(classes, counts),
        retrieval=retrieval,
        config=settings_table(flatten(run["config"]).items()),
        provenance=settings_table(flatten(run["provenance"] or {}).items()),
        largest_matrix=figures.LARGEST_MATRIX,
    )


def _measured_on(seeds: Sequence[Mapping[str, Any]]) -> str | None:
    """The images that all seeds were measured on at the end: the test's, else the validation's."""
    for split in ("test", "validation"):
        if seeds and all(seed.get(split) for seed in seeds):
            return split
    return None


def _summed(matrices: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """The sum of (C, C) counts over seeds."""
    return [
        [sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)
    ]


def _summary_rows(summary: Mapping[str, Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    return [{"metric": name, **row} for name, row in (summary or {}).items()]


PLAIN, MACRO = ("top1", "top5", "loss"), ("precision", "recall", "f1")


def _seeds_table(
    seeds: Sequence[Mapping[str, Any]], split: str | None, ensemble: Mapping[str, Any] | None
) -> Table:
    """A row for each seed, and one for all as an ensemble; validation's scores beside the test's,
    where there are both."""
    headers = ["seed", "epochs"]
    rows = [[setting_cell(seed["seed"]), setting_cell(len(seed["epochs"]))] for seed in seeds]
    results = [seed[split] for seed in seeds] if split else []
    if ensemble:
        rows.append([text_cell("ensemble"), number_cell(None)])
        results.append(ensemble)
    if split:
        shown = [name for name in SCORES if name in results[0]]
        headers += [*shown, "macro precision", "macro recall", "macro F1"]
        for row, result in zip(rows, results, strict=True):
            row += [number_cell(result[name]) for name in shown]
            row += [number_cell(result.get("macro", {}).get(name)) for name in MACRO]
    validated = [seed.get("validation") for seed in seeds]
    if split == "test" and any(validated):
        headers += [f"validation {name}" for name in PLAIN]
        for row, found in zip(rows, [*validated, None][: len(rows)], strict=True):
            row += [number_cell((found or {}).get(name)) for name in PLAIN]
    return Table(headers, rows)


def _onnx_table(files: Sequence[Mapping[str, Any]]) -> Table:
    headers = ("file", "precision", *PLAIN, "macro F1", "MB", "ms per image", "largest difference")
    rows = [
        [
            text_cell(one["file"], "name"),
            text_cell(one["precision"]),
            *(number_cell(one.get(name)) for name in (*PLAIN, "macro_f1")),
            number_cell(one["bytes"] / 1e6, digits=2),
            number_cell(one["latency_ms"], digits=2),
            number_cell(one["max_difference"]),
        ]
        for one in files
    ]
    return Table(headers, rows)


def _per_class_table(by_seed: Sequence[Sequence[Mapping[str, Any]]]) -> Table:
    """A row for each class: means over the seeds."""
    rows = []
    for same in zip(*by_seed, strict=True):
        means = [
            number_cell(sum(row[name] for row in same) / len(same))
            for name in ("precision", "recall", "f1")
        ]
        rows.append([text_cell(same[0]["class"]), *means, setting_cell(same[0]["support"])])
    return Table(("class", "precision", "recall", "F1", "images"), rows)


def _confused_table(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Table:
    """The pairs that were confused most, by share of the true class."""
    pairs = [
        (n / sum(row), n, classes[i], classes[j])
        for i, row in enumerate(counts)
        for j, n in enumerate(row)
        if n and i != j
    ]
    pairs.sort(key=lambda pair: (-pair[0], -pair[1]))
    rows = [
        [text_cell(true), text_cell(named), Cell(f"{n:,}", n, "number"),
         Cell(f"{share:.1%}", share, "number")]
        for share, n, true, named in pairs[:MOST_CONFUSED]
    ]  # fmt: skip
    return Table(("true class", "named", "images", "share of the class"), rows)
