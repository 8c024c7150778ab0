"""`hpo workers`: who works on a study, and where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli.options import Insecure, On, Storage, StudyName, console, database
from hpo.paths import Home

if TYPE_CHECKING:
    from rich.table import Table

    from hpo.search.status import StudyStatus
    from hpo.storage.records import WorkerRow
    from hpo.workers.engines import Placed


def workers(
    study: StudyName,
    all_: Annotated[
        bool, typer.Option("--all", help="Also those that have ended, with the reason.")
    ] = False,
    on: On = None,
    insecure: Insecure = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON; times in seconds since 1970.")
    ] = False,
    storage: Storage = None,
) -> None:
    """The workers of a study: where they are, what they do, when they were last heard of.

    With --on also what the engine has of them: what waits for a place is known to it alone.

    Example: hpo workers digits --all
    """
    from hpo.cli.tables import to_json
    from hpo.search.status import read_status
    from hpo.workers.engines import Target, open_engine

    with database(storage) as found:
        now = read_status(found, study)
    placed: list[Placed] = []
    if on is not None:
        with open_engine(on, Home.default(), insecure=insecure) as engine:
            placed = engine.placed(Target(now.row.name, now.row.uuid))
    chosen = now.workers if all_ else now.live_workers
    if as_json:
        data = [asdict(one) | {"state": _state(now, one)} for one in chosen]
        typer.echo(to_json({"workers": data, "placed": [asdict(one) for one in placed]}))
        return
    out = console()
    if not chosen:
        out.print(f"no worker of {study} is alive" + ("" if all_ else "; --all: those that were"))
    else:
        out.print(workers_table(now, chosen))
    if on is not None:
        out.print()
        out.print(placed_table(placed) if placed else f"nothing of {study} on {on}")


def _state(now: StudyStatus, worker: WorkerRow) -> str:
    """training, between trials, lost (not heard of for long), or ended."""
    if worker.ended is not None:
        return "ended"
    if worker not in now.live_workers:
        return "lost"
    return "between trials" if worker.number is None else "training"


def workers_table(now: StudyStatus, workers: Iterable[WorkerRow]) -> Table:
    """Workers, a line each."""
    from hpo.cli.safe import Text
    from hpo.cli.tables import plain_table
    from hpo.results.table import duration

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


STYLES = {"training": "cyan", "between trials": "dim", "lost": "magenta", "ended": "dim"}


def placed_table(placed: Sequence[Placed]) -> Table:
    """What an engine has placed, a line each."""
    from hpo.cli.safe import Text
    from hpo.cli.tables import plain_table

    table = plain_table("placed", "state", "host", "")
    for one in placed:
        table.add_row(Text(one.name), one.state, Text(one.host or "-"), Text(one.note))
    return table
