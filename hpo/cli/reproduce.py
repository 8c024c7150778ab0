"""`hpo reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpo.cli.options import Json, RunPath, console
from hpo.cli.results import training_progress
from hpo.paths import Home


def reproduce(
    run: RunPath,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder of the second training.",
            show_default="RUN.again",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="cpu, cuda, cuda:1 or mps.",
            show_default="one of the run's kind, if there is any",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a run again as its run.json and config.toml say, and tell what is different.

    Seeds, images, precision, layout and threads are those of the run. The exit code is 0 if
    weights, curves and scores are equal bit by bit, or if another processor, GPU or version of
    torch explains other bits and the scores agree within the noise of the images; else 1.

    Example: hpo reproduce hpo_runs/trained/best
    """
    from hpo.cli.console import SafeConsole
    from hpo.cli.tables import to_json
    from hpo.trained.reproduce import reproduce as train_again

    out = console()
    with training_progress(out if not as_json else SafeConsole(stderr=True)) as (tell, control):
        found = train_again(
            run,
            out=output,
            home=Home.default(),
            device=device,
            control=control,
            progress=tell,
        )
    if as_json:
        typer.echo(to_json(found.to_dict()))
    else:
        for line in found.lines():
            out.print(line, markup=False, soft_wrap=True)
    if not found.reproduced:
        raise typer.Exit(1)
