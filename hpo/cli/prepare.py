"""Before a search: init, check, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hpo.cli.options import Device, Overrides, StudyPath, console, program
from hpo.errors import Conflict
from hpo.files import write_whole
from hpo.paths import Home
from hpo.workers.devices import first_device

MOST_LOOKED = 2_000
"""Images that a first look decodes; of more, `hpo check` does."""


def init(
    data_dir: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="Folder of images: train/, maybe val/ and test/, by class; or one folder per "
            "class; or a CSV file with the columns file and label (and maybe split, group).",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Where to.", show_default="the folder's name"
        ),
    ] = None,
    force: Annotated[bool, typer.Option(help="Overwrite the file.")] = False,
) -> None:
    """Write a commented study file for your own photographs, which works as it is.

    Example: hpo init photos/ -o photos.toml
    """
    from hpo.definition.starter import starter
    from hpo.definition.studyfile import parse_study
    from hpo.engine import csv_data, folders
    from hpo.engine.datasets import examine_data

    summarize = csv_data.summarize_csv if data_dir.is_file() else folders.summarize_folder
    text = starter(data_dir, summarize(data_dir.expanduser()), output.stem if output else None)
    file = parse_study(text, str(data_dir))
    path = output or Path(f"{file.name}.toml")
    if path.exists() and not force:
        raise Conflict(f"{path} exists: choose another name with -o, or --force to overwrite it")
    write_whole(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))
    hpo = program()
    config = file.config(file.baselines[0]).data
    report = examine_data(config, Home.default().cache, remember=False, looked=MOST_LOOKED)
    console().print("\n".join(report.lines()), markup=False, soft_wrap=True)
    typer.echo(f"{path} written. Next:\n  {hpo} check {path}\n  {hpo} run {path}")


def check(
    study_file: StudyPath,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Estimate for so many workers.", show_default="one a device"
        ),
    ] = None,
    device: Device = None,
    set_: Overrides = [],  # noqa: B006  (Typer's way to say: repeatable)
) -> None:
    """Look at the data and try every architecture before a search; writes nothing.

    Validates the file, decodes every image of every part, test included (what cannot be read is
    named, and no pixels are used), tells what is odd about the data, builds every architecture of
    the space, runs one training step at the largest batch, and estimates memory, seconds per epoch
    and total time; of frozen layers, which are computed once, the disk that they take, and what the
    first and the later trials cost.

    Example: hpo check studies/digits.toml --workers 2
    """
    from hpo.definition.studyfile import StudyFile
    from hpo.definition.toml import assignments

    file = StudyFile.load(study_file, assignments(set_))
    from hpo.results.check import check as examine
    from hpo.workers.devices import spread, threads_for

    count = len(spread(workers, 1, device))
    result = examine(
        file,
        home=Home.default(),
        device=first_device(device),
        workers=count,
        threads=threads_for(count),
    )
    console().print(str(result), markup=False, soft_wrap=True)


def schema() -> None:
    """Print the JSON Schema of a study file: every field, its range and default.

    A TOML editor uses it to complete and check while you type.

    Example: hpo schema > study.schema.json
    """
    from hpo.definition.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
