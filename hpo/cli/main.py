"""`hpo`: the commands, and what every error prints."""

from __future__ import annotations

import gc
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

from hpo import __version__
from hpo.errors import HpoError
from hpo.formatting import printable
from hpo.io import disk_full, is_full
from hpo.redaction import safe_streams

Command = Callable[..., Any]

COMMANDS: dict[str, dict[str, str]] = {
    "Search": {
        "init": "init.init",
        "check": "search.check",
        "run": "search.run",
        "worker": "workers.worker",
        "launch": "workers.launch",
        "manifest": "workers.manifest",
    },
    "Look": {
        "list": "status.list_studies",
        "status": "status.status",
        "trials": "status.trials",
        "trial": "status.trial",
        "workers": "status.workers",
        "logs": "status.logs",
        "report": "results.report",
        "compare": "results.compare",
        "dashboard": "dashboard.dashboard",
        "mcp": "mcp.mcp",
    },
    "Steer": {
        "enqueue": "steer.enqueue",
        "stop": "steer.stop",
        "resume": "steer.resume",
        "extend": "steer.extend",
        "delete": "steer.delete",
    },
    "Use": {
        "verify": "verify.verify",
        "export": "results.export",
        "train": "training.train",
        "evaluate": "results.evaluate",
        "predict": "results.predict",
        "reproduce": "training.reproduce",
        "schema": "search.schema",
    },
    "Care": {
        "storage": "storage.storage",
    },
}
"""Commands by their panel of the help: each is `module.function` of hpo.cli."""
GROUPS = {"storage": "storage.COMMANDS"}
"""Commands that have subcommands."""
HIDDEN = {
    "probe": "workers.probe",
    "agent": "workers.agent",
    "keep": "workers.agent",  # its old name: launchers that are still running may call it
}
MANY = 50_000

PLACES = {name: place for panel in COMMANDS.values() for name, place in panel.items()} | HIDDEN
PANELS = {name: panel for panel, names in COMMANDS.items() for name in names}


class _PlainHelp:
    """Help that shows a flag without a type, and a required argument without braces."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters; of flags only the name is shown."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for one in params:
            if isinstance(one, TyperOption) and one.is_flag:
                one.metavar = ""
        return params

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line."""
        return [one.strip("{}") for one in super().collect_usage_pieces(ctx)]  # type: ignore[misc]


class _Command(_PlainHelp, TyperCommand):
    pass


class _Look(_Command):
    def make_context(self, *args: Any, **options: Any) -> Any:
        """Read the arguments; from here on look for garbage in cycles after each MANY objects, not
        after 700: nearly all that a look makes, modules above all, stays to its end."""
        gc.set_threshold(MANY)
        return super().make_context(*args, **options)


class _Group(_PlainHelp, TyperGroup):
    pass


class _Commands(Mapping[str, Any]):
    """All commands by their names, each loaded when it is first asked for: a call needs one."""

    def __getitem__(self, name: str) -> Any:
        return _loaded(name)

    def __iter__(self) -> Iterator[str]:
        return iter(PLACES)

    def __len__(self) -> int:
        return len(PLACES)


class _Hpo(_Group):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = _Commands()  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names without loading the commands."""
        return list(self.commands)


app = typer.Typer(
    name="hpo",
    cls=_Hpo,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hpo {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Start here: hpo run PHOTOS/ (a folder per class), or hpo run studies/digits.toml"
)
def hpo(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Hyperparameter search for image classifiers: from one study file to a retrained, honestly
    tested model."""


@cache
def _loaded(name: str) -> Any:
    """Import a command, and return it as Typer makes it. Raises KeyError for an unknown name."""
    command = _imported(PLACES[name])
    made: Any = get_command(_group(name, command) if name in GROUPS else _alone(name, command))
    made.rich_help_panel = PANELS.get(name)
    return made


def _alone(name: str, command: Command) -> typer.Typer:
    made = typer.Typer(add_completion=False, rich_markup_mode="rich")
    kind = _Look if PANELS.get(name) == "Look" else _Command
    made.command(name, cls=kind, hidden=name in HIDDEN, help=_help(command))(command)
    return made


def _group(name: str, command: Command) -> typer.Typer:
    made = typer.Typer(
        name=name,
        cls=_Group,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        help=_help(command),
    )
    for inner, subcommand in _imported(GROUPS[name]).items():
        made.command(inner, cls=_Command, help=_help(subcommand))(subcommand)
    return made


def _imported(place: str) -> Any:
    module, _, name = place.partition(".")
    return getattr(import_module(f"hpo.cli.{module}"), name)


def _help(command: Command) -> str:
    """Return the docstring, each paragraph as one line, for Typer to fill to the terminal."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0, or the code of its error with one message on stderr.

    HPO_DEBUG=1 shows the traceback. Typer exits with 130 after Ctrl-C, and with 1 on a closed pipe.
    """
    spin_briefly()
    with safe_streams():
        sys.exit(_call(args))


def spin_briefly() -> None:
    """Let OpenMP's threads spin 1,000 times before they sleep, unless the user has chosen.

    By default libgomp spins for milliseconds, which on a busy machine keeps the very thread that it
    waits for off its core; 1,000 is its own default where threads outnumber cores. The variable
    must be set before torch is imported; child processes inherit it (`benchmarks/waiting.py` times
    it).
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
    """Return the message for the user; a file that cannot be read or written is named."""
    if isinstance(error, OSError) and error.filename is not None:
        if is_full(error):
            return str(disk_full(Path(error.filename)))
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _say(message: str) -> None:
    """Print one message on standard error, control characters escaped."""
    print(f"hpo: {printable(message)}", file=sys.stderr)
