"""`hpo keep`: what engines start in a process of its own; not for people, so not in the help."""

from __future__ import annotations

import logging
from typing import Annotated, Literal

import typer

from hpo.cli.options import Storage, StudyName, database
from hpo.cli.worker import log_to_stderr
from hpo.paths import Home


def keep(
    study: StudyName,
    uuid: Annotated[str, typer.Option(help="The study's id: another of its name is refused.")],
    engine: Annotated[Literal["local", "slurm"], typer.Option(help="Who started it.")],
    device: Annotated[list[str], typer.Option(help="A worker on each; repeatable.")],
    threads: Annotated[int, typer.Option(help="CPU threads of each worker.")],
    storage: Storage = None,
) -> None:
    """Keep workers alive without a terminal, until the study is over or stopped.

    Example: hpo keep digits --uuid ... --engine local --device cpu --threads 1
    """
    from hpo.workers.engines.slurm import run_in_task
    from hpo.workers.keeper import Duty, Keeper
    from hpo.workers.signals import stop_on_signal

    with database(storage) as found:
        duty = Duty(study, uuid, found.secret_url, Home.default(), device, threads)
    log_to_stderr()
    keeper = Keeper(duty)
    if engine == "slurm":
        run_in_task(keeper)
        return
    with stop_on_signal() as stop:
        keeper.run(stop)
    logging.getLogger("hpo.cli").info("%s: the keeper ends", study)
