"""The feature cache: outputs of the frozen layers of a network, computed once per data set.

    cache/features/
    ├── <key>.lock   one builder at a time; others wait
    └── <key>        shape (JSON, padded to a page), then the outputs for one part (train, val),
                     one row of bytes per image, for each cached view

The key covers everything that decides the bits: contents and size of the images, weights and steps
of the network, its outputs for some noise, and the arithmetic. A file is complete or absent, and
all trainings on a host map it: a training that finds its files runs the frozen layers on that noise
alone. Images are processed in batches of a fixed size, whatever the training's own, because on some
devices rounding depends on it, and outputs must not depend on who computed them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hpo.config.augment import AugmentConfig
from hpo.config.train import TrainConfig
from hpo.control import Control
from hpo.data.arrays import HEADER
from hpo.data.cache import ImageCache, locked
from hpo.data.images import Images
from hpo.errors import DiskFull
from hpo.io import (
    CountingFile,
    atomic_write,
    discard,
    disk_full,
    is_sound,
    raising_disk_full,
    short_hash,
)
from hpo.training.arithmetic import is_fast, untimed_algorithms
from hpo.training.augment.ops import moved
from hpo.training.learner import autocast, memory_format
from hpo.training.loader import TrainBatches
from hpo.training.memory import available_bytes
from hpo.training.partition import Partition, partition
from hpo.training.tracing import MORE, CannotPartition

log = logging.getLogger(__name__)

BATCH, SIDE = 64, 224
"""Images computed at once, and the side up to which that holds; of larger images fewer, in about as
much memory."""
WORTH, SMALL = 6, 16_384
"""Largest output per image that is cached: this many times its bytes as decoded pixels, or this
many bytes. `benchmarks/frozen.py --cuts` compares reading with computing: on CPUs, up to the third
layer of ResNet-50 (5.3 times the pixels at 224), reading takes a thousandth of the time; more would
mostly fill disk and memory."""
_SHAPELESS = "weights", "trainable_blocks", "head", "dropout"
"""Model fields that decide nothing in the frozen layers except what the weights determine."""
NO_AUGMENT = AugmentConfig()
_FORMAT = 3

View = tuple[Images, AugmentConfig]
"""Images, and the augmentation with which they are shown."""


@dataclass(frozen=True)
class Preprocessing:
    """Normalisation and resolution of images for a network, and the device it runs on."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    config: TrainConfig
    device: torch.device


@dataclass(frozen=True)
class Features:
    """Cached outputs of frozen layers for a set of images.

    `parts`: (views, N, bytes) uint8, mapped from files; a set concatenated from two has two.
    """

    parts: tuple[Tensor, ...]
    device: torch.device

    def rows(self, order: Tensor, view: int, slices: Sequence[slice]) -> Iterator[Tensor]:
        """Yield the outputs (B, bytes) for each slice of `order`, (N,) indices of images, as fresh
        tensors on the device."""
        parts = [part[view % len(part)] for part in self.parts]
        index = moved(order, parts[0].device)
        for part in slices:
            rows = _gathered(parts, index[part])
            yield rows if rows.is_cuda else moved(rows, self.device)

    def resident(self) -> Features:
        """Return the features on the device, if that is a GPU with twice the memory; otherwise
        these."""
        if self.device.type != "cuda":
            return self
        if sum(part.nbytes for part in self.parts) > available_bytes(self.device) // 2:
            return self
        joined = torch.cat(self.parts, 1) if len(self.parts) > 1 else self.parts[0]
        return Features((joined.to(self.device),), self.device)


FeatureSets = Mapping[View, Features]


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


def find_cut(
    model: nn.Module, frozen: Sequence[nn.Module], config: TrainConfig, device: torch.device
) -> Partition | None:
    """Return the latest point at which `model` can be cut so that the part before it gives the same
    output for an image in every epoch, small enough to be cached; None if that part has no weights.
    `frozen` as returned by `models.set_trainable`. Raises CannotPartition, with the reason, if
    frozen layers cannot be separated."""
    weighted = any(True for module in frozen for _ in module.parameters())
    if not (weighted and is_cacheable(config)):
        return None
    side, runtime = config.data.image_size, config.runtime
    noise = _noise(side).to(device).contiguous(memory_format=memory_format(runtime.memory_format))
    with untimed_algorithms():  # the digest of the cut is to be the same in all processes
        return partition(
            model,
            frozen,
            noise,
            max_bytes=max(SMALL, WORTH * side**2 * 3),
            running=lambda: autocast(device, runtime.precision),
        )


def find_cut_or_obstacle(
    model: nn.Module, frozen: Sequence[nn.Module], config: TrainConfig, device: torch.device
) -> tuple[Partition | None, str | None]:
    """Return the cut (see `find_cut`), and the reason in one line if frozen layers have to be
    computed in every epoch although they would not need to."""
    try:
        cut = find_cut(model, frozen, config, device)
    except CannotPartition as obstacle:
        return None, f"frozen layers are computed in every epoch: {obstacle}"
    if cut and cut.obstacle:
        return cut, f"some frozen layers are computed in every epoch: {cut.obstacle}"
    return cut, None


def find_cut_or_warn(
    model: nn.Module, frozen: Sequence[nn.Module], config: TrainConfig, device: torch.device
) -> Partition | None:
    """Return the cut (see `find_cut`), logging the reason if frozen layers have to be computed in
    every epoch."""
    cut, obstacle = find_cut_or_obstacle(model, frozen, config, device)
    if obstacle:
        log.warning("%s", obstacle)
    return cut


def _noise(side: int) -> Tensor:
    """Return noise images (MORE, 3, side, side) of different contrast and brightness, always the
    same."""
    noise = torch.randn(MORE, 3, side, side, generator=torch.Generator().manual_seed(0))
    strength = torch.arange(1.0, MORE + 1).view(-1, 1, 1, 1)
    return noise * strength + strength - 1


def build_cache(
    model: nn.Module,
    cut: Partition | None,
    preprocessing: Preprocessing,
    views: Iterable[View],
    root: Path,
    control: Control,
    *,
    epoch: int,
) -> FeatureSets:
    """Return the outputs of the layers before `cut` for each of `views`, computed below `root`
    unless they exist.

    Empty if there is no cut, if the contents of any images are unknown, or if there is no room:
    more than `data.cache_limit_gb`, or more than the free space. `control.step` is called, without
    images, while this computes or waits for another process that does.
    """
    wanted = list(dict.fromkeys(views))
    if cut is None or not wanted:
        return {}
    extractor = Extractor(model, cut, preprocessing, root)
    features: dict[View, Features] = {}
    for view in wanted:
        outputs = extractor.open(*view, control, epoch)
        if outputs is None:
            return {}
        features[view] = outputs
    return features


def is_cacheable(config: TrainConfig) -> bool:
    """Return whether frozen layers give the same outputs in every epoch."""
    # What an earlier phase trained differs between the network and its average.
    apart = config.ema_decay is not None and config.phases
    still = config.frozen or config.augment == NO_AUGMENT or _fixed(config.augment) > 0
    return still and not apart


def num_views(augment: AugmentConfig) -> int:
    """Return how many views of each image are cached."""
    return max(1, _fixed(augment))


def _fixed(augment: AugmentConfig) -> int:
    """Return the number of fixed views of each image; 0 if it has none. Mixing differs in every
    epoch."""
    return 0 if augment.mixup or augment.cutmix else augment.cached_views


class Extractor:
    """Computes the layers of a network before a cut, and stores their outputs."""

    def __init__(self, model: nn.Module, cut: Partition, how: Preprocessing, root: Path) -> None:
        self._how, self._root = how, root / "features"
        self._layout = memory_format(how.config.runtime.memory_format)
        self._prefix, self._cut = cut.prefix(model).eval(), cut
        self._side = how.config.data.image_size
        self.batch = images_at_once(self._side)

    def open(
        self, images: Images, augment: AugmentConfig, control: Control, epoch: int
    ) -> Features | None:
        """Return the outputs for `images`, computed first if necessary; None if they cannot be
        cached."""
        parts = []
        for part in images.parts:
            rows = self._part(part, augment, control, epoch) if part.content else None
            if rows is None:
                return None
            parts.append(rows)
        return Features(tuple(parts), self._how.device).resident()

    def _part(
        self, images: Images, augment: AugmentConfig, control: Control, epoch: int
    ) -> Tensor | None:
        file = self._root / self._key(images.content, augment)
        size = HEADER + len(images) * num_views(augment) * self._cut.packing.size

        def tick() -> None:
            control.step(epoch=epoch, images=0)

        try:
            with raising_disk_full(file), locked(file, tick):
                store = ImageCache(self._root, self._how.config.data.cache_limit_gb * 1e9)
                if file.exists():
                    if file.stat().st_size > store.limit:
                        return None
                    if file.stat().st_size >= size and is_sound(file, tick):
                        return _mapped(file)
                    log.warning("%s is damaged: it is rebuilt", file)
                if not store.has_room(size):
                    return None
                self._build(file, images, augment, control, epoch)
                return _mapped(file)
        except DiskFull as full:
            log.warning("%s. Frozen layers are computed again in every epoch", full)
        except torch.OutOfMemoryError:
            log.warning(
                "out of memory with %d images at once; frozen layers are not cached", self.batch
            )
        return None

    @cached_property
    def _weights(self) -> str:
        return _digest(self._prefix)

    def run(self, pixels: Tensor) -> Tensor:
        """Return the outputs (B, bytes) for a batch (B, 3, S, S) on the device."""
        with torch.no_grad(), autocast(self._how.device, self._how.config.runtime.precision):
            return self._prefix(pixels)  # type: ignore[no-any-return]

    def _build(
        self, file: Path, images: Images, augment: AugmentConfig, control: Control, epoch: int
    ) -> None:
        shape = num_views(augment), len(images), self._cut.packing.size

        def write(out: CountingFile) -> None:
            out.write(json.dumps({"shape": shape}).encode().ljust(HEADER))
            for rows in self._computed(images, augment):
                control.step(epoch=epoch, images=0)
                out.write(rows.cpu().numpy().data)
                if out.full is not None:
                    raise disk_full(file, HEADER + math.prod(shape)) from out.full

        for left in file.parent.glob(f".{file.name}.*"):  # by a builder that was killed
            discard(left)
        atomic_write(file, write, sealed=True)

    def _computed(self, images: Images, augment: AugmentConfig) -> Iterator[Tensor]:
        batches = TrainBatches(
            images,
            mean=self._how.mean,
            std=self._how.std,
            augment=augment,
            image_size=self._side,
            batch_size=self.batch,
            device=self._how.device,
            memory_format=self._layout,
            loader_workers=self._how.config.data.loader_workers,
        )
        for view in range(num_views(augment)):
            for pixels, _ in batches.in_order(view):
                yield self.run(pixels)

    def _key(self, content: str, augment: AugmentConfig) -> str:
        config, device = self._how.config, self._how.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        arithmetic: list[object] = [name, config.runtime.precision, config.runtime.memory_format]
        arithmetic += ["fast"] if is_fast(config.runtime, device) else []
        arithmetic += [torch.__version__, torch.get_num_threads(), self.batch]
        images = [content, self._side, self._how.mean, self._how.std]
        views = augment.model_dump(mode="json") if _fixed(augment) else None
        shape = config.model.model_dump(mode="json", exclude=set(_SHAPELESS))
        network = [shape, str(self._prefix), self._cut.digest, self._weights]
        return short_hash([_FORMAT, arithmetic, images, views, network])


def images_at_once(side: int) -> int:
    """Return how many images of `side` pixels are computed together."""
    return max(1, int(BATCH * min(1.0, (SIDE / side) ** 2)))


def _mapped(file: Path) -> Tensor:
    """Return the outputs in `file`, (views, N, bytes) uint8, memory-mapped."""
    # Copy on write: torch requires writable memory, although nothing writes.
    data = np.asarray(np.memmap(file, np.uint8, "c"))
    shape = json.loads(data[:HEADER].tobytes())["shape"]
    return torch.from_numpy(data[HEADER : HEADER + math.prod(shape)]).view(shape)


def _digest(prefix: nn.Module) -> str:
    """Return the digest of all weights and buffers of `prefix`."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, value in [*prefix.named_parameters(), *prefix.named_buffers()]:
        hasher.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        plain = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        hasher.update(plain.numpy().data)
    return hasher.hexdigest()
