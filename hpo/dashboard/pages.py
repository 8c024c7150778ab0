"""hpo's own pages at /hpo: live workers, trials with all metrics and reasons, logs, the report,
and what steers a study.

Pages are made here, whole; one small script replaces their live part. Writes come as forms, and the
gateway has checked the login, the origin and --read-only before they get here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from werkzeug.wrappers import Response

from hpo.config.metrics import COSTS
from hpo.config.toml import parse_assignments
from hpo.dashboard.gateway import PAGE_POLICY, Request, read_form, redirect
from hpo.dashboard.pictures import PICTURES, names_of
from hpo.errors import ConfigError, HpoError, InputError, NotFound, StorageError
from hpo.formatting import (
    Cell,
    Table,
    duration,
    measured_cell,
    number,
    number_cell,
    plural,
    printable,
    setting_cell,
    settings_table,
    text_cell,
)
from hpo.paths import Home
from hpo.reports.figures import finite
from hpo.reports.rungs import rung_table
from hpo.reports.study import study_report
from hpo.reports.study_figures import STATE_COLORS, focus, is_maximized, measured_trials
from hpo.reports.summary import Kind, summarize, texts
from hpo.search import study as studies
from hpo.search.status import STATES, StudyStatus, read_status, read_studies, words_of
from hpo.storage import records
from hpo.storage.database import Database
from hpo.storage.records import Trial, WorkerRow

FOLDER = Path(__file__).parent / "templates"
KINDS = (Kind.SEARCHED, Kind.AGAINST, Kind.NOISE, Kind.NEXT)
"""Sentences of the summary beside the lead."""
PAGE_TRIALS = 100
"""Trials on a page."""
LOG_BYTES = 64 * 1024
"""What is shown of the end of each log."""
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; "
    f"img-src 'self' data:{PAGE_POLICY}"
)
REPORT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    f"img-src data: blob:{PAGE_POLICY}"
)
"""Beside the report's own, which lets only scripts run that carry its nonce."""
HIDDEN = ("seconds", "images_per_s")
"""Of an epoch's metrics, those that have columns of their own, or none."""
HISTORY_WIDTH, HISTORY_HEIGHT, EDGE = 1000, 120, 8
STUDY = r"/hpo/studies/(?P<name>[A-Za-z0-9._-]+)"
PICTURE_POLICY = "default-src 'none'; img-src data:; sandbox; frame-ancestors 'none'"
NOTHING: Mapping[str, str] = {}
"""The fields of a form that was not sent."""
TOLD = {
    "stop": "Stopping: workers save after the current epoch and exit.",
    "resume": "Resumed. Workers that wait go on; to start more: hpo resume, or hpo worker.",
    "extend": "Extended.",
    "enqueue": "Queued as the next trial.",
}
"""What a page says after each action."""


@dataclass(frozen=True)
class Pages:
    """Pages over the studies of `database`; `read_only` ones show no forms."""

    database: Database
    read_only: bool = False

    def respond(self, request: Request) -> Response:
        """Answer a request for /hpo or what is below it."""
        try:
            return self._respond(request)
        except NotFound as error:
            return self._page("problem.html", 404, title="Not found", problem=str(error))
        except StorageError:
            raise
        except HpoError as error:
            return self._page("problem.html", 500, title="Not shown", problem=str(error))

    def _respond(self, request: Request) -> Response:
        if request.path == "/hpo":
            return self._overview()
        if request.path == "/hpo/refresh.js":
            return Response((FOLDER / "refresh.js").read_bytes(), mimetype="text/javascript")
        for pattern, answer in self._routes.items():
            match = re.fullmatch(STUDY + pattern, request.path, re.ASCII)
            if match is not None:
                return answer(request, **match.groupdict())
        raise NotFound(f"no page {request.path}")

    @cached_property
    def _routes(self) -> dict[str, Callable[..., Response]]:
        return {
            "": self._study,
            r"/trials/(?P<trial>\d{1,9})": self._trial,
            rf"/trials/(?P<trial>\d{{1,9}})/(?P<picture>{'|'.join(PICTURES)})\.svg": self._picture,
            "/logs": self._logs,
            "/report": self._report,
            f"/(?P<action>{'|'.join(TOLD)})": self._act,
        }

    def _overview(self) -> Response:
        found, problems = read_studies(self.database)
        table = studies_table(found)
        return self._page("overview.html", title="Studies", table=table, problems=problems)

    def _study(
        self,
        request: Request,
        name: str,
        problem: str = "",
        given: Mapping[str, str] = NOTHING,
        code: int = 200,
    ) -> Response:
        status = read_status(self.database, name)
        state = request.args.get("state", "")
        chosen = [one for one in reversed(status.trials) if state in ("", one.state)]
        pages = max(1, -(-len(chosen) // PAGE_TRIALS))
        page = min(max(1, request.args.get("page", 1, int)), pages)
        shown = chosen[(page - 1) * PAGE_TRIALS : page * PAGE_TRIALS]
        return self._page(
            "progress.html",
            code,
            title=name,
            status=status,
            told_of=texts(summarize(status), *KINDS),
            states=[(one, status.count(one)) for one in STATES if status.count(one)],
            colors=STATE_COLORS,
            state=state,
            page=page,
            pages=pages,
            trials=trials_table(status, shown),
            workers=workers_table(status),
            rungs=rung_table(status),
            history=history_svg(status),
            problem=problem,
            told=TOLD.get(request.args.get("told", ""), ""),
            given=given,
        )

    def _trial(self, request: Request, name: str, trial: str) -> Response:
        status, chosen = self._find(name, trial)
        return self._page(
            "trial.html",
            title=f"{name}, trial {trial}",
            status=status,
            trial=chosen,
            pictures=names_of(self.database, status, chosen),
            parameters=settings_table(chosen.params.items()),
            epochs=epochs_table(chosen),
            attempts=attempts_table(status, chosen),
        )

    def _picture(self, request: Request, name: str, trial: str, picture: str) -> Response:
        drawn = PICTURES[picture](self.database, *self._find(name, trial))
        if drawn is None:
            raise NotFound(f"trial {trial} in study {name!r} has no picture {picture!r}")
        return Response(drawn, headers={"Content-Security-Policy": PICTURE_POLICY}, mimetype=SVG)

    def _find(self, name: str, trial: str) -> tuple[StudyStatus, Trial]:
        status = read_status(self.database, name)
        chosen = next((one for one in status.trials if one.number == int(trial)), None)
        if chosen is None:
            raise NotFound(f"no trial {trial} in study {name!r}")
        return status, chosen

    def _logs(self, request: Request, name: str) -> Response:
        row = records.get_study(self.database, name)
        logs = _read_logs(Home.default().study(row.uuid).logs)
        return self._page("logs.html", title=f"{name}, logs", name=name, logs=logs)

    def _report(self, request: Request, name: str) -> Response:
        page = study_report(self.database, name)
        return Response(page, headers={"Content-Security-Policy": REPORT_POLICY}, mimetype=HTML)

    def _act(self, request: Request, name: str, action: str) -> Response:
        """Do what a form asks for, and show the study; where it is refused, say why there."""
        if request.reads:
            raise NotFound(f"{request.path}: this is the target of a form")
        request.max_content_length = None  # beyond the server's own, of all bodies
        study, form = studies.load(self.database, name), read_form(request)
        try:
            _ACTIONS[action](study, form)
        except StorageError:
            raise
        except HpoError as error:
            return self._study(request, name, str(error), form, 409)
        return redirect(f"/hpo/studies/{name}?told={action}")

    def _page(self, template: str, code: int = 200, **values: Any) -> Response:
        page = _environment().get_template(template).render(read_only=self.read_only, **values)
        text = page.encode(errors="backslashreplace")
        return Response(text, code, {"Content-Security-Policy": POLICY}, mimetype=HTML)


HTML, SVG = "text/html", "image/svg+xml"


def _stop(study: studies.Study, form: Mapping[str, str]) -> None:
    studies.stop(study)


def _resume(study: studies.Study, form: Mapping[str, str]) -> None:
    studies.resume(study)


def _extend(study: studies.Study, form: Mapping[str, str]) -> None:
    """Raise the budget by the form's `trials`, and its `time` such as 30m."""
    more, time = form.get("trials", "").strip(), form.get("time", "").strip()
    if not more and not time:
        raise InputError("extend: say how many more trials, or how much more time, such as 30m")
    limits = studies.Limits()
    if more:
        limits["trials"] = (study.row.budget or 0) + _count(more)
    if time:
        limits["max_time"] = _more_time(study, time)
    studies.extend(study, **limits)


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,6}", text, re.ASCII):
        raise InputError(f"trials: {text!r}; allowed: a number from 1")
    return int(text)


def _more_time(study: studies.Study, text: str) -> float:
    from hpo.formatting import parse_duration

    try:
        return (study.row.max_time_s or 0.0) + parse_duration(text)
    except ValueError as error:
        raise InputError(f"time: {text!r}: {error}") from None


def _enqueue(study: studies.Study, form: Mapping[str, str]) -> None:
    """Queue the form's `values`, a line KEY=VALUE each."""
    values = parse_assignments(line for line in form.get("values", "").splitlines() if line.strip())
    if not values:
        raise ConfigError("enqueue: write KEY=VALUE, a line each, for example optimizer.lr=0.1")
    studies.enqueue(study, values)


_ACTIONS: dict[str, Callable[[studies.Study, Mapping[str, str]], None]] = {
    "stop": _stop,
    "resume": _resume,
    "extend": _extend,
    "enqueue": _enqueue,
}


def _read_logs(folder: Path) -> list[tuple[str, str]]:
    """Return (worker, the end of its log) of the logs on this host, the newest first."""
    paths = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [(path.stem, _end_of(path)) for path in paths]


def _end_of(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - LOG_BYTES))
        text = file.read().decode(errors="replace")
    lines = text.splitlines()[1 if size > LOG_BYTES else 0 :]
    return "\n".join(map(printable, lines))


def _environment() -> Environment:
    """Return the templates here, and the report's style and tables."""
    import hpo.reports

    reports = Path(hpo.reports.__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader([FOLDER, reports]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "duration": duration, "plural": plural}
    environment.globals["state_of"] = _state_of
    return environment


def _state_of(status: StudyStatus) -> str:
    """Return a study's state in words, and why it stopped."""
    why = f": {status.row.stop_reason}" if status.row.stop_reason else ""
    return f"{status.state}{why}"


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
            text_cell(f"about {duration(one.eta_s)}" if one.eta_s else ""),
        ]
        for one in found
    ]
    return Table(("study", "state", "trials", "metric", "best", "workers", "time left"), rows)


def trials_table(status: StudyStatus, trials: Sequence[Trial]) -> Table:
    """Return a row for each of `trials`: every metric at its best epoch, costs, why it ended, where
    it ran, its parameters."""
    metrics = _metrics(status.trials, status.file.metric)
    costs = [name for name in status.file.objectives if name in COSTS]
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
                *(measured_cell(name, trial.values.get(name)) for name in costs),
                text_cell(hosts.get(trial.attempts[-1].worker) if trial.attempts else None),
                text_cell(trial.origin),
            ]
        )
    head = ("trial", "state", metrics[0], "best epoch", "time", "reason")
    return Table((*head, *names, *metrics[1:], *costs, "ran on", "origin"), rows)


def _metrics(trials: Iterable[Trial], first: str) -> list[str]:
    """Return the metrics that any epoch has, the first objective first."""
    found = {name for trial in trials for row in trial.epochs for name in row.metrics}
    return [first, *sorted(found - {first, *HIDDEN})]


def _at_best(trial: Trial, metrics: Iterable[str]) -> list[float | None]:
    row = next((row for row in trial.epochs if row.epoch == trial.best_epoch), None)
    return [finite(row.metrics.get(name)) if row else None for name in metrics]


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
            *(number_cell(finite(row.metrics.get(name))) for name in names),
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
            text_cell(duration(status.end_of(one) - one.started)),
            text_cell(words_of(one)),
            text_cell(one.reason, "reason"),
        ]
        for one in trial.attempts
    ]
    return Table(("attempt", "worker", "time", "outcome", "reason"), rows)


def history_svg(status: StudyStatus) -> Markup | None:
    """Draw the best value of each trial and the best so far; None without two values. Values far
    below the others are drawn at the edge."""
    maximize = is_maximized(status)
    trials = [one for one in measured_trials(status) if finite(one.value) is not None]
    values = [one.value for one in trials if one.value is not None]
    if len(values) < 2:
        return None
    low, high = focus(values, maximize=maximize) or (min(values), max(values))
    last = max(one.number for one in trials)

    def at(place: int, value: float) -> str:
        share = (min(max(value, low), high) - low) / ((high - low) or 1.0)
        x = EDGE + (HISTORY_WIDTH - 2 * EDGE) * place / (last or 1)
        return f"{x:.1f},{HISTORY_HEIGHT - EDGE - (HISTORY_HEIGHT - 2 * EDGE) * share:.1f}"

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
        f'<svg viewBox="0 0 {HISTORY_WIDTH} {HISTORY_HEIGHT}" role="img" aria-label="{label}">'
        f"{path}{''.join(dots)}</svg>"
    )
