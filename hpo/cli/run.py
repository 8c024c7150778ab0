"""`hpo run`: create or resume, search, show, end with the result."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli.options import (
    Artifacts,
    Force,
    Overrides,
    Storage,
    StudyPath,
    console,
    database,
    program,
    quiet_optuna,
    storage_flag,
)
from hpo.errors import Interrupted

if TYPE_CHECKING:
    import threading

    from rich.console import Console

    from hpo.api import Study
    from hpo.results.progress import View
    from hpo.workers.supervisor import Supervisor


def run(
    study_file: StudyPath,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Worker processes in all.", show_default="one a device"
        ),
    ] = None,
    workers_per_device: Annotated[
        int, typer.Option(metavar="N", min=1, help="Worker processes on each device.")
    ] = 1,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="Put all workers there: cpu, cuda:1 or mps.",
            show_default="all visible GPUs in turn, else the CPU",
        ),
    ] = None,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Serve optuna-dashboard beside the search.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="One line per finished trial instead of a live view.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the result.")] = False,
    force: Force = False,
    set_: Overrides = [],  # noqa: B006
    storage: Storage = None,
    artifacts: Artifacts = None,
) -> None:
    """Search: create or resume the study, start workers, show them live, end with the result.

    Ctrl-C once hands the running trials back and ends; the same command goes on with them. Twice
    ends at once. More workers may join at any time, from any host: hpo worker STUDY.

    The exit code is 0 only where the study is finished and has a best trial: in `hpo run ... && hpo
    export ...` nothing follows otherwise. 130 after Ctrl-C or SIGTERM, 1 where no trial was
    completed or another command stopped the study, 2 where nothing could begin, or the database's
    file was removed meanwhile.

    Example: hpo run studies/digits.toml --workers 2
    """
    from hpo.api import Study, open_study
    from hpo.definition.studyfile import StudyFile
    from hpo.definition.toml import assignments
    from hpo.workers.devices import require_device, spread
    from hpo.workers.signals import stop_on_signal

    quiet_optuna()
    file = StudyFile.load(study_file, assignments(set_))
    devices = spread(workers, workers_per_device, device)
    require_device(device)
    with database(storage) as found:
        _, is_new = open_study(found, file, artifacts)
        study, out = Study(file.name, found), console()
        for line in _opening(study, is_new=is_new, quiet=quiet):
            out.print(line, markup=False, soft_wrap=True)
        again = shlex.join([str(study_file), *(part for one in set_ for part in ("--set", one))])
        with stop_on_signal() as stop:
            if not study.is_over:
                supervisor = study.supervisor(devices, force=force)
                shown = {"plain": plain, "quiet": quiet, "dashboard": dashboard}
                _search(study, supervisor, out, stop, **shown)
            code = _end(study, again, out, interrupted=stop.is_set())
    if code:
        raise typer.Exit(code)


def _opening(study: Study, *, is_new: bool, quiet: bool) -> Iterator[str]:
    """Lift a stop; yield a word on that, and lines on the data."""
    if study.resume_stopped():
        yield f"study {study.name} was stopped; it goes on"
    elif not is_new and not study.is_over:
        yield f"study {study.name} goes on where it was"
    report = None if quiet else study.data_report
    yield from report.lines() if report else ()


def _search(
    study: Study,
    supervisor: Supervisor,
    out: Console,
    stop: threading.Event,
    *,
    plain: bool,
    quiet: bool,
    dashboard: bool,
) -> None:
    """Run workers until the study is over or `stop` is set, and show them."""
    from hpo.cli import live
    from hpo.definition.remarks import remarks
    from hpo.results.progress import headline

    with ExitStack() as stack:
        if dashboard:
            from hpo.dashboard.beside import start_beside

            address, end = start_beside(study.database)
            stack.callback(end)
            out.print(f"dashboard: {address}", markup=False)
        if not quiet and (plain or not out.is_terminal):
            line = headline(study.status(), study.database.shown, supervisor.devices)
            out.print(line, markup=False, soft_wrap=True)
        for line in () if quiet else remarks(study.file):
            out.print(line, markup=False, soft_wrap=True, style="yellow")
        view = stack.enter_context(live.opened(out, study.status, plain=plain, quiet=quiet))
        stack.enter_context(_logged(out))
        supervisor.run(stop, partial(_tick, view, stop))
        view.finish()


STOPPING = "stopping: running trials are handed back after their current step; again: stop now"


def _tick(view: View, stop: threading.Event) -> None:
    if stop.is_set() and view.note != STOPPING:
        view.say(STOPPING)
    view.tick()


@contextmanager
def _logged(out: Console) -> Iterator[None]:
    """Warnings of the supervisor, above the live view."""
    from rich.logging import RichHandler

    log = logging.getLogger("hpo.workers")
    handler = RichHandler(logging.WARNING, console=out, show_path=False)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _end(study: Study, again: str, out: Console, *, interrupted: bool) -> int:
    """Print the result, or how to go on where the study or all of its workers here were stopped:
    `again` are the arguments that name it. Returns the exit code."""
    from hpo.cli.ending import print_ending

    hpo, flag = program(), storage_flag(study.database)
    status = study.status()
    if status.state != "finished":
        out.print(
            f"\nstopped: {status.finished} of {status.row.trials} trials are finished, the running "
            f"ones were handed back.\nTo go on: {hpo} run {again}{flag}",
            markup=False,
            soft_wrap=True,
        )
        return Interrupted.exit_code if interrupted else 1
    print_ending(study.database, status, out, hpo=hpo, flag=flag)
    return 1 if status.best is None else 0
