"""How long `hpo --help` takes, against a Python that does nothing.

    python -m benchmarks.startup [RUNS]

Both are started in turn, RUNS times (default 15) after one untimed start each, so that whatever
else the machine does falls on both. Prints one table: median, smallest and largest wall time in
milliseconds, and the ratio of the medians, with the hardware and the versions.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.host import machine, versions
from hpo.extras import DISTRIBUTION

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "hpo --help": [sys.executable, "-m", "hpo", "--help"],
    "hpo run --help": [sys.executable, "-m", "hpo", "run", "--help"],
    "hpo list": [sys.executable, "-m", "hpo", "list"],
}
BASE = "python -c pass"


def milliseconds(command: list[str]) -> float:
    """Wall time of one start, output thrown away."""
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - began) * 1000


def measure(runs: int) -> dict[str, list[float]]:
    """Times of each command, in turn."""
    for command in COMMANDS.values():
        milliseconds(command)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            times[name].append(milliseconds(command))
    return times


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    times = measure(runs)
    base = statistics.median(times[BASE])
    print(machine())
    print(f"{versions(DISTRIBUTION, 'typer', 'rich')}; {runs} starts each, in turn\n")
    print(f"{'':16}{'median ms':>11}{'smallest':>10}{'largest':>10}{'ratio':>8}")
    for name, found in times.items():
        median = statistics.median(found)
        print(f"{name:16}{median:11.0f}{min(found):10.0f}{max(found):10.0f}{median / base:8.1f}")


if __name__ == "__main__":
    main()
