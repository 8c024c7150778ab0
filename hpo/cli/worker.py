"""`hpo worker`: one process, one device, until the study is over."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from hpo.cli.options import Device, Force, Storage, StudyName, database, first_device, quiet_optuna
from hpo.paths import Home


def worker(
    study: StudyName,
    device: Device = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="CPU threads.", show_default="all cores of this machine"
        ),
    ] = None,
    force: Force = False,
    storage: Storage = None,
    worker_id: Annotated[str | None, typer.Option(hidden=True)] = None,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
) -> None:
    """Pull trials of an existing study until it is over. Start any number, anywhere.

    Needs the storage and the study's name alone (and the images at the same path): the study file
    is in the database, and so is where its artifacts are. Ctrl-C once: stop after the current step
    and hand the trial back; twice: stop now.

    Example: HPO_STORAGE=postgresql+psycopg://me@server/hpo hpo worker digits --device cuda:1
    """
    from hpo.search import mirror
    from hpo.search import study as studies

    with database(storage) as found:
        wanted = studies.load(found, study)
        home = Home.default()
        from hpo.engine.runtime import torch_device
        from hpo.search.agreement import agree_on_code
        from hpo.search.objective import Bench
        from hpo.storage.optuna_rdb import FencedStorage
        from hpo.workers.devices import threads_for
        from hpo.workers.launch import new_worker_id
        from hpo.workers.signals import stop_on_signal
        from hpo.workers.worker import Worker

        place = torch_device(first_device(device))
        _log()
        name = worker_id or new_worker_id()
        agree_on_code(found, wanted.uuid, wanted.file, worker=name, force=force)
        if (artifacts := mirror.find(found, wanted.uuid, home)) is not None:
            artifacts.verify()
        own = FencedStorage(found)
        view, cores = wanted.optuna_study(own), threads or threads_for(1)
        bench = Bench(wanted, own, view, home, place, cores, force)
        with stop_on_signal() as stop:
            reason = Worker(wanted, own, bench, home=home, device=str(place), worker_id=name).run(
                stop, supervised=supervised
            )
    logging.getLogger("hpo.cli").info("%s: %s", study, reason)


def _log() -> None:
    """Times and messages on standard error, which is a supervised worker's log file."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    quiet_optuna()
