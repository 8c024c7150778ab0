"""The GPU side of hpo on one data-centre GPU, in at most nine minutes.

    python -m benchmarks.gpu [--data FOLDER] [--only steps,workers] [--minutes 9]

From the repository's root. Each part prints its lines as it ends, and all of them stand in one
table at the end, with hardware, versions and n; a part for which the time is too short is left out
and named:

    tests    the tests marked gpu
    steps    images/s of hpo's training loop (augmentation, recorded steps and all) and of a bare
             loop of torch on one resident batch in the same precision and layout
    workers  images/s of 1, 2, 4 and 8 workers together
    memory   a batch that does not fit, answered by a smaller micro-batch
    kill     kill -9 of workers, against the same study left alone: every epoch equal bit for bit
    cifar    ResNet-18, AlexNet and MobileNetV2 for ten epochs on CIFAR-10, `--data`: a folder with
             cifar-10-batches-py, or train/ and test/ with a folder of images for each class

Where there is no GPU it says so and exits with 0; where a part fails, with 1. `--device cpu --tiny`
is a rehearsal: the same code on sizes that mean nothing, with a lack of memory that is pretended;
for whoever changes this file.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

import hpo
from benchmarks.host import machine, versions
from hpo.config.study import StudyFile
from hpo.config.train import RuntimeConfig, TrainConfig
from hpo.control import NullControl
from hpo.data.images import Images
from hpo.training import models
from hpo.training.arithmetic import set_arithmetic
from hpo.training.device import resolve, wait
from hpo.training.inputs import TrainingData
from hpo.training.learner import Learner, autocast, memory_format
from hpo.training.train import EpochResult, train
from hpo.workers.probe import mps_is_running, probe

ROOT = Path(__file__).parents[1]
CLASSES = 10
RUNS = 3
"""Measurements of which the median is told."""
NETWORKS = (("resnet18", 32), ("mobilenet_v2", 32), ("mobilenet_v2", 224), ("resnet50", 224))
RECIPES = (("resnet18", 0.88), ("alexnet", 0.74), ("mobilenet-v2", 0.80))
"""Studies of CIFAR-10, and the accuracy of a grid by hand in as many epochs."""
Line = tuple[str, str, str, str]
"""Part, what was measured, n, result."""


class Noise(Images):
    """Random pixels in CLASSES classes."""

    def __init__(self, count: int, side: int) -> None:
        source = np.random.default_rng(0)
        self.names = tuple(str(number) for number in range(count))
        self.labels = np.arange(count) % CLASSES
        self.sizes = np.full((count, 2), side)
        self._pixels = source.integers(0, 256, (count, side, side, 3), np.uint8)

    def pixels(self, i: int) -> Any:
        return self._pixels[i]

    def stacked(self) -> Any:
        return self._pixels


def noise(root: str, split: str) -> list[tuple[Any, int]] | None:
    """What `data.dataset = "benchmarks.gpu:noise"` names; as many images as `root` ends with."""
    if split != "train":
        return None
    images = Noise(int(Path(root).name), 32)
    return [(images.pixels(i), int(images.labels[i])) for i in range(len(images))]


@dataclass
class Bench:
    """Where it runs, and what is known so far."""

    device: torch.device
    tiny: bool
    data: Path | None
    until: float
    folder: Path
    lines: list[Line] = field(default_factory=list)
    failed: bool = False
    """Whether a part failed."""

    def tell(self, part: str, what: str, n: str, result: str) -> None:
        """Note a line, and print it."""
        self.lines.append((part, what, n, result))
        print(f"{part}: {what} (n = {n}): {result}", flush=True)

    def size(self, full: int, tiny: int) -> int:
        """Return a number, or that of a rehearsal."""
        return tiny if self.tiny else full


def tests(bench: Bench) -> None:
    """Run what is marked gpu, without plugins that a machine may lack."""
    if importlib.util.find_spec("pytest") is None:
        bench.tell("tests", "tests marked gpu", "0", "pytest is not installed here")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "-p",
               "no:cacheprovider", "-W", "ignore::pytest.PytestConfigWarning",
               "tests/unit/test_gpu.py"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    words = [line for line in done.stdout.splitlines() if re.search(r"\d+ \w+ in [\d.]+", line)]
    if done.returncode not in (0, 5):
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
        bench.failed = True
    bench.tell("tests", "tests marked gpu", "1", words[-1].strip("= ") if words else "did not run")


def configuration(
    name: str, side: int, batch: int, epochs: int, runtime: RuntimeConfig
) -> TrainConfig:
    """Return a training with the augmentation of the recipes of that size."""
    small = side == 32
    return TrainConfig.parse(
        {
            "epochs": epochs,
            "batch_size": batch,
            "data": {"image_size": side},
            "model": {"architecture": name} | ({"stem": "small"} if small else {}),
            "optimizer": {"lr": 0.01, "nesterov": True, "weight_decay": 5e-4},
            "augment": {"horizontal_flip": 0.5} | ({"crop_padding": 4} if small else {}),
            "runtime": runtime.model_dump(),
        }
    )


def seen(images: Images) -> TrainingData:
    """Return `images` to train on, none to validate."""
    return TrainingData(CLASSES, images, None, (0.5,) * 3, (0.25,) * 3)


def words(runtime: RuntimeConfig) -> str:
    """Return how a training computed."""
    return f"{runtime.precision}, {runtime.memory_format}, {runtime.compile}"


def steps(bench: Bench) -> None:
    """Compare hpo's loop with a bare one, network by network."""
    for name, full in NETWORKS:
        side = bench.size(full, 32)
        batch = bench.size(512 if side == 32 else 128, 4)
        count = batch * bench.size(80 if side == 32 else 24, 2)
        given = RuntimeConfig(precision="float32") if bench.tiny else RuntimeConfig()
        asked = configuration(name, side, batch, RUNS + 1, given)
        threads = len(os.sched_getaffinity(0))
        runtime = resolve(asked, classes=CLASSES, device=bench.device, threads=threads)
        config = asked.model_copy(update={"runtime": runtime})
        results = list(train(config, seen(Noise(count, side)), NullControl(), device=bench.device))
        ours = statistics.median(one.metrics["images_per_s"] for one in results[1:])
        bare = bare_loop(config, bench.device, count // batch)
        bench.tell(
            "steps",
            f"{name}, {full} px, batch {batch}: {words(runtime)}",
            str(RUNS),
            f"{ours:.0f} images/s, bare loop {bare:.0f}: {ours / bare:.2f}",
        )


def bare_loop(config: TrainConfig, device: torch.device, steps: int) -> float:
    """Return the images/s (median of RUNS) of the plainest loop on one resident batch, with the
    precision, layout and arithmetic of `config`."""
    set_arithmetic(config.runtime, device)
    layout = memory_format(config.runtime.memory_format)
    model = models.build(config.model, classes=CLASSES, image_size=config.data.image_size)
    model = model.to(device, memory_format=layout).train()  # type: ignore[call-overload]
    images = torch.randn(config.batch_size, 3, *[config.data.image_size] * 2, device=device)
    images = images.contiguous(memory_format=layout)
    labels = torch.arange(config.batch_size, device=device) % CLASSES
    optimizer = torch.optim.SGD(
        model.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True, fused=True
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, config.runtime.precision):
            loss = functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    rates = []
    for run in range(RUNS + 1):  # the first one prepares
        wait(device)
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait(device)
        if run:
            rates.append(steps * config.batch_size / (time.perf_counter() - began))
    return statistics.median(rates)


STUDY = """
[study]
name = "{name}"
trials = {trials}
sampler = "random"
pruner = "none"

[train]
epochs = {epochs}
batch_size = {batch}
data = {{dataset = "benchmarks.gpu:noise", root = "{images}", image_size = 32, val_fraction = 0.1}}
augment = {{horizontal_flip = 0.5, crop_padding = 4}}
model = {model}
runtime = {runtime}

[space]
optimizer.lr = {{low = 1e-3, high = 1e-1, log = true}}
"""


def study(
    bench: Bench, name: str, *, trials: int, epochs: int, images: int, batch: int, runtime: str
) -> hpo.Study:
    """Create a study of ResNet-18 on noise; in a rehearsal of a small CNN."""
    text = STUDY.format(
        name=name,
        trials=trials,
        epochs=epochs,
        batch=batch,
        images=bench.folder / str(images),
        model='{cnn = {filters = [4]}}' if bench.tiny
        else '{architecture = "resnet18", stem = "small"}',
        runtime=runtime,
    )  # fmt: skip
    path = bench.folder / f"{name}.toml"
    path.write_text(text)
    return hpo.Study.create(path, storage=f"sqlite:///{bench.folder / 'hpo.db'}")


def workers(bench: Bench) -> None:
    """Measure the total throughput of several workers."""
    made = study(bench, "workers", trials=1, epochs=1, images=bench.size(20_000, 400),
                 batch=bench.size(256, 16), runtime="{}")  # fmt: skip
    found = probe(made.database, "workers", str(bench.device), all_=True)
    alone = found.rates.get(1, 0.0)
    for count, rate in found.rates.items():
        result = f"{rate:.0f} images/s, {rate / alone:.2f} times one"
        bench.tell("workers", f"{count} together, 32 px", "1", result)
    mps = "with MPS" if mps_is_running() else "without MPS"
    why = f"; {found.end}" if found.end else ""
    bench.tell("workers", f"--workers-per-device auto, {mps}", "1", f"{found.best}{why}")


@contextmanager
def little_memory(bench: Bench, gigabytes: float) -> Iterator[str]:
    """Allow this process so much of the GPU's memory; in a rehearsal, pretend that 8 images fit."""
    if bench.device.type == "cuda":
        total = torch.cuda.get_device_properties(bench.device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total), bench.device)
        try:
            yield f"{gigabytes:g} GB allowed"
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
        return
    original = Learner._loss

    def small(self: Learner, forward: Any, images: torch.Tensor, labels: Any) -> Any:
        if len(images) > 8:
            raise torch.OutOfMemoryError("pretended")
        return original(self, forward, images, labels)

    Learner._loss = small  # type: ignore[method-assign]
    try:
        yield "pretended"
    finally:
        Learner._loss = original  # type: ignore[method-assign]


def memory(bench: Bench) -> None:
    """Train with a batch that does not fit."""
    side, batch = bench.size(224, 32), bench.size(512, 32)
    fast = RuntimeConfig(
        precision="float32", memory_format="channels_last", deterministic=False, compile="none"
    )
    config = configuration("mobilenet_v2", side, batch, 2, fast)
    with little_memory(bench, 8) as allowed, tempfile.TemporaryDirectory() as folder:
        results: list[EpochResult] = list(
            train(config, seen(Noise(batch * 2, side)), NullControl(), device=bench.device,
                  checkpoint=lambda epoch: Path(folder) / f"{epoch}.ckpt")
        )  # fmt: skip
    last = results[-1]
    answered = "answered" if last.micro_batch < batch else "it did fit"
    bench.tell(
        "memory",
        f"mobilenet_v2, {side} px, batch {batch}, float32, {allowed}",
        "1",
        f"{answered}: micro-batch {last.micro_batch}, {len(results)} of 2 epochs, peak "
        f"{last.metrics['peak_memory_mb'] / 1000:.1f} GB",
    )


CLOCKED = ("seconds", "images_per_s", "peak_memory_mb")


def curves(made: hpo.Study) -> dict[tuple[int, int], dict[str, float]]:
    """Return the metrics of each epoch of each trial but those that tell the time."""
    return {
        (trial.number, row.epoch): {k: v for k, v in row.metrics.items() if k not in CLOCKED}
        for trial in made.trials
        for row in trial.epochs
    }


def search(made: hpo.Study, device: str, workers: int, kills: int) -> int:
    """Run the study, and kill a worker whenever an epoch was finished since the last kill, `kills`
    times in all; return how often that was done."""
    supervisor = made.supervisor([device] * workers)
    done, known, looked = 0, 0, 0.0

    def strike() -> None:
        nonlocal done, known, looked
        if done >= kills or time.monotonic() - looked < 0.5:
            return
        looked = time.monotonic()
        finished = len(curves(made))
        running = [one for one in supervisor.slots if one.process and one.process.poll() is None]
        if finished > known and running:
            os.kill(running[done % len(running)].process.pid, signal.SIGKILL)  # type: ignore[union-attr]
            done, known = done + 1, finished

    supervisor.run(threading.Event(), strike)
    return done


def kill(bench: Bench) -> None:
    """Search twice, once with workers that are killed, and compare every epoch."""
    trials, epochs = bench.size(6, 3), bench.size(4, 3)
    shape: dict[str, Any] = {
        "trials": trials,
        "epochs": epochs,
        "images": bench.size(10_000, 300),
        "batch": bench.size(256, 32),
        "runtime": '{deterministic = true, precision = "bfloat16", memory_format = '
        '"channels_last", compile = "none", threads = 1}',
    }
    alone = study(bench, "alone", **shape)
    search(alone, str(bench.device), 2, 0)
    killed = study(bench, "killed", **shape)
    kills = search(killed, str(bench.device), 2, bench.size(4, 1))
    theirs, ours = curves(alone), curves(killed)
    same = sum(ours.get(place) == metrics for place, metrics in theirs.items())
    finished = sum(trial.state == "complete" for trial in killed.trials)
    bench.tell(
        "kill",
        f"kill -9 of {kills} of 2 workers, {trials} trials of {epochs} epochs",
        "1",
        f"{finished} of {trials} trials complete, {same} of {len(theirs)} epochs equal bit for bit",
    )


def cifar(bench: Bench) -> None:
    """Train the recipes of studies/, each tested once."""
    fields = cifar_fields(bench)
    if fields is None:
        bench.tell("cifar", "CIFAR-10", "0", "not run: give it with --data FOLDER")
        return
    for name, grid in RECIPES:
        file = StudyFile.load(ROOT / "studies" / f"cifar10-{name}.toml", fields)
        config = file.config(file.baselines[0])
        began = time.perf_counter()
        model = hpo.train(
            config, seeds=1, out=bench.folder / name, device=str(bench.device), progress=None
        )
        top1 = model.summary["test"]["top1"]["mean"]
        bench.tell(
            "cifar",
            f"{name}, {config.epochs} epochs: {words(model.config.runtime)}",
            "1",
            f"test top-1 {top1:.4f} (a grid by hand: {grid:.2f}), "
            f"{time.perf_counter() - began:.0f} s in all",
        )


def cifar_fields(bench: Bench) -> dict[str, Any] | None:
    """Return the fields that name the images; None where there are none."""
    folder = bench.data
    if bench.tiny:
        folder = bench.folder / "pictures"
        for part, count in (("train", 80), ("test", 20)):
            write_images(folder / part, count)
    if folder is None:
        return None
    if (folder / "cifar-10-batches-py").exists():
        return {"data.root": str(folder), "data.download": False}
    small = {"epochs": 2, "runtime.precision": "float32"} if bench.tiny else {}
    return {"data.dataset": "folder", "data.root": str(folder), **small}


def write_images(folder: Path, count: int) -> None:
    """Write `count` images of noise, in a folder for each class."""
    images = Noise(count, 32)
    for i in range(count):
        path = folder / f"class{images.labels[i]}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.pixels(i)).save(path)


PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "tests": (tests, 60),
    "steps": (steps, 60),
    "workers": (workers, 60),
    "memory": (memory, 20),
    "kill": (kill, 90),
    "cifar": (cifar, 120),
}
"""Each part, and the seconds that have to be left for it."""


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--only", help=f"parts, with commas between: {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part begins too late")
    parser.add_argument("--device", default="cuda:0", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    args.only = args.only.split(",") if args.only else list(PARTS)
    if unknown := set(args.only) - PARTS.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: allowed: {', '.join(PARTS)}")
    if args.data is not None and not args.data.is_dir():
        parser.error(f"--data {args.data}: there is no such folder")
    return args


def hardware(device: torch.device) -> str:
    """Return the GPU's name, its memory and CUDA's version, and the machine around it."""
    if device.type != "cuda":
        return f"{machine()} (a rehearsal: no figure means anything)"
    about = torch.cuda.get_device_properties(device)
    size = f"{about.total_memory / 2**30:.0f} GiB"
    return f"{about.name}, {size}, CUDA {torch.version.cuda}; {machine()}"


def main(given: Sequence[str] | None = None) -> int:
    """Measure; return the exit code."""
    args = arguments(given)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks.gpu: there is no CUDA device here, so nothing was measured")
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HPO_HOME"] = str(Path(folder) / "runs")
        until = began + 60 * args.minutes
        bench = Bench(torch.device(args.device), args.tiny, args.data, until, Path(folder))
        print(f"{hardware(bench.device)}; {versions('torch', 'torchvision', 'optuna')}", flush=True)
        for name in args.only:
            run_part(bench, name)
    print(table(bench, time.monotonic() - began))
    return int(bench.failed)


def run_part(bench: Bench, name: str) -> None:
    """Run a part if there is time; a fault of one does not end the others."""
    part, needed = PARTS[name]
    left = bench.until - time.monotonic()
    if left < needed:
        bench.tell(name, "left out", "0", f"{left:.0f} s were left, it needs {needed:.0f}")
        return
    try:
        part(bench)
    except Exception as error:  # the other parts are worth as much
        lines = f"{type(error).__name__}: {error}".splitlines()
        bench.tell(name, "failed", "0", lines[0])
        bench.failed = True
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def table(bench: Bench, seconds: float) -> str:
    """Return all lines as one table."""
    rows = ["| part | what | n | result |", "|---|---|---|---|"]
    rows += [f"| {' | '.join(line)} |" for line in bench.lines]
    about = f"{hardware(bench.device)}; {versions('torch', 'torchvision', 'optuna')}"
    return "\n".join(["", *rows, "", f"{about}; {seconds:.0f} s in all"])


if __name__ == "__main__":
    sys.exit(main())
