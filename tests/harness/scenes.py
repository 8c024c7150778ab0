"""What happens to whole processes, each scene in an interpreter of its own (see `swarm` for why).

    python -m tests.harness.scenes SCENE URL

A scene acts on the database at URL (files under HPO_HOME) and prints one JSON object; the test
that runs it looks at the database afterwards.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from hpo.config.study import StudyFile
from hpo.errors import Interrupted
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search import trial
from hpo.storage import leases, records
from hpo.storage.database import Database, connect
from hpo.storage.optuna import FencedStorage
from hpo.training.checkpoint import Checkpoint
from hpo.workers import worker as worker_module
from hpo.workers.supervisor import Supervisor
from hpo.workers.worker import Progress
from tests.harness.fakes import study_file
from tests.harness.swarm import Child, Forks

DEADLINE_S = 240.0

# Each of a worker's writes, in the order of its life: (name, owner, attribute).
WRITES: list[tuple[str, Any, str]] = [
    ("fill turn", leases, "claim_enqueuer"),
    ("filling", worker_module, "add_waiting"),
    ("claim", leases, "claim"),
    ("plan", FencedStorage, "set_trial_system_attr"),
    ("start", FencedStorage, "set_trial_state_values"),
    ("parameter", FencedStorage, "_set_trial_param"),
    ("runtime", leases, "keep_runtime"),
    ("epoch begun", leases, "begin_epoch"),
    ("checkpoint", Checkpoint, "save"),
    ("epoch", leases, "record_epochs"),
    ("report", FencedStorage, "set_trial_intermediate_value"),
    ("weights", trial, "save_weights"),
    ("attribute", FencedStorage, "set_trial_user_attr"),
    ("tell and end of the lease", trial, "_tell"),
]


def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`, with a deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.02)


def small_study(name: str, *, epochs: int = 3, **options: Any) -> StudyFile:
    """A few epochs of a very small network."""
    train = f"epochs = {epochs}\n"
    train += (
        '[train.model]\ncnn.filters = [4]\ndropout = 0.2\n[train.runtime]\nprecision = "float32"\n'
    )
    train += 'memory_format = "contiguous"\n[train.augment]\ncrop_padding = 1'
    return study_file(name=name, train=train, **options)


def forks(study: studies.Study, kind: str = "real") -> Forks:
    return Forks(study, Home.default(), kind)


def supervise(database: Database, study: studies.Study, launcher: Forks, workers: int) -> None:
    directory = study.directory(Home.default())
    supervisor = Supervisor(database, study.uuid, directory, launcher, ["cpu"] * workers, 600.0)
    supervisor.run(threading.Event())


def killed_after(owner: Any, name: str, calls: int = 1) -> None:
    """From now on this process dies by SIGKILL right after so many calls of `owner.name`."""
    original, left = getattr(owner, name), calls

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        answer, left = original(*args, **kwargs), left - 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    setattr(owner, name, call)


class KilledOnce(Forks):
    """The first worker dies after a given write, its successors live."""

    def __init__(self, *args: Any, write: tuple[str, Any, str], calls: int = 1) -> None:
        super().__init__(*args)
        self.write, self.calls = write, calls

    def start(self, worker: str, device: str) -> Child:
        if self.children:
            return super().start(worker, device)
        _, owner, name = self.write
        original = getattr(owner, name)
        killed_after(owner, name, self.calls)
        try:
            return super().start(worker, device)  # forked with the trap set
        finally:
            setattr(owner, name, original)


def killed_between_writes(url: str) -> dict[str, Any]:
    """One study per write: its first worker dies right after that write."""
    database = connect(url)
    reference, _ = studies.create(database, small_study("reference", trials=3))
    supervise(database, reference, forks(reference), 1)
    for number, write in enumerate(WRITES):
        study, _ = studies.create(database, small_study(f"write-{number}", trials=3))
        calls = 2 if write[0] == "attribute" else 1  # the first is where the trial comes from
        launcher = KilledOnce(study, Home.default(), "real", write=write, calls=calls)
        supervise(database, study, launcher, 1)
        assert launcher.children[0].code == -signal.SIGKILL, write[0]
    return {"writes": [name for name, _, _ in WRITES]}


PAUSES: list[tuple[str, Any, str, int]] = [
    ("epoch at a rung", leases, "record_epochs", 1),
    ("report at a rung", FencedStorage, "set_trial_intermediate_value", 1),
    ("pause", leases, "release", 1),
    ("claim of a promoted trial", leases, "claim", 3),
    ("its epoch begun", leases, "begin_epoch", 3),
    ("its checkpoint", Checkpoint, "save", 3),
    ("its epoch", leases, "record_epochs", 3),
    ("its report", FencedStorage, "set_trial_intermediate_value", 3),
    ("its second pause", leases, "release", 3),
    ("claim of the last promoted one", leases, "claim", 7),
    ("weights", trial, "save_weights", 1),
    ("end of a complete trial", trial, "_tell", 1),
    ("claim of an outranked trial", leases, "claim", 8),
    ("its reason", FencedStorage, "set_trial_user_attr", 7),
    ("end of an outranked trial", trial, "_tell", 2),
]
"""Writes of pauses, of promotions and of the end, with a single worker on `promoting_study`: trials
0, 1, 0 (promoted), 2, 3, 1 (promoted), 0 (to its end), and 1, 2, 3 are told."""


def promoting_study(name: str, scheduler: str = "promote") -> StudyFile:
    """Four trials of three epochs with rungs after the first and the second, better than guessing
    at once."""
    study = (
        'scheduler = {name = "promote", first_epochs = 1, reduction_factor = 2, finish = 1}'
        if scheduler == "promote"
        else ""
    )
    train = "epochs = 3\nbatch_size = 16\ndata.limit_train = 400\n[train.model]\n"
    train += 'cnn.filters = [8]\ndropout = 0.2\n[train.runtime]\nprecision = "float32"\n'
    train += 'memory_format = "contiguous"\n'
    space = "optimizer.lr = [0.02, 0.01, 0.005, 0.003]"
    return study_file(
        name=name, trials=4, sampler="grid", study=study, train=train, space=space, lease_s=2.0
    )


def killed_while_promoting(url: str) -> dict[str, Any]:
    """One study per write of a pause or a promotion: its first worker dies right after it."""
    database = connect(url)
    whole, _ = studies.create(database, promoting_study("whole", "none"))
    supervise(database, whole, forks(whole), 1)
    for number, (name, owner, attribute, calls) in enumerate(PAUSES):
        study, _ = studies.create(database, promoting_study(f"pause-{number}"))
        launcher = KilledOnce(
            study, Home.default(), "real", write=(name, owner, attribute), calls=calls
        )
        supervise(database, study, launcher, 1)
        assert launcher.children[0].code == -signal.SIGKILL, name
    return {"writes": [name for name, *_ in PAUSES]}


class StopsItself(Forks):
    """Its workers stop themselves in their second epoch, outside any transaction: stopped inside
    one, a process would keep its locks, and everybody would wait for it."""

    def start(self, worker: str, device: str) -> Child:
        renew, step = leases.renew, Progress.step
        quiet, stopped = threading.Lock(), threading.Event()

        def renew_quietly(*args: Any, **kwargs: Any) -> None:
            with quiet:
                renew(*args, **kwargs)

        def step_and_stop(self: Progress, *, epoch: int, images: int) -> None:
            step(self, epoch=epoch, images=images)
            if epoch == 2 and not stopped.is_set():
                stopped.set()
                with quiet:
                    os.kill(os.getpid(), signal.SIGSTOP)

        leases.renew, Progress.step = renew_quietly, step_and_stop  # type: ignore[method-assign]
        try:
            return super().start(worker, device)
        finally:
            leases.renew, Progress.step = renew, step  # type: ignore[method-assign]


def stopped_past_its_lease(url: str) -> dict[str, Any]:
    """SIGSTOP to a worker in mid-trial, its trial is taken over and finished, SIGCONT."""
    train = "epochs = 3\n[train.model.cnn]\nfilters = [4]"
    return _stopped(url, study_file(trials=4, lease_s=1.0, train=train))


def stopped_in_a_promoted_trial(url: str) -> dict[str, Any]:
    """The same in the second epoch of a trial that had paused after its first."""
    return _stopped(url, promoting_study("toy"))


def _stopped(url: str, file: StudyFile) -> dict[str, Any]:
    study, _ = studies.create(connect(url), file)
    first = StopsItself(study, Home.default(), "real").start("first", "cpu")
    until(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED)
    second = forks(study).start("second", "cpu")
    until(lambda: second.poll() is not None)
    os.kill(first.pid, signal.SIGCONT)
    return {"codes": [first.wait(), second.wait()]}


def handed_back_on_sigterm(url: str) -> dict[str, Any]:
    """SIGTERM to a worker in mid-epoch; the seconds until its trial can be taken again."""
    database = connect(url)
    study, _ = studies.create(
        database,
        study_file(
            trials=2, lease_s=60.0, train="epochs = 3\n[train.model]\ncnn.filters = [8, 16]"
        ),
    )
    launcher = forks(study)
    seconds = []
    for _ in range(3):
        child = launcher.start(f"worker-{len(seconds)}", "cpu")
        before = sum(len(rows) for rows in records.read_attempts(database, study.uuid).values())

        def begun(before: int = before) -> bool:
            attempts = records.read_attempts(database, study.uuid)
            rows = [row for rows in attempts.values() for row in rows]
            return len(rows) > before and any(row.live and row.epoch for row in rows)

        until(begun)
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        until(lambda: any(free.started for free in study.snapshot().free))
        seconds.append(time.monotonic() - began)
        assert child.wait() == Interrupted.exit_code
    return {"seconds": seconds}


def created_by_many(url: str) -> dict[str, Any]:
    """Thirty-two processes make the same study in a new database at once."""
    gate_r, gate_w = os.pipe()
    children = []
    for _ in range(32):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(gate_w)
                os.read(gate_r, 1)  # returns for all at once, when the parent closes its end
                studies.create(connect(url), study_file())
                code = 0
            finally:
                os._exit(code)
        children.append(Child(pid))
    os.close(gate_r)
    os.close(gate_w)
    return {"codes": [child.wait() for child in children]}


def deleted_under_a_worker(url: str) -> dict[str, Any]:
    """A study is deleted and made again, with the same ids, under a running worker."""
    database = connect(url)
    home = Home.default()
    old, _ = studies.create(
        database, study_file(trials=3, train="epochs = 3\n[train.model]\ncnn.filters = [4]")
    )
    child = forks(old).start("old", "cpu")
    until(lambda: any(rows for rows in records.read_epochs(database, old.uuid).values()))
    studies.delete(old, home, force=True)
    new, made = studies.create(database, study_file(trials=2))
    supervise(database, new, forks(new, "instant"), 1)
    return {"code": child.wait(), "made": made, "same_id": new.row.study_id == old.row.study_id}


SCENES = (
    killed_between_writes,
    killed_while_promoting,
    stopped_past_its_lease,
    stopped_in_a_promoted_trial,
    handed_back_on_sigterm,
    created_by_many,
    deleted_under_a_worker,
)


def main() -> None:
    torch.set_num_threads(1)
    scene = {scene.__name__: scene for scene in SCENES}[sys.argv[1]]
    Path(os.environ["HPO_HOME"]).mkdir(parents=True, exist_ok=True)
    print(json.dumps(scene(sys.argv[2])))


if __name__ == "__main__":
    main()
