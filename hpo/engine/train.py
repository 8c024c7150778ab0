"""train(): one training as a generator of epochs, and nothing that knows what it is for.

Search, retraining and tests drive the same generator; pruning is leaving the loop. Interrupted and
resumed from a checkpoint it gives the same numbers: what is random in an epoch depends on the seed
and the epoch alone, and a learning rate on the metrics so far.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hpo.definition.config import TrainConfig
from hpo.definition.goals import direction
from hpo.engine import goals, optim
from hpo.engine.checkpoint import Checkpoint
from hpo.engine.control import Control
from hpo.engine.inputs import TrainingData
from hpo.engine.learner import Evaluation, evaluate
from hpo.engine.measures import require_measurable
from hpo.engine.networks import Network, combined, of_fold
from hpo.errors import TrialFailed

__all__ = ["EpochResult", "Evaluation", "TrainingData", "evaluate", "train"]


@dataclass(frozen=True)
class EpochResult:
    """One finished epoch."""

    epoch: int
    """From 1."""
    metrics: dict[str, float]
    """train_loss, train_top1, val_loss, val_top1, val_top5 (of more than five classes),
    val_macro_f1, val_balanced_accuracy (fractions), further ones that were asked for (see
    `hpo.engine.measures`), lr (the head's, of the last step), seconds (with evaluation),
    images_per_s (training alone), peak_memory_mb. A retrieval has those of
    `hpo.definition.retrieval.RETRIEVED` instead of a classification's; where nothing learns there
    are no losses and no lr, and images_per_s is of the evaluation. Of folds these are means,
    `seconds` their sum, and there is the deviation of the metric, such as val_top1_std."""
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

    `checkpoint` names the file of an epoch; without it nothing is kept. `resume` is a checkpoint of
    the same configuration: training goes on with the epoch after it. `metric` decides which epoch
    is best; metrics that cost more than a few counts are measured where it is one, `also` has it,
    or the configuration watches it. Where the device runs out of memory, training goes back to the
    last checkpoint and halves the micro-batch; the effective batch stays. Under `cache` the outputs
    of a frozen beginning are kept, and shared with other trainings, where images do not change.

    Of several `data`, the folds of a cross-validation, each has a network: an epoch is that epoch
    of each of them, one after another, and its metrics are means (see `networks.combined`).

    Raises what `control.step` raises; ConfigError, DataError or TrialFailed for a configuration
    that cannot be trained; Damaged for a checkpoint that cannot be gone on with.
    """
    folds = [data] if isinstance(data, TrainingData) else data
    micro_batch = min(config.runtime.micro_batch or config.batch_size, config.batch_size)
    start = Checkpoint.load(resume) if resume else None
    if start:
        start.require(config)
        micro_batch = start.micro_batch
    while True:
        run = _Run(config, folds, control, device, metric, also, micro_batch, start, cache)
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
    """A training between two restarts: one network, or one for each fold, epoch by epoch."""

    def __init__(
        self,
        config: TrainConfig,
        folds: Sequence[TrainingData],
        control: Control,
        device: torch.device,
        metric: str,
        also: Sequence[str],
        micro_batch: int,
        start: Checkpoint | None,
        cache: Path | None,
    ) -> None:
        self.config, self.metric, self.micro_batch = config, metric, micro_batch
        self.validated = all(fold.val is not None for fold in folds)
        asked = goals.asked(config, metric, *also) if self.validated else ()
        for fold in folds:
            require_measurable(asked, fold)
        self.networks = [
            Network(
                of_fold(config, i, len(folds)), fold, control, device, micro_batch, cache, asked
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
        except torch.OutOfMemoryError as error:
            name, count = self.config.model.architecture, len(self.networks)
            what = f"{name} alone does" if count == 1 else f"{count} networks of {name} (folds) do"
            raise TrialFailed(f"{what} not fit in memory: {error}") from error

    @property
    def done(self) -> int:
        """Epochs finished so far."""
        return len(self.history)

    @property
    def least(self) -> int:
        """The least micro-batch with which all networks can learn."""
        return max(network.least for network in self.networks)

    def epochs(self, checkpoint: Callable[[int], Path] | None) -> Iterator[EpochResult]:
        while not self.ended():
            epoch = self.done + 1
            self.history.append(combined(list(self.each(epoch)), self.metric))
            if self.improved():
                self.best_epoch = epoch
                for network in self.networks:
                    network.keep(copied=checkpoint is not None)
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
        """The epoch of every network."""
        for network in self.networks:
            yield network.epoch(epoch, self.history)
            if len(self.networks) > 1:
                network.rest()

    def improved(self) -> bool:
        """Whether the epoch just finished is the best; of equal ones the first is."""
        if not self.validated or not self.best_epoch:
            return True
        if _diverged(self.history[-1]):
            return False
        value, best = self.history[-1][self.metric], self.history[self.best_epoch - 1][self.metric]
        return value < best if direction(self.metric) == "minimize" else value > best

    def ended(self) -> bool:
        return is_last(self.config, self.history)

    def save(self, path: Path) -> None:
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
    """Whether no epoch follows those of `history`, their metrics: it has all of them, early
    stopping ends it, or a loss is not finite."""
    if len(history) >= config.epochs:
        return True
    counted = history[config.all_phases()[-1].start :]
    return optim.should_stop(config.early_stopping, counted) or (
        bool(history) and _diverged(history[-1])
    )


def _diverged(metrics: Mapping[str, float]) -> bool:
    return not all(math.isfinite(metrics[name]) for name in metrics if name.endswith("_loss"))


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
