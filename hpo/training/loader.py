"""Batches of normalized images on the device.

Images of one size are kept on the device as one uint8 tensor if they fit; others are cropped and
resized one by one on the host, as uint8 with antialiasing, ahead of use if a GPU would wait, and in
worker processes if they must be decoded as well. Either way a batch has the same bits. Nothing
inside an epoch synchronises with the device.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from types import ModuleType
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpo.config.augment import AugmentConfig
from hpo.data.images import Images, Numbers
from hpo.training import augment as aug
from hpo.training.augment import ops
from hpo.training.augment.ops import moved
from hpo.training.memory import available_bytes


def class_weights(labels: Numbers, classes: int) -> Tensor:
    """Return (C,) float64 class weights N / (C n_c), scikit-learn's `balanced`, whose mean over the
    images is 1; C counts the classes that occur in `labels` (N,). A class without images has weight
    1."""
    counts = np.bincount(labels, minlength=classes)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.from_numpy(np.where(counts > 0, weights, 1.0))


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return (N,) indices drawn with replacement, each class of `labels` (N,) with equal
    probability."""
    counts = torch.bincount(labels)
    present = counts.nonzero()[:, 0]
    drawn = present[torch.randint(len(present), (len(labels),), generator=generator)]
    # Images of one class are adjacent in `by_class`.
    by_class = labels.argsort(stable=True)
    first = counts.cumsum(0) - counts
    within = (torch.rand(len(labels), generator=generator, dtype=torch.float64)
              * counts[drawn]).long()  # fmt: skip
    return by_class[first[drawn] + within]


T = TypeVar("T")
Batch = tuple[Tensor, Tensor]
"""((B, 3, S, S) float32 normalised, (B,) int64 labels), both on the device."""
MixedBatch = tuple[Tensor, Tensor | ops.Mixed]
"""A batch whose labels may be mixed by mixup or cutmix."""


class FeatureRows(Protocol):
    """Cached outputs of frozen layers, used instead of images."""

    def rows(self, order: Tensor, view: int, slices: Sequence[slice]) -> Iterator[Tensor]:
        """Yield (B, ...) on the device for each slice of `order`, (N,), as in view `view`."""


_MOST_COPIED = 500_000_000


class TrainBatches:
    """Shuffled and augmented batches. Epoch n depends on (seed, n) alone; with cached views the
    seed only shuffles the images, and epoch n shows view n modulo their number.

    The last batch may be short; a single leftover image is dropped, unless it is the only one:
    batch norm cannot train on one value. With `balanced`, every class is drawn equally often, with
    replacement.
    """

    def __init__(
        self,
        images: Images,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: AugmentConfig,
        image_size: int,
        batch_size: int,
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
        seed: int = 0,
        loader_workers: int = 0,
        balanced: bool = False,
        features: FeatureRows | None = None,
    ) -> None:
        self._balanced = torch.from_numpy(images.labels) if balanced else None
        self._features = features
        self._augment = augment = augment.scaled()
        self._size, self._seed = image_size, seed
        self._sizes = torch.from_numpy(images.sizes)
        resized = augment.random_resized_crop is not None
        padding = augment.crop_padding
        if features is None:
            self._feed = _feed(images, image_size, padding, device, loader_workers, resized=resized)
        self._finish = _Finish(mean, std, device, memory_format)
        self._labels = torch.from_numpy(images.labels).to(device)
        self._batch_size = batch_size
        self._slices = _slices(len(images), batch_size)
        if len(self._slices) > 1 and len(images) % batch_size == 1:
            del self._slices[-1]

    def __len__(self) -> int:
        """Return the number of steps per epoch."""
        return len(self._slices)

    def epoch(self, n: int) -> Generator[MixedBatch, None, None]:
        """Yield the batches of epoch `n`; close or exhaust the generator to end its helper
        threads."""
        order = self._order(n)
        if self._features is not None:
            labels = self._labels[moved(order, self._labels.device)]
            return _feature_batches(
                self._features.rows(order, n, self._slices), labels, self._slices
            )
        mixes = ops.draw_mixes(self._augment, self._size, len(self), self._seed, n)
        return self._mixed(self._shown(order, n, self._slices), mixes)

    def in_order(self, n: int) -> Generator[Batch, None, None]:
        """Yield all images in order, a single last one included, as augmented in epoch `n`."""
        count = len(self._sizes)
        return self._shown(torch.arange(count), n, _slices(count, self._batch_size))

    def _shown(
        self, order: Tensor, n: int, slices: Sequence[slice]
    ) -> Generator[Batch, None, None]:
        params = self._params(order, n)
        labels = self._labels[moved(order, self._labels.device)]
        there = params.to(self._labels.device)
        feed = self._feed.batches(order, params.boxes, slices)
        with closing(feed):
            for part, pixels in zip(slices, feed, strict=True):
                yield self._finish(pixels, there[part]), labels[part]

    def _mixed(
        self, batches: Generator[Batch, None, None], mixes: Sequence[ops.Mix | None]
    ) -> Generator[MixedBatch, None, None]:
        with closing(batches):
            for (images, labels), mix in zip(batches, mixes, strict=True):
                yield ops.mix_batch(images, labels, mix) if mix else (images, labels)

    def _order(self, n: int) -> Tensor:
        source = aug.generator(self._seed, n, "order")
        if self._balanced is not None:
            return balanced_order(self._balanced, source)
        return torch.randperm(len(self._sizes), generator=source)

    def _params(self, order: Tensor, n: int) -> aug.AugmentParams:
        if views := self._augment.cached_views:
            return aug.draw_params(self._augment, self._sizes, self._size, view=n % views)[order]
        return aug.draw_params(self._augment, self._sizes[order], self._size, self._seed, n)


class EvalBatches:
    """All images in order, centre crops without augmentation."""

    def __init__(
        self,
        images: Images,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        batch_size: int,
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
        loader_workers: int = 0,
        features: FeatureRows | None = None,
    ) -> None:
        self._features = features
        if features is None:
            self._feed = _feed(images, image_size, 0, device, loader_workers, resized=False)
        self._finish = _Finish(mean, std, device, memory_format)
        self._labels = torch.from_numpy(images.labels).to(device)
        self._slices = _slices(len(images), batch_size)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._slices)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in order."""
        order = torch.arange(len(self._labels))
        if self._features is not None:
            rows = self._features.rows(order, 0, self._slices)
            yield from _feature_batches(rows, self._labels, self._slices)
            return
        feed = self._feed.batches(order, None, self._slices)
        with closing(feed):
            for part, pixels in zip(self._slices, feed, strict=True):
                yield self._finish(pixels, aug.AugmentParams()), self._labels[part]


def _feature_batches(
    rows: Iterator[Tensor], labels: Tensor, slices: Sequence[slice]
) -> Generator[Batch, None, None]:
    for part, row in zip(slices, rows, strict=True):
        yield row, labels[part]


def _slices(count: int, batch_size: int) -> list[slice]:
    return [slice(at, min(at + batch_size, count)) for at in range(0, count, batch_size)]


class _Finish:
    """Turns (B, S, S, 3) uint8 on the device into the model's input."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        memory_format: torch.memory_format,
    ) -> None:
        centre = torch.tensor(mean, dtype=torch.float64)
        scale = 1 / torch.tensor(std, dtype=torch.float64)
        self._scale = scale.float().view(1, 3, 1, 1).to(device)
        self._shift = (-centre * scale).float().view(1, 3, 1, 1).to(device)
        self._format = memory_format

    def __call__(self, pixels: Tensor, params: aug.AugmentParams) -> Tensor:
        pixels = aug.apply_uint8(pixels, params)
        batch = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=self._format)
        batch = aug.apply_float(batch.mul_(1 / 255), params)
        batch.mul_(self._scale).add_(self._shift)
        if params.erased is not None:
            aug.erase(batch, params.erased)
        return batch.contiguous(memory_format=self._format)


def _feed(
    images: Images,
    size: int,
    padding: int,
    device: torch.device,
    workers: int,
    *,
    resized: bool,
) -> _DeviceImages | _HostCrops:
    if images.uniform and not resized:
        side = int(images.sizes[0, 0]) + 2 * padding
        copied = padding > 0 or len(images.parts) > 1
        if _fits(len(images) * side * side * 3, copied, device):
            return _DeviceImages(images, size, padding, device)
    return _HostCrops(images, size, device, workers)


def _fits(size: int, copied: bool, device: torch.device) -> bool:
    """Return whether `size` bytes fit on the device. On a GPU, half of the free memory is left to
    the model. The host maps an existing file, but padding and concatenation make a copy, and each
    worker, and each fold, has its own."""
    if device.type == "cuda":
        return size <= available_bytes(device) // 2
    return not copied or size <= _MOST_COPIED


class _DeviceImages:
    """Images of one size as one tensor on the device, black padding included."""

    def __init__(self, images: Images, size: int, padding: int, device: torch.device) -> None:
        data = torch.from_numpy(images.stacked()).to(device)
        self._padding, self._device, self._size = padding, device, size
        self._data = F.pad(data, (0, 0, padding, padding, padding, padding)) if padding else data

    def batches(
        self, order: Tensor, boxes: Tensor | None, slices: Sequence[slice]
    ) -> Generator[Tensor, None, None]:
        index = moved(order, self._device)
        if boxes is None:
            images = self._centre()
            for part in slices:
                yield images.index_select(0, index[part])
            return
        windows = self._windows()
        top, left = moved(boxes[:, :2] + self._padding, self._device).unbind(1)
        for part in slices:
            yield windows[index[part], top[part], left[part]]

    def _centre(self) -> Tensor:
        side, size = self._data.shape[1], self._size
        top = int(aug.centre(torch.tensor([[side, side]]), size)[0, 0])
        return self._data[:, top : top + size, top : top + size]

    def _windows(self) -> Tensor:
        """Return (N, tops, lefts, S, S, 3): every possible crop, as a view."""
        count, side, _, _ = self._data.shape
        places = side - self._size + 1
        image, row, column, channel = self._data.stride()
        return self._data.as_strided(
            (count, places, places, self._size, self._size, 3),
            (image, row, column, row, column, channel),
        )


Request = tuple[Tensor, Tensor]
"""Indices (B,) and boxes (B, 4) of one batch."""


class _Crops(Dataset[Tensor]):
    """Crops made on the host; an item is a whole batch."""

    def __init__(self, images: Images, size: int) -> None:
        self._images, self._size = images, size

    def __getitem__(self, request: Request) -> Tensor:
        indices, boxes = request
        out = torch.empty(len(indices), self._size, self._size, 3, dtype=torch.uint8)
        for target, i, box in zip(out, indices.tolist(), boxes.tolist(), strict=True):
            crop(torch.from_numpy(self._images.pixels(i)), box, target)
        return out


def crop(image: Tensor, box: Sequence[int], out: Tensor) -> None:
    """Write the part of `image`, (H, W, 3) uint8, inside `box` to `out`, (S, S, 3) uint8: copied,
    black outside the image, if the box has that size; otherwise resized with antialiasing."""
    top, left, height, width = box
    size = out.shape[0]
    if (height, width) != (size, size):
        inside = image[top : top + height, left : left + width].permute(2, 0, 1)[None]
        inside = inside.contiguous(memory_format=torch.channels_last)  # twice as fast
        resized = F.interpolate(
            inside, (size, size), mode="bilinear", align_corners=False, antialias=True
        )
        out.copy_(resized[0].permute(1, 2, 0))
        return
    rows = slice(max(top, 0), min(top + size, image.shape[0]))
    columns = slice(max(left, 0), min(left + size, image.shape[1]))
    inside = image[rows, columns]
    if inside.shape != out.shape:
        out.zero_()
    out[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = inside


class _HostCrops:
    """Images of any size, each cropped by itself on the host."""

    def __init__(self, images: Images, size: int, device: torch.device, workers: int) -> None:
        self._sizes, self._size = torch.from_numpy(images.sizes), size
        self._crops, self._device = _Crops(images, size), device
        self._requests: list[Request] = []
        self._loader = self._processes(workers) if images.streamed and workers else None

    def _processes(self, workers: int) -> DataLoader[Tensor]:
        # `batch_size=None`: an item is a batch already. The generator of its own keeps torch's
        # global one, and so dropout, as it is without processes. Never fork: CUDA and threads.
        requests: Any = self._requests
        return DataLoader(
            self._crops,
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            multiprocessing_context="spawn",
            persistent_workers=True,
            generator=torch.Generator(),
        )

    def batches(
        self, order: Tensor, boxes: Tensor | None, slices: Sequence[slice]
    ) -> Generator[Tensor, None, None]:
        if boxes is None:
            boxes = aug.centre(self._sizes[order], self._size)
        self._requests[:] = [(order[part], boxes[part]) for part in slices]
        with _without_main():
            made = iter(self._loader or map(self._crops.__getitem__, self._requests))
        if self._device.type != "cuda":
            yield from (batch.to(self._device) for batch in made)
            return
        with closing(_prefetch(batch.pin_memory() for batch in made)) as ready:
            for batch in ready:
                yield batch.to(self._device, non_blocking=True)


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep processes that are spawned inside from running the user's script again, which may have
    no main guard: they need hpo alone."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _prefetch(items: Iterator[T], most: int = 2) -> Generator[T, None, None]:
    """Yield the same items, produced by a thread up to `most` ahead of use. Closing ends the
    thread."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(most)
    over = threading.Event()

    def offer(item: T | None, error: BaseException | None = None) -> None:
        while not over.is_set():
            with suppress(queue.Full):
                ready.put((item, error), timeout=0.1)
                break

    def work() -> None:
        try:
            for item in items:
                offer(item)
                if over.is_set():
                    return
            offer(None)
        except BaseException as error:  # raised where the item is asked for
            offer(None, error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while (got := ready.get())[0] is not None:
            yield got[0]
        if got[1] is not None:
            raise got[1]
    finally:
        over.set()
        thread.join()
