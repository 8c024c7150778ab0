"""A network in training: optimizer steps, micro-batches, and the exponential moving average of its
weights."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hpo.config.train import Phase, TrainConfig
from hpo.errors import TrialFailed
from hpo.training import compiling, metrics, models
from hpo.training.arithmetic import is_fast
from hpo.training.augment import ops
from hpo.training.losses import make_loss
from hpo.training.optim import make_optimizer, set_lr
from hpo.training.partition import Partition

log = logging.getLogger(__name__)

RECORDED = ("cuda-graph", "inductor")
"""Values of `runtime.compile` with which steps are recorded on an NVIDIA GPU."""


class Average:
    """Exponential moving average of a network: a copy in eval mode whose tensors move by 1 - decay
    towards the network's after every step (Polyak & Juditsky 1992), including batch norm
    statistics.

    The first steps average over only a tenth of the steps so far, so that the random initialisation
    is forgotten: decay is at most (1 + n) / (10 + n) in step n, as in TensorFlow's
    ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    def update(self, model: nn.Module) -> None:
        """Update the average after a step of `model`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        moving = [pair for pair in pairs if pair[0].is_floating_point()]
        with torch.no_grad():
            follow = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            follow([mine for mine, _ in moving], [theirs for _, theirs in moving], 0)
            counts = [pair for pair in pairs if not pair[0].is_floating_point()]
            if counts:  # many small ones: together, which is one launch on a GPU
                torch._foreach_copy_([mine for mine, _ in counts], [one for _, one in counts])

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Restore the average from a checkpoint."""
        self.model.load_state_dict(state)
        self.updates = updates


def _tensors(model: nn.Module) -> list[Tensor]:
    """Return parameters and buffers, shared ones once."""
    return [*model.parameters(), *model.buffers()]


Batch = tuple[Tensor, Tensor]
"""Images (B, 3, S, S) float32, or features of them, and labels (B,) int64, on one device."""
MixedBatch = tuple[Tensor, Tensor | ops.Mixed]
"""A batch whose labels may be mixed by mixup or cutmix."""

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def memory_format(name: str) -> torch.memory_format:
    """Return torch's layout for `runtime.memory_format`; an unresolved `auto` means contiguous."""
    return FORMATS.get(name, torch.contiguous_format)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of mixed precision, if `runtime.precision` asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


class RunningMeans:
    """Running means of loss and hits, kept on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        # MPS has no float64.
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.loss = torch.zeros((), dtype=kind, device=device)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0

    def add(self, loss: Tensor, hits: Tensor, images: int) -> None:
        """Add a batch: `loss` () is its mean over `images`, `hits` () the number of correct
        ones."""
        self.loss += loss.detach() * images
        self.hits += hits
        self.images += images

    def read(self) -> tuple[float, float]:
        """Return the mean loss and the share of hits; waits for the device."""
        return self.loss.item() / self.images, self.hits.item() / self.images


class Learner:
    """The network and the optimizer of one configuration.

    `micro_batch` is the largest number of images computed at once; `epoch` (from 1) decides the
    initial phase. Raises what `models.build` raises, and ConfigError for a loss that cannot be
    found.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        classes: int,
        device: torch.device,
        micro_batch: int = 0,
        pretrained: bool = True,
        epoch: int = 1,
    ) -> None:
        self.config, self.device = config, device
        self._loss_of = make_loss(config)
        self.micro_batch = micro_batch or config.batch_size
        model = models.build(
            config.model,
            classes=classes,
            image_size=config.data.image_size,
            pretrained=pretrained,
        )
        self.is_recorded = config.runtime.compile in RECORDED and device.type == "cuda"
        layout = memory_format(config.runtime.memory_format)
        self.model: nn.Module = model.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.has_batch_norm = any(isinstance(part, _BatchNorm) for part in self.model.modules())
        decay = config.ema_decay
        self.average = None if decay is None else Average(self.model, decay)
        self.use_features(None)
        for phase in config.all_phases():  # too many blocks are found now, not at its start
            models.set_trainable(self.model, phase.trainable_blocks)
        self.start_phase(config.phase_of(epoch))

    def start_phase(self, phase: Phase) -> None:
        """Make the blocks of `phase` trainable, with a new optimizer."""
        self.phase = phase
        self.model.zero_grad(set_to_none=True)
        self.frozen = models.set_trainable(self.model, phase.trainable_blocks)
        head = self.model.get_submodule(models.family(self.model).head)
        recorded = self.device if self.is_recorded else None
        fused = self.is_recorded or is_fast(self.config.runtime, self.device)
        self.optimizer = make_optimizer(
            self.model, self.config.optimizer, head, fused=fused, recorded=recorded
        )
        self._start_steps()
        self._learning = [part for group in self.optimizer.param_groups for part in group["params"]]

    def set_class_weights(self, class_weights: Tensor) -> None:
        """Weight each class in the training loss, (C,) float32 on the device."""
        self._loss_of = make_loss(self.config, class_weights)
        self._start_steps()

    @property
    def eval_model(self) -> nn.Module:
        """Model to evaluate and save: the EMA model if enabled."""
        return self.average.model if self.average else self.model

    def use_features(self, cut: Partition | None) -> None:
        """Expect batches of cached features, the outputs before `cut`; with None, batches of
        images."""
        self._train_forward, self.eval_forward = self.model, self.eval_model
        """Modules that map batches to logits: one in training, one for evaluation."""
        if cut:
            self._train_forward = cut.suffix(self.model)
            self.eval_forward = cut.suffix(self.eval_model) if self.average else self._train_forward
        self._start_steps()

    @property
    def is_compiled(self) -> bool:
        """True if torch.compile compiles the network for its full batches."""
        return self._compiled is not None

    def _start_steps(self) -> None:
        """Compile and record anew the steps that follow, those of full batches."""
        self._compiled = None
        if self.config.runtime.compile == "inductor":
            self._compiled = compiling.compiled(self._train_forward)
        self._step: compiling.Step = self._update
        if self.is_recorded:
            recorder = compiling.CudaRecorder(self.device)
            self._step = compiling.RecordedStep(self._update, recorder)

    def train_mode(self) -> None:
        """Set training mode, except for frozen modules."""
        self.model.train()
        for part in self.frozen:
            part.eval()

    def step(self, batch: MixedBatch, lr: float, means: RunningMeans | None = None) -> None:
        """Take one optimizer step on the mean loss of `batch`, accumulated over micro-batches. For
        mixed labels, the label with the larger weight counts for the accuracy."""
        images, labels = batch
        set_lr(self.optimizer, lr)
        step = self._step if len(labels) == self.config.batch_size else self._update
        parts = step(images, labels)
        if means:
            for loss, hits, count in parts:
                means.add(loss, hits, count)
        if self.average:
            self.average.update(self.model)

    def _update(self, images: Tensor, labels: compiling.Labels) -> compiling.Parts:
        """Take an optimizer step, compiled if that is possible; return its micro-batches."""
        if self._compiled is None or len(labels) != self.config.batch_size:
            return self._update_by(self._train_forward, images, labels)
        try:
            return self._update_by(self._compiled, images, labels)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.warning("the network is not compiled: %s", compiling.reason(error))
            self._compiled = None
        return self._update_by(self._train_forward, images, labels)

    def _update_by(
        self, forward: Callable[[Tensor], Tensor], images: Tensor, labels: compiling.Labels
    ) -> compiling.Parts:
        self.optimizer.zero_grad(set_to_none=True)
        count = self._parts(len(labels))
        done: compiling.Parts = []
        truths: Sequence[compiling.Labels] = labels.tensor_split(count)
        for part, truth in zip(images.tensor_split(count), truths, strict=True):
            loss, logits = self._loss(forward, part, truth)
            (loss * (len(truth) / len(labels)) if count > 1 else loss).backward()  # type: ignore[no-untyped-call]
            hits = metrics.top_k_correct(logits.detach(), ops.dominant(truth), 1)
            done.append((loss.detach(), hits, len(truth)))
        if self.config.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._learning, self.config.clip_grad_norm)
        self.optimizer.step()
        return done

    def _parts(self, images: int) -> int:
        """Return the number of micro-batches; batch norm cannot train on a single image."""
        parts = math.ceil(images / self.micro_batch)
        return max(1, min(parts, images // 2)) if self.has_batch_norm else parts

    def _loss(
        self, forward: Callable[[Tensor], Tensor], images: Tensor, labels: compiling.Labels
    ) -> tuple[Tensor, Tensor]:
        try:
            with autocast(self.device, self.config.runtime.precision):
                logits = forward(images).float()
        except ValueError as error:
            raise TrialFailed(
                f"a batch of {len(labels)} cannot be trained on: {error}; choose another batch_size"
            ) from error
        return ops.mean_loss(labels, partial(self._loss_of, logits)), logits
