"""`hpo enqueue`, `stop`, `resume`, `extend` and `delete`: what steers a study."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli import limits
from hpo.cli.options import (
    Insecure,
    Json,
    On,
    Storage,
    StudyName,
    confirm,
    database,
    program,
    say,
    storage_flag,
)
from hpo.errors import InputError
from hpo.formatting import plural
from hpo.paths import Home

if TYPE_CHECKING:
    from hpo.config.study import StudyFile


def enqueue(
    study: StudyName,
    values: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE...",
            help="Searched parameters by dotted name; the others are sampled.",
        ),
    ],
    as_json: Json = False,
    storage: Storage = None,
) -> None:
    """Queue a configuration as the next trial; it counts toward the budget.

    Example: hpo enqueue digits optimizer.name=adamw optimizer.lr=0.003
    """
    from hpo.api.study import Study
    from hpo.config.toml import parse_assignments

    given = parse_assignments(values)
    with database(storage) as found:
        Study(study, found).enqueue(given)
    say(as_json, {"study": study, "enqueued": given}, f"the next trial of {study} will try it")


def stop(
    study: StudyName,
    on: On = None,
    insecure: Insecure = False,
    as_json: Json = False,
    storage: Storage = None,
) -> None:
    """Pause a study: workers save after the current epoch and exit.

    Reaches every worker, on any host, through the database. Queued Slurm and Ray workers exit once
    they are scheduled; --on cancels them now.

    Example: hpo stop digits
    """
    from hpo.api.study import Study
    from hpo.workers.launchers import open_launcher
    from hpo.workers.launchers.base import Target

    with database(storage) as found:
        chosen = Study(study, found)
        chosen.stop()
        if on is not None:
            with open_launcher(on, Home.default(), insecure=insecure) as launcher:
                launcher.stop(Target(study, chosen.row.uuid))
        status, flag = chosen.status(), storage_flag(found)
    line = f"{study} is stopping; to resume: {program()} resume {study}{flag}"
    say(as_json, status.to_dict(), line)


def resume(study: StudyName, as_json: Json = False, storage: Storage = None) -> None:
    """Resume a stopped study. Starts no worker: `hpo run`, `launch` and `worker` do.

    Example: hpo resume digits
    """
    from hpo.api.study import Study

    with database(storage) as found:
        chosen = Study(study, found)
        chosen.resume()
        status, flag = chosen.status(), storage_flag(found)
    line = f"{study} is resumed; start workers: {program()} worker {study}{flag}"
    say(as_json, status.to_dict(), line)


def extend(
    study: StudyName,
    trials: Annotated[
        str | None,
        typer.Option(
            metavar="N|+N", help="New budget in trials, or +N for N more.", show_default="unchanged"
        ),
    ] = None,
    max_time: Annotated[
        str | None,
        typer.Option(
            metavar="T|+T",
            help="New limit of time by the clock, such as 2h, or +30m for 30 minutes more.",
            show_default="unchanged",
        ),
    ] = None,
    max_full_trainings: Annotated[
        str | None,
        typer.Option(
            metavar="X|+X",
            help="New limit of full trainings, or +X for X more.",
            show_default="unchanged",
        ),
    ] = None,
    timeout_s: Annotated[
        str | None,
        typer.Option(
            metavar="S|+S",
            help="New limit of the summed time of all workers, in seconds or such as 4h.",
            show_default="unchanged",
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            metavar="V",
            help="New target value, at which the study stops.",
            show_default="unchanged",
        ),
    ] = None,
    patience_trials: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="New number of trials in a row without a better one.",
            show_default="unchanged",
        ),
    ] = None,
    epochs: Annotated[
        str | None,
        typer.Option(
            metavar="N|+N",
            help="New number of epochs of a trial: complete trials go on to it.",
            show_default="unchanged",
        ),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Try failed configurations again, within the budget."),
    ] = False,
    as_json: Json = False,
    storage: Storage = None,
) -> None:
    """Raise the limits of a study and resume it. Starts no worker.

    With more --epochs, complete trials go on, from the checkpoint where one was kept
    (study.keep_checkpoints), else again from their start, and end as if they had had so many from
    the beginning. Refused where that cannot be, as with a cosine schedule, which runs over all
    epochs; the message says what helps. Stop the workers first.

    Example: hpo extend digits --trials +20; hpo extend digits --epochs 30
    """
    from hpo.api.study import Study
    from hpo.reports.progress import time_and_epochs

    texts = {"trials": trials, "max_time": max_time, "max_full_trainings": max_full_trainings,
             "timeout_s": timeout_s, "epochs": epochs}  # fmt: skip
    if {*texts.values(), target, patience_trials} == {None} and not retry_failed:
        raise InputError(
            "nothing to extend: give --trials, --max-time, --max-full-trainings, --timeout-s, "
            "--target, --patience-trials, --epochs or --retry-failed"
        )
    with database(storage) as found:
        chosen = Study(study, found)
        complete = 0 if epochs is None else chosen.status().count("complete")
        retried = chosen.extend(
            retry_failed=retry_failed,
            target=target,
            patience_trials=patience_trials,
            **limits.raised(chosen, texts),
        )
        status, flag = chosen.status(), storage_flag(found)
    total = "no limit on trials" if status.budget is None else f"{status.budget} trials in total"
    again = f", {retried} failed configurations will be retried" if retry_failed else ""
    continued = 0 if epochs is None else complete - status.count("complete")
    more = (_going_on(continued, status.file),) if continued else ()
    say(
        as_json,
        {**status.to_dict(), "retried": retried, "continued": continued},
        f"{study}: {', '.join((total, *time_and_epochs(status)))}{again}",
        *more,
        f"start workers: {program()} worker {study}{flag}",
    )


def _going_on(trials: int, file: StudyFile) -> str:
    """Say how complete trials go on."""
    kept = file.study.keep_checkpoints
    return (
        f"{plural(trials, 'complete trial')} {'goes' if trials == 1 else 'go'} on to epoch "
        f"{file.max_epochs}: from the checkpoint where one was kept (study.keep_checkpoints = "
        f"{kept}), else again from epoch 1"
    )


def delete(
    study: StudyName,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Also while workers are running; their trials are ended first."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    keep_files: Annotated[
        bool,
        typer.Option(
            "--keep-files",
            help="Keep logs, checkpoints and weights for its copy (hpo storage copy).",
        ),
    ] = False,
    as_json: Json = False,
    storage: Storage = None,
) -> None:
    """Remove a study: its trials, curves, logs, checkpoints and weights. This cannot be undone.

    Refused while a worker holds a trial, unless --force.

    Example: hpo delete digits
    """
    from hpo.api.study import Study
    from hpo.search.status import find_verification

    with database(storage) as found:
        chosen = Study(study, found)
        verified = find_verification(found, chosen.row)
        if not yes:
            _confirm(study, chosen.status().finished)
        chosen.delete(force=force, keep_files=keep_files)
        flag = storage_flag(found)
    lines = [f"{study} was deleted"]
    if verified is not None:
        left = f"its verification is still there: {program()} delete {verified.name}{flag}"
        lines.append(left)
    deleted = {"deleted": study, "verification": verified.name if verified else None}
    say(as_json, deleted, *lines)


def _confirm(study: str, finished: int) -> None:
    if not sys.stdin.isatty():
        raise InputError(f"{study} has {finished} finished trials; to delete it: --yes")
    confirm(f"Delete {study} with {finished} finished trials?")
