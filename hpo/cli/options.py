"""Arguments and options that several commands share, and what commands do with them."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpo.errors import HpoError, InputError, NotFound, nearest
from hpo.formatting import printable
from hpo.paths import Home

if TYPE_CHECKING:
    from rich.console import Console

    from hpo.search.study import Study
    from hpo.storage.database import Database

PIPE_WIDTH = 200
"""Columns of a table in a file or a pipe."""


def study_names(incomplete: str) -> list[str]:
    """Return the names of studies that begin so, for a shell that completes a command line; none
    where the usual database cannot be read."""
    from hpo.storage.database import connect
    from hpo.storage.records import list_studies

    try:
        found = connect(os.environ.get("HPO_STORAGE") or Home.default().storage)
        try:
            names = [row.name for row in list_studies(found)]
        finally:
            found.dispose()
    except HpoError:
        return []
    return [name for name in names if name.startswith(incomplete)]


StudyName = Annotated[
    str,
    typer.Argument(metavar="STUDY", help="Name of the study.", autocompletion=study_names),
]
StudyOrFile = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        help="Name of the study, or a study file (.toml), which creates it if it is new.",
    ),
]
RunPath = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Folder that `hpo train` wrote.", show_default=False),
]
StudyPath = Annotated[
    Path, typer.Argument(metavar="STUDY.toml", help="The study file.", show_default=False)
]


def warn_of_password(context: typer.Context, param: typer.CallbackParam, url: str) -> str:
    """Warn on standard error of a password on the command line; return `url`."""
    source = context.get_parameter_source(param.name or "")
    if url and source is not None and source.name == "COMMANDLINE":
        from hpo.storage.url import PASSWORD_FILE, has_password

        if has_password(url):
            typer.echo(
                "hpo: warning: every user of this machine can read a password on the command line; "
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
        help="Where checkpoints and weights are also written, for workers on other hosts: a folder "
        "that all of them mount, s3://BUCKET/FOLDER (extra s3), or any other URL that fsspec "
        "knows. Stored with the study; never with a password in it.",
        show_default="nowhere: a trial that moves to another host restarts from epoch 1",
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
        help="Continue although code or images changed since the study began (recorded).",
    ),
]
Log = Annotated[
    list[str],
    typer.Option(
        "--log",
        metavar="tensorboard|mlflow|wandb",
        help="Also log every epoch there; repeatable. Each needs the extra of its name.",
        show_default="none",
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
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Worker processes in total.", show_default="one per device"
    ),
]
WorkersPerDevice = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        help="Worker processes on each device; auto: as many as train fastest together, found by a "
        "probe first.",
    ),
]
WorkersDevice = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="Device of all workers: cpu, cuda:1 or mps.",
        show_default="all visible GPUs in turn, else the CPU",
    ),
]
Plain = Annotated[
    bool, typer.Option("--plain", help="One line per finished trial instead of a live view.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
On = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="LAUNCHER",
        help="Also query the launcher: local, slurm, ray or ray://HOST:PORT.",
        show_default="the database alone",
    ),
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Allow a Ray cluster without authentication."),
]


@contextmanager
def database(storage: str | None) -> Iterator[Database]:
    """Open the database of `--storage`, and close it at the end; raise StorageError for a bad URL.
    Nothing is read or created."""
    from hpo.storage.database import connect

    found = connect(storage or Home.default().storage)
    try:
        yield found
    finally:
        found.dispose()


def open_study_or_file(
    found: Database,
    given: str,
    artifacts: str | None,
    overrides: Sequence[str] = (),
    *,
    look: bool = True,
) -> Study:
    """Load the study of a name, or open that of a study file. The first of any number of callers
    creates it, with its `artifacts` and, if `look`, after a look at its images."""
    from hpo.config.toml import is_file_name
    from hpo.search import study as studies

    if not is_file_name(given):
        if overrides:
            raise InputError("--set changes a study file; an existing study is as it was created")
        return studies.load(found, given)
    from hpo.api.creation import open_study
    from hpo.config.study import StudyFile
    from hpo.config.toml import parse_assignments
    from hpo.storage.records import find_study

    file = StudyFile.load(Path(given), parse_assignments(overrides))
    is_new = find_study(found, file.name) is None
    opened = open_study(found, file, artifacts if is_new else None, look=look)
    tell_note(on_replacing(file.name) if opened.replaced else None)
    return opened.study


def on_replacing(name: str) -> str:
    """Return a note on a study that took the place of another one of its name."""
    return f"study {name} had another definition, and nothing of it was trained: it is replaced"


def console(width: int | None = None, *, stderr: bool = False) -> Console:
    """Return a console on standard output, or error: of that width, else as wide as the terminal,
    and PIPE_WIDTH in a pipe."""
    from hpo.cli.console import SafeConsole

    out = SafeConsole(highlight=False, width=width, stderr=stderr)
    if width is not None:
        return out
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out = SafeConsole(highlight=False, width=PIPE_WIDTH, stderr=stderr)
    return out


def say(as_json: bool, data: Any, *lines: str) -> None:
    """Print `data` as JSON, or else the lines that say it to people."""
    if not as_json:
        for line in lines:
            typer.echo(line)
        return
    from hpo.cli.tables import to_json

    typer.echo(to_json(data))


def require_there(data: Path) -> None:
    """Raise NotFound, with the nearest names beside it, unless there is such a file or folder."""
    path = data.expanduser()
    if not path.exists():
        names = sorted(one.name for one in path.parent.glob("[!.]*"))
        hint = f"; {nearest(path.name, names)}" if names else ""
        raise NotFound(f"{data}: no such file or folder{hint}")


@contextmanager
def working(what: str, *, shown: bool = True, out: Console | None = None) -> Iterator[None]:
    """Show `what`, then the phases of the work, beside a spinner on `out`, by default standard
    error, if that is a terminal. Lines that are printed meanwhile must be on the same console."""
    from hpo.cli.console import SafeConsole, Text
    from hpo.control import phases_heard

    out = out or SafeConsole(stderr=True)
    if not shown or not out.is_terminal:
        yield
        return
    with (
        out.status(Text(what), spinner="line") as spinner,
        phases_heard(lambda phase: spinner.update(Text(phase))),
    ):
        yield


def tell_note(line: str | None) -> None:
    """Print a note on standard error; standard output may be read by a program."""
    if line:
        typer.echo(f"note: {printable(line)}", err=True)


def tell_warning(line: str) -> None:
    """Print a warning on standard error."""
    typer.echo(f"hpo: warning: {printable(line)}", err=True)


def confirm(question: str, *, default: bool = False) -> None:
    """Ask at the terminal, on standard error; raise Abort where the answer is no."""
    with redirect_stdout(sys.stderr):
        typer.confirm(question, default=default, abort=True)


def program() -> str:
    """Return how hpo was called, so that commands that we print can be typed."""
    called = Path(sys.argv[0])
    if called.name != "hpo":
        return "python -m hpo"
    found = shutil.which("hpo")
    if found is not None and called.exists() and called.samefile(found):
        return "hpo"
    here = Path.cwd()
    return shlex.quote(str(called.relative_to(here) if called.is_relative_to(here) else called))


def again_arguments(
    study_file: Path, set_: list[str], notify: list[str], options: Mapping[str, object]
) -> str:
    """Return the arguments of the same command without those for one time alone. Of --notify only
    the bell is repeated: URLs and commands may hold secrets."""
    words = [str(study_file), *(part for one in set_ for part in ("--set", one))]
    for name, value in options.items():
        if value not in (None, False) and (name, value) != ("workers_per_device", 1):
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join([*words, *(["--notify", "bell"] if "bell" in notify else [])])


def storage_flag(found: Database) -> str:
    """Return the --storage option with which a printed command reaches this database."""
    from hpo.storage.url import option, usual

    return option(found.url, usual())


def quiet_optuna() -> None:
    """Silence Optuna's own messages; hpo reports its trials."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
