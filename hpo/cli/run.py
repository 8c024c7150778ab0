"""`hpo run`: create or resume, search, show, end with the result."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
    make_home,
    program,
    quiet_optuna,
    storage_flag,
)
from hpo.errors import Interrupted
from hpo.paths import Home

if TYPE_CHECKING:
    import threading

    from rich.console import Console

    from hpo.cli.live import View
    from hpo.definition.studyfile import StudyFile
    from hpo.engine.data_report import DataReport
    from hpo.search.study import Study
    from hpo.storage.db import Database
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
    from hpo.definition.remarks import remarks
    from hpo.definition.studyfile import StudyFile
    from hpo.definition.toml import assignments
    from hpo.search.agreement import read_report, require_code
    from hpo.workers.devices import spread
    from hpo.workers.signals import stop_on_signal

    file = StudyFile.load(study_file, assignments(set_))
    devices = spread(workers, workers_per_device, device)
    _check_device(device)
    with database(storage) as found:
        study, note = _study(found, file, artifacts)
        out = console()
        if note:
            out.print(note, markup=False, soft_wrap=True)
        report = None if quiet else read_report(found, study.uuid)
        for line in report.lines() if report else ():
            out.print(line, markup=False, soft_wrap=True)
        again = shlex.join([str(study_file), *(part for one in set_ for part in ("--set", one))])
        with stop_on_signal() as stop:
            if not _is_over(study):
                if not force:
                    require_code(found, study.uuid, study.file)
                supervisor = _supervisor(study, devices, force=force)
                told = [] if quiet else remarks(file)
                shown = {"plain": plain, "quiet": quiet, "dashboard": dashboard}
                _search(study, supervisor, out, stop, told, **shown)
            code = _end(study, again, out, interrupted=stop.is_set())
    if code:
        raise typer.Exit(code)


def _check_device(device: str | None) -> None:
    """Raise InputError for a device that is not there, before anything is created. The usual ones
    are known without torch, which a supervisor must not load."""
    from hpo.workers.devices import visible_gpus

    gpus = visible_gpus()
    if device in (None, "cpu", *gpus) or (device == "cuda" and gpus):
        return
    from hpo.engine.runtime import torch_device

    torch_device(str(device))


def _study(found: Database, file: StudyFile, artifacts: str | None) -> tuple[Study, str]:
    """The study of `file`, new or resumed, and a word on that."""
    from hpo.search import study as studies

    study, is_new = open_study(found, file, artifacts)
    if study.row.stop == "user":
        studies.resume(study)
        return studies.load(found, file.name), f"study {file.name} was stopped; it goes on"
    if is_new or _is_over(study):
        return study, ""
    return study, f"study {file.name} goes on where it was"


def open_study(
    found: Database, file: StudyFile, artifacts: str | None, *, look: bool = True
) -> tuple[Study, bool]:
    """The study of `file`, made if it is new; whether it was. Bad data, own modules that are not
    here and artifacts that cannot be used create nothing; without `look` images and modules are on
    other hosts, and the workers will tell."""
    from hpo.engine.code import code_of
    from hpo.search import mirror
    from hpo.search import study as studies
    from hpo.search.agreement import keep_report
    from hpo.storage.records import find_study

    quiet_optuna()
    row = find_study(found, file.name)
    place = mirror.check(artifacts, row, found) if artifacts else None
    report = None
    if row is None and look:
        code_of(file)
        report = check_data(file)
    make_home(found)
    study, is_new = studies.create(found, file)
    if report:
        keep_report(found, study.uuid, report)
    if place:
        mirror.keep(found, study.row, place, Home.default())
    return study, is_new


def check_data(file: StudyFile) -> DataReport:
    """Look at every file of every data set in the space, test files included, and return what is
    known of the first; raises DataError, and ConfigError where they cannot measure what is
    optimized. Writes nothing but downloads of torchvision's data sets."""
    from hpo.engine.datasets import examine_data
    from hpo.engine.goals import asked, require_supported

    matters = {"dataset", "root", "labels", "val_fraction", "test_fraction", "split_seed",
               "limit_train", "skip_unreadable",
               "group_by", "near_duplicates", "folds", "orientation", "background", "max_pixels",
               "crop_to_box"}  # fmt: skip
    seen: dict[str, DataReport] = {}
    for config in map(file.config, file.space.corners()):
        key = config.data.model_dump_json(include=matters)
        if key not in seen:
            cache = Home.default().cache
            seen[key] = examine_data(config.data, cache, download=True, remember=False)
        require_supported(asked(config, *file.objectives), seen[key].parts["val"])
    return next(iter(seen.values()))


def _is_over(study: Study) -> bool:
    facts = study.facts()
    return facts.finished >= facts.trials or (facts.stop == "rule" and not facts.running)


def _search(
    study: Study,
    supervisor: Supervisor,
    out: Console,
    stop: threading.Event,
    told: Sequence[str],
    *,
    plain: bool,
    quiet: bool,
    dashboard: bool,
) -> None:
    """Run workers until the study is over or `stop` is set, and show them below what is `told`."""
    from hpo.cli import live
    from hpo.search.status import read_status

    database, name = study.database, study.row.name
    with ExitStack() as stack:
        if dashboard:
            from hpo.dashboard.beside import start_beside

            address, end = start_beside(database)
            stack.callback(end)
            out.print(f"dashboard: {address}", markup=False)
        if not quiet and (plain or not out.is_terminal):
            line = live.headline(read_status(database, name), database.shown, supervisor.devices)
            out.print(line, markup=False, soft_wrap=True)
        for line in told:
            out.print(line, markup=False, soft_wrap=True, style="yellow")
        view = stack.enter_context(
            live.opened(out, lambda: read_status(database, name), plain=plain, quiet=quiet)
        )
        stack.enter_context(_logged(out))
        supervisor.run(stop, lambda: _tick(view, stopping=stop.is_set()))
        view.finish()


def _supervisor(study: Study, devices: list[str], *, force: bool) -> Supervisor:
    from hpo.workers.devices import threads_for
    from hpo.workers.launch import LocalProcesses
    from hpo.workers.supervisor import Supervisor

    directory = study.directory(Home.default())
    threads = threads_for(len(devices))
    launcher = LocalProcesses(study.database, study.row.name, directory, threads, force)
    stall_timeout_s = study.file.study.stall_timeout_s
    return Supervisor(study.database, study.uuid, directory, launcher, devices, stall_timeout_s)


STOPPING = "stopping: running trials are handed back after their current step; again: stop now"


def _tick(view: View, *, stopping: bool) -> None:
    if stopping and view.note != STOPPING:
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
    from hpo.search.status import read_status

    hpo, flag = program(), storage_flag(study.database)
    status = read_status(study.database, study.row.name)
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
