"""One search done as people do it: in a notebook, with Optuna, with Ray Tune, and with hpo.

    python -m benchmarks.peers --data FOLDER --out results.json [--only ARM ...] [--seeds 3]
                               [--trials 32] [--epochs 6] [--train-images 2000] [--val-images 1000]
                               [--workers 2] [--retrain 3] [--target ACCURACY]

FOLDER holds train/ and test/, in each a folder of images for each class: CIFAR-10 as files. All
arms get the same images of it, network, space, epochs and processes; each is a command of its own
in a fresh folder, timed from its start to its exit, imports and decoding included. They run in
turn, all arms of seed 0, then all of seed 1, so that what else the machine does falls on all alike.
`--out` is written after each, and what it holds is not run again: the same command goes on after
an interruption, with more `--seeds`, or with other arms. Then each search's winner is retrained
with `--retrain` seeds on training and validation images by one bare loop, and tested on all of
test/.

Prints a Markdown table: medians (least to most); times as ratios to hpo's of the same seeds
(geometric mean, with its interval by Student's t); the difference of the tests to hpo's (Welch).
Seconds to a target are those until any epoch of any trial had the accuracy; where none is given it
is the median of the best that plain Optuna found.

Needs the test extra and `pip install 'ray[tune]'`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.host import machine, versions
from benchmarks.peers import ours
from benchmarks.peers.figures import HEADINGS, Run, rows
from benchmarks.peers.search import Search
from hpo.extras import DISTRIBUTION
from hpo.io import write_text

ROOT = Path(__file__).parents[2]
HPO, OPTUNA = "hpo", "Optuna, TPE and median"
OURS: dict[str, list[str]] = {
    HPO: [],
    "hpo, no defaults": ["study.defaults=false"],
    "hpo, median": ["study.pruner=median"],
    "hpo, median, no defaults": ["study.pruner=median", "study.defaults=false"],
}
"""What each sets in the study file."""
PEERS: dict[str, list[str]] = {
    OPTUNA: ["benchmarks.peers.plain_optuna"],
    "Ray Tune, ASHA": ["benchmarks.peers.ray_tune", "random"],
    "Ray Tune, ASHA and Optuna": ["benchmarks.peers.ray_tune", "optuna"],
    "notebook grid": ["benchmarks.peers.notebook"],
}
"""Modules and their first arguments."""
ARMS = (*OURS, *PEERS)
SETTING = ("trials", "epochs", "train_images", "val_images", "workers")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--out", type=Path, required=True, help="results, as JSON")
    parser.add_argument("--only", nargs="+", metavar="ARM", choices=ARMS, default=list(ARMS))
    for name, default in (("trials", 32), ("epochs", 6), ("workers", 2), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--train-images", type=int, default=2000)
    parser.add_argument("--val-images", type=int, default=1000)
    parser.add_argument("--retrain", type=int, default=3, metavar="SEEDS")
    parser.add_argument("--target", type=float, help="validation accuracy, 0 to 1")
    return parser.parse_args()


class Results:
    """The runs of one setting, on disk after each change."""

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self.path = path
        self.setting = setting
        self.runs: list[Run] = []
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["setting"] != setting:
                raise SystemExit(f"{path} is of {found['setting']}; asked for: {setting}")
            self.runs = [Run(**run) for run in found["runs"]]

    def has(self, arm: str, seed: int) -> bool:
        return any((run.arm, run.seed) == (arm, seed) for run in self.runs)

    def save(self) -> None:
        text = json.dumps({"setting": self.setting, "runs": [asdict(run) for run in self.runs]})
        write_text(self.path, text)


def subset(data: Path, to: Path, train: int, val: int) -> Path:
    """`train` and `val` images of train/, and as many of test/ as validate, each class in
    proportion, always the same ones."""
    classes = sorted(one.name for one in (data / "train").iterdir())
    for name in classes:
        files = drawn(data / "train" / name)
        of_train, of_val = train // len(classes), val // len(classes)
        if len(files) < of_train + of_val:
            raise SystemExit(f"{data / 'train' / name}: {len(files)} images are too few")
        copy(files[:of_train], to / "train" / name)
        copy(files[of_train : of_train + of_val], to / "val" / name)
        copy(drawn(data / "test" / name)[:of_val], to / "test" / name)
    return to


def drawn(folder: Path) -> list[Path]:
    files = sorted(folder.iterdir())
    random.Random(folder.name).shuffle(files)
    return files


def copy(files: Sequence[Path], to: Path) -> None:
    to.mkdir(parents=True)
    for file in files:
        shutil.copy(file, to)


def searched(arm: str, search: Search) -> Run:
    """Search once."""
    log = search.out / "output.txt"
    began = time.time()
    code = ours.run(search, OURS[arm], log) if arm in OURS else peer(PEERS[arm], search, log)
    seconds = time.time() - began
    if code:
        raise RuntimeError("\n".join(log.read_text(encoding="utf-8").splitlines()[-15:]))
    if arm in OURS:
        ours.collect(search)
    text = (search.out / "epochs.jsonl").read_text(encoding="utf-8")
    epochs = sorted((json.loads(row) for row in text.splitlines()), key=lambda row: row["time"])
    won = json.loads((search.out / "winner.json").read_text(encoding="utf-8"))
    curve = [(row["time"] - began, row["accuracy"]) for row in epochs]
    return Run(arm, search.seed, seconds, curve, won["config"], won["accuracy"])


def peer(module: list[str], search: Search, log: Path) -> int:
    """Search with a peer; return its exit code."""
    asked = [
        f"--{name}={getattr(search, name)}" for name in ("trials", "epochs", "workers", "seed")
    ]
    call = [sys.executable, "-m", *module, str(search.data), str(search.out), *asked]
    with log.open("w", encoding="utf-8") as file:
        return subprocess.run(
            call, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=file, stderr=file
        ).returncode


def search_all(args: argparse.Namespace, results: Results, images: Path) -> bool:
    """Run what `results` lacks, in turn; return whether all of it went well."""
    well = True
    for seed in range(args.seeds):
        for arm in args.only:
            if results.has(arm, seed):
                continue
            with tempfile.TemporaryDirectory(prefix="peers-") as folder:
                asked = (args.trials, args.epochs, args.workers, seed)
                try:
                    run = searched(arm, Search(images, Path(folder), *asked))
                except RuntimeError as error:
                    print(f"{arm}, seed {seed}: failed\n{error}", file=sys.stderr, flush=True)
                    well = False
                    continue
            results.runs.append(run)
            results.save()
            print(f"{arm}, seed {seed}: {run.seconds:.0f} s, {len(run.curve)} epochs", flush=True)
    return well


def retrain_all(args: argparse.Namespace, results: Results, images: Path) -> None:
    """Retrain and test each winner with the seeds that it lacks."""
    from benchmarks.peers.retrain import in_memory, score

    waiting = [(run, str(seed)) for seed in range(args.retrain) for run in results.runs]
    waiting = [(run, seed) for run, seed in waiting if seed not in run.tests]
    if not waiting:
        return
    training, test = in_memory(images / "train", images / "val"), in_memory(args.data / "test")
    for run, seed in waiting:
        run.tests[seed] = score(run.config, training, test, args.epochs, int(seed))
        results.save()


def target(args: argparse.Namespace, runs: Sequence[Run]) -> float:
    """The accuracy asked for, else the median of plain Optuna's best, else of all."""
    if args.target is not None:
        return float(args.target)
    return statistics.median(
        [run.best for run in runs if run.arm == OPTUNA] or [r.best for r in runs]
    )


def table(args: argparse.Namespace, runs: Sequence[Run]) -> Iterator[str]:
    goal = target(args, runs)
    images = f"{args.train_images:,} + {args.val_images:,} images"
    yield f"{machine()}"
    yield versions(DISTRIBUTION, "torch", "torchvision", "optuna", "ray")
    yield f"{images}, {args.trials} trials of up to {args.epochs} epochs, {args.workers} processes;"
    yield f"target: validation accuracy {goal:.3f}\n"
    yield f"| {' | '.join(HEADINGS)} |"
    yield "|---" * len(HEADINGS) + "|"
    for row in rows(runs, ARMS, HPO, goal):
        yield f"| {' | '.join(row)} |"


def main() -> int:
    args = arguments()
    results = Results(args.out, {name: getattr(args, name) for name in SETTING})
    with tempfile.TemporaryDirectory(prefix="peers-images-") as folder:
        images = subset(args.data, Path(folder), args.train_images, args.val_images)
        well = search_all(args, results, images)
        retrain_all(args, results, images)
    if results.runs:
        print("\n".join(["", *table(args, results.runs)]))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
