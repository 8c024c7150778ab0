"""Studies under random faults, one after the other, until the time is over; each is checked.

    python -m tests.harness.chaos {sqlite,postgresql} SECONDS SEED

Workers really train something tiny, with an odd SEED three folds of it, under the product's own
supervisor, which runs in a process of its own. At random instants a worker or the supervisor is
killed (SIGKILL), asked to end (SIGTERM) or stopped for a while (SIGSTOP, SIGCONT), and the database
is restarted (PostgreSQL) or locked for a while (SQLite). Where the supervisor is gone it is started
again. Files lie under HPO_HOME. Prints one JSON object, in which `violations` is to be empty.
SIGTERM ends it with all its processes.

`python -m benchmarks.chaos` does the same for longer, and prints a table.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch

from hpo.config.study import StudyFile, parse_study
from hpo.errors import Interrupted, StorageUnavailable
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.study import Study
from hpo.storage.database import connect
from hpo.workers.process import stop_on_signal
from hpo.workers.supervisor import Supervisor
from tests.harness import verdict
from tests.harness.fakes import study_file
from tests.harness.servers import Postgres
from tests.harness.swarm import Child, Forks, forked
from tests.harness.verdict import Curves, Verdict

LEASE_S = 2.0
PAUSE_S = 0.8
"""Between two faults, on average."""
CALM_S = 240.0
"""A study that has not ended so long after the last fault never will."""
BY_A_FAULT = (
    *(Interrupted.exit_code, StorageUnavailable.exit_code),
    *(-signal.SIGKILL, -signal.SIGTERM),
)
"""How a supervisor ends whose study is not over."""
EPOCHS, POINTS = 4, 12
SPACE = "optimizer.lr = [0.3, 0.1, 0.03, 0.01]\nseed = [0, 1, 2]"
TRAIN = f"""epochs = {EPOCHS}
batch_size = 32
data.limit_train = 300
model = {{cnn = {{filters = [4]}}, dropout = 0.2}}
runtime = {{precision = "float32", memory_format = "contiguous", threads = 1}}
"""


PROMOTE = 'scheduler = {name = "promote", reduction_factor = 2, finish = 2}'


def chaos_study(name: str, *, trials: int, folded: bool = False, pruner: str = "none") -> StudyFile:
    """The first points of one grid: every study computes what the reference did. `pruner` may also
    be promote, the scheduler."""
    train = TRAIN + "data.folds = 3\n" * folded
    file = study_file(name=name, trials=trials, sampler="grid", lease_s=LEASE_S, train=train,
                      space=SPACE)  # fmt: skip
    chosen = PROMOTE if pruner == "promote" else f'pruner = "{pruner}"'
    return parse_study(file.text.replace('pruner = "none"', chosen), name)


@dataclass
class Tally:
    """What happened in all studies."""

    faults: Counter[str] = field(default_factory=Counter)
    studies: int = 0
    trials: int = 0
    attempts: int = 0
    epochs: int = 0
    again: int = 0
    """Epochs that were begun more often than once."""
    failed: int = 0
    compared: int = 0
    """Epochs that were compared with the reference, bit for bit."""
    violations: list[str] = field(default_factory=list)


class Herd:
    """All processes of a study by role, also those that lost their parent. Known by id and time of
    start, so that no signal ever reaches another process that got the same id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)

    def add(self, role: str, pid: int) -> None:
        started = psutil.Process(pid).create_time()
        (self.folder / f"{role}-{pid}").write_text(repr(started))

    def alive(self, role: str) -> list[psutil.Process]:
        return [one for path in self.folder.glob(f"{role}-*") if (one := _living(path))]

    def end(self) -> None:
        """Kill them all, supervisors first: they would start new workers."""
        while alive := self.alive("supervisor") or self.alive("worker"):
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.02)

    @contextmanager
    def crashes_noted(self) -> Iterator[None]:
        """In a process of the herd: an error that nobody expects is told by `crashes`, too."""
        try:
            yield
        except (Interrupted, StorageUnavailable):
            raise
        except BaseException:
            (self.folder / f"crash.{os.getpid()}").write_text(traceback.format_exc())
            raise

    def crashes(self) -> list[str]:
        """The last lines of what processes died of."""
        found = [path.read_text().strip() for path in self.folder.glob("crash.*")]
        return [f"a process crashed: {text.splitlines()[-1]}" for text in found]


def _living(path: Path) -> psutil.Process | None:
    text = path.read_text()
    try:
        process = psutil.Process(int(path.name.rpartition("-")[2]))
        same = text != "" and process.create_time() == float(text)
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


class HerdForks(Forks):
    """Its workers are entered, and end when their supervisor is gone."""

    def __init__(self, study: Study, home: Home, herd: Herd) -> None:
        super().__init__(study, home, "real")
        self.herd = herd

    def start(self, worker: str, device: str) -> Child:
        child = super().start(worker, device)
        self.herd.add("worker", child.pid)
        return child

    def work(self, worker: str) -> None:
        with self.herd.crashes_noted():
            super().work(worker)


@dataclass
class Scenery:
    """Where a study is searched."""

    url: str
    home: Home
    name: str
    workers: int
    herd: Herd

    def supervisor(self) -> Child:
        """What `hpo run` does, in a process of its own."""
        child = forked(self._run)
        self.herd.add("supervisor", child.pid)
        return child

    def _run(self) -> None:
        parent = os.getppid()
        with self.herd.crashes_noted(), stop_on_signal() as stop:
            study = studies.load(connect(self.url), self.name)

            def end_alone() -> None:
                """Without whoever undoes the faults."""
                if os.getppid() != parent:
                    stop.set()

            supervise(study, HerdForks(study, self.home, self.herd), self.workers, stop, end_alone)
            if stop.is_set():
                raise Interrupted("stopped by a signal")


class Storm:
    """Faults at random instants, and what undoes them later."""

    def __init__(self, rng: random.Random, tally: Tally, url: str, server: Postgres | None) -> None:
        self.rng, self.tally, self.url, self.server = rng, tally, url, server
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.due = 0.0
        self.faults = [
            (self.kill, "worker", 6),
            (self.terminate, "worker", 2),
            (self.freeze, "worker", 3),
            (self.kill, "supervisor", 1),
            (self.terminate, "supervisor", 1),
            (self.freeze, "supervisor", 1),
            (self.restart if server else self.lock, "database", 1),
        ]

    def blow(self, herd: Herd, *, more: bool) -> None:
        """Undo what is due, and strike, if it is time to and there are to be more faults."""
        now = time.monotonic()
        for one in [one for one in self.later if one[0] <= now]:
            self.later.remove(one)
            one[1]()
        if more and now >= self.due:
            self.due = now + self.rng.expovariate(1 / PAUSE_S)
            weights = [weight for *_, weight in self.faults]
            strike, role, _ = self.rng.choices(self.faults, weights)[0]
            strike(role, herd)

    def _struck(self, role: str, herd: Herd, sig: int, what: str) -> psutil.Process | None:
        alive = herd.alive(role)
        if not alive:
            return None
        chosen = self.rng.choice(alive)
        try:
            chosen.send_signal(sig)
        except psutil.NoSuchProcess:
            return None
        self.tally.faults[f"{role} {what}"] += 1
        return chosen

    def kill(self, role: str, herd: Herd) -> None:
        self._struck(role, herd, signal.SIGKILL, "killed")

    def terminate(self, role: str, herd: Herd) -> None:
        self._struck(role, herd, signal.SIGTERM, "terminated")

    def freeze(self, role: str, herd: Herd) -> None:
        process = self._struck(role, herd, signal.SIGSTOP, "stopped")
        if process is not None:
            self._after(self.rng.uniform(0.2, 3 * LEASE_S), lambda: _thaw(process))

    def restart(self, role: str, herd: Herd) -> None:
        assert self.server is not None
        if any(one[1] == self.server.start for one in self.later):
            return  # it is away already
        self.tally.faults["database restarted"] += 1
        self.server.stop(self.rng.choice(["fast", "immediate"]))
        self._after(self.rng.uniform(0, 3 * LEASE_S), self.server.start)

    def lock(self, role: str, herd: Herd) -> None:
        """Another process holds SQLite's write lock."""
        self.tally.faults["database locked"] += 1
        seconds = self.rng.uniform(0.2, 2 * LEASE_S)

        def hold() -> None:
            file = self.url.removeprefix("sqlite:///")
            holder = sqlite3.connect(file, timeout=60.0, isolation_level=None)
            holder.execute("BEGIN IMMEDIATE")
            time.sleep(seconds)

        self._after(seconds + 60, forked(hold).wait)

    def _after(self, seconds: float, undo: Callable[[], Any]) -> None:
        self.later.append((time.monotonic() + seconds, undo))

    def end(self) -> None:
        """Undo everything now."""
        for _, undo in self.later:
            undo()
        self.later = []


def _thaw(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGCONT)
    except psutil.NoSuchProcess:
        return


def search(scenery: Scenery, storm: Storm, until: float) -> list[str]:
    """Search one study to its end under the storm, which abates at `until`; what went wrong."""
    supervisor, calm = scenery.supervisor(), until
    while (left := unfinished(scenery)) != 0 or scenery.herd.alive("*"):
        now = time.monotonic()
        storm.blow(scenery.herd, more=now < until)
        calm = max(calm, now) if now < until or storm.later else calm
        if now > calm + CALM_S:
            return [f"did not end {CALM_S:g} s after the last fault"]
        code = supervisor.poll()
        if code is not None and left != 0:
            if code not in BY_A_FAULT and (code != 0 or unfinished(scenery)):
                return [f"its supervisor ended with code {code}"]
            supervisor = scenery.supervisor()  # the command is typed again
        time.sleep(0.1)
    supervisor.wait()
    return []


def unfinished(scenery: Scenery) -> int | None:
    """Trials that the study lacks; None while the database is away."""
    database = connect(scenery.url)
    try:
        facts = studies.load(database, scenery.name).snapshot()
    except StorageUnavailable:
        return None
    finally:
        database.dispose()  # a fork must not share its connections
    return facts.trials - facts.finished


def supervise(
    study: Study,
    forks: Forks,
    workers: int,
    stop: threading.Event,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Run the product's supervisor over `forks` until the study is over or `stop` is set."""
    directory = study.directory(forks.home)
    Supervisor(study.database, study.uuid, directory, forks, ["cpu"] * workers, 600.0).run(
        stop, tick
    )


def reference(url: str, home: Home, folded: bool) -> Curves:
    """Every point of the grid, undisturbed."""
    database = connect(url)
    study, _ = studies.create(database, chaos_study("reference", trials=POINTS, folded=folded))
    supervise(study, Forks(study, home, "real"), 2, threading.Event())
    found = verdict.curves(database, "reference")
    database.dispose()
    assert len(found) == POINTS
    return found


def chaos(kind: str, seconds: float, seed: int, home: Home) -> Tally:
    """Studies until `seconds` are over, or one broke a promise."""
    home.root.mkdir(parents=True, exist_ok=True)
    rng, tally = random.Random(seed), Tally()
    server = Postgres() if kind == "postgresql" else None
    url = server.url("chaos") if server else f"sqlite:///{home.database}"
    until = time.monotonic() + seconds
    folded = seed % 2 == 1
    expected = reference(url, home, folded)
    while time.monotonic() < until and not tally.violations:
        name = f"chaos-{tally.studies}"
        trials, pruner = rng.randint(4, POINTS), rng.choice(["none", "promote", "median"])
        database = connect(url)
        studies.create(database, chaos_study(name, trials=trials, folded=folded, pruner=pruner))
        database.dispose()
        herd = Herd(home.root / "herd" / name)
        storm = Storm(rng, tally, url, server)
        try:
            wrong = search(Scenery(url, home, name, rng.randint(1, 4), herd), storm, until)
            storm.end()
        finally:
            herd.end()
        database = connect(url)
        found = verdict.judge(database, name, home, expected)
        database.dispose()
        add(found, name, tally, [*wrong, *herd.crashes()])
    return tally


def add(found: Verdict, name: str, tally: Tally, wrong: list[str]) -> None:
    """Add a study that ended to the tally, with what it broke and what else went `wrong`."""
    tally.studies += 1
    for key in ("trials", "attempts", "epochs", "again", "failed", "compared"):
        setattr(tally, key, getattr(tally, key) + getattr(found, key))
    tally.violations += [f"study {name}: {one}" for one in [*wrong, *found.violations]]


def end_on_sigterm() -> None:
    """From now on SIGTERM unwinds this process; its forks it ends at once, as without this."""
    own = os.getpid()

    def end(number: int, _frame: FrameType | None) -> None:
        if os.getpid() == own:
            raise SystemExit(128 + number)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end)


def main() -> None:
    torch.set_num_threads(1)
    end_on_sigterm()
    kind, seconds, seed = sys.argv[1:4]
    print(json.dumps(vars(chaos(kind, float(seconds), int(seed), Home.default()))))


if __name__ == "__main__":
    main()
