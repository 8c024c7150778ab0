"""Optuna itself under the faults of `benchmarks/faults.py`, as its documentation says to use it: a
heartbeat, stale trials tried again, a callback that ends at so many complete trials.

    python -m benchmarks.stock SCENE URL [TIMES]

A scene acts on the empty database at URL, and prints one JSON object, as those of
`tests.harness.faults` do for hpo.
"""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from typing import Any

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

from tests.harness.races import PROCESSES, TRIALS, emptied
from tests.harness.scene import Scene, run_scene, together
from tests.harness.scenes import until
from tests.harness.servers import Postgres
from tests.harness.swarm import Child, forked

warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
optuna.logging.set_verbosity(optuna.logging.ERROR)
BUDGET, WORKERS, EPOCHS, EPOCH_S = 60, 4, 50, 0.02
GRACE_S = 2
PAUSE_S = 2.0
"""Between two kills, at most."""


def storage(url: str) -> RDBStorage:
    """With a heartbeat, and what died is tried again."""
    kind = {} if url.startswith("sqlite") else {"pool_pre_ping": True}
    return RDBStorage(
        url,
        engine_kwargs=kind,
        heartbeat_interval=1,
        grace_period=GRACE_S,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
    )


def new_study(url: str, name: str = "stock") -> optuna.Study:
    return optuna.create_study(storage=storage(url), study_name=name)


def load(url: str, name: str = "stock") -> optuna.Study:
    return optuna.load_study(storage=storage(url), study_name=name)


def search(url: str, epochs: int = EPOCHS, budget: int = BUDGET) -> None:
    """What one worker does."""

    def objective(trial: optuna.Trial) -> float:
        value = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        for epoch in range(epochs):
            time.sleep(EPOCH_S)
            trial.report(value, epoch)
        return value

    enough = MaxTrialsCallback(budget, states=(TrialState.COMPLETE,))
    load(url).optimize(objective, callbacks=[enough])


def counted(url: str, *states: TrialState) -> int:
    return len(load(url).get_trials(deepcopy=False, states=states))


def killed(url: str, times: int = 200) -> dict[str, Any]:
    """Workers are killed at random instants, at most `times`, and started again, until one ends by
    itself, which is where the budget is spent; the others end by themselves, too."""
    new_study(url)
    rng, kills = random.Random(0), 0
    children = [forked(lambda: search(url)) for _ in range(WORKERS)]
    while counted(url, TrialState.COMPLETE) < BUDGET:
        time.sleep(rng.uniform(PAUSE_S / 8, PAUSE_S))
        for i, child in enumerate(children):
            if child.poll() is not None:
                children[i] = forked(lambda: search(url))
        if kills < times:
            rng.choice(children).kill()
            kills += 1
    for child in children:
        child.wait()
    complete = counted(url, TrialState.COMPLETE)
    running = counted(url, TrialState.RUNNING)
    return {"killed": kills, "complete": complete, "running": running}


def takeover_killed(url: str, times: int = 50) -> dict[str, Any]:
    """Who fails a stale trial, to let it be tried again, is killed between the two."""
    names = [f"takeover-{number}" for number in range(times)]
    for name in names:
        study = new_study(url, name)
        trial = study.ask()
        study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
    time.sleep(GRACE_S + 1.5)

    def die(name: str) -> None:
        study = load(url, name)
        write = study._storage.set_trial_state_values

        def once(*args: Any, **kwargs: Any) -> None:
            write(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        study._storage.set_trial_state_values = once  # type: ignore[method-assign,assignment]
        optuna.storages.fail_stale_trials(study)

    lost = 0
    for name in names:
        forked(lambda name=name: die(name)).wait()  # type: ignore[misc]
        study = load(url, name)
        optuna.storages.fail_stale_trials(study)
        lost += not study.get_trials(states=(TrialState.WAITING, TrialState.RUNNING))
    return {"lost": lost}


def stopped(url: str, times: int = 5) -> dict[str, Any]:
    """SIGSTOP to a worker, another one fails its trial, SIGCONT: how many died, and how often the
    other one could not, since who was stopped holds a lock."""
    new_study(url)
    died = blocked = 0
    for _ in range(times):
        child = forked(lambda: search(url, epochs=150, budget=10**6))
        time.sleep(2)
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(2 * GRACE_S)
        reaper = forked(lambda: optuna.storages.fail_stale_trials(load(url)))
        blocked += ended(reaper) != 0
        os.kill(child.pid, signal.SIGCONT)
        died += ended(child) is not None
        time.sleep(GRACE_S + 1)
        optuna.storages.fail_stale_trials(load(url))
    return {"died": died, "blocked": blocked}


def ended(child: Child, within_s: float = 10.0) -> int | None:
    """Its exit code; None, and it is killed, where it does not end in time."""
    deadline = time.monotonic() + within_s
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    code = child.code
    child.kill()
    child.wait()
    return code


def claims(url: str, times: int = 10) -> dict[str, Any]:
    """Eight processes ask for a hundred waiting trials: how many were handed out."""
    handed_out = []
    for number in range(times):
        name = f"claims-{number}"
        study = optuna.create_study(storage=url, study_name=name)
        for i in range(TRIALS):
            study.enqueue_trial({"lr": i / TRIALS})

        def take(_: int, name: str = name) -> int:
            mine, own = 0, optuna.load_study(storage=url, study_name=name)
            while own.ask().number < TRIALS:
                mine += 1
            return mine

        handed_out.append(sum(filter(None, together(PROCESSES, take))))
    return {"handed_out": handed_out}


def creates(url: str, times: int = 10) -> dict[str, Any]:
    """Eight processes make the same study in a new database: how many live to tell."""
    survivors = []
    for _ in range(times):
        emptied(url)

        def create(_: int) -> bool:
            optuna.create_study(storage=url, study_name="stock", load_if_exists=True)
            return True

        survivors.append(together(PROCESSES, create).count(True))
    return {"survivors": survivors}


def finishes(url: str, times: int = 100) -> dict[str, Any]:
    """Two processes finish the same trial: how many were told that they did."""
    optuna.create_study(storage=url, study_name="stock")
    accepted = []
    for _ in range(times):
        number = optuna.load_study(storage=url, study_name="stock").ask().number

        def tell(i: int, number: int = number) -> bool:
            study = optuna.load_study(storage=url, study_name="stock")
            study.tell(number, float(i))
            return True

        accepted.append(together(2, tell).count(True))
    return {"accepted": accepted}


def restarted(mode: str, away_s: str) -> dict[str, Any]:
    """PostgreSQL is stopped under a worker and started again: did it die, was its trial left."""
    server = Postgres()
    url = server.url("stock")
    new_study(url)
    child = forked(lambda: search(url, epochs=1000, budget=1))
    until(lambda: counted(url, TrialState.RUNNING) == 1)
    time.sleep(1)
    server.stop(mode)
    time.sleep(float(away_s))
    server.start()
    time.sleep(1000 * EPOCH_S)
    died = child.poll() is not None
    child.kill()
    child.wait()
    return {"died": int(died)}


def wrong_clocks(url: str, times: int = 1) -> dict[str, Any]:
    """A worker whose time zone is New York's, and one who looks for dead trials in UTC: how many
    live trials were failed."""
    failed = 0
    for number in range(times):
        name = f"zones-{number}"

        def live(name: str = name) -> None:
            os.environ.update(TZ="America/New_York", PGTZ="America/New_York")
            time.tzset()
            study = load(url, name)
            trial = study.ask()
            for _ in range(8):
                study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
                time.sleep(0.5)

        os.environ.update(TZ="UTC", PGTZ="UTC")
        study = new_study(url, name)
        child = forked(live)
        time.sleep(2)
        optuna.storages.fail_stale_trials(study)
        failed += len(study.get_trials(states=(TrialState.FAIL,)))
        child.wait()
    return {"false_deaths": failed}


SCENES: tuple[Scene, ...] = (
    killed,
    takeover_killed,
    stopped,
    claims,
    creates,
    finishes,
    restarted,
    wrong_clocks,
)

if __name__ == "__main__":
    run_scene(SCENES)
