"""One process of a probe: a training that runs when it is told to (see `hpo.workers.probe`)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from hpo.config.study import StudyFile
from hpo.config.train import EarlyStoppingConfig, RuntimeConfig, ScheduleConfig, TrainConfig
from hpo.data.dataset import open_data
from hpo.paths import Home
from hpo.training import device as runtime
from hpo.training.arithmetic import set_arithmetic
from hpo.training.compiling import WARM_UP
from hpo.training.inputs import TrainingData
from hpo.training.train import train

if TYPE_CHECKING:
    import torch

FIRST_STEPS = WARM_UP + 3
"""Steps before the first measurement: kernels are loaded, and a step is recorded."""
AHEAD = 8
"""Steps after which the host waits for the device, so that it does not run far ahead."""


class OverError(Exception):
    """Nobody asks any more."""


@dataclass
class Rounds:
    """The control of the training: it goes on for as long as each line says, and tells how fast."""

    config: TrainConfig
    device: torch.device
    commands: IO[str]
    answer: Callable[..., None]
    steps: int = 0
    images: int = 0
    began: float = 0.0
    until: float | None = None
    """End of the measurement; None before the first one."""

    def step(self, *, epoch: int, images: int) -> None:
        """Count a step, or wait for the next measurement. Raises OverError after the last one."""
        self.steps += 1
        self.images += images
        if self.until is None:
            if self.steps > FIRST_STEPS:
                self._ready()
        elif self.steps % AHEAD == 0 or self.device.type == "cpu":
            runtime.wait(self.device)
            if time.monotonic() >= self.until:
                self.answer(images_per_s=self.images / (time.monotonic() - self.began))
                self._next()

    def _ready(self) -> None:
        runtime.wait(self.device)
        if runtime.has_lacked_memory(self.device):
            self.answer(full="out of memory")
            raise OverError
        self.answer(runtime=self.config.runtime.model_dump())
        self._next()

    def _next(self) -> None:
        line = self.commands.readline()
        if not line:
            raise OverError
        told = json.loads(line)
        threads = {"threads": told["threads"]}
        set_arithmetic(self.config.runtime.model_copy(update=threads), self.device)
        self.images, self.began = 0, time.monotonic()
        self.until = self.began + told["seconds"]


def first_config(file: StudyFile) -> TrainConfig:
    """Return what a study tries first, as a training that does not end by itself."""
    values = file.baselines[0] if file.baselines else file.space.corners()[0]
    config = file.config(values)
    return config.model_copy(
        update={
            "epochs": 10_000,
            "phases": (),
            "schedule": ScheduleConfig(name="constant"),
            "early_stopping": EarlyStoppingConfig(),
            "optimizer": config.optimizer.model_copy(update={"lr": 1e-6}),
        }
    )


def serve(file: StudyFile, device: torch.device, threads: int, home: Home) -> None:
    """Train the first configuration of `file` as standard input says, until that ends."""

    def answer(**message: Any) -> None:
        print(json.dumps(message), flush=True)

    config = first_config(file)
    told = json.loads(sys.stdin.readline() or "null")
    if told is None:
        return
    if config.frozen:
        answer(full="nothing is trained")
        return
    data = open_data(config.data, home.cache)
    seen = TrainingData(len(data.classes), data.train, None, data.mean, data.std)
    if told["runtime"] is None:
        found = runtime.resolve(config, classes=seen.classes, device=device, threads=threads)
    else:
        found = RuntimeConfig.model_validate(told["runtime"])
    # The number of threads is told with each measurement.
    config = config.model_copy(update={"runtime": found.model_copy(update={"threads": 0})})
    rounds = Rounds(config, device, sys.stdin, answer)
    try:
        for _ in train(config, seen, rounds, device=device):
            pass
    except (OverError, BrokenPipeError):
        return
