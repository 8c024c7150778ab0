"""What the frozen beginning of a network makes of a data set, computed once and kept.

    cache/features/
    ├── <key>.lock   one builder; others wait
    └── <key>        what they are (JSON, padded to a page), then the outputs of one part (train,
                     val), picture after picture, of each cached view

The key is made of all that decides the bits: the pictures' contents and size, the weights and
steps, the arithmetic. A file is complete or not there, and all trainings of a host map it: one that
finds its files runs no frozen step. Pictures go through in batches of one size, whatever a
training's own, so that the rounding, which on some devices depends on that size, does not depend on
who came first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from hpo.engine.learner import autocast, memory_format
from hpo.engine.loader import TrainBatches
from hpo.files import disk_full, is_full

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
HEADER = 4096
"""Bytes of a file before the outputs."""
PLAIN = AugmentConfig()
_FORMAT = 2

View = tuple[Images, AugmentConfig]
"""Pictures, and how they are shown."""
Mapped = tuple[Tensor, torch.memory_format]
"""The outputs of a file, (views, N, ...), and how those of a batch lie in memory."""


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
        parts = [part[view % len(part)] for part in self.parts]
        index = order.to(parts[0].device)
        for part in slices:
            rows = _gathered(parts, index[part])
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


def frozen_cut(model: nn.Module, frozen: Iterable[nn.Module]) -> int:
    """How many steps of the network, first to last, need not be computed in every epoch: with the
    images unchanged they give the same. 0: none that has weights. `frozen` as from
    `models.set_trainable`."""
    chain = steps(model)
    count = frozen_steps(chain, frozen)
    weighted = any(True for step in chain[:count] for _ in step.parameters())
    return count if weighted else 0


def keep(
    model: nn.Module,
    cut: int,
    how: Preparation,
    views: Iterable[View],
    root: Path,
    control: Control,
    *,
    epoch: int,
) -> Kept:
    """What the first `cut` steps of the network make of each of `views`, computed under `root`
    unless it is there already.

    Nothing where it is not `lasting`, where one of them has contents that are not known, or outputs
    that are not WORTH their bytes, or where there is no room: more than `data.cache_limit_gb`, or
    more than is free. `control.step` is asked, without images, while this computes or waits for
    another who does.
    """
    wanted = list(dict.fromkeys(views))
    if not (cut and wanted and lasting(how.config)):
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
    """The first `cut` steps of a network, and where their outputs are kept."""

    def __init__(self, model: nn.Module, cut: int, how: Preparation, root: Path) -> None:
        self._how, self._root = how, root / "features"
        self._layout = memory_format(how.config.runtime.memory_format)
        self._prefix = nn.Sequential(*steps(model)[:cut])
        self._model, self._rest = model, steps(model)[cut:]
        self._side = how.config.data.image_size
        self.batch = max(1, int(BATCH * min(1.0, (SIDE / self._side) ** 2)))

    def open(
        self, images: Images, augment: AugmentConfig, control: Control, epoch: int
    ) -> Features | None:
        """The outputs for `images`, computed first if need be; None where they are not kept."""
        found, layout = [], torch.contiguous_format
        for part in images.parts:
            rows = self._part(part, augment, control, epoch) if part.content else None
            if rows is None:
                return None
            found.append(rows[0])
            layout = rows[1]
        return Features(tuple(found), layout, self._how.device).resident()

    def _part(
        self, images: Images, augment: AugmentConfig, control: Control, epoch: int
    ) -> Mapped | None:
        file = self._root / self._key(images.content, augment)
        try:
            with locked(file, lambda: control.step(epoch=epoch, images=0)):
                store = Store(self._root, self._how.config.data.cache_limit_gb * 1e9)
                if file.exists():
                    return _mapped(file) if file.stat().st_size <= store.limit else None
                if not self.worth or not store.has_room(self._size(images, augment)):
                    return None
                self._build(file, images, augment, control, epoch)
                return _mapped(file)
        except OSError as error:
            if not is_full(error):
                raise
            full = disk_full(file, self._size(images, augment))
            log.warning("%s. Frozen layers are computed anew in every epoch", full)
        except torch.OutOfMemoryError:
            log.warning("out of memory with %d images at once; nothing is kept", self.batch)
        return None

    @cached_property
    def _weights(self) -> str:
        return _digest(self._model, self._rest)

    @cached_property
    def sample(self) -> Tensor:
        """Outputs for two black pictures: what there is to keep."""
        blank = torch.zeros(2, 3, self._side, self._side, device=self._how.device)
        return self.run(blank.contiguous(memory_format=self._layout))

    @property
    def worth(self) -> bool:
        """Whether the outputs for a picture are worth their bytes."""
        return self.sample[0].nbytes <= max(SMALL, WORTH * self._side**2 * 3)

    def run(self, pixels: Tensor) -> Tensor:
        """The outputs for a batch, (B, 3, S, S) on the device."""
        self._prefix.eval()
        with torch.no_grad(), autocast(self._how.device, self._how.config.runtime.precision):
            return self._prefix(pixels)  # type: ignore[no-any-return]

    def _size(self, images: Images, augment: AugmentConfig) -> int:
        """Bytes of the file."""
        return HEADER + len(images) * shown(augment) * self.sample[0].nbytes

    def _build(
        self, file: Path, images: Images, augment: AugmentConfig, control: Control, epoch: int
    ) -> None:
        shape = shown(augment), len(images), *self.sample.shape[1:]
        beside = file.with_name(f".{file.name}")
        try:
            with beside.open("wb") as out:
                out.write(_header(self.sample, shape))
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
        network = [shape, str(self._prefix), self._weights]
        return short_hash([_FORMAT, arithmetic, pictures, views, network])


def _header(sample: Tensor, shape: Sequence[int]) -> bytes:
    """What the outputs in a file are; `sample` is like them."""
    facts = {
        "dtype": str(sample.dtype).removeprefix("torch."),
        "shape": list(shape),
        "channels_last": _layout_of(sample) == torch.channels_last,
    }
    return json.dumps(facts).encode().ljust(HEADER)


def _mapped(file: Path) -> Mapped:
    # Copy on write: torch wants writable memory, and nobody writes.
    data = np.asarray(np.memmap(file, np.uint8, "c"))
    facts = json.loads(data[:HEADER].tobytes())
    rows = torch.from_numpy(data[HEADER:]).view(getattr(torch, facts["dtype"]))
    layout = torch.channels_last if facts["channels_last"] else torch.contiguous_format
    return rows.view(facts["shape"]), layout


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
