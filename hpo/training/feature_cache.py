"""What the frozen beginning of a network makes of a data set, computed once and kept.

    cache/features/
    ├── <key>.lock   one builder; others wait
    └── <key>        their shape (JSON, padded to a page), then the outputs of one part (train,
                     val), a row of bytes for each image, of each cached view

The key is made of all that decides the bits: the images' contents and size, the weights and steps,
what they give for some noise, the arithmetic. A file is complete or not there, and all trainings of
a host map it: one that finds its files runs frozen layers on that noise alone. Images go through in
batches of one size, whatever a training's own, so that the rounding, which on some devices depends
on that size, does not depend on who came first.
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
from hpo.data.cache import (
    ImageCache,
    locked,
    short_hash,
)
from hpo.data.images import Images
from hpo.errors import DiskFull
from hpo.io import (
    CountingFile,
    atomic_write,
    discard,
    disk_full,
    is_sound,
    raising_disk_full,
)
from hpo.training.learner import (
    autocast,
    memory_format,
)
from hpo.training.loader import TrainBatches
from hpo.training.partition import (
    Partition,
    partition,
)
from hpo.training.tracing import (
    MORE,
    Uncut,
)

log = logging.getLogger(__name__)

BATCH, SIDE = 64, 224
"""Pictures computed at once, and up to which side: of larger ones fewer, in as much memory."""
WORTH, SMALL = 6, 16_384
"""Largest output of a picture that is kept: this many times its bytes as decoded pixels, or this
many bytes. `benchmarks/frozen.py --cuts` measures reading against computing: on CPUs, up to the
third layer of ResNet-50 (5.3 times the pixels at 224), reading takes a thousandth of the time; more
would mostly fill disk and memory."""
_SHAPELESS = "weights", "trainable_blocks", "head", "dropout"
"""Fields of the model that decide nothing in its beginning but what the weights tell."""
PLAIN = AugmentConfig()
_FORMAT = 3

View = tuple[Images, AugmentConfig]
"""Pictures, and how they are shown."""


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

    `parts`: (views, N, bytes) uint8, mapped from files; a set that was joined from two has two.
    """

    parts: tuple[Tensor, ...]
    device: torch.device

    def rows(self, order: Tensor, view: int, slices: Sequence[slice]) -> Iterator[Tensor]:
        """The outputs (B, bytes) for each slice of `order`, (N,) positions of images; on the
        device, and nobody else's to change."""
        parts = [part[view % len(part)] for part in self.parts]
        index = order.to(parts[0].device)
        for part in slices:
            rows = _gathered(parts, index[part])
            if self.device.type == "cuda" and not rows.is_cuda:
                rows = rows.pin_memory()
            yield rows.to(self.device, non_blocking=True)

    def resident(self) -> Features:
        """The same on the device, where that is a GPU with twice the room."""
        if self.device.type != "cuda":
            return self
        if sum(part.nbytes for part in self.parts) > torch.cuda.mem_get_info(self.device)[0] // 2:
            return self
        joined = torch.cat(self.parts, 1) if len(self.parts) > 1 else self.parts[0]
        return Features((joined.to(self.device),), self.device)


Kept = Mapping[View, Features]


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


def frozen_cut(
    model: nn.Module, frozen: Sequence[nn.Module], config: TrainConfig, device: torch.device
) -> Partition | None:
    """Where `model` can be cut so that what is before gives the same for an image in every epoch,
    and is worth its bytes; None where that is nothing with weights. `frozen` as from
    `models.set_trainable`. Raises Uncut with the reason where frozen layers cannot be told apart.
    """
    weighted = any(True for module in frozen for _ in module.parameters())
    if not (weighted and lasting(config)):
        return None
    side, precision = config.data.image_size, config.runtime.precision
    return partition(
        model,
        frozen,
        _noise(side)
        .to(device)
        .contiguous(memory_format=memory_format(config.runtime.memory_format)),
        most=max(SMALL, WORTH * side**2 * 3),
        running=lambda: autocast(device, precision),
    )


def cut_or_obstacle(
    model: nn.Module, frozen: Sequence[nn.Module], config: TrainConfig, device: torch.device
) -> tuple[Partition | None, str | None]:
    """The same, and in a line why frozen layers are computed in every epoch that need not be."""
    try:
        cut = frozen_cut(model, frozen, config, device)
    except Uncut as obstacle:
        return None, f"frozen layers are computed in every epoch: {obstacle}"
    if cut and cut.obstacle:
        return cut, f"some frozen layers are computed in every epoch: {cut.obstacle}"
    return cut, None


def found_cut(
    model: nn.Module, frozen: Sequence[nn.Module], config: TrainConfig, device: torch.device
) -> Partition | None:
    """The same; what stands against it goes to the log."""
    cut, obstacle = cut_or_obstacle(model, frozen, config, device)
    if obstacle:
        log.warning("%s", obstacle)
    return cut


def _noise(side: int) -> Tensor:
    """Images (MORE, 3, side, side), of different contrast and brightness: always the same."""
    noise = torch.randn(MORE, 3, side, side, generator=torch.Generator().manual_seed(0))
    strength = torch.arange(1.0, MORE + 1).view(-1, 1, 1, 1)
    return noise * strength + strength - 1


def keep(
    model: nn.Module,
    cut: Partition | None,
    how: Preparation,
    views: Iterable[View],
    root: Path,
    control: Control,
    *,
    epoch: int,
) -> Kept:
    """What the network before its `cut` makes of each of `views`, computed under `root` unless it
    is there already.

    Nothing where there is no cut, where one of them has contents that are not known, or where there
    is no room: more than `data.cache_limit_gb`, or more than is free. `control.step` is asked,
    without images, while this computes or waits for another who does.
    """
    wanted = list(dict.fromkeys(views))
    if cut is None or not wanted:
        return {}
    extractor = Extractor(model, cut, how, root)
    kept: dict[View, Features] = {}
    for view in wanted:
        found = extractor.open(*view, control, epoch)
        if found is None:
            return {}
        kept[view] = found
    return kept


def lasting(config: TrainConfig) -> bool:
    """Whether frozen layers give in every epoch what they gave in the first."""
    # What an earlier phase trained differs between the network and its average.
    apart = config.ema_decay is not None and config.phases
    still = config.frozen or config.augment == PLAIN or _fixed(config.augment) > 0
    return still and not apart


def shown(augment: AugmentConfig) -> int:
    """How many times each picture is kept."""
    return max(1, _fixed(augment))


def _fixed(augment: AugmentConfig) -> int:
    """How many fixed views of each picture; 0: it has none. Mixing is new in every epoch."""
    return 0 if augment.mixup or augment.cutmix else augment.cached_views


class Extractor:
    """What a network computes before it is cut, and where its outputs are kept."""

    def __init__(self, model: nn.Module, cut: Partition, how: Preparation, root: Path) -> None:
        self._how, self._root = how, root / "features"
        self._layout = memory_format(how.config.runtime.memory_format)
        self._prefix, self._cut = cut.prefix(model).eval(), cut
        self._side = how.config.data.image_size
        self.batch = at_once(self._side)

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
        return Features(tuple(found), self._how.device).resident()

    def _part(
        self, images: Images, augment: AugmentConfig, control: Control, epoch: int
    ) -> Tensor | None:
        file = self._root / self._key(images.content, augment)
        size = HEADER + len(images) * shown(augment) * self._cut.packing.size

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
                    log.warning("%s is damaged: it is made anew", file)
                if not store.has_room(size):
                    return None
                self._build(file, images, augment, control, epoch)
                return _mapped(file)
        except DiskFull as full:
            log.warning("%s. Frozen layers are computed anew in every epoch", full)
        except torch.OutOfMemoryError:
            log.warning("out of memory with %d images at once; nothing is kept", self.batch)
        return None

    @cached_property
    def _weights(self) -> str:
        return _digest(self._prefix)

    def run(self, pixels: Tensor) -> Tensor:
        """The outputs (B, bytes) for a batch, (B, 3, S, S) on the device."""
        with torch.no_grad(), autocast(self._how.device, self._how.config.runtime.precision):
            return self._prefix(pixels)  # type: ignore[no-any-return]

    def _build(
        self, file: Path, images: Images, augment: AugmentConfig, control: Control, epoch: int
    ) -> None:
        shape = shown(augment), len(images), self._cut.packing.size

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
        for view in range(shown(augment)):
            for pixels, _ in batches.in_order(view):
                yield self.run(pixels)

    def _key(self, content: str, augment: AugmentConfig) -> str:
        config, device = self._how.config, self._how.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        arithmetic: list[object] = [name, config.runtime.precision, config.runtime.memory_format]
        arithmetic += [torch.__version__, torch.get_num_threads(), self.batch]
        pictures = [content, self._side, self._how.mean, self._how.std]
        views = augment.model_dump(mode="json") if _fixed(augment) else None
        shape = config.model.model_dump(mode="json", exclude=set(_SHAPELESS))
        network = [shape, str(self._prefix), self._cut.digest, self._weights]
        return short_hash([_FORMAT, arithmetic, pictures, views, network])


def at_once(side: int) -> int:
    """How many images of `side` pixels are computed together."""
    return max(1, int(BATCH * min(1.0, (SIDE / side) ** 2)))


def _mapped(file: Path) -> Tensor:
    """The outputs in `file`, (views, N, bytes) uint8."""
    # Copy on write: torch wants writable memory, and nobody writes.
    data = np.asarray(np.memmap(file, np.uint8, "c"))
    shape = json.loads(data[:HEADER].tobytes())["shape"]
    return torch.from_numpy(data[HEADER : HEADER + math.prod(shape)]).view(shape)


def _digest(prefix: nn.Module) -> str:
    """Of all weights and buffers of `prefix`."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in [*prefix.named_parameters(), *prefix.named_buffers()]:
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        plain = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        found.update(plain.numpy().data)
    return found.hexdigest()
