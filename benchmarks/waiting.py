"""Training steps by how OpenMP's threads wait for each other: spin, spin shortly, or sleep.

    python -m benchmarks.waiting [--rounds 5] [--busy N]

A round starts a fresh process for each way of waiting, in alternating order: the same network on
the same random images. "default" is libgomp's own (some milliseconds of spinning), "1000" spins
1,000 times, as `hpo` sets it and as libgomp does where it knows that threads outnumber cores,
"passive" sleeps at once. `--busy N` lets N processes compute beside them, as on a shared machine.
Prints the seconds of a step (the median of a process's steps, then over the rounds) and each way's
ratio to the default (the median over the rounds, and that of the fastest ones, which other programs
disturbed least).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.host import machine, versions

CASES = {"small_cnn": (32, 128, 12), "mobilenet_v2": (96, 32, 4)}
"""Of each network: side of the images, images of a step, most steps of a process."""
ENOUGH_S = 30.0
"""No further step once a process has spent so long on them."""
WAYS = {
    "default": {},
    "1000": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
SPIN = [sys.executable, "-c", "while True: pass"]


def seconds_of_a_step(name: str, threads: int) -> float:
    """Time training steps in this process; return their median in seconds."""
    import torch

    from hpo.config.train import TrainConfig
    from hpo.training.learner import Learner

    side, batch, steps = CASES[name]
    config = TrainConfig.parse(
        {
            "batch_size": batch,
            "data": {"image_size": side},
            "model": {"architecture": name},
            "optimizer": {"lr": 1e-6},
            "runtime": {"precision": "float32", "memory_format": "channels_last"},
        }
    )
    torch.set_num_threads(threads)
    learner = Learner(config, classes=10, device=torch.device("cpu"), pretrained=False)
    images = torch.randn(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch) % 10
    learner.train_mode()
    times: list[float] = []
    while len(times) <= steps and sum(times) < ENOUGH_S:
        began = time.perf_counter()
        learner.step((images, labels), lr=1e-6)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:] or times)  # the first one also prepares


def measured(name: str, threads: int, way: str) -> float:
    """Return the seconds of a step in a fresh process."""
    known = {name for settings in WAYS.values() for name in settings}
    environment = {key: value for key, value in os.environ.items() if key not in known}
    environment |= {"OMP_NUM_THREADS": str(threads)} | WAYS[way]
    command = [sys.executable, "-m", "benchmarks.waiting", "--step", name, str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


@contextmanager
def computing(count: int) -> Iterator[None]:
    """Keep `count` processes busy."""
    others = [subprocess.Popen(SPIN) for _ in range(count)]
    try:
        yield
    finally:
        for one in others:
            one.kill()
            one.wait()


def row(name: str, threads: int, rounds: int) -> str:
    """Measure one network; return its line of the table."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in list(WAYS) if number % 2 else list(WAYS)[::-1]:
            times[way].append(measured(name, threads, way))
    line = f"{name}, {threads} thread{'s' if threads > 1 else ''}".ljust(24)
    base = times["default"]
    for way, found in times.items():
        line += f"{statistics.median(found):9.3f}"
        if way != "default":
            ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
            line += f" ({ratio:.2f}, {min(found) / min(base):.2f})"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside it")
    parser.add_argument("--only", choices=list(CASES), help="one network alone")
    parser.add_argument("--step", nargs=2, metavar=("NETWORK", "THREADS"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.step:
        print(json.dumps(seconds_of_a_step(asked.step[0], int(asked.step[1]))))
        return
    print(machine())
    print(f"{versions('torch')}; {asked.rounds} rounds, {asked.busy} busy processes beside them")
    print("seconds of a step (ratio to the default: median, of the fastest)\n")
    print("".ljust(24) + "  default" + "".join(f"{way:>9}".ljust(22) for way in list(WAYS)[1:]))
    with computing(asked.busy):
        for name in CASES if asked.only is None else [asked.only]:
            for threads in (1, 2):
                print(row(name, threads, asked.rounds), flush=True)


if __name__ == "__main__":
    main()
