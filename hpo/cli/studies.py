"""Steering a study: enqueue, stop, resume, extend, delete."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hpo.cli.options import (
    Insecure,
    On,
    Storage,
    StudyName,
    database,
    program,
    storage_flag,
)
from hpo.errors import InputError
from hpo.paths import Home


def enqueue(
    study: StudyName,
    values: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE...",
            help="Searched parameters by dotted name; what is left out is sampled.",
        ),
    ],
    storage: Storage = None,
) -> None:
    """Let the next trial try this configuration, within the budget.

    Example: hpo enqueue digits optimizer.name=adamw optimizer.lr=0.003
    """
    from hpo.api import Study
    from hpo.definition.toml import assignments

    given = assignments(values)
    with database(storage) as found:
        Study(study, found).enqueue(given)
    typer.echo(f"the next trial of {study} that starts tries it")


def stop(
    study: StudyName, on: On = None, insecure: Insecure = False, storage: Storage = None
) -> None:
    """Hand running trials back after their current epoch and end the workers; nothing is lost.

    Reaches every worker, wherever it was placed, through the database. What waits for a place in
    Slurm or Ray ends when it gets one; with --on it is taken back at once.

    Example: hpo stop digits
    """
    from hpo.search import study as studies
    from hpo.workers.engines import Target, open_engine

    with database(storage) as found:
        chosen = studies.load(found, study)
        studies.stop(chosen)
        if on is not None:
            with open_engine(on, Home.default(), insecure=insecure) as engine:
                engine.stop(Target(study, chosen.uuid))
        flag = storage_flag(found)
    typer.echo(f"{study} stops; to go on: {program()} resume {study}{flag}")


def resume(study: StudyName, storage: Storage = None) -> None:
    """Let a stopped study go on. Starts no worker: `hpo run`, `launch` or `worker` does.

    Example: hpo resume digits
    """
    from hpo.api import Study

    with database(storage) as found:
        Study(study, found).resume()
        flag = storage_flag(found)
    typer.echo(f"{study} may go on; start workers: {program()} worker {study}{flag}")


def extend(
    study: StudyName,
    trials: Annotated[
        str | None,
        typer.Option(
            metavar="N|+N", help="New budget in trials, or so many more.", show_default="unchanged"
        ),
    ] = None,
    timeout_s: Annotated[
        float | None,
        typer.Option(
            metavar="S", help="New limit of active time, in seconds.", show_default="unchanged"
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(metavar="V", help="New value to stop at.", show_default="unchanged"),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Try failed configurations again, within the budget."),
    ] = False,
    storage: Storage = None,
) -> None:
    """Raise the limits of a study and let it go on. Starts no worker.

    Example: hpo extend digits --trials +20
    """
    from hpo.search import study as studies

    if trials is None and timeout_s is None and target is None and not retry_failed:
        raise InputError(
            "nothing to extend: give --trials, --timeout-s, --target or --retry-failed"
        )
    with database(storage) as found:
        old = studies.load(found, study)
        budget = None if trials is None else _budget(trials, old.row.trials)
        retried = studies.extend(
            old, trials=budget, timeout_s=timeout_s, target=target, retry_failed=retry_failed
        )
        row, flag = studies.load(found, study).row, storage_flag(found)
    again = f", {retried} failed configurations come again" if retry_failed else ""
    typer.echo(f"{study}: {row.trials} trials in all{again}")
    typer.echo(f"start workers: {program()} worker {study}{flag}")


def _budget(text: str, now: int) -> int:
    """`50` is the new total, `+20` is twenty more than now."""
    digits = text.removeprefix("+")
    if not (digits.isascii() and digits.isdigit()):
        raise InputError(f"--trials {text!r}: a whole number such as 50, or +20 for so many more")
    return now + int(digits) if text.startswith("+") else int(digits)


def delete(
    study: StudyName,
    force: Annotated[
        bool, typer.Option("--force", help="Also while workers are at it; ends their trials first.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    keep_files: Annotated[
        bool,
        typer.Option(
            "--keep-files",
            help="Leave logs, checkpoints and weights to its copy (hpo storage copy).",
        ),
    ] = False,
    storage: Storage = None,
) -> None:
    """Remove a study: its trials, curves, logs, checkpoints and weights. There is no way back.

    Refused while a worker holds a trial; --force ends that first.

    Example: hpo delete digits
    """
    from hpo.search import study as studies

    with database(storage) as found:
        old = studies.load(found, study)
        if not yes:
            _confirm(study, old.facts().finished)
        studies.delete(old, Home.default(), force=force, keep_files=keep_files)
    typer.echo(f"{study} was deleted")


def _confirm(study: str, finished: int) -> None:
    if not sys.stdin.isatty():
        raise InputError(f"{study} has {finished} finished trials; to delete it: --yes")
    typer.confirm(f"Delete {study} with {finished} finished trials?", abort=True)
