"""`hpo worker`, `launch`, `manifest`, and the agent that launchers start."""

from __future__ import annotations

import inspect
import logging
import re
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hpo import __version__
from hpo.cli.options import (
    Artifacts,
    Device,
    Force,
    Insecure,
    Overrides,
    Storage,
    StudyName,
    StudyOrFile,
    console,
    database,
    open_study_or_file,
    program,
    quiet_optuna,
    storage_flag,
)
from hpo.errors import Conflict, InputError, Interrupted, LauncherError
from hpo.paths import Home
from hpo.workers.launchers.kubernetes import LABEL, QUANTITY, job_name, manifests, require_name
from hpo.workers.process import first_device

if TYPE_CHECKING:
    from hpo.search.study import Study
    from hpo.storage.database import Database
    from hpo.workers.launchers.base import LaunchedWorker, Launcher, LaunchRequest, Target
    from hpo.workers.worker import Worker


def worker(
    study: StudyOrFile,
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
    early: Annotated[bool, typer.Option("--early", hidden=True)] = False,
) -> None:
    """Run one worker until the study is finished. Start as many as you like, on any machine.

    Needs only the storage and the study's name (and the images at the same path): the study file
    and the location of its artifacts are in the database. Ctrl-C: stop after the current step and
    hand the trial back; again: stop now.

    The exit code says whether to start another worker: 0, no, the study is over or stopped; 130,
    yes, a signal ended this one and its trial was handed back; 2, no, it would fail for the same
    reason, or the database file was removed; any other, yes, this one died.

    Example: HPO_STORAGE=postgresql+psycopg://me@server/hpo hpo worker digits --device cuda:1
    """
    from hpo.workers.process import starting, stop_on_signal
    from hpo.workers.spawn import wait_for_call

    with ExitStack() as stack:
        with starting():
            worker_id = wait_for_call() if early else worker_id
            found = stack.enter_context(database(storage))
            wanted = open_study_or_file(found, study, artifacts)
            log_to_stderr()
            ready = _ready(wanted, device, threads, worker_id, force=force)
        stop = stack.enter_context(stop_on_signal())
        stack.callback(ready.close)
        reason = ready.run(stop, supervised=supervised)
    if stop.is_set():
        outcome = "is held until its lease expires" if ready.still_held else "was handed back"
        raise Interrupted(f"{wanted.row.name}: {reason}; its trial {outcome}")
    logging.getLogger("hpo.cli").info("%s: %s", wanted.row.name, reason)


def _ready(
    study: Study, device: str | None, threads: int | None, worker_id: str | None, *, force: bool
) -> Worker:
    """Return a worker of `study` that has imported all that it needs, and may work on it."""
    from hpo.config.remarks import remarks
    from hpo.search import sync
    from hpo.search.fingerprints import agree_on_code
    from hpo.search.trial import TrialRunner
    from hpo.storage.optuna import FencedStorage
    from hpo.training.device import torch_device
    from hpo.workers.process import new_worker_id, threads_for
    from hpo.workers.worker import Worker

    home, name = Home.default(), worker_id or new_worker_id()
    place = torch_device(first_device(device))
    agree_on_code(study.database, study.uuid, study.file, worker=name, force=force)
    if (kept := sync.find(study.database, study.uuid, home)) is not None:
        kept.verify()
    own = FencedStorage(study.database)
    view, cores = study.optuna_study(own), threads or threads_for(1)
    runner = TrialRunner(study, own, view, home, place, cores, force)
    for line in remarks(study.file):
        logging.getLogger("hpo.cli").warning("%s", line)
    return Worker(study, own, runner, home=home, device=str(place), worker_id=name)


def log_to_stderr() -> None:
    """Log to standard error, which is a supervised worker's log file."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    quiet_optuna()


def agent(
    study: StudyName,
    uuid: Annotated[
        str, typer.Option(help="The study's uuid; another study of the same name is refused.")
    ],
    launcher: Annotated[
        Literal["local", "slurm"],
        typer.Option(
            "--launcher", "--engine", help="The launcher that started it; --engine is its old name."
        ),
    ],
    device: Annotated[list[str], typer.Option(help="Run a worker on it; repeatable.")],
    threads: Annotated[int, typer.Option(help="CPU threads of each worker.")],
    storage: Storage = None,
) -> None:
    """Keep workers alive without a terminal, until the study is over or stopped.

    Example: hpo agent digits --uuid ... --launcher local --device cpu --threads 1
    """
    from hpo.workers.agent import Agent, AgentSpec
    from hpo.workers.launchers.slurm import run_in_task
    from hpo.workers.process import stop_on_signal

    with database(storage) as found:
        spec = AgentSpec(study, uuid, found.secret_url, Home.default(), device, threads)
    log_to_stderr()
    running = Agent(spec)
    if launcher == "slurm":
        run_in_task(running)
        return
    with stop_on_signal() as stop:
        running.run(stop)
    logging.getLogger("hpo.cli").info("%s: the agent is done", study)


def probe(study: StudyName, device: Device = None, storage: Storage = None) -> None:
    """Train as standard input says, and tell how fast: for --workers-per-device auto.

    Example: hpo probe digits --device cpu
    """
    with database(storage) as found:
        from hpo.search import study as studies

        file = studies.load(found, study).file
    from hpo.training.device import torch_device
    from hpo.workers.probed import serve
    from hpo.workers.process import threads_for

    quiet_optuna()
    serve(file, torch_device(first_device(device)), threads_for(1), Home.default())


NEWS_S = 30.0
"""How long `hpo launch` waits for its workers to start; they do not need it."""
POLL_S = 0.5


def launch(
    study: StudyOrFile,
    workers: Annotated[
        int, typer.Option("--workers", "-n", metavar="N", min=1, help="Number of workers to add.")
    ] = 1,
    on: Annotated[
        str,
        typer.Option(
            metavar="LAUNCHER",
            help="local (in the background on this host), slurm, ray (the cluster of this host) or "
            "ray://HOST:PORT.",
        ),
    ] = "local",
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(
            metavar="G",
            help="1, a fraction such as 0.5, or 0 for the CPU.",
            show_default="1 if there are GPUs",
        ),
    ] = None,
    cpus_per_worker: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="CPU threads per worker.",
            show_default="1; local: an equal share of the cores",
        ),
    ] = None,
    sbatch: Annotated[
        list[str],
        typer.Option(
            metavar="OPTION",
            help="Another #SBATCH line, such as partition=gpu or time=4:00:00; repeatable.",
            show_default="none",
        ),
    ] = [],  # noqa: B006  (Typer's way to say: repeatable)
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sbatch script without submitting it.")
    ] = False,
    insecure: Insecure = False,
    set_: Overrides = [],  # noqa: B006
    storage: Storage = None,
    artifacts: Artifacts = None,
) -> None:
    """Start workers in the background, on a Ray cluster, or on Slurm; they outlive this terminal.

    A worker that dies is replaced; if its host dies, it is started on another one, and its trial
    resumes from the last checkpoint that can be read there. On other hosts a worker needs hpo, the
    images at the same path, and access to the database. All workers end with the study, or with
    `hpo stop STUDY`.

    Example: hpo launch studies/digits.toml --workers 4 --gpus-per-worker 0.5 --on ray://head:10001
    """
    from hpo.workers.launchers import open_launcher
    from hpo.workers.launchers.base import LaunchRequest, Size, Target
    from hpo.workers.launchers.slurm import Slurm

    home = Home.default()
    if dry_run and on != "slurm":
        raise InputError(f"--dry-run prints the script of --on slurm; --on {on} has none")
    with (
        database(storage) as found,
        open_launcher(on, home, insecure=insecure, sbatch=sbatch) as launcher,
    ):
        size = Size(workers, gpus_per_worker, cpus_per_worker)
        launcher.check(size)
        look = launcher.has_our_files
        chosen = open_study_or_file(found, study, artifacts, set_, look=look)
        _require_unfinished(chosen)
        target = Target(chosen.row.name, chosen.uuid)
        request = LaunchRequest(target, size, found.secret_url, home)
        if dry_run:
            assert isinstance(launcher, Slurm)
            typer.echo(launcher.script(request), nl=False)
            return
        _resume(chosen, launcher, target)
        _start(found, launcher, request, on)


def _require_unfinished(study: Study) -> None:
    """Raise InputError if nothing is left to do."""
    from hpo.search import scheduling

    snapshot = study.snapshot()
    rule = snapshot.stop_reason if snapshot.stop == "rule" else None
    decision = scheduling.decide(snapshot, rule)
    if snapshot.stop != "user" and isinstance(decision, scheduling.Over):
        name, hpo = study.row.name, program()
        raise InputError(f"{name} is over: {decision.reason}; to continue: {hpo} extend {name} ...")


def _resume(study: Study, launcher: Launcher, target: Target) -> None:
    """Lift a stop once the workers that it ends have ended; else they would stay."""
    from hpo.search import study as studies

    if study.row.stop != "user":
        return
    deadline = time.monotonic() + NEWS_S
    while left := launcher.launched(target):
        if time.monotonic() > deadline or all(one.state == "waiting" for one in left):
            names, hpo = ", ".join(one.name for one in left[:4]), program()
            raise Conflict(
                f"{study.row.name} was stopped, and {len(left)} of its workers have not ended yet "
                f"({names}): try again later; to cancel those that are still queued: "
                f"{hpo} stop {study.row.name} --on ..."
            )
        time.sleep(POLL_S)
    studies.resume(study)
    typer.echo(f"study {study.row.name} was stopped; resuming it")


def _start(found: Database, launcher: Launcher, request: LaunchRequest, on: str) -> None:
    from hpo.cli.status import placed_table
    from hpo.formatting import plural
    from hpo.storage.records import clock

    name, began = request.target.study, clock(found)
    launcher.start(request)
    workers = plural(request.size.workers, "worker")
    typer.echo(
        f"{workers} of {name} on {on}: waiting for them to start (Ctrl-C does not stop them)"
    )
    placed = _news(found, launcher, request, began)
    if placed:
        console().print(placed_table(placed))
    failed = _failed(found, request.target, began)
    for line in failed:
        typer.echo(line, err=True)
    if failed and not placed:
        raise LauncherError(f"no worker of {name} could start on {on}: see above")
    hpo, flag = program(), storage_flag(found)
    logs = "" if launcher.has_our_files else f" --on {on}"
    typer.echo(
        f"watch: {hpo} status {name} --watch{flag}\n"
        f"logs:  {hpo} logs {name} -f{logs}{flag}\n"
        f"stop:  {hpo} stop {name}{flag}"
    )


def _news(
    found: Database, launcher: Launcher, request: LaunchRequest, began: float
) -> list[LaunchedWorker]:
    """Wait until the requested workers have started or ended, or NEWS_S have passed, as in a queue;
    return what is placed."""
    from hpo.storage.records import read_workers

    deadline = time.monotonic() + NEWS_S
    while True:
        placed = launcher.launched(request.target)
        new = [w for w in read_workers(found, request.target.uuid) if w.started >= began]
        alive = sum(worker.ended is None for worker in new)
        if alive >= request.size.workers or (new and not placed) or time.monotonic() > deadline:
            return placed
        time.sleep(POLL_S)


def _failed(found: Database, target: Target, since: float) -> list[str]:
    """Return the reasons of workers that have ended since then although the study is not over."""
    from hpo.search.status import read_status

    now = read_status(found, target.study)
    if now.state in ("finished", "stopped"):
        return []
    ended = [w for w in now.workers if w.started >= since and w.ended is not None]
    return [f"{worker.host}: {worker.reason}" for worker in ended]


THIS_HOST = ("localhost", "127.0.0.1", "::1")
NEXT = """\
# Study {study} on Kubernetes. Once, in the same namespace, from files that hold the secrets:
#   kubectl{namespace} create secret generic {storage} --from-file=password=secrets/database
#   kubectl{namespace} create secret generic {dashboard} --from-file=password=secrets/dashboard \
--from-file=token=secrets/token
# Then pipe this to: kubectl apply -f -
# Look: kubectl{namespace} port-forward service/hpo-dashboard 8080:8080
# apply does not run a finished Job again; first: kubectl{namespace} delete job {job}
"""


@dataclass(frozen=True)
class ManifestOptions:
    """The options of `hpo manifest`. Raises InputError for what Kubernetes would refuse."""

    study: StudyOrFile
    workers: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="Pods.")] = 1
    image: Annotated[
        str, typer.Option(metavar="IMAGE", help="Image built from the Dockerfile, as pods pull it.")
    ] = f"hpo:{__version__}"
    namespace: Annotated[str | None, typer.Option(metavar="NAME", show_default="kubectl's own")] = (
        None
    )
    cpus: Annotated[int, typer.Option(metavar="N", min=1, help="CPU cores per worker.")] = 2
    memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="Memory per worker, 1 GiB of it as shared memory for batches."
        ),
    ] = "4Gi"
    gpus: Annotated[
        int, typer.Option(metavar="N", min=0, max=1, help="GPUs per worker: 0 or 1.")
    ] = 0
    data_claim: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Volume claim with the images, mounted read-only.",
            show_default="none",
        ),
    ] = None
    data_path: Annotated[
        str, typer.Option(metavar="DIR", help="Its mount path: `data/` in a study file.")
    ] = "/srv/hpo/data"
    home_claim: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Volume claim that all workers can write, for checkpoints and caches: a trial "
            "resumes in another pod from its last epoch.",
            show_default="none: a moved trial restarts from epoch 1, unless there are artifacts",
        ),
    ] = None
    artifacts: Artifacts = None
    artifacts_secret: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Secret whose keys are environment variables for the artifacts, such as "
            "AWS_ACCESS_KEY_ID.",
            show_default="none",
        ),
    ] = None
    storage_secret: Annotated[
        str, typer.Option(metavar="NAME", help="Secret with the database's `password`.")
    ] = "hpo-storage"
    dashboard_secret: Annotated[
        str, typer.Option(metavar="NAME", help="Secret with `password` and `token`.")
    ] = "hpo-dashboard"
    storage: Storage = None

    def __post_init__(self) -> None:
        require_name("--namespace", self.namespace, LABEL)
        for name in ("data_claim", "home_claim", "artifacts_secret", "storage_secret",
                     "dashboard_secret"):  # fmt: skip
            require_name(f"--{name.replace('_', '-')}", getattr(self, name))
        if not QUANTITY.fullmatch(self.memory):
            raise InputError(f"--memory {self.memory!r}: a number and a unit, such as 4Gi or 500Mi")
        if not self.data_path.startswith("/") or ":" in self.data_path:
            raise InputError(
                f"--data-path {self.data_path!r}: an absolute path, such as /srv/hpo/data"
            )
        if self.artifacts is not None and "://" not in self.artifacts:
            raise InputError(
                f"--artifacts {self.artifacts!r}: pods cannot see this machine's folders; give a "
                "URL, such as s3://BUCKET/FOLDER (a volume of the cluster: --home-claim)"
            )
        if not self.image or re.search(r"\s", self.image):
            raise InputError(f"--image {self.image!r}: the name of an image, such as hpo:1.0")


def manifest(**given: Any) -> None:
    """Print the Kubernetes manifest of a study: an Indexed Job of workers, a dashboard and its
    service.

    Nothing is started, and no database is read. Secrets are named, never printed; the comment at
    the top says how to create them. Pods that are evicted or die are replaced, and their trials
    resume.

    Example: hpo manifest studies/digits.toml --workers 4 --storage
    postgresql+psycopg://hpo@database/hpo
    """
    from hpo.storage.artifacts import normal

    name, source = _manifest_study(given["study"])
    if given["artifacts"]:
        given["artifacts"] = normal(given["artifacts"])
    options = ManifestOptions(**given | {"study": name, "storage": _reachable(given["storage"])})
    typer.echo(_comment(options) + _yaml(manifests(vars(options) | {"source": source})), nl=False)


# One parameter of the command for each field.
manifest.__signature__ = inspect.signature(ManifestOptions, eval_str=True)  # type: ignore[attr-defined]


def _manifest_study(study: str) -> tuple[str, str | None]:
    """Return the study's name and, if it is a file, its text."""
    from hpo.config.strategies import StudyConfig
    from hpo.config.study import StudyFile
    from hpo.config.toml import is_file_name

    if is_file_name(study):
        file = StudyFile.load(Path(study))
        return file.name, file.text
    return StudyConfig.parse({"name": study}, prefix="study.").name, None


def _reachable(storage: str | None) -> str:
    """Return the URL for pods, without its password, which is in the secret."""
    from hpo.storage.url import for_others, parse, show

    url = parse(storage or Home.default().storage)
    if url.get_backend_name() == "sqlite":
        raise InputError(
            f"{show(url)}: pods cannot share a file; name a database server with --storage "
            "postgresql+psycopg://USER@HOST/NAME"
        )
    if url.host is None or url.host in THIS_HOST:
        raise InputError(
            f"{show(url)}: in a pod, that host is the pod itself; use the name of the database's "
            "host in the cluster"
        )
    return for_others(url)


def _comment(options: ManifestOptions) -> str:
    return NEXT.format(
        study=options.study,
        namespace=f" --namespace {options.namespace}" if options.namespace else "",
        storage=options.storage_secret,
        dashboard=options.dashboard_secret,
        job=job_name(options.study),
    )


def _yaml(documents: list[dict[str, Any]]) -> str:
    """Dump readable YAML: keys in our order, text of several lines as a block."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    Dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]
    return yaml.dump_all(
        documents,
        Dumper=Dumper,
        sort_keys=False,
        width=100,
        explicit_start=True,
        allow_unicode=True,
    )
