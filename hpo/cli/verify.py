"""`hpo verify`: the best configurations of a study again, with other seeds."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli.options import (
    Force,
    Plain,
    Quiet,
    Storage,
    StudyName,
    Workers,
    WorkersDevice,
    WorkersPerDevice,
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
    from rich.table import Table

    from hpo.api.study import Study
    from hpo.search.verification import Candidate, Verification


def verify(
    study: StudyName,
    top: Annotated[
        int, typer.Option(metavar="K", min=1, help="Number of configurations, the best ones.")
    ] = 5,
    seeds: Annotated[
        int, typer.Option(metavar="N", help="Number of seeds of each configuration, from 2.")
    ] = 3,
    workers: Workers = None,
    workers_per_device: WorkersPerDevice = "1",
    device: WorkersDevice = None,
    plain: Plain = False,
    quiet: Quiet = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print only the result, as JSON.")
    ] = False,
    force: Force = False,
    storage: Storage = None,
) -> None:
    """Train the best configurations again with other seeds, and rank them by their means.

    The best of many trials is also the luckiest one. The same training and validation images as in
    the search, seeds that it did not use; the test set stays closed. `hpo export` then takes the
    winner.

    The trainings are the trials of a study of their own, STUDY.verify, so that they survive crashes
    and workers on other hosts may join: hpo worker STUDY.verify. The same command goes on after an
    interruption; with a larger --top or --seeds it trains only what is new.

    The exit code is 0 if there is a winner or a tie, 130 after Ctrl-C or SIGTERM, 1 if trainings
    failed, or all configurations diverged with some seed.

    Example: hpo verify digits --top 3 --seeds 3 --workers 2
    """
    from hpo.api.study import Study
    from hpo.cli.search import read_per_device
    from hpo.workers.process import require_count, require_device, stop_on_signal

    count, quiet = read_per_device(workers_per_device), quiet or as_json
    require_count(workers, count)
    require_device(device)
    with ExitStack() as stack:
        found = stack.enter_context(database(storage))
        quiet_optuna()
        parent, out = Study(study, found), console(stderr=as_json)
        child = parent.verification_study(top, seeds, force=force)
        stop = stack.enter_context(stop_on_signal())
        if not child.is_over:
            if not quiet:
                _say_what_is_ahead(parent, child, out)
            say = (lambda line: None) if quiet else partial(out.print, markup=False)
            devices = child.devices(workers, count, device, say=say, stop=stop)
            _train(child, devices, out, stop, force=force, plain=plain, quiet=quiet)
        result = parent.verification()
        assert result is not None
        _print(result, parent, out, as_json=as_json)
        if len(result.candidates) < top and not as_json:
            few = f"{len(result.candidates)} different configurations ran to their end, not {top}"
            out.print(few, markup=False, style="yellow")
    if stop.is_set():
        again = f"{program()} verify {study} --top {top} --seeds {seeds}{storage_flag(found)}"
        raise Interrupted(f"stopped; to resume: {again}")
    if result.winner is None:
        raise typer.Exit(1)


def _say_what_is_ahead(parent: Study, child: Study, out: Console) -> None:
    """Say how much is to be trained, and that the study is not finished where it is not."""
    from hpo.cli.console import tell
    from hpo.formatting import plural

    status, search = child.status(), parent.status()
    left = (status.budget or 0) - status.finished
    line = f"{child.name}: {plural(left, 'training')} to go on the search's validation images"
    tell(out, line)
    if search.state != "finished":
        warning = f"{parent.name} is not finished: better trials may come, which this leaves out"
        tell(out, warning, "yellow")
    if len(search.file.objectives) > 1:
        line = f"ranked by {search.file.metric}, the first of its metrics"
        tell(out, line)


def _train(
    child: Study,
    devices: list[str],
    out: Console,
    stop: threading.Event,
    *,
    force: bool,
    plain: bool,
    quiet: bool,
) -> None:
    """Run workers until all is trained, or `stop` is set, and show them."""
    from hpo.cli.search import work

    supervisor = child.supervisor(devices, force=force)
    work(child, child.file, supervisor, out, stop, plain=plain, quiet=quiet)


def _print(result: Verification, parent: Study, out: Console, *, as_json: bool) -> None:
    """Print the ranking, what it says, and the commands that come next."""
    from hpo.cli.console import tell
    from hpo.cli.tables import to_json

    if as_json:
        typer.echo(to_json(result.to_dict()))
        return
    out.print()
    out.print(ranking_table(result))
    out.print()
    tell(out, result.verdict, "bold green" if result.winner else "bold")
    for line in result.remarks():
        tell(out, line)
    if result.winner is not None:
        hpo, flag, name = program(), storage_flag(parent.database), parent.name
        takes = f"{hpo} export {name}{flag} takes trial {result.winner.trial}"
        line = f"\nnext: {takes}; then {hpo} train {name}.best.toml --seeds 3"
        out.print(line, markup=False, soft_wrap=True)


def ranking_table(result: Verification) -> Table:
    """Return a table of the candidates, best first."""
    from hpo.cli.console import Text
    from hpo.cli.tables import plain_table
    from hpo.formatting import number

    heads = ("trial", f"search {result.metric}", "other seeds", "change", "by seed", "")
    table = plain_table(*heads, right=heads[:4])
    for one in result.candidates:
        table.add_row(
            str(one.trial),
            number(one.searched),
            one.shown,
            "" if one.mean is None else f"{one.mean - one.searched:+.4f}",
            " ".join(number(value) for value in one.values.values()),
            Text(_place(result, one)),
        )
    return table


def _place(result: Verification, one: Candidate) -> str:
    """Say in a word or two where a candidate stands."""
    if one.diverged:
        return f"diverged with seed {', '.join(map(str, one.diverged))}"
    if one.pending:
        return f"{one.pending} to go"
    if one.failed:
        return f"{one.failed} failed"
    if result.winner is None:
        return ""
    if one is result.winner:
        return "best mean" if result.tied else "winner"
    return "tied" if one in result.tied else "worse"
