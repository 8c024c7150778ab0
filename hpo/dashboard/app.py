"""optuna-dashboard over a database of hpo's: the app behind the gateway, with notes and figures.

Its caches go by the ids of studies and trials. Tables that hpo made never give out an id twice;
those of others do on SQLite, once the newest study is deleted. So every request reads which study
an id belongs to, and if that has changed, optuna-dashboard is made anew, with empty caches.

Notes and figures are computed when they are looked at, and put into the answer that the page reads:
nothing is written, so nothing gets stale, costs a worker time, or makes each later request slower,
as notes in the database would (optuna-dashboard searches all of them for each trial). A note that
somebody wrote stays as it is.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from werkzeug.wrappers import Response

from hpo.config.metrics import COSTS
from hpo.dashboard import pictures
from hpo.dashboard.gateway import Request, json_response, refusal
from hpo.dashboard.pages import Pages
from hpo.errors import ConfigError, InputError, StorageError
from hpo.formatting import duration, measured, number, plural, sparkline
from hpo.paths import Home
from hpo.reports import rungs, study_figures, summary
from hpo.search import study as studies
from hpo.search.status import StudyStatus, read_status
from hpo.storage import records
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage, cached
from hpo.storage.records import Trial
from hpo.storage.schema import create_schema

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

STUDY = re.compile(r"/api/studies/(\d+)")
HEALTH_S = 2.0
FRESH_S = 4.0
"""A status that was read so short a time ago is good enough: pages ask every ten seconds."""
PICTURED = 3
"""So many of the best trials have pictures in their notes."""
MOST_LINES = 200
"""Trials whose curves are drawn."""


class DashboardApp:
    """The WSGI app of `database`, whose tables are created if they are missing: hpo's own pages at
    /hpo, optuna-dashboard everywhere else."""

    def __init__(self, database: Database, *, read_only: bool = False) -> None:
        create_schema(database)
        self.database = database
        self._pages = Pages(database, read_only)
        self._notes = Notes(database)
        self._lock = threading.Lock()
        self._identities = records.study_identities(database)
        self._app = _optuna_dashboard(database)

    def __call__(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        """Answer a request that the gateway let through."""
        return self._respond(Request(environ))(environ, start)

    def _respond(self, request: Request) -> Response:
        if request.path == "/hpo" or request.path.startswith("/hpo/"):
            return self._pages.respond(request)
        if not request.path.startswith(("/api/", "/csv/")):
            return Response.from_app(self._app, request.environ)
        app = self._current()
        match = STUDY.fullmatch(request.path)
        if request.method == "DELETE" and match is not None:
            response = self._delete(int(match[1]))
            if response is not None:
                return response
        response = Response.from_app(app, request.environ)
        if request.method == "GET" and match is not None and response.status_code == 200:
            detail = json.loads(response.get_data())
            self._notes.add(int(match[1]), detail)
            response.set_data(json.dumps(detail, separators=(",", ":")))
        # The pages read JSON out of every response, and take one without for a failure.
        return json_response(200, {}) if response.status_code == 204 else response

    def _delete(self, study_id: int) -> Response | None:
        """Delete as `hpo delete` does, files included; return None if the study is not hpo's."""
        rows = records.list_studies(self.database)
        name = next((row.name for row in rows if row.study_id == study_id), None)
        if name is None:
            return None
        try:
            studies.delete(studies.load(self.database, name), Home.default())
        except InputError as error:
            return refusal(409, str(error))
        return json_response(200, {})

    def _current(self) -> WSGIApplication:
        """Return the app, made anew if an id that it knows now belongs to another study, or to
        none."""
        current = records.study_identities(self.database)
        with self._lock:
            if any(current.get(key) != known for key, known in self._identities.items()):
                self._app = _optuna_dashboard(self.database)
            self._identities = current
            return self._app


def _optuna_dashboard(database: Database) -> WSGIApplication:
    import optuna_dashboard
    from optuna_dashboard import _importance

    _importance.param_importance_cache.clear()  # a module's, by the same ids
    app: WSGIApplication = optuna_dashboard.wsgi(cached(FencedStorage(database)))
    return app


class Health:
    """Whether the database answers. One thread at a time asks it, every HEALTH_S at most, so that
    requests of strangers cost nothing and a database that hangs blocks one thread alone."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._lock = threading.Lock()
        self._healthy, self._asked = True, -HEALTH_S

    def __call__(self) -> bool:
        """Return whether the database answered when it was last asked."""
        if not self._lock.acquire(blocking=False):
            return self._healthy and time.monotonic() - self._asked < HEALTH_S
        try:
            if time.monotonic() - self._asked >= HEALTH_S:
                self._asked = time.monotonic()
                self._healthy = self._ask()
        finally:
            self._lock.release()
        return self._healthy

    def _ask(self) -> bool:
        try:
            records.clock(self.database)
        except StorageError:
            return False
        return True


class Notes:
    """Notes and figures, in optuna-dashboard's pages, of the studies of `database`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._read: dict[int, tuple[float, StudyStatus]] = {}

    def add(self, study_id: int, detail: dict[str, Any]) -> None:
        """Add to what optuna-dashboard tells of a study; nothing to one that is not hpo's."""
        status = self._status(study_id)
        if status is None:
            return
        if detail["note"]["version"] <= 1:
            detail["note"]["body"] = study_note(status, detail["note"]["body"])
        known = {trial.number: trial for trial in status.trials}
        best = [trial.number for trial in status.ranked()[:PICTURED]]
        for one in (*detail["trials"], *detail["best_trials"]):
            trial = known.get(one["number"])
            if trial is not None and not one["note"]["version"]:
                shown = self._pictures(status, trial) if trial.number in best else []
                one["note"]["body"] = trial_note(status, trial, shown)
        detail["plotly_graph_objects"] += [
            {"id": name, "graph_object": json.dumps(figure)} for name, figure in _figures(status)
        ]

    def _pictures(self, status: StudyStatus, trial: Trial) -> list[str]:
        return pictures.names_of(self._database, status, trial)

    def _status(self, study_id: int) -> StudyStatus | None:
        with self._lock:
            when, status = self._read.get(study_id, (-FRESH_S, None))
            if status is not None and time.monotonic() - when < FRESH_S:
                return status
        rows = records.list_studies(self._database)
        name = next((row.name for row in rows if row.study_id == study_id), None)
        if name is None:
            return None
        try:
            status = read_status(self._database, name)
        except ConfigError:  # of a newer hpo
            return None
        with self._lock:
            self._read = {study_id: (time.monotonic(), status)}
        return status


def study_note(status: StudyStatus, decides: str) -> str:
    """Return a study's note as Markdown: its summary, what `decides` which trials go on, how to
    reproduce it, and where to see more."""
    name = status.row.name
    place = f"/hpo/studies/{name}"
    told = [f"- {_plain(one.text)}" for one in summary.summarize(status)]
    lines = [
        f"[Workers, logs, all metrics, stop and extend]({place}) · [report]({place}/report)",
        "",
        *told,
        "",
        decides,
        "",
        "To export and retrain the best configuration:",
        "",
        f"    hpo export {name}\n    hpo train {name}.best.toml --seeds 3",
        "",
        "The study file as it was given:",
        "",
        *(f"    {line}" for line in status.file.text.splitlines()),
        "",
        "",  # what somebody adds is no part of the file
    ]
    return "\n".join(lines)


def trial_note(status: StudyStatus, trial: Trial, shown: list[str]) -> str:
    """Return a trial's note as Markdown: why it ended, the curves of all its metrics, the command
    that exports it, and its pictures `shown`."""
    place = f"/hpo/studies/{status.row.name}/trials/{trial.number}"
    ended = f"**{trial.state}**" + (f": {_plain(trial.reason)}" if trial.reason else "")
    lines = [
        f"{ended}. {_plain(trial.origin)}. [All of it]({place})",
        "",
        *_metrics(trial),
        "",
        f"    hpo export {status.row.name} --trial {trial.number}",
        "",
        *(f"![{name}]({place}/{name}.svg)" for name in shown),
    ]
    return "\n".join(lines)


def _metrics(trial: Trial) -> Iterator[str]:
    """Yield the lines of a table of the metrics: curve, best epoch's value, last value; then what
    it cost."""
    if not trial.epochs:
        return
    yield "| | | best epoch | last |"
    yield "|---|---|---|---|"
    best = next((row for row in trial.epochs if row.epoch == trial.best_epoch), trial.epochs[-1])
    for name in sorted({name for row in trial.epochs for name in row.metrics}):
        values = [row.metrics[name] for row in trial.epochs if name in row.metrics]
        cells = (number(best.metrics.get(name)), number(trial.epochs[-1].metrics.get(name)))
        yield f"| {_plain(name)} | {sparkline(values)} | {' | '.join(cells)} |"
    yield ""
    costs = [f", {name} {measured(name, trial.values[name])}" for name in COSTS
             if name in trial.values]  # fmt: skip
    spent = f"{plural(len(trial.epochs), 'epoch')} in {plural(len(trial.attempts), 'attempt')}"
    yield f"{spent}, {duration(trial.seconds)} of training{''.join(costs)}"


def _plain(text: str) -> str:
    """Return `text` as one line that Markdown shows as it is: it may come from outside."""
    line = " ".join(text.split())
    return "".join(f"\\{one}" if one in "\\`*_[]<>|#!&~" else one for one in line)


def _fewer(status: StudyStatus) -> StudyStatus:
    """Return the status with the best MOST_LINES trials of those that have a value."""
    if len(status.trials) <= MOST_LINES:
        return status
    states = {trial.state for trial in study_figures.measured_trials(status)}
    best = status.ranked(*states)
    return replace(status, trials=tuple(best[:MOST_LINES]))


def _figures(status: StudyStatus) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield figures of the whole study, by the name that the page shows."""
    drawn = {
        "Curves-by-outcome": study_figures.intermediate_values(_fewer(status)),
        "Value-against-cost": study_figures.value_against_time(status),
        "Worker-timeline": study_figures.worker_timeline(status),
        "Promotion-rungs": rungs.rung_figure(status),
    }
    yield from ((name, one) for name, one in drawn.items() if one is not None)
