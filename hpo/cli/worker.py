"""`hpo worker`: one process, one device, until the study is over."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli.options import (
    Artifacts,
    Device,
    Force,
    Storage,
    database,
    quiet_optuna,
)
from hpo.errors import Interrupted
from hpo.paths import Home
from hpo.workers.devices import first_device

if TYPE_CHECKING:
    from hpo.search.study import Study
    from hpo.storage.db import Database


def worker(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY",
            help="Name of the study, or a study file (.toml), which makes the study if it is new.",
        ),
    ],
    device: Device = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="CPU threads.", show_default="all cores of this machine"
        ),
    ] = None,
    force: Force = False,
    storage: Storage = None,
    artifacts: Artifacts = None,
    worker_id: Annotated[str | None, typer.Option(hidden=True)] = None,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
) -> None:
    """Pull trials of a study until it is over. Start any number, anywhere.

    Needs the storage and the study's name alone (and the images at the same path): the study file
    is in the database, and so is where its artifacts are. Ctrl-C once: stop after the current step
    and hand the trial back; twice: stop now.

    The exit code tells whoever starts workers what to do: 0, the study is over or stopped; 130, a
    signal ended this worker and its trial was handed back, start another one; 2, no worker can work
    like this, or the database's file was removed; else it died, start another one.

    Example: HPO_STORAGE=postgresql+psycopg://me@server/hpo hpo worker digits --device cuda:1
    """
    from hpo.search import mirror

    with database(storage) as found:
        wanted = _study(found, study, artifacts)
        home = Home.default()
        from hpo.definition.remarks import remarks
        from hpo.engine.runtime import torch_device
        from hpo.search.agreement import agree_on_code
        from hpo.search.objective import Bench
        from hpo.storage.optuna_rdb import FencedStorage
        from hpo.workers.devices import threads_for
        from hpo.workers.launch import new_worker_id
        from hpo.workers.signals import stop_on_signal
        from hpo.workers.worker import Worker

        place = torch_device(first_device(device))
        log_to_stderr()
        name = worker_id or new_worker_id()
        agree_on_code(found, wanted.uuid, wanted.file, worker=name, force=force)
        if (kept := mirror.find(found, wanted.uuid, home)) is not None:
            kept.verify()
        own = FencedStorage(found)
        view, cores = wanted.optuna_study(own), threads or threads_for(1)
        bench = Bench(wanted, own, view, home, place, cores, force)
        worker = Worker(wanted, own, bench, home=home, device=str(place), worker_id=name)
        for line in remarks(wanted.file):
            logging.getLogger("hpo.cli").warning("%s", line)
        with stop_on_signal() as stop:
            reason = worker.run(stop, supervised=supervised)
    if stop.is_set():
        became = "is held until its lease ends" if worker.still_held else "was handed back"
        raise Interrupted(f"{wanted.row.name}: {reason}; its trial {became}")
    logging.getLogger("hpo.cli").info("%s: %s", wanted.row.name, reason)


def _study(found: Database, study: str, artifacts: str | None) -> Study:
    """The study of that name; or of that file, made by the first of any number of workers, who
    alone needs `artifacts`."""
    from hpo.search import study as studies

    if not study.endswith(".toml"):
        return studies.load(found, study)
    from hpo.api import open_study
    from hpo.definition.studyfile import StudyFile
    from hpo.storage.records import find_study

    file = StudyFile.load(Path(study))
    is_new = find_study(found, file.name) is None
    return open_study(found, file, artifacts if is_new else None)[0]


def log_to_stderr() -> None:
    """Times and messages on standard error, which is a supervised worker's log file."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    quiet_optuna()
