"""How long commands and workers take to start, where that time goes, and what choosing precision
and layout costs.

    python -m benchmarks.startup [RUNS] [--only commands run resolve] [--other CHECKOUT]

- commands: `hpo --help`, `list` and `status` (of a finished study of 3 trials) against a Python
  that does nothing.
- run: `hpo run` of a new study, from the moment it is typed to the end of each worker's first
  training step, for the small network and MobileNetV2 on digits, with 1 and 2 workers; against
  `import torch` and `import torch, torchvision` in a bare Python.
- resolve: the measurement of precision and layout at 32 px and batch 128 in one thread, also on a
  processor that is told not to have bfloat16 (oneDNN's ONEDNN_MAX_CPU_ISA).

All are started in turn, RUNS times (default 7) after one untimed round, so that whatever else the
machine does falls on all of them. `--other` measures another checkout of hpo in the same rounds, by
which the last column divides. Prints seconds: wall time and processor time (user and system, of all
processes), the smallest and the median.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import hpo
from benchmarks.host import machine, versions
from hpo.extras import DISTRIBUTION

HERE = Path(hpo.__file__).parents[1]
TRACER = Path(__file__).with_name("tracer")
STUDY = """
[study]
name = "tiny"
trials = {trials}
sampler = "random"
[train]
epochs = 1
data = {{dataset = "digits", image_size = {side}}}
model = {{architecture = "{architecture}", stem = "{stem}"}}
[space]
optimizer.name = ["sgd", "adamw"]
"""
NETWORKS = {
    "small network": ("small_cnn", "default", 8),
    "MobileNetV2": ("mobilenet_v2", "small", 32),
}
RESOLVE = """
import json, sys, time, torch
from hpo.config.train import TrainConfig
from hpo.training import device
model = {{"architecture": "{architecture}", "stem": "{stem}"}}
data = {{"dataset": "digits", "image_size": 32}}
config = TrainConfig.parse({{"batch_size": 128, "model": model, "data": data}})
torch.set_num_threads(1)
device.Learner(config, classes=10, device=torch.device("cpu"))
began, used = time.perf_counter(), time.process_time()
found = device.resolve(config, classes=10, device=torch.device("cpu"), threads=1)
seconds = time.perf_counter() - began, time.process_time() - used
print(json.dumps([*seconds, found.precision + " " + found.memory_format]))
"""
RESOLVED = {"small network": ("small_cnn", "default"), "MobileNetV2": ("mobilenet_v2", "small"),
            "ResNet-18": ("resnet18", "small")}  # fmt: skip
ISAS = {"": "", ", no bfloat16": "AVX2"}
STAGES = (
    ("python, command line", "", "> main"),
    ("imports", "> main", "< hpo.workers.worker"),
    ("waits for the study", "< hpo.workers.worker", "called"),
    ("database, code", "called", "> Worker.run"),
    ("claims a trial", "> Worker.run", "> open_data"),
    ("images", "> open_data", "< open_data"),
    ("precision, layout", "< open_data", "< resolve"),
    ("network, first step", "< resolve", "< Learner.step"),
)
"""Of a worker: from one mark to another."""


@dataclass
class Sample:
    """Seconds of several runs of one thing."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def add(self, wall: float, cpu: float, said: str = "") -> None:
        self.wall.append(wall)
        self.cpu.append(cpu)
        self.said.append(said)

    def __str__(self) -> str:
        figures = (min(self.wall), median(self.wall), min(self.cpu), median(self.cpu))
        return "".join(f"{one:9.2f}" for one in figures)


Samples = dict[str, Sample]
HEAD = f"{'seconds':34}{'wall min':>9}{'median':>9}{'cpu min':>9}{'median':>9}"


def environment(checkout: Path, home: Path, **more: str) -> dict[str, str]:
    paths = os.pathsep.join(map(str, [TRACER] * ("TRACE" in more) + [checkout]))
    return os.environ | {"PYTHONPATH": paths, "HPO_HOME": str(home)} | more


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def timed(command: list[str], cwd: Path, env: dict[str, str]) -> tuple[float, float]:
    """Wall and processor time of a process with all its children; its output is thrown away."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    wall, after = time.time() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


PYTHON = [sys.executable]
HPO = [*PYTHON, "-m", "hpo"]


def finished_study(checkout: Path, place: Path) -> dict[str, str]:
    """Make a study of 3 trials in `place`; return the environment in which it is found."""
    architecture, stem, side = NETWORKS["small network"]
    file = place / "tiny.toml"
    file.write_text(STUDY.format(trials=3, architecture=architecture, stem=stem, side=side))
    env = environment(checkout, place / "runs")
    timed([*HPO, "run", file.name, "--quiet", "--device", "cpu", "--workers", "1"], place, env)
    return env


Job = Callable[[], tuple[float, float, str]]


def command_jobs(checkout: Path, stack: ExitStack) -> dict[str, Job]:
    place = stack.enter_context(folder())
    env = finished_study(checkout, place)
    commands = {
        "python -c pass": [*PYTHON, "-c", "pass"],
        "hpo --help": [*HPO, "--help"],
        "hpo list": [*HPO, "list"],
        "hpo status": [*HPO, "status", "tiny"],
    }
    return {
        name: lambda command=command: (*timed(command, place, env), "")  # type: ignore[misc]
        for name, command in commands.items()
    }


def import_jobs() -> dict[str, Job]:
    lines = ("import torch", "import torch, torchvision")
    return {
        line: lambda line=line: (*timed([*PYTHON, "-c", line], Path(), dict(os.environ)), "")  # type: ignore[misc]
        for line in lines
    }


def run_jobs(checkout: Path, stages: dict[str, Sample] | None) -> dict[str, Job]:
    return {
        f"{name}, {workers} worker{'s' * (workers > 1)}": lambda name=name, workers=workers: run(  # type: ignore[misc]
            checkout, name, workers, stages
        )
        for name in NETWORKS
        for workers in (1, 2)
    }


def run(
    checkout: Path, network: str, workers: int, stages: dict[str, Sample] | None
) -> tuple[float, float, str]:
    """Seconds until the last worker has made its first step, and the processor time that all of
    them and the supervisor had used when theirs was made."""
    architecture, stem, side = NETWORKS[network]
    with folder() as place:
        (place / "trace").mkdir()
        file = place / "tiny.toml"
        file.write_text(STUDY.format(trials=100, architecture=architecture, stem=stem, side=side))
        env = environment(checkout, place / "runs", TRACE=str(place / "trace"))
        command = [*HPO, "run", file.name, "--quiet", "--device", "cpu", "--workers", str(workers)]
        typed = time.time()
        with subprocess.Popen(
            command, cwd=place, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and steps(place / "trace") < workers:
                time.sleep(0.1)
            process.terminate()
        traces = [read_trace(path) for path in (place / "trace").iterdir()]
    ends = [one["< Learner.step"] for one in traces if "< Learner.step" in one]
    assert len(ends) == workers, f"{len(ends)} of {workers} workers made a step"
    (supervisor,) = (one for one in traces if "< Learner.step" not in one)
    if stages is not None and workers == 1:
        (worker,) = (one for one in traces if "< Learner.step" in one)
        add_stages(stages, network, typed, supervisor, worker)
    ready = supervisor.get("> EarlyWorkers.call", supervisor["> Child.__init__"])[1]
    return max(wall for wall, _ in ends) - typed, sum(cpu for _, cpu in ends) + ready, ""


def steps(traces: Path) -> int:
    """How many processes have made a step of a training."""
    return sum("< Learner.step" in path.read_text() for path in traces.iterdir())


Trace = dict[str, tuple[float, float]]


def read_trace(path: Path) -> Trace:
    """When each mark was first passed: wall clock and processor time; "" is the start."""
    found: Trace = {}
    for number, line in enumerate(path.read_text().splitlines()):
        name, wall, cpu = json.loads(line)
        found.setdefault("" if number == 0 else name, (wall, cpu))
    return found


def add_stages(
    stages: dict[str, Sample], network: str, typed: float, supervisor: Trace, worker: Trace
) -> None:
    begun, called = supervisor["> Child.__init__"], supervisor.get("> EarlyWorkers.call")
    before = stages.setdefault(f"{network}: hpo run until workers start", Sample())
    before.add(begun[0] - typed, begun[1])
    if called:
        after = stages.setdefault(f"{network}: hpo run until it calls them", Sample())
        after.add(called[0] - begun[0], called[1] - begun[1])
    imported = worker["< hpo.workers.worker"]
    waited = max(imported[0], called[0] if called else 0.0)
    worker = worker | {"called": (waited, imported[1])}
    for name, first, last in STAGES:
        if first in worker and last in worker:
            one = stages.setdefault(f"{network}: {name}", Sample())
            one.add(worker[last][0] - worker[first][0], worker[last][1] - worker[first][1])


def resolve_jobs(checkout: Path) -> dict[str, Job]:
    return {
        f"resolve {name}{how}": lambda name=name, isa=isa: resolve(checkout, name, isa)  # type: ignore[misc]
        for name in RESOLVED
        for how, isa in ISAS.items()
    }


def resolve(checkout: Path, network: str, isa: str) -> tuple[float, float, str]:
    architecture, stem = RESOLVED[network]
    code = RESOLVE.format(architecture=architecture, stem=stem)
    more = {"OMP_NUM_THREADS": "1"} | ({"ONEDNN_MAX_CPU_ISA": isa} if isa else {})
    with folder() as place:  # where Python finds no other hpo first
        env = environment(checkout, place, **more)
        command = [*PYTHON, "-c", code]
        done = subprocess.run(
            command, cwd=place, env=env, capture_output=True, text=True, check=True
        )
    wall, cpu, said = json.loads(done.stdout)
    return wall, cpu, said


def measure(jobs: dict[str, Job], runs: int) -> Samples:
    """All `jobs` in turn, `runs` times after an untimed round."""
    samples = {name: Sample() for name in jobs}
    for number in range(runs + 1):
        for name, job in jobs.items():
            found = job()
            if number:
                samples[name].add(*found)
    return samples


OTHER = " (other)"


def both(make: Callable[[Path], dict[str, Job]], other: Path | None) -> dict[str, Job]:
    """The jobs of this checkout, each followed by that of the other one."""
    own, theirs = make(HERE), make(other) if other else {}
    return {
        name + end: job
        for name in own
        for end, job in (("", own[name]), (OTHER, theirs.get(name)))
        if job is not None
    }


def show(samples: Samples, base: str | None = None) -> None:
    """Print a table; the last columns are ratios of median processor times."""
    compared = any(name.endswith(OTHER) for name in samples)
    print(HEAD + (f"{'cpu / ' + base:>33}" if base else "") + "  other / this" * compared)
    for name, sample in samples.items():
        ratio = median(sample.cpu) / median(samples[base].cpu) if base else 0.0
        other = samples.get(name + OTHER)
        line = f"{name:34}{sample}" + (f"{ratio:33.2f}" if base else "")
        line += f"{median(other.cpu) / median(sample.cpu):14.2f}" if other else ""
        print(f"{line.ljust(70)}  {', '.join(sorted(set(sample.said) - {''}))}".rstrip())
    print(flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("runs", type=int, nargs="?", default=7)
    parser.add_argument("--only", nargs="+", choices=("commands", "run", "resolve"))
    parser.add_argument("--other", type=Path, help="another checkout of hpo")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    other = args.other.resolve() if args.other else None
    only = args.only or ("commands", "run", "resolve")
    print(machine())
    print(versions(DISTRIBUTION, "torch", "torchvision", "optuna", "sqlalchemy", "typer"))
    print(f"{args.runs} runs each, in turn\n", flush=True)
    if "commands" in only:
        with ExitStack() as stack:
            jobs = both(lambda checkout: command_jobs(checkout, stack), other)
            show(measure(jobs, args.runs), "python -c pass")
    if "run" in only:
        stages: dict[str, Sample] = {}
        jobs = both(lambda checkout: run_jobs(checkout, stages if checkout == HERE else None),
                    other)  # fmt: skip
        show(measure(import_jobs() | jobs, args.runs), "import torch, torchvision")
        print("Of the runs with 1 worker, the first untimed one included")
        show(stages)
    if "resolve" in only:
        show(measure(both(resolve_jobs, other), args.runs))


if __name__ == "__main__":
    main()
