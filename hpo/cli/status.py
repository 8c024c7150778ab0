"""`hpo list`, `status`, `trials`, `trial`, `logs`, `workers`: the state of studies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hpo.cli.options import (
    Insecure,
    Json,
    On,
    Storage,
    StudyName,
    console,
    database,
    program,
    storage_flag,
    tell_warning,
)
from hpo.errors import InputError, NotFound, StorageError
from hpo.formatting import printable
from hpo.paths import Home

if TYPE_CHECKING:
    from rich.table import Table

    from hpo.search.status import StudyStatus
    from hpo.storage.database import Database
    from hpo.storage.records import Trial, WorkerRow
    from hpo.workers.launchers.base import LaunchedWorker

POLL_S = 0.5
WIDEST = 1_000
"""Columns of a table that may be wider than the terminal."""


def list_studies(as_json: Json = False, storage: Storage = None) -> None:
    """List all studies: state, finished trials of the budget, best value, workers, creation time.

    Example: hpo list
    """
    from hpo.cli.tables import studies_table, to_json
    from hpo.search.status import read_studies

    with database(storage) as found:
        studies, problems = read_studies(found)
        for problem in problems:
            tell_warning(problem)
        if as_json:
            typer.echo(to_json([one.to_dict() for one in studies]))
        elif studies:
            console().print(studies_table(studies))
        elif not problems:
            typer.echo(f"no studies in {found.shown}; to create one: {program()} run STUDY.toml")


def status(
    study: StudyName,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Keep showing it until the study is over; Ctrl-C to stop."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON; durations in seconds, timestamps in Unix time.")
    ] = False,
    storage: Storage = None,
) -> None:
    """Show a study's progress: trials by state, best so far, time left, and its workers.

    Of each worker: device, trial, epoch, last metric and images per second. Where trials pause at
    rungs: how many reached each, and went on.

    Example: hpo status digits --watch
    """
    from hpo.cli import live, tables
    from hpo.cli.console import tell
    from hpo.reports.groups import front_table
    from hpo.reports.rungs import rung_table
    from hpo.reports.summary import as_dicts, summarize
    from hpo.search.status import read_status

    with database(storage) as found:
        now = read_status(found, study)
        if as_json:
            told = {"summary": as_dicts(summarize(now))}
            typer.echo(tables.to_json(now.to_dict() | told))
        elif watch:
            _watch(found, study)
        else:
            out = console()
            out.print(live.Screen(now, clock=lambda: 0.0, read=0.0))
            if len(now.file.objectives) > 1:
                out.print()
                out.print(tables.cells_table(front_table(now)))
            if (rungs := rung_table(now)).rows:
                out.print()
                out.print(tables.cells_table(rungs))
            why = now.no_best if now.state == "finished" else None
            about = _verified(now) or tables.noise_lines(now)
            for line in (now.row.stop_reason, why, now.pruned_note, about):
                if line:
                    tell(out, f"\n{line}")
            for one in now.forced:
                out.print(f"{one.worker} was forced to join: {one}", markup=False, style="yellow")


def _verified(now: StudyStatus) -> str | None:
    """Say which study this one verifies; None for a search."""
    verified = now.file.verifies
    if verified is None:
        return None
    return (
        f"verifies {verified.study}: its trials are configurations of that study with other seeds; "
        f"{program()} verify {verified.study} ranks them"
    )


def _watch(found: Database, study: str) -> None:
    from hpo.cli import live
    from hpo.search.status import read_status

    out, pause = console(), threading.Event()
    with live.opened(out, lambda: read_status(found, study), stays=True) as view:
        while view.tick().state not in ("finished", "stopped"):
            pause.wait(POLL_S)
    live.print_over(view.status, out, hpo=program(), flag=storage_flag(found))


def trials(
    study: StudyName,
    format_: Annotated[
        Literal["table", "csv", "json"], typer.Option("--format", help="How to print them.")
    ] = "table",
    by: Annotated[
        str | None,
        typer.Option(
            metavar="PARAM",
            help="A line for each value of this searched parameter: mean, standard deviation and "
            "best of the metrics at the best epoch; pruned trials are excluded from means.",
            show_default="a line for each trial",
        ),
    ] = None,
    state: Annotated[
        list[str],
        typer.Option(
            "--state",
            metavar="STATE",
            help="Only trials in this state, such as paused or complete; may be repeated.",
            show_default="all",
        ),
    ] = [],  # noqa: B006
    wide: Annotated[
        bool, typer.Option("--wide", help="All trials and parameters, wider than the terminal.")
    ] = False,
    storage: Storage = None,
) -> None:
    """List the trials of a study, best first: state, epochs, value, training time, parameters.

    A terminal shows as many parameters as fit, those first that explain most of the differences;
    --wide shows all. csv and json have all of them, numbers in full precision and times in seconds;
    json has every epoch and attempt. With --by model.architecture, for example, trials are
    summarized by architecture; pruned trials are counted but excluded from means.

    Example: hpo trials digits --format csv > trials.csv
    """
    from hpo.cli import tables
    from hpo.cli.console import tell
    from hpo.search.status import read_status

    with database(storage) as found:
        now = _only(read_status(found, study), state)
    if by is not None:
        _print_groups(now, by, format_)
    elif format_ == "csv":
        typer.echo(tables.trials_csv(now), nl=False)
    elif format_ == "json":
        typer.echo(tables.to_json([one.to_dict() for one in now.trials]))
    else:
        _print_trials(now, wide=wide)
        if not state and (line := tables.noise_lines(now)):
            tell(console(), f"\n{line}")


def _print_trials(now: StudyStatus, *, wide: bool) -> None:
    """Print the best first; a terminal gets what fits, unless `wide`."""
    from hpo.cli.trial_list import MOST, trials_table

    out = console()
    most = MOST if out.is_terminal and not wide else None
    table, more = trials_table(now, out.width, most=most, wide=wide)
    (console(WIDEST) if wide else out).print(table)
    if more:
        out.print(f"{more}: --wide", style="dim")


def _only(now: StudyStatus, states: Sequence[str]) -> StudyStatus:
    """Return the status with the trials in `states` alone; all of them where none is named. Raises
    InputError for another word."""
    from hpo.search.status import STATES

    for one in states:
        if one not in STATES:
            raise InputError(f"--state {one}: allowed: {', '.join(STATES)}")
    kept = tuple(trial for trial in now.trials if not states or trial.state in states)
    return replace(now, trials=kept)


def _print_groups(now: StudyStatus, by: str, format_: str) -> None:
    from hpo.cli import tables
    from hpo.reports.groups import group_data, group_table

    if format_ == "json":
        typer.echo(tables.to_json(group_data(now, by)))
    elif format_ == "csv":
        typer.echo(tables.groups_csv(group_data(now, by)), nl=False)
    else:
        console().print(tables.cells_table(group_table(now, by)))


def trial(
    study: StudyName,
    number: Annotated[int, typer.Argument(metavar="N", min=0, help="Number of the trial, from 0.")],
    source: Annotated[
        bool,
        typer.Option(
            "--source", help="Print the modules of yours that it ran, as they were, instead."
        ),
    ] = False,
    as_json: Json = False,
    storage: Storage = None,
) -> None:
    """Show one trial: parameters, metrics of every epoch, attempts, code, why it ended, and where
    its weights are, if they were kept.

    Example: hpo trial digits 12
    """
    from hpo.cli.tables import sources, to_json, trial_page
    from hpo.search.fingerprints import read_code
    from hpo.search.status import read_status

    with database(storage) as found:
        now = read_status(found, study)
        code = read_code(found, now.row.uuid)
        wanted = next((one for one in now.trials if one.number == number), None)
        if wanted is None:
            last = max((one.number for one in now.trials), default=None)
            have = "it has none yet" if last is None else f"allowed: 0 to {last}"
            raise NotFound(f"no trial {number} in study {study!r}; {have}")
        if source:
            typer.echo(sources(now, wanted, code), nl=False)
            return
        weights = _weights(found, now, wanted)
    if as_json:
        typer.echo(to_json({"study": study, "weights": weights, **wanted.to_dict()}))
        return
    out = console()
    out.print(trial_page(now, wanted, code))
    if weights:
        out.print(f"\nweights of its best epoch: {weights}", markup=False, soft_wrap=True)


def _weights(found: Database, now: StudyStatus, trial: Trial) -> str | None:
    """Return where a complete trial's weights are, or why that is unknown; None if not kept."""
    from hpo.search.sync import find_weights

    if trial.state != "complete" or not trial.attempts:  # another tool may have made it
        return None
    try:
        return find_weights(found, Home.default(), now.row.uuid, trial.attempts[-1])
    except StorageError as error:
        return str(error)


def logs(
    study: StudyName,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", "-f", help="Keep printing until the study is over; Ctrl-C to stop."
        ),
    ] = False,
    worker: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Only this worker's.", show_default="all workers"),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="LAUNCHER",
            help="Read them from the nodes of ray or ray://HOST:PORT, through Ray.",
            show_default="the files under HPO_HOME",
        ),
    ] = None,
    insecure: Insecure = False,
    storage: Storage = None,
) -> None:
    """Print the logs of the workers that `hpo run` or `hpo launch` started.

    They are files under HPO_HOME on the worker's host; Slurm's hosts usually share them, and Ray's
    are read with --on, as long as the worker is alive.

    Example: hpo logs digits -f
    """
    from hpo.search.status import read_status
    from hpo.workers.launchers import open_launcher
    from hpo.workers.launchers.base import Target

    with (
        database(storage) as found,
        open_launcher(on or "local", Home.default(), insecure=insecure) as launcher,
    ):
        now = read_status(found, study)
        target = Target(study, now.row.uuid)
        tail = Tail(lambda seen: launcher.logs(target, seen), worker)
        pause = threading.Event()
        while True:
            over = not follow or read_status(found, study).state in ("finished", "stopped")
            for line in tail.fresh():
                typer.echo(printable(line))
            if not tail.read:
                raise NotFound(_no_logs(study, worker, tail.others, on))
            if over:
                return
            pause.wait(POLL_S)


def _no_logs(study: str, worker: str | None, others: set[str], on: str | None) -> str:
    if worker is not None and others:
        return f"no log of a worker {worker!r}; there are logs of: {', '.join(sorted(others))}"
    if on is not None:
        return (
            f"no worker of study {study!r} is on {on}; logs of earlier ones are files under "
            "HPO_HOME on their hosts"
        )
    return (
        f"no logs of study {study!r} under {Home.default().root} on this host: workers of `hpo "
        "run` and `hpo launch` write there; for those on Ray: --on ray://...; `hpo worker` logs "
        "to its terminal"
    )


class Tail:
    """Lines of logs, each read once; with several logs a line begins with its worker.

    `after` returns, for each worker, its log from an offset in bytes.
    """

    def __init__(
        self, after: Callable[[Mapping[str, int]], Mapping[str, bytes]], worker: str | None = None
    ) -> None:
        self.after, self.worker = after, worker
        self.read: dict[str, int] = {}
        self.others: set[str] = set()

    def fresh(self) -> Iterator[str]:
        """Yield complete lines that were written since the last call."""
        while True:
            found = self.after(self.read)
            self.others = {name for name in found if self.worker not in (None, name)}
            parts = {name: text for name, text in found.items() if name not in self.others}
            several = len(self.read | dict.fromkeys(parts, 0)) > 1
            progress = False
            for name, data in parts.items():
                whole = data[: data.rfind(b"\n") + 1]
                self.read[name] = self.read.get(name, 0) + len(whole)
                progress = progress or bool(whole)
                prefix = f"{name} | " if several else ""
                yield from (prefix + line for line in whole.decode(errors="replace").splitlines())
            if not progress:
                return


def workers(
    study: StudyName,
    all_: Annotated[
        bool, typer.Option("--all", help="Also ended workers, with the reason.")
    ] = False,
    on: On = None,
    insecure: Insecure = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON; durations in seconds, timestamps in Unix time.")
    ] = False,
    storage: Storage = None,
) -> None:
    """List a study's workers: host, device, state, trial, and when they were last seen.

    With --on, also as the launcher lists them: only it knows those that still wait in its queue.

    Example: hpo workers digits --all
    """
    from hpo.cli.tables import to_json
    from hpo.search.status import read_status
    from hpo.workers.launchers import open_launcher
    from hpo.workers.launchers.base import Target

    with database(storage) as found:
        now = read_status(found, study)
    placed: list[LaunchedWorker] = []
    if on is not None:
        with open_launcher(on, Home.default(), insecure=insecure) as launcher:
            placed = launcher.launched(Target(now.row.name, now.row.uuid))
    chosen = now.workers if all_ else now.live_workers
    if as_json:
        data = [asdict(one) | {"state": _state(now, one)} for one in chosen]
        typer.echo(to_json({"workers": data, "placed": [asdict(one) for one in placed]}))
        return
    out = console()
    if not chosen:
        out.print(
            f"no live workers of {study}" + ("" if all_ else "; --all lists those that have ended")
        )
    else:
        out.print(workers_table(now, chosen))
    if on is not None:
        out.print()
        out.print(placed_table(placed) if placed else f"no workers of {study} on {on}")


def _state(now: StudyStatus, worker: WorkerRow) -> str:
    """Return preparing (a trial), training, between trials, lost (its heartbeat stopped), or
    ended."""
    if worker.ended is not None:
        return "ended"
    if worker not in now.live_workers:
        return "lost"
    if worker.number is None:
        return "between trials"
    return "training" if worker.epochs else "preparing"


def workers_table(now: StudyStatus, workers: Iterable[WorkerRow]) -> Table:
    """Return a table of workers, a line each."""
    from hpo.cli.console import Text
    from hpo.cli.tables import plain_table
    from hpo.formatting import duration

    table = plain_table("worker", "host", "device", "state", "trial", "seen", "reason",
                        right=("trial", "seen"))  # fmt: skip
    for one in workers:
        state = _state(now, one)
        table.add_row(
            Text(one.id),
            Text(one.host),
            one.device,
            Text(state, STYLES[state]),
            "-" if one.number is None else str(one.number),
            f"{duration(max(0.0, now.now - one.seen))} ago",
            Text(one.reason or ""),
        )
    return table


STYLES = {
    "preparing": "cyan",
    "training": "cyan",
    "between trials": "dim",
    "lost": "magenta",
    "ended": "dim",
}


def placed_table(placed: Sequence[LaunchedWorker]) -> Table:
    """Return a table of a launcher's workers, a line each."""
    from hpo.cli.console import Text
    from hpo.cli.tables import plain_table

    table = plain_table("placed", "state", "host", "")
    for one in placed:
        table.add_row(Text(one.name), one.state, Text(one.host or "-"), Text(one.note))
    return table
