"""train(): one training as a generator of epochs, and nothing that knows what it is for.

Search, retraining and tests drive the same generator; pruning is leaving the loop. Interrupted and
resumed from a checkpoint it gives the same numbers: what is random in an epoch depends on the seed
and the epoch alone, and a learning rate on the metrics so far.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from hpo.definition.config import TrainConfig, direction
from hpo.engine import optim
from hpo.engine.balance import class_weights
from hpo.engine.chain import beyond
from hpo.engine.checkpoint import Checkpoint
from hpo.engine.control import Control
from hpo.engine.features import Kept, Preparation, frozen_cut, keep
from hpo.engine.inputs import Batches, TrainingData, make_batches, views
from hpo.engine.learner import Evaluation, Learner, Tally, evaluate
from hpo.engine.loader import TrainBatches
from hpo.engine.retrieval import Validation
from hpo.errors import TrialFailed

__all__ = ["EpochResult", "Evaluation", "TrainingData", "evaluate", "train"]


@dataclass(frozen=True)
class EpochResult:
    """One finished epoch."""

    epoch: int
    """From 1."""
    metrics: dict[str, float]
    """train_loss, train_top1, val_loss, val_top1, val_top5 (fractions), lr (the head's, of the last
    step), seconds (with evaluation), images_per_s (training alone), peak_memory_mb. A retrieval has
    those of `hpo.definition.retrieval.RETRIEVED` instead of val_top1 and val_top5; where nothing
    learns there are no losses and no lr, and images_per_s is of the evaluation."""
    best_epoch: int
    checkpoint: Path | None
    """Complete on disk; its weights of the best epoch: `checkpoint.best_weights`."""
    last: bool
    """No epoch follows: the last one, early stopping, or a loss that is not finite."""
    diverged: bool
    """A loss is not finite."""
    micro_batch: int
    """Images computed at once; below batch_size after the device ran out of memory."""


def train(
    config: TrainConfig,
    data: TrainingData,
    control: Control,
    *,
    device: torch.device,
    metric: str = "val_top1",
    checkpoint: Callable[[int], Path] | None = None,
    resume: Path | None = None,
    cache: Path | None = None,
) -> Generator[EpochResult, None, None]:
    """Train as `config` says, yielding each epoch after its checkpoint is on disk.

    `checkpoint` names the file of an epoch; without it nothing is kept. `resume` is a checkpoint of
    the same configuration: training goes on with the epoch after it. `metric` decides which epoch
    is best. Where the device runs out of memory, training goes back to the last checkpoint and
    halves the micro-batch; the effective batch stays. Under `cache` the outputs of a frozen
    beginning are kept, and shared with other trainings, where images do not change.

    Raises what `control.step` raises; ConfigError, DataError or TrialFailed for a configuration
    that cannot be trained.
    """
    micro_batch = min(config.runtime.micro_batch or config.batch_size, config.batch_size)
    start = Checkpoint.load(resume) if resume else None
    if start:
        start.require(config)
        micro_batch = start.micro_batch
    while True:
        run = _Run(config, data, control, device, metric, micro_batch, start, cache)
        start = None
        try:
            for result in run.epochs(checkpoint):
                resume = result.checkpoint
                yield result
            return
        except torch.OutOfMemoryError as error:
            reason = str(error)
        # Only here, behind the `except`, is the traceback gone that holds the tensors.
        done, least = run.done, run.least
        del run
        _free(device)
        if micro_batch <= least:
            raise TrialFailed(f"out of memory even with {micro_batch} images at once: {reason}")
        if done and resume is None:
            raise TrialFailed(
                f"out of memory in epoch {done + 1}, without a checkpoint to go back to: {reason}"
            )
        micro_batch = max(least, micro_batch // 2)
        start = Checkpoint.load(resume) if resume else None


class _Run:
    """A training between two restarts."""

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        control: Control,
        device: torch.device,
        metric: str,
        micro_batch: int,
        start: Checkpoint | None,
        cache: Path | None,
    ) -> None:
        self.data, self.cache = data, cache
        self.config, self.control, self.device, self.metric = config, control, device, metric
        self.validated = data.val is not None
        self.classes = data.classes
        self.prepare(0)
        self.learner = self.make_learner(micro_batch, start)
        if config.data.balance == "loss":
            weights = class_weights(data.train.labels, data.classes)
            self.learner.weigh(weights.float().to(device))
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        if start:
            self.restore(start)
        self.opened: tuple[int, Batches] | None = None

    def make_learner(self, micro_batch: int, start: Checkpoint | None) -> Learner:
        try:
            return Learner(
                self.config,
                classes=self.classes,
                device=self.device,
                micro_batch=micro_batch,
                pretrained=start is None,
                epoch=start.epoch if start else 1,
            )
        except torch.OutOfMemoryError as error:
            name = self.config.model.architecture
            raise TrialFailed(f"{name} alone does not fit in memory: {error}") from error

    @property
    def done(self) -> int:
        """Epochs finished so far."""
        return len(self.history)

    @property
    def least(self) -> int:
        """The least micro-batch with which this network can learn."""
        return 2 if self.learner.normed else 1

    def restore(self, start: Checkpoint) -> None:
        self.learner.model.load_state_dict(start.model)
        self.learner.optimizer.load_state_dict(start.optimizer)
        if self.learner.average and start.average is not None:
            self.learner.average.load(start.average, start.averaged)
        self.history, self.best_epoch = list(start.metrics), start.best_epoch
        self.best = start.best_weights

    def prepare(self, epoch: int) -> None:
        """The same arithmetic and the same random numbers, whatever ran before in this process."""
        if self.config.runtime.threads:
            torch.set_num_threads(self.config.runtime.threads)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        mixed = np.random.SeedSequence((self.config.seed, epoch)).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed[0]))

    def epochs(self, checkpoint: Callable[[int], Path] | None) -> Iterator[EpochResult]:
        while not self.ended():
            epoch = self.done + 1
            phase = self.config.phase_of(epoch)
            if phase != self.learner.phase:
                self.learner.begin(phase)
            self.history.append(self.epoch(epoch))
            if self.improved():
                self.best_epoch = epoch
                self.best = _copied(self.learner.kept) if checkpoint else {}
            path = checkpoint(epoch) if checkpoint else None
            if path:
                self.save(path)
            yield EpochResult(
                epoch=epoch,
                metrics=dict(self.history[-1]),
                best_epoch=self.best_epoch,
                checkpoint=path,
                last=self.ended(),
                diverged=_diverged(self.history[-1]),
                micro_batch=self.learner.micro_batch,
            )

    def epoch(self, epoch: int) -> dict[str, float]:
        """Train and evaluate once; returns the metrics."""
        self.prepare(epoch)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        batches = self.open(epoch)
        if batches.train is None:
            return self.look(epoch, batches, began)
        rates = optim.learning_rates(
            self.config, epoch=epoch, steps=len(batches.train), history=self.history
        )
        tally = self.pass_over(epoch, batches.train, rates)
        loss, top1 = tally.means()
        trained = time.perf_counter() - began
        found = {"train_loss": loss, "train_top1": top1}
        found |= self.validate(epoch, batches)
        return found | {
            "lr": rates[-1],
            "seconds": time.perf_counter() - began,
            "images_per_s": tally.images / trained,
            "peak_memory_mb": peak_memory_mb(self.device),
        }

    def look(self, epoch: int, batches: Batches, began: float) -> dict[str, float]:
        """The one epoch of a network that does not learn."""
        found = self.validate(epoch, batches)
        seconds = time.perf_counter() - began
        images = len(self.data.train) + len(self.data.val) if self.data.val else 0
        return found | {
            "seconds": seconds,
            "images_per_s": images / seconds,
            "peak_memory_mb": peak_memory_mb(self.device),
        }

    def open(self, epoch: int) -> Batches:
        """The batches, of features where the beginning of the network need not be computed again;
        made anew only when another part of it is frozen."""
        cut = frozen_cut(self.learner.model, self.learner.frozen)
        if self.opened and self.opened[0] == cut:
            return self.opened[1]
        data = self.data
        kept: Kept = {}
        if self.cache:
            how = Preparation(data.mean, data.std, self.config, self.device)
            shown = views(self.config, data)
            model, control = self.learner.model, self.control
            kept = keep(model, cut, how, shown, self.cache, control, epoch=epoch)
        self.learner.skip(cut if kept else 0)
        micro_batch = self.learner.micro_batch
        batches = make_batches(self.config, data, self.device, micro_batch, kept)
        self.opened = cut, batches
        return batches

    def pass_over(self, epoch: int, shown: TrainBatches, rates: list[float]) -> Tally:
        """One pass over the training images, without waiting for the device."""
        self.learner.train_mode()
        tally = Tally(self.device)
        images = 0
        with closing(shown.epoch(epoch)) as batches:
            for rate, batch in zip(rates, batches, strict=True):
                self.control.step(epoch=epoch, images=images)
                self.learner.step(batch, rate, tally)
                images = len(batch[1])
        self.control.step(epoch=epoch, images=images)
        return tally

    def validate(self, epoch: int, batches: Batches) -> dict[str, float]:
        data, cut = self.data, self.learner.cut
        if data.val is None or batches.val is None:
            return {}
        if batches.gallery is not None:
            validation = Validation(data.train, batches.gallery, data.val, batches.val, cut)
            return validation.measure(
                self.learner.kept,
                self.config,
                classes=self.classes,
                device=self.device,
                control=self.control,
                epoch=epoch,
            )
        found = evaluate(
            beyond(self.learner.kept, cut),
            batches.val,
            classes=self.classes,
            device=self.device,
            precision=self.config.runtime.precision,
            control=self.control,
            epoch=epoch,
        )
        return {"val_loss": found.loss, "val_top1": found.top1, "val_top5": found.top5}

    def improved(self) -> bool:
        """Whether the epoch just finished is the best; of equal ones the first is."""
        if not self.validated or not self.best_epoch:
            return True
        if _diverged(self.history[-1]):
            return False
        value, best = self.history[-1][self.metric], self.history[self.best_epoch - 1][self.metric]
        return value < best if direction(self.metric) == "minimize" else value > best

    def ended(self) -> bool:
        if self.done >= self.config.epochs:
            return True
        counted = self.history[self.config.all_phases()[-1].start :]
        stopped = optim.should_stop(self.config.early_stopping, counted)
        return stopped or (self.done > 0 and _diverged(self.history[-1]))

    def save(self, path: Path) -> None:
        current, average = self.best_epoch == self.done, self.learner.average
        Checkpoint(
            config=self.config.to_dict(),
            metrics=self.history,
            best_epoch=self.best_epoch,
            micro_batch=self.learner.micro_batch,
            model=self.learner.model.state_dict(),
            best=None if current else self.best,
            optimizer=self.learner.optimizer.state_dict(),
            average=average.model.state_dict() if average else None,
            averaged=average.updates if average else 0,
        ).save(path)


def _diverged(metrics: dict[str, float]) -> bool:
    return not all(math.isfinite(metrics[name]) for name in metrics if name.endswith("_loss"))


def _copied(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory_mb(device: torch.device) -> float:
    """Most memory in use, in MB (10^6 bytes): CUDA: tensors since the counter was reset; else this
    process's resident memory, on Linux and macOS the largest so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return float(psutil.Process(os.getpid()).memory_info().rss) / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
