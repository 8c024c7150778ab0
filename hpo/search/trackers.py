"""Experiment trackers that users have already: TensorBoard, MLflow and W&B.

Each works in a thread of its own behind a queue, so that a slow server delays no training. One that
fails is warned of once and dropped; the search goes on without it.

Every attempt at a trial gives all epochs from the first one, those of its predecessors too. So the
curve is whole wherever it goes on, and each tracker sees to it that no step is there twice.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from queue import Full, Queue
from typing import Any, Protocol, get_args

from filelock import FileLock

from hpo.config.strategies import TrackerName
from hpo.errors import InputError, nearest
from hpo.extras import install_command
from hpo.paths import Home
from hpo.redaction import redact

log = logging.getLogger(__name__)

NAMES: tuple[str, ...] = get_args(TrackerName)
MOST_WAITING = 10_000
"""Messages that a tracker may be behind."""
FLUSH_S = 20.0
"""Seconds that a process waits at its end for trackers that are behind."""

Metrics = Mapping[str, float]
Scalar = str | int | float | bool


@dataclass(frozen=True)
class Run:
    """One training, as trackers show it."""

    project: str
    """The study, or the folder of a retraining."""
    name: str
    """Its name there, such as `trial-7`."""
    key: str
    """Unique among all runs, and the same for each attempt at it."""
    params: Mapping[str, Scalar] = field(default_factory=dict)
    epochs: Sequence[Metrics] = ()
    """Metrics of the epochs that are finished already, from the first."""


class Tracker(Protocol):
    """Shows one run after another."""

    def open(self, run: Run) -> None:
        """Begin a run, or go on with it."""

    def log(self, epoch: int, metrics: Metrics) -> None:
        """Take the metrics of an epoch, counted from 1."""

    def close(self, outcome: str | None, results: Metrics) -> None:
        """End the run; without an outcome it goes on later, or elsewhere."""


class TensorBoard:
    """Event files in a folder per run, with the parameters for the HPARAMS tab."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, run: Run) -> None:
        """Begin an event file that takes the place of those of earlier attempts."""
        from torch.utils.tensorboard import SummaryWriter

        # What earlier files of the folder have from step 1 on is not shown any more.
        self.writer: Any = SummaryWriter(str(self.root / run.name), purge_step=1)
        self.params, self.step = run.params, 0
        for epoch, metrics in enumerate(run.epochs, 1):
            self.log(epoch, metrics)

    def log(self, epoch: int, metrics: Metrics) -> None:
        """Write a scalar per metric."""
        self.step = epoch
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self, outcome: str | None, results: Metrics) -> None:
        """Write the results, and the parameters beside them."""
        from torch.utils.tensorboard.summary import hparams

        if outcome is not None:
            for name, value in results.items():
                self.writer.add_scalar(name, value, self.step)
            self.writer.add_text("outcome", outcome, self.step)
            described: Any = hparams  # has no types
            for summary in described(dict(self.params), dict(results)):
                self.writer.file_writer.add_summary(summary)
        self.writer.close()


STATUS = {"complete": "FINISHED", "paused": "SCHEDULED", "pruned": "KILLED"}
"""MLflow's status of a run by our outcome, where that is not FAILED."""
KEY = "hpo.key"
"""Tag by which an MLflow run is found again."""


class MLflow:
    """Runs in the experiment of the study, on the server of MLFLOW_TRACKING_URI or in a file."""

    def __init__(self, store: Path) -> None:
        self.store = store

    def open(self, run: Run) -> None:
        """Find the run of an earlier attempt, or create it."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        self.store.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.store}.lock"):  # many workers make the database at once
            self.client = self._client()
            experiment = self._experiment(run.project)
            found = self.client.search_runs([experiment], f"tags.`{KEY}` = '{run.key}'")
            if found:
                self.run_id = str(found[0].info.run_id)
                self.client.update_run(self.run_id, status="RUNNING")
            else:
                self.run_id = self._create(experiment, run)
        self.known = self._steps(found[0].data.metrics) if found else set()
        for epoch, metrics in enumerate(run.epochs, 1):
            self.log(epoch, metrics)

    def _client(self) -> Any:
        from mlflow import MlflowClient

        local = f"sqlite:///{self.store}"
        return MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or local)

    def _experiment(self, name: str) -> str:
        """Return the id of the experiment `name`, which another host may create meanwhile."""
        for last in (False, True):
            if found := self.client.get_experiment_by_name(name):
                return str(found.experiment_id)
            try:
                local = not os.environ.get("MLFLOW_TRACKING_URI")
                place = str(self.store.with_suffix("")) if local else None
                return str(self.client.create_experiment(name, artifact_location=place))
            except Exception:
                if last:
                    raise
        raise AssertionError

    def _create(self, experiment: str, run: Run) -> str:
        tags = {KEY: run.key, "mlflow.source.name": "hpo"}
        run_id = str(self.client.create_run(experiment, tags=tags, run_name=run.name).info.run_id)
        for name, value in run.params.items():
            self.client.log_param(run_id, _plain(name), value)
        return run_id

    def _steps(self, names: Iterable[str]) -> set[int]:
        """Return the epochs that the run has already, by its metrics of these names."""
        history = self.client.get_metric_history
        return {one.step for name in names for one in history(self.run_id, name)}

    def log(self, epoch: int, metrics: Metrics) -> None:
        """Send all metrics of an epoch at once, unless the run has it."""
        if epoch not in self.known:
            self.known.add(epoch)
            self._send(metrics, epoch)

    def _send(self, metrics: Metrics, step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(_plain(name), value, now, step) for name, value in metrics.items()]
        self.client.log_batch(self.run_id, metrics=batch)

    def close(self, outcome: str | None, results: Metrics) -> None:
        """Write the results, and how it ended."""
        if outcome is not None:
            self._send(results, max(self.known, default=0))
            self.client.set_tag(self.run_id, "hpo.outcome", outcome)
            self.client.set_terminated(self.run_id, STATUS.get(outcome, "FAILED"))


def _plain(name: str) -> str:
    """Return a name that MLflow takes: a class or a user's function may have any."""
    return re.sub(r"[^\w.\- /]", "_", name)[:250]


class WandB:
    """Runs in the project of the study: files to `wandb sync`, or on the server with
    WANDB_MODE=online."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, run: Run) -> None:
        """Begin the run, or go on with it, under the same id."""
        import wandb

        self.root.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE", "offline")
        self.run = wandb.init(
            project=run.project,
            name=run.name,
            id=re.sub(r"[^\w-]", "-", run.key),
            dir=str(self.root),
            config=dict(run.params),
            mode=mode,
            # `wandb sync` lets files of one id take each other's place, and each has all epochs.
            resume=None if mode == "offline" else "allow",
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, init_timeout=30),
        )
        first = self.run.starting_step  # those before are on the server
        for epoch, metrics in enumerate(run.epochs, 1):
            if epoch >= first:
                self.log(epoch, metrics)

    def log(self, epoch: int, metrics: Metrics) -> None:
        """Log all metrics of an epoch."""
        self.run.log(dict(metrics), step=epoch)

    def close(self, outcome: str | None, results: Metrics) -> None:
        """Write the results as the run's summary, and finish it."""
        if outcome is not None:
            self.run.summary.update({**results, "outcome": outcome})
        worked = outcome in (None, *STATUS)
        self.run.finish(exit_code=0 if worked else 1)


class _Channel:
    """A tracker behind a queue."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self.queue: Queue[Callable[[Tracker], None] | None] = Queue(MOST_WAITING)
        self.dropped = False
        self.thread = threading.Thread(target=self._work, name=f"log {name}", daemon=True)
        self.thread.start()

    def put(self, call: Callable[[Tracker], None] | None) -> None:
        """Let the tracker do something, once it has done what came before."""
        if self.dropped:
            return
        try:
            self.queue.put_nowait(call)
        except Full:
            self._drop(f"it is {MOST_WAITING:,} messages behind")

    def _work(self) -> None:
        while (call := self.queue.get()) is not None and not self.dropped:
            try:
                call(self.tracker)
            except Exception as error:
                self._drop(f"{type(error).__name__}: {error}")

    def _drop(self, why: str) -> None:
        self.dropped = True
        first = redact((why.splitlines() or [""])[0])
        log.warning("log = %r: %s; nothing more is logged there by this process", self.name, first)

    def join(self, deadline: float) -> None:
        """Wait until it has done all, or could not by `deadline`."""
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive() and not self.dropped:
            self._drop(f"not done after {FLUSH_S:g} s")


class Trackers:
    """The trackers of a process. Each call returns at once; those of one run come in order, those
    of a run that is not open are ignored."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self.channels = [_Channel(name, one) for name, one in trackers.items()]
        self.key: str | None = None
        self.count = 0
        """Epochs of the open run so far."""

    @classmethod
    def of(cls, names: Iterable[str], home: Home, folder: Path) -> Trackers:
        """Return those of `names`: event files go to `folder`, what has no server to `home`."""
        made: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(folder),
            "mlflow": lambda: MLflow(home.mlflow),
            "wandb": lambda: WandB(home.root),
        }
        return cls({name: made[name]() for name in names})

    def open(self, run: Run) -> None:
        """Begin a run; one that is still open was left."""
        self._leave()
        self.key, self.count = run.key, len(run.epochs)
        self._put(lambda tracker: tracker.open(run))

    def log(self, key: str, epoch: int, metrics: Metrics) -> None:
        """Log an epoch of the run `key`, unless that was done."""
        if key == self.key and epoch > self.count:
            self.count, values = epoch, dict(metrics)
            self._put(lambda tracker: tracker.log(epoch, values))

    def end(self, key: str, outcome: str, results: Metrics) -> None:
        """End the run `key`, with its results."""
        if key == self.key:
            self.key = None
            self._put(lambda tracker: tracker.close(outcome, results))

    def close(self) -> None:
        """Leave a run that is open, and wait for all trackers, FLUSH_S at most."""
        self._leave()
        deadline = time.monotonic() + FLUSH_S
        for channel in self.channels:
            channel.put(None)
        for channel in self.channels:
            channel.join(deadline)

    def _leave(self) -> None:
        if self.key is not None:
            self.key = None
            self._put(lambda tracker: tracker.close(None, {}))

    def _put(self, call: Callable[[Tracker], None]) -> None:
        for channel in self.channels:
            channel.put(call)


def require(names: Iterable[str]) -> None:
    """Raise InputError for an unknown tracker, or one whose package is not installed."""
    for name in names:
        if name not in NAMES:
            raise InputError(f"log {name!r}: {nearest(name, NAMES)}")
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # W&B's own folder wandb/ looks like a package
            raise InputError(f"log {name!r}: it is not installed: {install_command(name)}")


def commands(names: Iterable[str], home: Home, folder: Path) -> Iterator[str]:
    """Yield the commands that show what trackers without a server were given (`Trackers.of`)."""
    for name in names:
        if name == "tensorboard":
            yield f"tensorboard --logdir {_near(folder)}"
        elif name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
            yield f"mlflow ui --backend-store-uri sqlite:///{_near(home.mlflow)}"
        elif name == "wandb" and os.environ.get("WANDB_MODE", "offline") == "offline":
            yield f"wandb sync {_near(home.root / 'wandb')}"


def _near(path: Path) -> str:
    """Return a path for a shell, relative to the working directory if it is below it."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def scalars(values: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return parameters as trackers take them: what is no number or text as text."""
    return {
        name: value if isinstance(value, Scalar) else str(value) for name, value in values.items()
    }
