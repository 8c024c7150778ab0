"""`hpo launch` and what belongs to it: workers on other hosts, or in the background of this one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli.options import (
    Artifacts,
    Insecure,
    Overrides,
    Storage,
    console,
    database,
    program,
    storage_flag,
)
from hpo.errors import Conflict, EngineError, InputError
from hpo.paths import Home

if TYPE_CHECKING:
    from hpo.search.study import Study
    from hpo.storage.db import Database
    from hpo.workers.engines import Engine, Order, Placed, Target

NEWS_S = 30.0
"""How long `hpo launch` waits to show what became of its workers; they go on without it."""
POLL_S = 0.5


def launch(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY", help="Name of the study, or its file (.toml), which creates it."
        ),
    ],
    workers: Annotated[
        int, typer.Option("--workers", "-n", metavar="N", min=1, help="So many more workers.")
    ] = 1,
    on: Annotated[
        str,
        typer.Option(
            metavar="ENGINE",
            help="local (in the background of this host), slurm, ray (the cluster of this host) or "
            "ray://HOST:PORT.",
        ),
    ] = "local",
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(
            metavar="G",
            help="1, a share such as 0.5, or 0 for the CPU.",
            show_default="1 where there are GPUs",
        ),
    ] = None,
    cpus_per_worker: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="CPU threads of each.",
            show_default="1; local: the cores, shared",
        ),
    ] = None,
    sbatch: Annotated[
        list[str],
        typer.Option(
            metavar="OPTION",
            help="A further #SBATCH line, such as partition=gpu or time=4:00:00; repeatable.",
            show_default="none",
        ),
    ] = [],  # noqa: B006  (Typer's way to say: repeatable)
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the script for sbatch, submit nothing.")
    ] = False,
    insecure: Insecure = False,
    set_: Overrides = [],  # noqa: B006
    storage: Storage = None,
    artifacts: Artifacts = None,
) -> None:
    """Place workers and leave them: in the background, on a Ray cluster, or through Slurm.

    The study goes on without this terminal. A worker that dies is replaced; one whose host dies is
    placed elsewhere, and its trial goes on from its last checkpoint that others can read. On other
    hosts a worker needs hpo, the images at the same path, and a database that it reaches. `hpo stop
    STUDY` ends all of them; so does the end of the study.

    Example: hpo launch studies/digits.toml --workers 4 --gpus-per-worker 0.5 --on ray://head:10001
    """
    from hpo.workers.engines import Order, Size, Target, open_engine
    from hpo.workers.engines.slurm import Slurm

    home = Home.default()
    if dry_run and on != "slurm":
        raise InputError(f"--dry-run prints the script of --on slurm; --on {on} has none")
    with (
        database(storage) as found,
        open_engine(on, home, insecure=insecure, sbatch=sbatch) as engine,
    ):
        size = Size(workers, gpus_per_worker, cpus_per_worker)
        engine.check(size)
        chosen = _study(found, study, set_, artifacts, look=engine.has_our_files)
        target = Target(chosen.row.name, chosen.uuid)
        order = Order(target, size, found.secret_url, home)
        if dry_run:
            assert isinstance(engine, Slurm)
            typer.echo(engine.script(order), nl=False)
            return
        _resume(chosen, engine, target)
        _start(found, engine, order, on)


def _study(
    found: Database, given: str, overrides: Sequence[str], artifacts: str | None, *, look: bool
) -> Study:
    """The study of that name; or of that file, made if it is new (with `look`, its images are
    looked for first). Raises InputError where nothing is left to do."""
    from hpo.api import open_study
    from hpo.definition.studyfile import StudyFile
    from hpo.definition.toml import assignments
    from hpo.search import plan
    from hpo.search import study as studies

    if given.endswith(".toml") or Path(given).is_file():
        study, _ = open_study(
            found, StudyFile.load(Path(given), assignments(overrides)), None, look=look
        )
    elif overrides:
        raise InputError("--set changes a study file; the study of a name is as it was created")
    else:
        study = studies.load(found, given)
    facts = study.facts()
    rule = facts.stop_reason if facts.stop == "rule" else None
    decision = plan.decide(facts, rule)
    if facts.stop != "user" and isinstance(decision, plan.Over):
        name, hpo = study.row.name, program()
        raise InputError(f"{name} is over: {decision.reason}; to go on: {hpo} extend {name} ...")
    return study


def _resume(study: Study, engine: Engine, target: Target) -> None:
    """Lift a stop, once the workers that end because of it have ended: they would stay."""
    from hpo.search import study as studies

    if study.row.stop != "user":
        return
    deadline = time.monotonic() + NEWS_S
    while left := engine.placed(target):
        if time.monotonic() > deadline or all(one.state == "waiting" for one in left):
            names, hpo = ", ".join(one.name for one in left[:4]), program()
            raise Conflict(
                f"{study.row.name} was stopped, and {len(left)} of its workers are still there "
                f"({names}): try again when they have handed back; to take back those that wait "
                f"for a place: {hpo} stop {study.row.name} --on ..."
            )
        time.sleep(POLL_S)
    studies.resume(study)
    typer.echo(f"study {study.row.name} was stopped; it goes on")


def _start(found: Database, engine: Engine, order: Order, on: str) -> None:
    from hpo.cli.workers import placed_table
    from hpo.results.table import count
    from hpo.storage.records import clock

    name, began = order.target.study, clock(found)
    engine.start(order)
    some = count(order.size.workers, "worker")
    typer.echo(f"{some} of {name} on {on}: waiting for their first news (Ctrl-C: they go on)")
    placed = _news(found, engine, order, began)
    if placed:
        console().print(placed_table(placed))
    failed = _failed(found, order.target, began)
    for line in failed:
        typer.echo(line, err=True)
    if failed and not placed:
        raise EngineError(f"no worker of {name} could work on {on}: see above")
    hpo, flag = program(), storage_flag(found)
    logs = "" if engine.has_our_files else f" --on {on}"
    typer.echo(
        f"watch it: {hpo} status {name} --watch{flag}\n"
        f"logs:     {hpo} logs {name} -f{logs}{flag}\n"
        f"end it:   {hpo} stop {name}{flag}"
    )


def _news(found: Database, engine: Engine, order: Order, began: float) -> list[Placed]:
    """What is placed once as many workers have begun as were ordered, all have ended, or it takes
    too long: a queue may."""
    from hpo.storage.records import read_workers

    deadline = time.monotonic() + NEWS_S
    while True:
        placed = engine.placed(order.target)
        new = [w for w in read_workers(found, order.target.uuid) if w.started >= began]
        alive = sum(worker.ended is None for worker in new)
        if alive >= order.size.workers or (new and not placed) or time.monotonic() > deadline:
            return placed
        time.sleep(POLL_S)


def _failed(found: Database, target: Target, since: float) -> list[str]:
    """Workers that have ended since then though the study is not over, with their reasons."""
    from hpo.search.status import read_status

    now = read_status(found, target.study)
    if now.state in ("finished", "stopped"):
        return []
    ended = [w for w in now.workers if w.started >= since and w.ended is not None]
    return [f"{worker.host}: {worker.reason}" for worker in ended]
