"""train(): one training as a generator of epochs.

A training has one network, or one for each fold of a cross-validation. Those share the
configuration except for the seed, and the history of their mean metrics, which drives learning
rates and early stopping.

Search, retraining and tests drive the same generator; pruning is leaving the loop. Interrupted and
resumed from a checkpoint it gives the same numbers: what is random in an epoch depends on the seed
and the epoch alone, and a learning rate on the metrics so far.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from hpo.config.metrics import direction
from hpo.config.train import TrainConfig
from hpo.control import Control, enter_phase
from hpo.errors import TrialFailed
from hpo.training import metrics as goals
from hpo.training import optim
from hpo.training.arithmetic import kept_generators, seed_generators, set_arithmetic
from hpo.training.checkpoint import Checkpoint, best_of
from hpo.training.evaluation import require_measurable
from hpo.training.feature_cache import FeatureSets, Preprocessing, build_cache, find_cut_or_warn
from hpo.training.inputs import Batches, TrainingData, make_batches, views
from hpo.training.learner import Learner, RunningMeans
from hpo.training.loader import TrainBatches, class_weights
from hpo.training.memory import is_lack, is_scarce, release
from hpo.training.partition import Partition
from hpo.training.tasks import task_of

Metrics = dict[str, float]


def fold_config(config: TrainConfig, fold: int, folds: int) -> TrainConfig:
    """Return the configuration of one network of several: with a seed of its own, derived from
    `config.seed` and `fold` (from 0)."""
    if folds == 1:
        return config
    mixed = np.random.SeedSequence((config.seed, fold)).generate_state(1, np.uint64)
    return config.model_copy(update={"seed": int(mixed[0]) >> 1})


def mean_over_folds(per_network: Sequence[Metrics], metric: str) -> Metrics:
    """Combine the metrics of all networks in an epoch: means, except the sum of `seconds` and the
    maximum of `peak_memory_mb`; plus the standard deviation (n - 1) of `metric` over them as
    `<metric>_std`."""
    if len(per_network) == 1:
        return per_network[0]
    means = {
        name: sum(one[name] for one in per_network) / len(per_network) for name in per_network[0]
    }
    means["seconds"] = sum(one["seconds"] for one in per_network)
    means["peak_memory_mb"] = max(one["peak_memory_mb"] for one in per_network)
    if metric in means:
        apart = [one[metric] - means[metric] for one in per_network]
        means[f"{metric}_std"] = math.sqrt(sum(x * x for x in apart) / (len(per_network) - 1))
    return means


class Network:
    """A network with its data and its training state."""

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        control: Control,
        device: torch.device,
        micro_batch: int,
        cache: Path | None,
        asked: Sequence[str] = (),
    ) -> None:
        self.asked = asked
        self.config, self.data, self.control, self.device = config, data, control, device
        self.micro_batch, self.cache, self.classes = micro_batch, cache, data.classes
        self.best: dict[str, Tensor] = {}
        self.predictions: dict[str, Tensor] = {}
        """On the validation images, in the last epoch."""
        self.best_predictions: dict[str, Tensor] = {}
        self.trained = False
        """Whether it has trained since it was built."""
        self._batches: tuple[Any, Batches] | None = None

    def build(self, state: Mapping[str, Any] | None, epoch: int) -> None:
        """Build the network for `epoch` (from 1): from `state` (see `Network.state`), or with
        initial weights."""
        enter_phase("building the model")
        self.prepare(0)
        self.learner = Learner(
            self.config,
            classes=self.classes,
            device=self.device,
            micro_batch=self.micro_batch,
            pretrained=state is None,
            epoch=epoch,
        )
        if self.config.data.balance == "loss":
            weights = class_weights(self.data.train.labels, self.classes)
            self.learner.set_class_weights(weights.float().to(self.device))
        if state:
            self.restore(state)

    @property
    def min_micro_batch(self) -> int:
        """Smallest micro-batch on which this network can train."""
        return 2 if self.learner.has_batch_norm else 1

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load weights, optimizer, EMA and best weights from `state`."""
        average = self.learner.average
        self.learner.model.load_state_dict(state["model"])
        optim.load_optimizer(self.learner.optimizer, state["optimizer"])
        if average and state["average"] is not None:
            average.load(state["average"], state["averaged"])
        self.best = best_of(state)
        self.best_predictions = state.get("predictions", {})

    def keep_as_best(self, *, copied: bool) -> None:
        """Keep the weights of this epoch as the best; they are copied only if `copied`."""
        state = self.learner.eval_model.state_dict() if copied else {}
        self.best = {name: value.detach().to("cpu", copy=True) for name, value in state.items()}
        self.best_predictions = self.predictions

    def release_workers(self) -> None:
        """End the processes that decode images until the next epoch, for the sake of another
        network."""
        if any(
            images is not None and images.streamed for images in (self.data.train, self.data.val)
        ):
            self._batches = None

    def state(self, *, best: bool) -> dict[str, Any]:
        """Return this network's part of a checkpoint; with `best`, the stored weights of the best
        epoch as well."""
        average = self.learner.average
        return {
            "model": self.learner.model.state_dict(),
            "best": self.best if best else None,
            "optimizer": self.learner.optimizer.state_dict(),
            "average": average.model.state_dict() if average else None,
            "averaged": average.updates if average else 0,
            "predictions": self.best_predictions,
        }

    def prepare(self, epoch: int) -> None:
        """Reset the arithmetic settings and the random generators, independent of what ran before
        in this process."""
        set_arithmetic(self.config.runtime, self.device)
        mixed = np.random.SeedSequence((self.config.seed, epoch)).generate_state(1, np.uint64)
        seed_generators(int(mixed[0]))

    def epoch(self, epoch: int, history: Sequence[Metrics]) -> Metrics:
        """Train and evaluate for one epoch, after those in `history`; return the metrics."""
        phase = self.config.phase_of(epoch)
        if phase != self.learner.phase:
            self.learner.start_phase(phase)
        self.prepare(epoch)
        if self.device.type == "cuda" and not (self.learner.is_recorded and self.trained):
            torch.cuda.reset_peak_memory_stats(self.device)  # a replay allocates nothing
        self.trained = True
        began = time.perf_counter()
        batches = self.make_batches(epoch)
        if batches.train is None:
            return self.evaluate_only(epoch, batches, began)
        rates = optim.learning_rates(
            self.config, epoch=epoch, steps=len(batches.train), history=history
        )
        means = self.train_epoch(epoch, batches.train, rates)
        loss, top1 = means.read()
        trained = time.perf_counter() - began
        values = {"train_loss": loss, "train_top1": top1}
        values |= self.validate(epoch, batches)
        return values | {
            "lr": rates[-1],
            "seconds": time.perf_counter() - began,
            "images_per_s": means.images / trained,
            "peak_memory_mb": peak_memory_mb(self.device),
        }

    def evaluate_only(self, epoch: int, batches: Batches, began: float) -> Metrics:
        """Evaluate a network that does not train; return the metrics of its only epoch."""
        values = self.validate(epoch, batches)
        seconds = time.perf_counter() - began
        images = len(self.data.train) + len(self.data.val) if self.data.val else 0
        return values | {
            "seconds": seconds,
            "images_per_s": images / seconds,
            "peak_memory_mb": peak_memory_mb(self.device),
        }

    def make_batches(self, epoch: int) -> Batches:
        """Return the batches, of cached features if the frozen layers need not be computed again;
        rebuilt only when the trainable blocks change."""
        blocks = self.learner.phase.trainable_blocks
        if self._batches and self._batches[0] == blocks:
            return self._batches[1]
        data, model = self.data, self.learner.model
        cut: Partition | None = None
        cached: FeatureSets = {}
        if self.cache and (
            cut := find_cut_or_warn(model, self.learner.frozen, self.config, self.device)
        ):
            preprocessing = Preprocessing(data.mean, data.std, self.config, self.device)
            wanted = views(self.config, data)
            cached = build_cache(
                model, cut, preprocessing, wanted, self.cache, self.control, epoch=epoch
            )
        self.learner.use_features(cut if cached else None)
        micro_batch = self.learner.micro_batch
        batches = make_batches(self.config, data, self.device, micro_batch, cached)
        self._batches = blocks, batches
        return batches

    def train_epoch(
        self, epoch: int, train_batches: TrainBatches, rates: list[float]
    ) -> RunningMeans:
        """Train once over the training images, without synchronising with the device."""
        self.learner.train_mode()
        means = RunningMeans(self.device)
        images = 0
        with closing(train_batches.epoch(epoch)) as batches:
            for step, (rate, batch) in enumerate(zip(rates, batches, strict=True), 1):
                enter_phase(f"step {step}/{len(rates)}")
                self.control.step(epoch=epoch, images=images)
                self.learner.step(batch, rate, means)
                images = len(batch[1])
        self.control.step(epoch=epoch, images=images)
        return means

    def validate(self, epoch: int, batches: Batches) -> Metrics:
        """Return the validation metrics; empty without validation images."""
        data = self.data
        if data.val is None or batches.val is None:
            return {}
        enter_phase("validating")
        task = task_of(self.config)
        found = task.validate(self.learner, batches, data, self.asked, self.control, epoch)
        self.predictions = found.predictions
        return found.metrics


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory in MB (10^6 bytes): on CUDA, of tensors since the counter was reset;
    otherwise the resident memory of this process, on Linux and macOS its maximum so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return float(psutil.Process(os.getpid()).memory_info().rss) / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


@dataclass(frozen=True)
class EpochResult:
    """One finished epoch."""

    epoch: int
    """Number of the epoch, from 1."""
    metrics: dict[str, float]
    """train_loss, train_top1, val_loss, val_top1, val_top5 (of more than five classes),
    val_macro_f1, val_balanced_accuracy (fractions), further ones that were asked for (see
    `hpo.training.evaluation`), lr (the head's, of the last step), seconds (with evaluation),
    images_per_s (training alone), peak_memory_mb. A retrieval has those of
    `hpo.config.retrieval.RETRIEVED` instead of a classification's; where nothing learns there
    are no losses and no lr, and images_per_s is of the evaluation. Of folds these are means,
    `seconds` their sum, and there is the deviation of the metric, such as val_top1_std."""
    best_epoch: int
    checkpoint: Path | None
    """Complete on disk; its best weights: `Checkpoint.best_weights`."""
    last: bool
    """Whether training is over: the last epoch, early stopping, or a loss that is not finite."""
    diverged: bool
    """Whether a loss is not finite."""
    micro_batch: int
    """Images computed at once; less than batch_size after the device ran out of memory."""


def train(
    config: TrainConfig,
    data: TrainingData | Sequence[TrainingData],
    control: Control,
    *,
    device: torch.device,
    metric: str = "val_top1",
    also: Sequence[str] = (),
    checkpoint: Callable[[int], Path] | None = None,
    resume: Path | None = None,
    cache: Path | None = None,
) -> Generator[EpochResult, None, None]:
    """Train as `config` says, yielding each epoch after its checkpoint is on disk.

    `checkpoint` names the file of an epoch; without it nothing is saved. `resume` is a checkpoint
    of the same configuration: training continues with the epoch after it. `metric` decides which
    epoch is best; metrics that cost more than a few counts are measured if `metric` or `also` names
    them, or the configuration watches them. If the device runs out of memory, training returns to
    the last checkpoint and halves the micro-batch; the effective batch stays the same. Below
    `cache`, outputs of frozen layers are cached, and shared with other trainings, if the images do
    not change.

    With several `data`, the folds of a cross-validation, each has a network: an epoch trains each
    of them for one epoch, one after another, and its metrics are means (see `mean_over_folds`).

    Raises what `control.step` raises; ConfigError, DataError or TrialFailed for a configuration
    that cannot be trained; Damaged for a checkpoint that cannot be resumed.
    """
    folds = [data] if isinstance(data, TrainingData) else data
    begin = partial(_Run, config, folds, control, device, metric, also, cache)
    if is_scarce(device):
        release(device)  # of what was measured before
    try:
        with kept_generators():
            yield from _restarted(begin, config, device, checkpoint, resume)
    finally:
        if is_scarce(device):
            release(device)


def _restarted(
    begin: Callable[[int, Checkpoint | None], _Run],
    config: TrainConfig,
    device: torch.device,
    checkpoint: Callable[[int], Path] | None,
    resume: Path | None,
) -> Generator[EpochResult, None, None]:
    """Yield the epochs of a training; begin it again at its last checkpoint, with fewer images at
    once, where `device` lacks memory."""
    micro_batch = min(config.runtime.micro_batch or config.batch_size, config.batch_size)
    start = Checkpoint.load(resume) if resume else None
    if start:
        start.require(config)
        micro_batch = start.micro_batch
    while True:
        run = begin(micro_batch, start)
        start = None
        try:
            for result in run.epochs(checkpoint):
                resume = result.checkpoint
                yield result
            return
        except RuntimeError as error:
            if not is_lack(error):
                raise
            reason = str(error)
        # Only here, behind the `except`, is the traceback gone that holds the tensors.
        done, min_micro_batch = run.done, run.min_micro_batch
        del run
        release(device)
        if micro_batch <= min_micro_batch:
            raise TrialFailed(f"out of memory even with {micro_batch} images at once: {reason}")
        if done and resume is None:
            lost = f"out of memory in epoch {done + 1}, without a checkpoint to go back to"
            raise TrialFailed(f"{lost}: {reason}")
        micro_batch = max(min_micro_batch, micro_batch // 2)
        start = Checkpoint.load(resume) if resume else None


class _Run:
    """A training between two restarts: one network, or one for each fold, epoch by epoch."""

    def __init__(
        self,
        config: TrainConfig,
        folds: Sequence[TrainingData],
        control: Control,
        device: torch.device,
        metric: str,
        also: Sequence[str],
        cache: Path | None,
        micro_batch: int,
        start: Checkpoint | None,
    ) -> None:
        self.config, self.metric, self.micro_batch = config, metric, micro_batch
        self.validated = all(fold.val is not None for fold in folds)
        asked = goals.asked(config, metric, *also) if self.validated else ()
        for fold in folds:
            require_measurable(asked, fold)
        self.networks = [
            Network(
                fold_config(config, i, len(folds)), fold, control, device, micro_batch, cache, asked
            )
            for i, fold in enumerate(folds)
        ]
        self.build(start)
        self.history = list(start.metrics) if start else []
        self.best_epoch = start.best_epoch if start else 0

    def build(self, start: Checkpoint | None) -> None:
        states = start.networks if start else [None] * len(self.networks)
        try:
            for network, state in zip(self.networks, states, strict=True):
                network.build(state, start.epoch if start else 1)
        except RuntimeError as error:
            if not is_lack(error):
                raise
            name, count = self.config.model.architecture, len(self.networks)
            what = f"{name} alone does" if count == 1 else f"{count} networks of {name} (folds) do"
            raise TrialFailed(f"{what} not fit in memory: {error}") from error

    @property
    def done(self) -> int:
        """Number of finished epochs."""
        return len(self.history)

    @property
    def min_micro_batch(self) -> int:
        """Smallest micro-batch on which all networks can train."""
        return max(network.min_micro_batch for network in self.networks)

    def epochs(self, checkpoint: Callable[[int], Path] | None) -> Iterator[EpochResult]:
        while not self.ended():
            epoch = self.done + 1
            self.history.append(mean_over_folds(list(self.each(epoch)), self.metric))
            if self.improved():
                self.best_epoch = epoch
                for network in self.networks:
                    network.keep_as_best(copied=checkpoint is not None)
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
                micro_batch=self.micro_batch,
            )

    def each(self, epoch: int) -> Iterator[dict[str, float]]:
        """Run the epoch on each network; yield its metrics."""
        for network in self.networks:
            yield network.epoch(epoch, self.history)
            if len(self.networks) > 1:
                network.release_workers()

    def improved(self) -> bool:
        """Return whether the last epoch is the best; ties go to the first one."""
        if not self.validated or not self.best_epoch:
            return True
        if _diverged(self.history[-1]):
            return False
        value, best = self.history[-1][self.metric], self.history[self.best_epoch - 1][self.metric]
        return value < best if direction(self.metric) == "minimize" else value > best

    def ended(self) -> bool:
        return is_last(self.config, self.history)

    def save(self, path: Path) -> None:
        enter_phase("saving")
        current = self.best_epoch == self.done
        first, *others = [network.state(best=not current) for network in self.networks]
        Checkpoint(
            config=self.config.to_dict(),
            metrics=self.history,
            best_epoch=self.best_epoch,
            micro_batch=self.micro_batch,
            **first,
            others=others,
        ).save(path)


def is_last(config: TrainConfig, history: Sequence[Mapping[str, float]]) -> bool:
    """Return whether training is over after the epochs in `history`: all are done, early stopping
    applies, or a loss is not finite."""
    if len(history) >= config.epochs:
        return True
    counted = history[config.all_phases()[-1].start :]
    return optim.should_stop(config.early_stopping, counted) or (
        bool(history) and _diverged(history[-1])
    )


def _diverged(metrics: Mapping[str, float]) -> bool:
    return not all(math.isfinite(metrics[name]) for name in metrics if name.endswith("_loss"))
