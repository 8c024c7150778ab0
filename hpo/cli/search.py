"""`hpo check`, `schema` and `run`: before and during a search."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hpo.cli import background, limits
from hpo.cli.init import FromScratch, Quick, is_data, study_file_of, wished
from hpo.cli.options import (
    Artifacts,
    Device,
    Force,
    Json,
    Log,
    Overrides,
    Plain,
    Quiet,
    Storage,
    StudyPath,
    Workers,
    WorkersDevice,
    WorkersPerDevice,
    again_arguments,
    confirm,
    console,
    database,
    on_replacing,
    program,
    quiet_optuna,
    say,
    storage_flag,
    tell_note,
    warn_of_password,
    working,
)
from hpo.errors import Conflict, HpoError, InputError, Interrupted, LimitsRaised
from hpo.paths import Home
from hpo.workers import process

if TYPE_CHECKING:
    import threading

    from rich.console import Console

    from hpo.api.creation import Opened
    from hpo.api.study import Study
    from hpo.cli.background import Terminal
    from hpo.config.study import StudyFile
    from hpo.reports.progress import View
    from hpo.workers.notify import Notifier
    from hpo.workers.supervisor import Supervisor


def check(
    study_file: StudyPath,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Number of workers to estimate for.",
            show_default="one per device",
        ),
    ] = None,
    device: Device = None,
    trials: limits.Trials = None,
    time: limits.MaxTime = None,
    max_full_trainings: limits.MaxFullTrainings = None,
    as_json: Json = False,
    set_: Overrides = [],  # noqa: B006  (Typer's way to say: repeatable)
) -> None:
    """Check the data and try every architecture before a search; nothing is written.

    Validates the file; decodes every image of every split, test included (unreadable files are
    named; the test pixels are not used); reports anomalies in the data; builds every architecture
    of the space; runs one training step at the largest batch size; and estimates memory, seconds
    per epoch, and what the search will spend until its first budget is spent: trials, full
    trainings, epochs and time. For frozen layers, whose outputs are computed once, it estimates the
    disk space, and the cost of the first and of later trials.

    Example: hpo check studies/digits.toml --workers 2
    """
    from hpo.cli.console import tell
    from hpo.config.study import StudyFile
    from hpo.config.toml import parse_assignments

    set_ = [*set_, *limits.assignments(trials, time, max_full_trainings)]
    file = StudyFile.load(study_file, parse_assignments(set_))
    count = len(process.spread(workers, 1, device))
    with working("loading torch"):
        from hpo.trained.dry_run import check as examine

        result = examine(
            file,
            home=Home.default(),
            device=process.first_device(device),
            workers=count,
            threads=process.threads_for(count),
        )
    if as_json:
        say(as_json, result.to_dict())
        return
    tell(console(), str(result))


def schema() -> None:
    """Print the JSON Schema of a study file: every field, its range and default.

    A TOML editor completes and checks with it while you type.

    Example: hpo schema > study.schema.json
    """
    from hpo.config.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def run(
    study_file: Annotated[
        Path,
        typer.Argument(
            metavar="STUDY.toml|DATA",
            help="The study file; or a folder of images, or a CSV file of labels, for which the "
            "file that hpo init would write is written and run.",
            show_default=False,
        ),
    ],
    workers: Workers = None,
    workers_per_device: WorkersPerDevice = "1",
    device: WorkersDevice = None,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Serve optuna-dashboard during the search.")
    ] = False,
    plain: Plain = False,
    quiet: Quiet = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print only the result, as JSON: that of hpo status.")
    ] = False,
    notify: Annotated[
        list[str],
        typer.Option(
            metavar="bell|URL|COMMAND",
            help="At the end and in trouble: ring the bell, post JSON to a webhook, or run a "
            "command with it on standard input; repeatable. Also one in HPO_NOTIFY.",
            show_default="none",
        ),
    ] = [],  # noqa: B006
    log: Log = [],  # noqa: B006
    force: Force = False,
    trials: limits.Trials = None,
    time: limits.MaxTime = None,
    max_full_trainings: limits.MaxFullTrainings = None,
    quick: Quick = False,
    from_scratch: FromScratch = False,
    set_: Overrides = [],  # noqa: B006
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STUDY",
            help="Take the finished trials of this study of the same database over, as far as they "
            "lie in the new space: they count as seen, not in the budget. Only when the study is "
            "created.",
            show_default="none",
        ),
    ] = None,
    learn_from: Annotated[
        list[str],
        typer.Option(
            metavar="STUDY|auto",
            help="Try the best configurations of this earlier study first; repeatable. auto: of "
            "every compatible study. Only when the study is created.",
            show_default="study.learn_from of the file, else none",
        ),
    ] = [],  # noqa: B006
    learn_storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="HPO_LEARN_STORAGE",
            callback=warn_of_password,
            help="Database of the studies to learn from.",
            show_default="the same",
        ),
    ] = None,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", "-y", help="Extend a study that exists to higher limits without asking."
        ),
    ] = False,
    storage: Storage = None,
    artifacts: Artifacts = None,
) -> None:
    """Search: create or resume the study, run workers, show them live, and print the result.

    Ctrl-C hands the running trials back and exits; the same command resumes them. A second Ctrl-C
    exits at once. The key q leaves the search running in the background. More workers may join at
    any time, from any host: hpo worker STUDY.

    Of a study that exists, higher limits (--trials 32, --time 2h, --set epochs=30, in the file)
    extend it. Another definition is refused, unless nothing of the study was trained yet: then it
    is replaced.

    The search ends with the first of --trials, --time and --max-full-trainings, or of the limits in
    the file. With a time and no number of trials there are as many as fit.

    The exit code is 0 only if the study is finished and has a best trial, so that `hpo run ... &&
    hpo export ...` is safe; 130 after Ctrl-C or SIGTERM; 1 if no trial was completed, another
    command stopped the study, or q left it; 2 if the search could not start, or the database file
    was removed meanwhile.

    Example: hpo run studies/digits.toml --workers 2; hpo run photos/ --time 1h
    """
    terminal = None if plain or quiet or as_json else background.fork()
    from hpo.api.creation import Learning, fetch_weights, open_study
    from hpo.api.study import Study
    from hpo.cli.console import tell
    from hpo.config.study import StudyFile
    from hpo.config.toml import parse_assignments
    from hpo.search.trackers import require
    from hpo.storage.records import find_study
    from hpo.workers.notify import Notifier
    from hpo.workers.spawn import EarlyWorkers, WorkerCommand

    set_ = [*set_, *limits.assignments(trials, time, max_full_trainings), *_log_assignment(log)]
    per_device = read_per_device(workers_per_device)
    process.require_count(workers, per_device)
    process.require_device(device)
    quiet, out = quiet or as_json, console(stderr=as_json)
    say = no_line if quiet else partial(tell, out)
    if is_data(study_file):
        wish = wished(time, trials, quick, from_scratch, device)
        with working("reading the images", shown=not quiet, out=out):
            study_file = study_file_of(study_file, wish, say)
    elif quick or from_scratch:
        raise InputError("--quick and --from-scratch are for a folder of images or a CSV file")
    file = StudyFile.load(study_file, parse_assignments(set_))
    require(file.study.log or ())
    # How many there are is measured, or known: then they start at once.
    devices = process.spread(workers, per_device, device) if isinstance(per_device, int) else []
    learning = Learning(_learning(learn_from), learn_storage, from_, force)
    notifier = Notifier.of(notify)
    with ExitStack() as stack:
        stack.callback(notifier.close)
        with process.starting(), _beginning(out, devices, quiet=quiet) as hush:
            found = stack.enter_context(database(storage))
            command = WorkerCommand(found, file.name, process.threads_for(len(devices)), force)
            early = stack.enter_context(EarlyWorkers(command, devices))
            quiet_optuna()
            if find_study(found, file.name) is None:  # without its weights none is created
                fetch_weights(file, say)
            study = Study(file.name, found)
            create = partial(open_study, found, file, artifacts, learning)
            opened = _opened(create, study, hush, yes=yes)
        _tell_notes(study, from_, learn_from, opened)
        if not file.decides_as(study.file):
            file = study.file  # made before, with other defaults
        for line in _opening(study, is_new=opened.is_new, quiet=quiet):
            tell(out, line)
        shown = {"plain": plain, "quiet": quiet, "dashboard": dashboard}
        placed = {"workers": workers, "workers_per_device": per_device, "device": device}
        again = again_arguments(study_file, set_, notify, {**placed, **shown})
        stop = stack.enter_context(process.stop_on_signal())
        if not study.is_over:
            fetch_weights(study.file, say)
            if not devices:
                devices = study.devices(workers, per_device, device, say=say, stop=stop)
            supervisor = study.supervisor(devices, force=force, early=early)
            work(study, file, supervisor, out, stop, notifier, terminal, **shown)
            out = console(stderr=as_json)  # if it left its terminal, of its log
        code = _end(study, again, out, interrupted=stop.is_set(), as_json=as_json)
    if code:
        raise typer.Exit(code)


def _log_assignment(log: Sequence[str]) -> list[str]:
    """Return --log as `--set` writes it."""
    return [f"study.log={json.dumps(log)}"] if log else []


def no_line(line: str) -> None:
    """Say nothing."""


def _opened(
    create: Callable[[], Opened], study: Study, hush: Callable[[], object], *, yes: bool
) -> Opened:
    """Create or open `study`; if the file has higher limits, raise them once that is agreed to."""
    try:
        return create()
    except LimitsRaised as raised:
        hush()
        _extend(study, raised, yes=yes)
        return create()


def _extend(study: Study, raised: LimitsRaised, *, yes: bool) -> None:
    """Raise the limits of a study that exists, once that is agreed to: by `yes`, or at the
    terminal."""
    if not yes:
        if not sys.stdin.isatty():
            raise Conflict(f"{raised}, or the same command with --yes")
        typer.echo(str(raised).partition("\nTo go on")[0], err=True)
        confirm(f"Extend {study.name}?", default=True)
    study.extend(**raised.limits)


@contextmanager
def _beginning(
    out: Console, devices: Sequence[str], *, quiet: bool
) -> Iterator[Callable[[], object]]:
    """Say at once what takes seconds before a search: workers start, images are read. Yields what
    ends that, for a question to the user."""
    from hpo.cli.console import Text, is_drawn
    from hpo.control import no_progress, phases_heard
    from hpo.reports.progress import starting

    line = ", ".join((*([starting(devices)] if devices else ()), "reading the images"))
    if quiet or not is_drawn(out):
        if not quiet:
            out.print(line, markup=False, soft_wrap=True)
        yield no_progress
    else:
        with (
            out.status(line) as shown,
            phases_heard(lambda phase: shown.update(Text(f"{line}: {phase}"))),
        ):
            yield shown.stop


def _learning(names: list[str]) -> list[str] | Literal["auto"] | None:
    """Return what --learn-from says; None where it is not given."""
    if "auto" in names and len(names) > 1:
        raise InputError("--learn-from auto: every compatible study; name none beside it")
    return "auto" if names == ["auto"] else names or None


def _tell_notes(study: Study, from_: str | None, learn_from: list[str], opened: Opened) -> None:
    """Say what a user should know of how the study was opened."""
    tell_note(on_replacing(study.name) if opened.replaced else None)
    tell_note(_on_taking(study, from_, opened))
    tell_note(_on_learning(study.file, learn_from, is_new=opened.is_new))


def _on_taking(study: Study, from_: str | None, opened: Opened) -> str | None:
    """Return a note on the trials that a study took over, where that was asked for."""
    if from_ is None:
        return None
    taken = study.file.taken_over
    if taken is None or taken.study != from_:
        return (
            f"study {study.name} exists, without trials of {from_}: give the new one another name"
        )
    if not opened.is_new:
        return None
    left = f"; {opened.left} have no place in the new space" if opened.left else ""
    return f"{study.status().taken_note}{left}"


def _on_learning(file: StudyFile, learn_from: list[str], *, is_new: bool) -> str | None:
    """Return a note where nothing was learned although that was asked for."""
    if learn_from and not is_new:
        return f"study {file.name} exists: it tries first what was chosen at its creation"
    if is_new and (learn_from or file.study.learn_from) and not file.learned:
        return "nothing was learned: no earlier study is compatible and new to this one"
    return None


def read_per_device(text: str) -> int | str:
    """Return a number from 1, or auto. Raises InputError for anything else."""
    if text == "auto":
        return text
    if not (text.isascii() and text.isdigit() and int(text)):
        raise InputError(f"--workers-per-device {text!r}: a number from 1, or auto")
    return int(text)


def _opening(study: Study, *, is_new: bool, quiet: bool) -> Iterator[str]:
    """Lift a stop, and say so; yield lines about the data, and what a new study tries first."""
    if study.resume_stopped():
        yield f"study {study.name} was stopped; resuming it"
    elif not is_new and not study.is_over:
        yield f"resuming study {study.name}"
    report = None if quiet else study.data_report
    yield from report.lines() if report else ()
    if is_new and not quiet:
        from hpo.reports.progress import first_lines

        yield from first_lines(study.file)
    if not quiet and (names := study.file.study.log):
        from hpo.search.trackers import commands

        home = Home.default()
        folder = home.study(study.row.uuid).tensorboard
        yield from (f"log: {line}" for line in commands(names, home, folder))


def work(
    study: Study,
    file: StudyFile,
    supervisor: Supervisor,
    out: Console,
    stop: threading.Event,
    notifier: Notifier | None = None,
    terminal: Terminal | None = None,
    *,
    plain: bool,
    quiet: bool,
    dashboard: bool = False,
) -> None:
    """Run workers until the study of `file` is over or `stop` is set, and show and tell of
    them."""
    from hpo.cli import live
    from hpo.workers.notify import Notifier

    told = notifier or Notifier(())
    with ExitStack() as stack:
        if dashboard:
            from hpo.dashboard.server import start_subprocess

            address, end = start_subprocess(study.database)
            stack.callback(end)
            out.print(f"dashboard: {address}", markup=False)
        if not quiet:
            _say_plan(study, file, supervisor, out, plain=plain)
        shown = {"plain": plain, "quiet": quiet}
        view = stack.enter_context(
            live.opened(out, study.status, devices=supervisor.devices, **shown)
        )
        stack.enter_context(_logged(out))
        if terminal is not None and isinstance(view, live.LiveView):
            stack.enter_context(terminal.keys_read())
            view.screen.keys = background.KEYS

        def tick() -> None:
            nonlocal view
            view.follow(stop)
            told.look(view.status, view.problem)
            if terminal is not None and terminal.follow(stop) and isinstance(view, live.LiveView):
                view.leave()
                view = _leave(study, supervisor, out, terminal)

        try:
            supervisor.run(stop, tick)
        except HpoError as error:
            told.failed(view.status, error)
            raise
        view.finish()
        told.ended(view.status, interrupted=stop.is_set())


def _say_plan(
    study: Study, file: StudyFile, supervisor: Supervisor, out: Console, *, plain: bool
) -> None:
    """Print what decides which trials go on, and remarks on the study; without a live view, first
    who works on what."""
    from hpo.cli.console import is_drawn, tell
    from hpo.config.remarks import remarks
    from hpo.reports.progress import headline
    from hpo.search.promotion import what_decides

    if plain or not is_drawn(out):
        line = headline(study.status(), study.database.shown, supervisor.devices)
        out.print(line, markup=False, soft_wrap=True)
    tell(out, what_decides(file))
    for line in remarks(study.file):
        tell(out, line, "yellow")


def _leave(study: Study, supervisor: Supervisor, out: Console, terminal: Terminal) -> View:
    """Say how to come back to a search, and let it go on in the background; return what writes its
    log."""
    from hpo.reports.progress import PlainView

    log, hpo, flag = supervisor.directory.log("run"), program(), storage_flag(study.database)
    for line in (
        f"{study.name} goes on in the background, until it is finished",
        f"watch: {hpo} status {study.name} --watch{flag}",
        f"stop:  {hpo} stop {study.name}{flag}",
        f"log:   {log}",
    ):
        out.print(line, markup=False, soft_wrap=True)
    terminal.leave(log)
    return PlainView(study.status, partial(console().print, markup=False, soft_wrap=True))


@contextmanager
def _logged(out: Console) -> Iterator[None]:
    """Print the supervisor's warnings above the live view."""
    from rich.logging import RichHandler

    log = logging.getLogger("hpo.workers")
    handler = RichHandler(logging.WARNING, console=out, show_path=False)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _end(study: Study, again: str, out: Console, *, interrupted: bool, as_json: bool) -> int:
    """Print the result, or the command that resumes a stopped study, with the arguments `again`;
    return the exit code."""
    from hpo.cli.live import print_ending
    from hpo.reports.progress import and_paused, finished_trials

    hpo, flag = program(), storage_flag(study.database)
    status = study.status()
    if as_json:
        say(as_json, status.to_dict())
    if status.state != "finished":
        out.print(
            f"\nstopped: {finished_trials(status)} finished{and_paused(status)}, the running ones "
            f"were handed back.\nTo resume: {hpo} run {again}{flag}",
            markup=False,
            soft_wrap=True,
        )
        return Interrupted.exit_code if interrupted else 1
    if not as_json:
        print_ending(study.database, status, out, hpo=hpo, flag=flag)
    return 1 if status.best is None else 0
