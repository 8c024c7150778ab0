"""`hpo compare`: studies, architectures and trained runs beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpo.cli.options import Device, Storage, console, database
from hpo.workers.devices import first_device


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY|RUN...",
            help="Names of studies, and folders that `hpo train` wrote.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="A page with figures.", show_default="none"
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(metavar="K", min=1, help="Trials of the mean beside the best.")
    ] = 5,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency", help="Time one image here where a study has no latency_ms of its own."
        ),
    ] = False,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, curves too.")] = False,
    storage: Storage = None,
) -> None:
    """Studies and the architectures in them, and trained runs, beside each other.

    Of studies: best, mean of the best trials, epochs and time spent, and what the best network
    costs; of runs: top-1, top-5, precision, recall and F1, as before and after tuning. The page has
    accuracy against cost, curves laid over each other, and F1 of the 20 most frequent classes.

    Example: hpo compare resnet mobilenet -o compare.html
    """
    from hpo.cli.tables import cells_table, to_json
    from hpo.results import compare as comparing
    from hpo.results.compare_figures import entries_table, runs_table
    from hpo.results.comparison_page import comparison_report
    from hpo.results.page import write_report

    with database(storage) as found:
        result = comparing.compare(
            found, names, top=top, device=first_device(device), latency=latency
        )
    if output is not None:
        write_report(output, comparison_report(result, " · ".join(names)))
    if as_json:
        typer.echo(to_json(result.to_dict()))
        return
    out = console()
    for table in (entries_table(result), runs_table(result)):
        if table.rows:
            out.print(cells_table(table))
    for note in result.notes:
        out.print(note, markup=False, soft_wrap=True)
    if output is not None:
        typer.echo(f"{output} written: open it in a browser")
