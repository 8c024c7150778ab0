"""`hpo`: the commands, and how every error leaves."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.main import get_command

from hpo import __version__
from hpo.cli import (
    dashboard,
    results,
    search,
    status,
    storage,
    workers,
)
from hpo.errors import HpoError
from hpo.formatting import printable
from hpo.io import (
    disk_full,
    is_full,
)
from hpo.redaction import safe_streams

Command = Callable[..., Any]

COMMANDS: dict[str, dict[str, Command]] = {
    "Search": {
        "init": search.init,
        "check": search.check,
        "run": search.run,
        "worker": workers.worker,
        "launch": workers.launch,
        "manifest": workers.manifest,
    },
    "Look": {
        "list": status.list_studies,
        "status": status.status,
        "trials": status.trials,
        "trial": status.trial,
        "workers": status.workers,
        "logs": status.logs,
        "report": results.report,
        "compare": results.compare,
        "dashboard": dashboard.dashboard,
    },
    "Steer": {
        "enqueue": search.enqueue,
        "stop": search.stop,
        "resume": search.resume,
        "extend": search.extend,
        "delete": search.delete,
    },
    "Use": {
        "export": results.export,
        "train": results.train,
        "evaluate": results.evaluate,
        "predict": results.predict,
        "schema": search.schema,
    },
    "Care": {
        "storage": storage.storage,
    },
}
GROUPS: dict[Command, dict[str, Command]] = {storage.storage: storage.COMMANDS}
"""What has commands of its own."""

app = typer.Typer(
    name="hpo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hpo {__version__}")
        raise typer.Exit


@app.callback(epilog="Start here: hpo run studies/digits.toml --workers 2")
def hpo(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Hyperparameter search for image classifiers: from one study file to a retrained, honestly
    tested model."""


def _help(command: Command) -> str:
    """The docstring with its paragraphs unbroken, to be filled to the terminal's width."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(one.split()) for one in paragraphs)


def _add(panel: str, name: str, command: Command) -> None:
    if command not in GROUPS:
        app.command(name, rich_help_panel=panel, help=_help(command))(command)
        return
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
    for inner, one in GROUPS[command].items():
        group.command(inner, help=_help(one))(one)
    app.add_typer(group, name=name, rich_help_panel=panel, help=_help(command))


for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        _add(panel, name, command)
for name in ("agent", "keep"):  # its old name: launchers that are still running may call it
    app.command(name, hidden=True, help=_help(workers.agent))(workers.agent)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0, or the code of its error with one message on stderr.

    HPO_DEBUG=1 shows the traceback. Ctrl-C and a reader that has left are Typer's: 130 and 1.
    """
    spin_briefly()
    with safe_streams():
        sys.exit(_call(args))


def spin_briefly() -> None:
    """Let OpenMP's threads spin 1,000 times before they sleep, unless the user has chosen.

    libgomp spins for milliseconds by default, which on a busy machine keeps the very thread that is
    waited for from its core; 1,000 is its own number where it knows that threads outnumber cores.
    It must stand in the environment before torch is imported; child processes inherit it
    (`benchmarks/waiting.py` times it).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _call(args: Sequence[str] | None) -> int:
    try:
        get_command(app)(args, prog_name="hpo")
    except (HpoError, OSError) as error:
        if os.environ.get("HPO_DEBUG"):
            traceback.print_exc()
        _say(_message(error))
        return error.exit_code if isinstance(error, HpoError) else 1
    except Exception:
        traceback.print_exc()  # here, where standard error is redacted
        return 1
    return 0


def _message(error: HpoError | OSError) -> str:
    """What the user is told: of a file that cannot be read or written its name and the reason."""
    if isinstance(error, OSError) and error.filename is not None:
        if is_full(error):
            return str(disk_full(Path(error.filename)))
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _say(message: str) -> None:
    """One message on standard error; what a terminal would obey is shown instead."""
    print(f"hpo: {printable(message)}", file=sys.stderr)
