"""The report of a study."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hpo.config.base import flatten
from hpo.formatting import (
    Cell,
    Table,
    duration,
    measured_cell,
    number_cell,
    setting_cell,
    settings_table,
    text_cell,
)
from hpo.paths import Home
from hpo.reports import figures, groups, rungs, study_figures
from hpo.reports.groups import group_table
from hpo.reports.importance import Importances, importances
from hpo.reports.mistakes import Mistakes, mistakes_of
from hpo.reports.page import curve_figures, render
from hpo.reports.summary import Kind, summarize, texts
from hpo.search import fingerprints, sync
from hpo.search.promotion import what_decides
from hpo.search.status import StudyStatus, read_status
from hpo.storage import records
from hpo.storage.database import Database
from hpo.storage.records import FINAL, Trial, WorkerRow
from hpo.storage.url import option


def study_report(database: Database, name: str) -> str:
    """Return the page of a study in any state as HTML. Raises NotFound."""
    status = read_status(database, name)
    found = importances(database, name)
    best = status.best
    mistakes = None if best is None else mistakes_of(database, status, best)
    summary = summarize(status, found)
    return render(
        "study.html",
        _study_figures(status, found) | _confusion(mistakes),
        status=status,
        best=best,
        summary=texts(summary, *(kind for kind in Kind if kind != Kind.NEXT)),
        to_try=texts(summary, Kind.NEXT),
        states=[
            (state, status.count(state), color)
            for state, color in study_figures.STATE_COLORS.items()
            if status.count(state)
        ],
        importances=found,
        mistakes=mistakes if isinstance(mistakes, Mistakes) else None,
        no_mistakes=mistakes if isinstance(mistakes, str) else None,
        largest_matrix=figures.LARGEST_MATRIX,
        hidden=study_figures.hidden(status),
        drawn_curves=len(study_figures.drawn_curves(status)),
        with_epochs=sum(bool(trial.epochs) for trial in status.trials),
        axes=study_figures.parallel_axes(status, found.shares),
        slices=[f"slice-{index}" for index in range(len(status.file.space))],
        searched=None if best is None else settings_table(best.params.items()),
        fixed=None if best is None else settings_table(_fixed(status, best)),
        commands=None if best is None else _commands(database, status, best),
        rungs=rungs.rung_table(status),
        decides=what_decides(status.file),
        so_far=status.best_so_far,
        front=groups.front_table(status) if len(status.file.objectives) > 1 else None,
        fronts=[f"front-{name}" for name in status.file.objectives[1:]],
        groups=_groups(status),
        trials=_trials_table(status),
        workers=_workers_table(status),
        versions=_versions(status),
        data_report=fingerprints.read_report(database, status.row.uuid),
        fingerprints=_fingerprints(database, status),
        code=fingerprints.read_code(database, status.row.uuid),
        storage=database.shown,
    )


def share_report(database: Database, name: str, path: Path) -> str | None:
    """Upload the page in the file `path` to the study's artifacts; return its URL, or None if the
    study keeps none. Raises StorageError."""
    found = sync.find(database, records.get_study(database, name).uuid, Home.default())
    return None if found is None else found.put(path, sync.REPORT)


def _confusion(found: Mistakes | str | None) -> dict[str, Any]:
    return {"confusion": found.confusion} if isinstance(found, Mistakes) else {}


def _study_figures(status: StudyStatus, found: Importances) -> dict[str, Any]:
    best = status.best
    epochs = [{"epoch": row.epoch, **row.metrics} for row in best.epochs] if best else []
    mark = best.best_epoch if best else None
    slices = {
        f"slice-{index}": study_figures.slice_plot(status, name)
        for index, name in enumerate(status.file.space)
    }
    return {
        "history": study_figures.optimization_history(status),
        "intermediate": study_figures.intermediate_values(status),
        "rungs": rungs.rung_figure(status),
        "importance": figures.importance(found) if found.outstanding else None,
        "parallel": study_figures.parallel_coordinate(
            status, study_figures.parallel_axes(status, found.shares)
        ),
        **slices,
        **{
            f"front-{name}": groups.front_figure(status, name)
            for name in status.file.objectives[1:]
        },
        **curve_figures({"best": epochs}, mark),
    }


def _fixed(status: StudyStatus, best: Trial) -> list[tuple[str, Any]]:
    """Return all settings of the best trial that were not searched."""
    whole = flatten(status.file.config(best.params).to_dict())
    return [(name, value) for name, value in whole.items() if name not in best.params]


def _commands(database: Database, status: StudyStatus, best: Trial) -> list[str]:
    """Return the commands to type next, for this database."""
    study, file = shlex.quote(status.row.name), shlex.quote(f"{status.row.name}.best.toml")
    storage = option(database.url, Home.default().storage)
    return [
        f"hpo export {study} --trial {best.number} -o {file}{storage}",
        f"hpo train {file} --seeds 3",
    ]


def _groups(status: StudyStatus) -> list[tuple[str, Table]]:
    """Return the table of each parameter that complete or pruned trials used."""
    tables = [(name, group_table(status, name)) for name in status.file.space]
    single = len(status.file.objectives) == 1
    best = {f"best {status.file.metric}": "best"} if single else {}
    return [
        (name, Table(("value", *(best.get(head, head) for head in table.headers[1:])), table.rows))
        for name, table in tables
        if table.rows
    ]


def _trials_table(status: StudyStatus) -> Table:
    names = list(status.file.space)
    costs = status.file.objectives[1:]
    headers = ("trial", "state", status.file.metric, *costs, "best epoch", "epochs", "seconds")
    rows = [_trial_row(trial, names, costs) for trial in status.trials]
    return Table((*headers, *names, "origin", "reason"), rows)


def _trial_row(trial: Trial, names: Iterable[str], costs: Iterable[str]) -> list[Cell]:
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
        text_cell(trial.origin, "reason"),
        text_cell(trial.reason, "reason"),
    ]


def _workers_table(status: StudyStatus) -> Table:
    """Return a row for each worker: trials that it ended, time that it was busy."""
    attempts = [attempt for trial in status.trials for attempt in trial.attempts]
    rows = []
    for worker in status.workers:
        own = [a for a in attempts if a.worker == worker.id]
        ended = sum(a.outcome in FINAL for a in own)
        busy = sum(status.end_of(a) - a.started for a in own)
        rows.append(
            [
                text_cell(worker.id, "name"),
                text_cell(worker.host),
                text_cell(worker.device),
                Cell(str(ended), ended, "number"),
                Cell(duration(busy), busy, "number"),
                text_cell(_worker_state(status, worker)),
            ]
        )
    return Table(("worker", "host", "device", "trials ended", "busy", "state"), rows)


def _worker_state(status: StudyStatus, worker: WorkerRow) -> str:
    """Return why a worker ended, what it does, or that it is lost."""
    if worker.ended is None and worker not in status.live_workers:
        return "lost"
    return worker.reason or "at work"


def _versions(status: StudyStatus) -> list[tuple[str, str]]:
    """Return (program, versions of the workers), oldest worker first."""
    found: dict[str, dict[str, None]] = {}
    for worker in status.workers:
        for name, version in worker.versions.items():
            found.setdefault(name, {})[version] = None
    return [(name, ", ".join(versions)) for name, versions in found.items()]


def _fingerprints(database: Database, status: StudyStatus) -> list[tuple[str, str]]:
    """Return (settings in words, fingerprint) of the images, as the first worker opened them."""
    found = records.read_resolved(database, status.row.uuid, fingerprints.IMAGES)
    return [
        (_in_words(key.removeprefix(fingerprints.IMAGES)), str(value))
        for key, value in found.items()
    ]


def _in_words(settings: str) -> str:
    """Return `folder, val_fraction 0.15, split_seed 0, folds 3` for the settings of images."""
    values = settings.split("/")
    named = zip(fingerprints.SETTINGS, values, strict=False)
    told = [
        value if name == "dataset" else f"{name} {value}"
        for name, value in named
        if value != "None"
    ]
    later = values[len(fingerprints.SETTINGS) :]
    return ", ".join([*told, *(one.replace("=", " ") for one in later)])
