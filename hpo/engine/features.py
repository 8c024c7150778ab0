"""What the frozen beginning of a network makes of a data set, computed once and kept.

    cache/features/
    ├── <key>.lock   one builder; others wait
    └── <key>        outputs of one part (train, val), picture after picture, of each cached view

The key is made of all that decides the bits: the pictures' contents and size, the weights and
steps, the arithmetic. A file is complete or not there, and all trainings of a host map it. Pictures
go through in batches of one size, whatever a training's own, so that the rounding, which on some
devices depends on that size, does not depend on who came first.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hpo.definition.augment import AugmentConfig
from hpo.definition.config import TrainConfig
from hpo.engine.cache import Store, locked, short_hash
from hpo.engine.chain import frozen_steps, steps
from hpo.engine.control import Control
from hpo.engine.images import Images
from hpo.engine.learner import Learner, autocast, memory_format
from hpo.engine.loader import TrainBatches
from hpo.files import disk_full, is_full

log = logging.getLogger(__name__)

BATCH = 64
"""Pictures computed at once."""
WORTH, SMALL = 6, 16_384
"""Largest output of a picture that is kept: this many times its bytes as decoded pixels, or this
many bytes. `benchmarks/frozen.py --cuts` measures reading against computing: on CPUs, up to the
third layer of ResNet-50 (5.3 times the pixels at 224), reading takes a thousandth of the time; more
would mostly fill disk and memory."""
_SHAPELESS = "weights", "trainable_blocks", "head", "dropout"
"""Fields of the model that decide nothing in its beginning but what the weights tell."""
_FORMAT = 1


@dataclass(frozen=True)
class Preparation:
    """How pictures become the input of a network."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    config: TrainConfig
    device: torch.device


@dataclass(frozen=True)
class Features:
    """Outputs of a frozen beginning for a set of pictures.

    `parts`: (views, N, ...) tensors, mapped from files; a set that was joined from two has two.
    """

    parts: tuple[Tensor, ...]
    layout: torch.memory_format
    device: torch.device

    def rows(self, order: Tensor, view: int, slices: Sequence[slice]) -> Iterator[Tensor]:
        """The outputs (B, ...) for each slice of `order`, (N,) positions of pictures; on the
        device, and nobody else's to change."""
        shown = [part[view % len(part)] for part in self.parts]
        index = order.to(shown[0].device)
        for part in slices:
            rows = _gathered(shown, index[part])
            if self.device.type == "cuda" and not rows.is_cuda:
                rows = rows.pin_memory()
            rows = rows.to(self.device, non_blocking=True)
            yield rows.contiguous(memory_format=self.layout)

    def resident(self) -> Features:
        """The same on the device, where that is a GPU with twice the room."""
        if self.device.type != "cuda":
            return self
        if sum(part.nbytes for part in self.parts) > torch.cuda.mem_get_info(self.device)[0] // 2:
            return self
        joined = torch.cat(self.parts, 1) if len(self.parts) > 1 else self.parts[0]
        return Features((joined.to(self.device),), self.layout, self.device)


def _gathered(parts: Sequence[Tensor], index: Tensor) -> Tensor:
    if len(parts) == 1:
        return parts[0].index_select(0, index)
    out = torch.empty(len(index), *parts[0].shape[1:], dtype=parts[0].dtype)
    start = 0
    for part in parts:
        here = (index >= start) & (index < start + len(part))
        out[here] = part.index_select(0, index[here] - start)
        start += len(part)
    return out


def frozen_cut(learner: Learner) -> int:
    """How many steps of the network, first to last, need not be computed in every epoch: with the
    images unchanged they give the same. 0: none that has weights."""
    chain = steps(learner.model)
    count = frozen_steps(chain, learner.frozen)
    weighted = any(True for step in chain[:count] for _ in step.parameters())
    return count if weighted else 0


def keep(
    learner: Learner,
    how: Preparation,
    sets: tuple[Images, Images | None],
    root: Path,
    control: Control,
    *,
    epoch: int,
) -> tuple[Features, Features | None] | None:
    """What the frozen beginning of the network makes of training and validation images, computed
    under `root` unless it is there already.

    None where the images are new in every epoch, their contents are not known, an output is not
    WORTH its bytes, or there is no room: more than `data.cache_limit_gb`, or more than is free.
    `control.step` is asked, without images, while this computes or waits for another who does.
    """
    cut, augment = frozen_cut(learner), how.config.augment
    if not cut or not (augment == AugmentConfig() or _views(augment)):
        return None
    extractor = Extractor(learner, cut, how, root)
    if not extractor.worth:
        return None
    train = extractor.open(sets[0], augment, control, epoch)
    if train is None or sets[1] is None:
        return None if train is None else (train, None)
    val = extractor.open(sets[1], AugmentConfig(), control, epoch)
    return None if val is None else (train, val)


def _views(augment: AugmentConfig) -> int:
    """How many fixed ones of each picture; 0: it has none. Mixing is new in every epoch."""
    return 0 if augment.mixup or augment.cutmix else augment.cached_views


class Extractor:
    """The first `cut` steps of a learner's network, and where their outputs are kept."""

    def __init__(self, learner: Learner, cut: int, how: Preparation, root: Path) -> None:
        self._how, self._root = how, root / "features"
        self._layout = memory_format(how.config.runtime.memory_format)
        self._prefix = nn.Sequential(*steps(learner.model)[:cut])
        self._weights = _digest(learner.model, steps(learner.model)[cut:])
        side = how.config.data.image_size
        blank = torch.zeros(2, 3, side, side, device=how.device)
        sample = self._run(blank.contiguous(memory_format=self._layout))
        self._shape, self._dtype = sample.shape[1:], sample.dtype
        self._output = _layout_of(sample)
        self.bytes = sample[0].nbytes
        self.worth = self.bytes <= max(SMALL, WORTH * side * side * 3)

    def open(
        self, images: Images, augment: AugmentConfig, control: Control, epoch: int
    ) -> Features | None:
        """The outputs for `images`, computed first if need be; None where they are not kept."""
        found = []
        for part in images.parts:
            rows = self._part(part, augment, control, epoch) if part.content else None
            if rows is None:
                return None
            found.append(rows)
        return Features(tuple(found), self._output, self._how.device).resident()

    def _part(
        self, images: Images, augment: AugmentConfig, control: Control, epoch: int
    ) -> Tensor | None:
        shape = (max(1, _views(augment)), len(images), *self._shape)
        size = math.prod(shape[:2]) * self.bytes
        file = self._root / self._key(images.content, augment)
        try:
            with locked(file, lambda: control.step(epoch=epoch, images=0)):
                store = Store(self._root, self._how.config.data.cache_limit_gb * 1e9)
                if not file.exists():
                    if not store.has_room(size):
                        return None
                    self._build(file, images, augment, control, epoch)
                return self._mapped(file, shape) if size <= store.limit else None
        except OSError as error:
            if not is_full(error):
                raise
            full = disk_full(file, size)
            log.warning("%s. Frozen layers are computed anew in every epoch", full)
        except torch.OutOfMemoryError:
            log.warning("out of memory with %d images at once; nothing is kept", BATCH)
        return None

    def _mapped(self, file: Path, shape: tuple[int, ...]) -> Tensor:
        # Copy on write: torch wants writable memory, and nobody writes.
        data = torch.from_numpy(np.asarray(np.memmap(file, np.uint8, "c")))
        return data.view(self._dtype).view(shape)

    def _build(
        self, file: Path, images: Images, augment: AugmentConfig, control: Control, epoch: int
    ) -> None:
        beside = file.with_name(f".{file.name}")
        try:
            with beside.open("wb") as out:
                for rows in self._computed(images, augment):
                    control.step(epoch=epoch, images=0)
                    out.write(rows.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
                out.flush()
                os.fsync(out.fileno())
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)

    def _computed(self, images: Images, augment: AugmentConfig) -> Iterator[Tensor]:
        batches = TrainBatches(
            images,
            mean=self._how.mean,
            std=self._how.std,
            augment=augment,
            image_size=self._how.config.data.image_size,
            batch_size=BATCH,
            device=self._how.device,
            memory_format=self._layout,
            loader_workers=self._how.config.data.loader_workers,
        )
        for view in range(max(1, _views(augment))):
            for pixels, _ in batches.in_order(view):
                yield self._run(pixels)

    def _run(self, pixels: Tensor) -> Tensor:
        self._prefix.eval()
        with torch.no_grad(), autocast(self._how.device, self._how.config.runtime.precision):
            return self._prefix(pixels)  # type: ignore[no-any-return]

    def _key(self, content: str, augment: AugmentConfig) -> str:
        config, device = self._how.config, self._how.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        arithmetic: list[object] = [name, config.runtime.precision, config.runtime.memory_format]
        arithmetic += [torch.__version__, torch.get_num_threads(), BATCH]
        pictures = [content, config.data.image_size, self._how.mean, self._how.std]
        views = augment.model_dump(mode="json") if _views(augment) else None
        shape = config.model.model_dump(mode="json", exclude=set(_SHAPELESS))
        network = [shape, str(self._prefix), self._weights]
        return short_hash([_FORMAT, arithmetic, pictures, views, network])


def _layout_of(sample: Tensor) -> torch.memory_format:
    """How the outputs lie in memory, so that what follows them computes the same bits."""
    last = torch.channels_last
    if (
        sample.dim() == 4
        and not sample.is_contiguous()
        and sample.is_contiguous(memory_format=last)
    ):
        return last
    return torch.contiguous_format


def _digest(model: nn.Module, rest: Sequence[nn.Module]) -> str:
    """Of all weights but those of `rest`."""
    later = {id(value) for step in rest for value in step.state_dict(keep_vars=True).values()}
    found = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in later:
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            plain = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
            found.update(plain.numpy().data)
    return found.hexdigest()
