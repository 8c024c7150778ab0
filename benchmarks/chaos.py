"""What random faults cost and break, for as long as you like: nothing is to break.

    python -m benchmarks.chaos [--minutes 60] [--database sqlite|postgresql|both] [--seed N]
                               [--output FILE]

The suite's own chaos test (`tests/harness/chaos.py`), for longer: real workers train something tiny
under the product's supervisor, while processes are killed, stopped and asked to end, and the
database is restarted or locked, at random instants, 0.8 s apart on average. A study that ends
is checked against every promise, its curves bit for bit against those of an undisturbed search.
Prints one table with a line per database, and whatever was broken; exit code 1 if anything was.
Failed trials are those that five attempts in a row could not bring one epoch further, as promised.
Each database has `--minutes` of its own. An interrupt or SIGTERM ends everything that was started.
Needs the test extra.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.host import machine, versions
from hpo.extras import DISTRIBUTION
from hpo.paths import Home
from tests.harness.chaos import Tally, chaos, end_on_sigterm

DATABASES = ("sqlite", "postgresql")
HEADINGS = (
    *("database", "minutes", "workers killed / terminated / stopped"),
    *("supervisors killed / terminated / stopped", "database restarted / locked"),
    *("studies", "trials (failed)", "attempts", "epochs", "computed again"),
    *("compared bit for bit", "violations"),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="of each database")
    parser.add_argument("--database", choices=[*DATABASES, "both"], default="both")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--output", type=Path, help="what happened, as JSON lines")
    return parser.parse_args()


def line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    args = arguments()
    torch.set_num_threads(1)
    end_on_sigterm()
    print(machine())
    print(
        f"{versions(DISTRIBUTION, 'torch', 'optuna', 'sqlalchemy', 'psycopg')}; seed {args.seed}\n"
    )
    print(line(HEADINGS))
    print(line(["---"] * len(HEADINGS)), flush=True)
    broken: list[str] = []
    for kind in DATABASES if args.database == "both" else [args.database]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="hpo-chaos-") as folder:
            tally = chaos(kind, 60 * args.minutes, args.seed, Home(Path(folder)))
        minutes = (time.monotonic() - began) / 60
        print(row(kind, minutes, tally), flush=True)
        broken += [f"{kind}: {one}" for one in tally.violations]
        if args.output:
            with args.output.open("a", encoding="utf-8") as file:
                about = {"database": kind, "minutes": minutes, "seed": args.seed}
                file.write(json.dumps(about | vars(tally)) + "\n")
    print("\n".join(["", *broken]))
    return 1 if broken else 0


def row(kind: str, minutes: float, tally: Tally) -> str:
    """One line of the table."""

    def faults(role: str, *kinds: str) -> str:
        return " / ".join(str(tally.faults[f"{role} {kind}"]) for kind in kinds)

    blows = [faults(role, "killed", "terminated", "stopped") for role in ("worker", "supervisor")]
    blows.append(faults("database", "restarted", "locked"))
    trials = f"{tally.trials} ({tally.failed})"
    epochs = [tally.epochs, tally.again, tally.compared]
    counts = [tally.studies, trials, tally.attempts, *epochs, len(tally.violations)]
    return line([kind, f"{minutes:.1f}", *blows, *counts])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
