"""One network of a training: the images it learns from, its epochs, its part of a checkpoint.

A training has one, or one for each fold of a cross-validation. Those share the configuration but
for the seed, and the history of their mean metrics, by which learning rates and early stopping go.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from hpo.definition.config import TrainConfig
from hpo.engine import measures, optim
from hpo.engine.balance import class_weights
from hpo.engine.checkpoint import best_of
from hpo.engine.control import Control
from hpo.engine.features import Kept, Preparation, found_cut, keep
from hpo.engine.inputs import Batches, TrainingData, make_batches, views
from hpo.engine.learner import Learner, Tally, evaluate
from hpo.engine.loader import TrainBatches
from hpo.engine.partition import Partition
from hpo.engine.retrieval import Validation

Metrics = dict[str, float]


def of_fold(config: TrainConfig, fold: int, folds: int) -> TrainConfig:
    """The configuration of one of several networks: a seed of its own, derived from `config.seed`
    and `fold` (from 0)."""
    if folds == 1:
        return config
    mixed = np.random.SeedSequence((config.seed, fold)).generate_state(1, np.uint64)
    return config.model_copy(update={"seed": int(mixed[0]) >> 1})


def combined(found: Sequence[Metrics], metric: str) -> Metrics:
    """An epoch of all networks as one: means, but the sum of `seconds` and the most of
    `peak_memory_mb`; and the standard deviation (n - 1) of `metric` over them as `<metric>_std`."""
    if len(found) == 1:
        return found[0]
    means = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
    means["seconds"] = sum(one["seconds"] for one in found)
    means["peak_memory_mb"] = max(one["peak_memory_mb"] for one in found)
    if metric in means:
        apart = [one[metric] - means[metric] for one in found]
        means[f"{metric}_std"] = math.sqrt(sum(x * x for x in apart) / (len(found) - 1))
    return means


class Network:
    """A network, the images of `data`, and how far it has learned from them."""

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
        self.opened: tuple[Any, Batches] | None = None

    def build(self, state: Mapping[str, Any] | None, epoch: int) -> None:
        """Make the network for `epoch` (from 1): as `state` has it (see `Network.state`), else
        with its first weights."""
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
            self.learner.weigh(weights.float().to(self.device))
        if state:
            self.restore(state)

    @property
    def least(self) -> int:
        """The least micro-batch with which this network can learn."""
        return 2 if self.learner.normed else 1

    def restore(self, state: Mapping[str, Any]) -> None:
        average = self.learner.average
        self.learner.model.load_state_dict(state["model"])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        if average and state["average"] is not None:
            average.load(state["average"], state["averaged"])
        self.best = best_of(state)

    def keep(self, *, copied: bool) -> None:
        """Take the weights of this epoch as the best."""
        kept = self.learner.kept.state_dict() if copied else {}
        self.best = {name: value.detach().to("cpu", copy=True) for name, value in kept.items()}

    def rest(self) -> None:
        """End the processes that decode images, until the next epoch: another network's turn."""
        if any(
            images is not None and images.streamed for images in (self.data.train, self.data.val)
        ):
            self.opened = None

    def state(self, *, best: bool) -> dict[str, Any]:
        """Its part of a checkpoint; with the best epoch's weights where those are not its own."""
        average = self.learner.average
        return {
            "model": self.learner.model.state_dict(),
            "best": self.best if best else None,
            "optimizer": self.learner.optimizer.state_dict(),
            "average": average.model.state_dict() if average else None,
            "averaged": average.updates if average else 0,
        }

    def prepare(self, epoch: int) -> None:
        """The same arithmetic and the same random numbers, whatever ran before in this process."""
        if self.config.runtime.threads:
            torch.set_num_threads(self.config.runtime.threads)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        mixed = np.random.SeedSequence((self.config.seed, epoch)).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed[0]))

    def epoch(self, epoch: int, history: Sequence[Metrics]) -> Metrics:
        """Train and evaluate once, after the epochs of `history`; returns the metrics."""
        phase = self.config.phase_of(epoch)
        if phase != self.learner.phase:
            self.learner.begin(phase)
        self.prepare(epoch)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        batches = self.open(epoch)
        if batches.train is None:
            return self.look(epoch, batches, began)
        rates = optim.learning_rates(
            self.config, epoch=epoch, steps=len(batches.train), history=history
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

    def look(self, epoch: int, batches: Batches, began: float) -> Metrics:
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
        blocks = self.learner.phase.trainable_blocks
        if self.opened and self.opened[0] == blocks:
            return self.opened[1]
        data, model = self.data, self.learner.model
        cut: Partition | None = None
        kept: Kept = {}
        if self.cache and (cut := found_cut(model, self.learner.frozen, self.config, self.device)):
            how = Preparation(data.mean, data.std, self.config, self.device)
            shown = views(self.config, data)
            kept = keep(model, cut, how, shown, self.cache, self.control, epoch=epoch)
        self.learner.skip(cut if kept else None)
        micro_batch = self.learner.micro_batch
        batches = make_batches(self.config, data, self.device, micro_batch, kept)
        self.opened = blocks, batches
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

    def validate(self, epoch: int, batches: Batches) -> Metrics:
        data = self.data
        if data.val is None or batches.val is None:
            return {}
        if batches.gallery is not None:
            validation = Validation(data.train, batches.gallery, data.val, batches.val)
            return validation.measure(
                self.learner.kept,
                self.learner.judged,
                self.config,
                classes=self.classes,
                device=self.device,
                control=self.control,
                epoch=epoch,
            )
        found = evaluate(
            self.learner.judged,
            batches.val,
            classes=self.classes,
            device=self.device,
            precision=self.config.runtime.precision,
            control=self.control,
            epoch=epoch,
            probabilities=measures.need_probabilities(self.asked),
        )
        return measures.measure(found, self.asked, data.names)


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
