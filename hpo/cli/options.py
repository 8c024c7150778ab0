"""Arguments and options that several commands share, and what every command does with them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.formatting import printable
from hpo.paths import Home

if TYPE_CHECKING:
    from rich.console import Console

    from hpo.storage.database import Database

PIPE_WIDTH = 200
"""Columns of a table that goes into a file or a pipe."""

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="Name of the study.")]
RunPath = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="What `hpo train` wrote: its folder.", show_default=False),
]
StudyPath = Annotated[
    Path, typer.Argument(metavar="STUDY.toml", help="The study file.", show_default=False)
]


def warn_of_password(context: typer.Context, param: typer.CallbackParam, url: str) -> str:
    """One line on standard error where a password stands in argv."""
    source = context.get_parameter_source(param.name or "")
    if url and source is not None and source.name == "COMMANDLINE":
        from hpo.storage.url import (
            PASSWORD_FILE,
            has_password,
        )

        if has_password(url):
            typer.echo(
                "hpo: warning: everybody on this machine can read a password on the command line; "
                f"put the URL into HPO_STORAGE, or the password alone into a file that "
                f"{PASSWORD_FILE} names",
                err=True,
            )
    return url


Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="HPO_STORAGE",
        callback=warn_of_password,
        help="Database of the studies, such as sqlite:///hpo.db or "
        "postgresql+psycopg://USER@HOST/NAME.",
        show_default="hpo_runs/hpo.db under the working directory",
    ),
]
Artifacts = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="HPO_ARTIFACTS",
        help="Where checkpoints and weights also go, for workers on other hosts: a folder that all "
        "of them mount, or s3://BUCKET/FOLDER (extra s3) and what else fsspec knows. Kept with the "
        "study; never with a password in it.",
        show_default="nowhere: a trial that moves to another host begins again",
    ),
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a field of the file, such as epochs=100; repeatable.",
        show_default="none",
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Work although the code or the images here are not those that the study began with; "
        "it is recorded.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="cpu, cuda, cuda:1 or mps.",
        show_default="the first GPU, else the CPU",
    ),
]


On = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="LAUNCHER",
        help="Also ask what placed them: local, slurm, ray or ray://HOST:PORT.",
        show_default="the database alone",
    ),
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Also a Ray cluster that asks for no token."),
]


@contextmanager
def database(storage: str | None) -> Iterator[Database]:
    """The database of `--storage`, closed at the end; raises StorageError for a bad URL. Touches
    nothing."""
    from hpo.storage.database import connect

    found = connect(storage or Home.default().storage)
    try:
        yield found
    finally:
        found.dispose()


def console() -> Console:
    """Standard output; as wide as the terminal, and wide in a pipe, where nothing is to be cut."""
    from hpo.cli.console import SafeConsole

    out = SafeConsole(highlight=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out = SafeConsole(highlight=False, width=PIPE_WIDTH)
    return out


def tell_note(line: str | None) -> None:
    """On standard error: beside the output, which a program may read."""
    if line:
        typer.echo(f"note: {printable(line)}", err=True)


def program() -> str:
    """hpo as it was called, so that a command that we print can be typed."""
    called = Path(sys.argv[0])
    if called.name != "hpo":
        return "python -m hpo"
    found = shutil.which("hpo")
    if found is not None and called.exists() and called.samefile(found):
        return "hpo"
    here = Path.cwd()
    return str(called.relative_to(here) if called.is_relative_to(here) else called)


def storage_flag(found: Database) -> str:
    """What a command that is printed here needs to reach this database."""
    from hpo.storage.url import (
        option,
        usual,
    )

    return option(found.url, usual())


def quiet_optuna() -> None:
    """No messages of Optuna's own: we say what its trials do."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
