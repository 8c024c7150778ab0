"""Augmentation operations on batches of images: crops, flips, colour, warps, erasing, mixing.

A box is (top, left, height, width) in pixels of the image; a crop may extend beyond the image,
which is black there.

A matrix, (B, 3, 3), maps homogeneous (x, y, 1) of the result to the input image, both in -1..1 with
the centre at 0. The transformation that is applied first comes first in a product.

Mixup and CutMix mix a batch with itself shifted by one image, with one weight for the whole batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpo.config.augment import AugmentConfig


def seed_of(seed: int, epoch: int, purpose: str) -> int:
    """Return a 63-bit seed that depends on nothing but the arguments."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """Return a CPU generator that depends on nothing but the arguments."""
    return torch.Generator().manual_seed(seed_of(seed, epoch, purpose))


_CACHED = 200_000  # floats


def at_once(batch: Tensor) -> int:
    """Return how many images to process at once: as many as fit the cache of a CPU, all on a
    GPU."""
    return len(batch) if batch.is_cuda else max(1, _CACHED // batch[0].numel())


def moved(values: Tensor, device: torch.device) -> Tensor:
    """Copy `values` from the host to `device` without waiting for the copy."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


_ASPECTS = 3 / 4, 4 / 3
_ERASED_AREA = 0.02, 0.33
_ERASED_ASPECTS = 1 / 3.3, 1 / 0.3  # width by height; torchvision has it the other way


def centre(sizes: Tensor, size: int) -> Tensor:
    """Return (N, 4) boxes of torchvision's CenterCrop, which rounds halves to even."""
    corner = ((sizes - size) / 2).round().long()
    return torch.cat([corner, torch.full_like(corner, size)], 1)


def padded_crop(sizes: Tensor, padding: int, size: int, source: torch.Generator) -> Tensor:
    """Draw (N, 4) boxes of `size` x `size` anywhere in images padded with `padding` black
    pixels."""
    room = sizes + 2 * padding - size + 1
    corner = below(room, source) - padding
    return torch.cat([corner, torch.full_like(corner, size)], 1)


def random_resized_crop(
    sizes: Tensor, scale: tuple[float, float], source: torch.Generator
) -> Tensor:
    """Draw (N, 4) boxes as torchvision's RandomResizedCrop does: area fraction uniform in `scale`,
    aspect ratio log-uniform in 3/4..4/3, ten attempts, otherwise the largest centred box."""
    whole = _largest_centred(*sizes.double().unbind(1))
    return _ten_tries(sizes, sizes, scale, _ASPECTS, source, otherwise=whole)


def erased(count: int, probability: float, size: int, source: torch.Generator) -> Tensor:
    """Draw (N, 4) boxes as torchvision's RandomErasing does in images of `size` pixels: smaller
    than the image, or after ten attempts nothing, which is a box of zeros."""
    nothing = torch.zeros(count, 4, dtype=torch.int64)
    chosen = torch.rand(count, generator=source, dtype=torch.float64) < probability
    sizes = torch.full((count, 2), size)
    boxes = _ten_tries(sizes, sizes - 1, _ERASED_AREA, _ERASED_ASPECTS, source, otherwise=nothing)
    return torch.where(chosen[:, None], boxes, nothing)


def _ten_tries(
    sizes: Tensor,
    largest: Tensor,
    scale: tuple[float, float],
    aspects: tuple[float, float],
    source: torch.Generator,
    *,
    otherwise: Tensor,
) -> Tensor:
    """Draw boxes with an area fraction uniform in `scale` and log-uniform aspect ratio, at most
    `largest`."""
    areas = sizes.double().prod(1)
    low, high = map(math.log, aspects)
    boxes, waiting = otherwise, torch.ones(len(sizes), dtype=torch.bool)
    for _ in range(10):
        u = torch.rand(2, len(sizes), generator=source, dtype=torch.float64)
        area = areas * (scale[0] + (scale[1] - scale[0]) * u[0])
        aspect = torch.exp(low + (high - low) * u[1])
        shape = torch.stack([(area / aspect).sqrt().round(), (area * aspect).sqrt().round()], 1)
        corner = below((sizes - shape.long() + 1).clamp(min=1), source)
        fits = ((shape > 0) & (shape <= largest)).all(1)
        boxes = torch.where((waiting & fits)[:, None], torch.cat([corner, shape.long()], 1), boxes)
        waiting &= ~fits
    return boxes


def _largest_centred(heights: Tensor, widths: Tensor) -> Tensor:
    low, high = _ASPECTS
    height = torch.minimum(heights, (widths / low).round())
    width = torch.minimum(widths, (heights * high).round())
    corner = torch.stack([(heights - height) // 2, (widths - width) // 2], 1)
    return torch.cat([corner, torch.stack([height, width], 1)], 1).long()


def below(room: Tensor, source: torch.Generator) -> Tensor:
    """Draw uniform integers from 0 to below `room`."""
    values = torch.rand(room.shape, generator=source, dtype=torch.float64)
    return torch.minimum((values * room).long(), room - 1)


def horizontal_flip(batch: Tensor, flip: Tensor) -> Tensor:
    """Mirror left to right the images of a (B, S, S, C) batch for which `flip`, (B,) bool, is true.
    The batch may be overwritten."""
    return _mirrored(batch, flip, axis=2)


def vertical_flip(batch: Tensor, flip: Tensor) -> Tensor:
    """Mirror top to bottom the images of a (B, S, S, C) batch for which `flip`, (B,) bool, is true.
    The batch may be overwritten."""
    return _mirrored(batch, flip, axis=1)


def _mirrored(batch: Tensor, flip: Tensor, axis: int) -> Tensor:
    if batch.is_cuda:  # without synchronising
        return torch.where(flip[:, None, None, None], batch.flip(axis), batch)
    for i in flip.nonzero().flatten().tolist():
        batch[i] = batch[i].flip(axis - 1)
    return batch


def erase(batch: Tensor, boxes: Tensor) -> Tensor:
    """Set the pixels inside (B, 4) boxes of a (B, C, S, S) batch to 0, in place."""
    if not batch.is_cuda:
        for image, (top, left, height, width) in zip(batch, boxes.tolist(), strict=True):
            image[:, top : top + height, left : left + width] = 0
        return batch
    place = torch.arange(batch.shape[-1], device=batch.device)
    top, left, height, width = boxes[:, :, None].unbind(1)
    rows = (place >= top) & (place < top + height)
    columns = (place >= left) & (place < left + width)
    return batch.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)


_GREY = 0.2989, 0.587, 0.114  # ITU-R BT.601, rounded as torchvision has it


def brightness(batch: Tensor, factors: Tensor) -> Tensor:
    """Multiply a batch (B, 3, S, S) in 0..1 by factors (B,)."""
    return batch.mul_(per_image(factors)).clamp_(0, 1)


def contrast(batch: Tensor, factors: Tensor) -> Tensor:
    """Blend each image with its mean grey by factors (B,)."""
    return _blend(batch, grey(batch).mean((1, 2, 3), keepdim=True), factors)


def saturation(batch: Tensor, factors: Tensor) -> Tensor:
    """Blend each image with its grey version by factors (B,)."""
    return _blend(batch, grey(batch), factors)


def hue(batch: Tensor, shifts: Tensor) -> Tensor:
    """Shift the hue by (B,) turns of the colour circle, keeping value and saturation (HSV, Smith
    1978).

    A channel is value - chroma * clamp(min(k, 4 - k), 0, 1), where k is the hue in sixths of a
    turn, plus 5 for red, 3 for green and 1 for blue, modulo 6.
    """
    red, green, blue = batch.unbind(1)
    value, least = batch.amax(1), batch.amin(1)
    chroma = value - least
    safe = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    # Made on the device: a copy from the host would wait for it.
    offsets = 5 - 2 * torch.arange(3, device=batch.device, dtype=batch.dtype)
    turned = (sixths + 6 * shifts[:, None, None])[:, None] + offsets[:, None, None]
    k = turned.remainder_(6)
    part = torch.minimum(k, 4 - k).clamp_(0, 1)
    return torch.sub(value[:, None], part.mul_(chroma[:, None]), out=batch)


def grayscale(batch: Tensor, chosen: Tensor) -> Tensor:
    """Convert to grey the images for which `chosen`, (B,) bool, is true."""
    if batch.is_cuda:  # without synchronising
        return torch.where(per_image(chosen), grey(batch), batch, out=batch)
    for i in chosen.nonzero().flatten().tolist():
        batch[i] = grey(batch[i : i + 1])[0]
    return batch


def grey(batch: Tensor) -> Tensor:
    """Return the (B, 1, S, S) luminance of a (B, 3, S, S) batch."""
    red, green, blue = batch.unbind(1)
    return (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue)[:, None]


def per_image(values: Tensor) -> Tensor:
    """Reshape (B,) values to (B, 1, 1, 1)."""
    return values[:, None, None, None]


def _blend(batch: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    weight = per_image(factors)
    return batch.mul_(weight).add_(other * (1 - weight)).clamp_(0, 1)


def rotation(degrees: Tensor) -> Tensor:
    """Return (B, 3, 3) matrices that rotate images counter-clockwise about their centre."""
    angle = torch.deg2rad(degrees.double())
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    cos, sin = angle.cos(), angle.sin()
    return _matrix([cos, -sin, zero, sin, cos, zero, zero, zero, one])


def affine(shift: Tensor, scale: Tensor, shear: Tensor, size: int) -> Tensor:
    """Return (B, 3, 3) matrices of torchvision's affine without rotation: shear by (B,) degrees
    horizontally, scale by (B,) factors, then translate by (B, 2) pixels of `size`, right and
    down."""
    slope, inverse = torch.deg2rad(shear.double()).tan(), 1 / scale.double()
    right, down = (shift.double() * (2 / size)).unbind(1)
    zero, one = torch.zeros_like(slope), torch.ones_like(slope)
    across = -inverse * (right + slope * down)
    return _matrix(
        [inverse, slope * inverse, across, zero, inverse, -inverse * down, zero, zero, one]
    )


def perspective(corners: Tensor, size: int) -> Tensor:
    """Return (B, 3, 3) matrices of torchvision's perspective: the centres of the corner pixels of
    images of `size` move to `corners`, (B, 4, 2) x and y in pixels: top left, top right, bottom
    right, bottom left, no three of them on a line."""
    start = corner_pixels(size).expand_as(corners)
    x, y = corners.double().unbind(2)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    rows = []
    for axis, target in enumerate(start.unbind(2)):
        line = [zero] * 6
        line[3 * axis : 3 * axis + 3] = [x, y, one]
        rows.append(torch.stack([*line, -x * target, -y * target], 2))
    solved = torch.linalg.solve(torch.cat(rows, 1), start.mT.flatten(1))
    pixels = torch.cat([solved, torch.ones_like(solved[:, :1])], 1).view(-1, 3, 3)
    to_unit = torch.tensor([[2 / size, 0, -1], [0, 2 / size, -1], [0, 0, 1]], dtype=torch.float64)
    return (to_unit @ pixels @ to_unit.inverse()).float()


def corner_pixels(size: int) -> Tensor:
    """Return (4, 2) x and y of the corner pixels, clockwise from the top left."""
    end = size - 1
    return torch.tensor([[0, 0], [end, 0], [end, end], [0, end]], dtype=torch.float64)


def warp(batch: Tensor, matrix: Tensor) -> Tensor:
    """Resample square images (B, C, S, S) once, bilinearly, black outside.

    `matrix` is (B, 3, 3), or (B, 2, 3) if the last row is 0, 0, 1, which is faster.
    """
    grid = _places(matrix, batch.shape[2])
    if matrix.shape[1] == 3:
        grid = grid[..., :2] / grid[..., 2:]
    return F.grid_sample(batch, grid, "bilinear", "zeros", align_corners=False)


def _places(matrix: Tensor, size: int) -> Tensor:
    """Return (B, S, S, R) products of (B, R, 3) matrices with the centre (x, y, 1) of each pixel,
    as the sum of a row and a column: far faster than one product per pixel."""
    centres = torch.arange(1 - size, size, 2, device=matrix.device) / size
    across = (matrix[:, :, 0, None] * centres).mT
    down = (matrix[:, :, 1, None] * centres + matrix[:, :, 2, None]).mT
    return across[:, None] + down[:, :, None]


def _matrix(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows, 1).view(-1, 3, 3).float()


Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Mix:
    """Mixup or CutMix of one batch."""

    weight: float
    """Weight of an image's own label, 0..1; the shifted image has the rest."""
    box: Box | None = None
    """(top, left, bottom, right), copied from the shifted batch; None: blend by weight."""


@dataclass(frozen=True)
class Mixed:
    """Labels of a mixed batch."""

    labels: Tensor
    """(B,) int64."""
    others: Tensor
    """(B,) int64 labels of the images mixed in."""
    weight: float | Tensor
    """Weight of `labels`, 0..1; `others` have the rest. In a recorded step () on the device."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def tensor_split(self, parts: int) -> list[Mixed]:
        """Split the batch as `Tensor.tensor_split` does."""
        pairs = zip(self.labels.tensor_split(parts), self.others.tensor_split(parts), strict=True)
        return [Mixed(labels, others, self.weight) for labels, others in pairs]


def draw_mixes(
    config: AugmentConfig, size: int, steps: int, seed: int, epoch: int
) -> list[Mix | None]:
    """Draw one Mix for each batch of an epoch, for images of `size` pixels; None: not mixed."""
    if not config.mixup and not config.cutmix:
        return [None] * steps
    source = np.random.default_rng(seed_of(seed, epoch, "mix"))
    cut = source.random(steps) < (0.5 if config.mixup and config.cutmix else bool(config.cutmix))
    drawn: list[Mix | None] = []
    for cuts in cut.tolist():
        alpha = config.cutmix if cuts else config.mixup
        weight = float(source.beta(alpha, alpha))
        drawn.append(_cut(weight, size, source) if cuts else Mix(weight))
    return drawn


def _cut(weight: float, size: int, source: np.random.Generator) -> Mix:
    """Draw a square of 1 - weight of the area centred on any pixel; the part outside the image does
    not count."""
    y, x = source.integers(size, size=2).tolist()
    half = int(0.5 * math.sqrt(1 - weight) * size)
    top, left = max(y - half, 0), max(x - half, 0)
    bottom, right = min(y + half, size), min(x + half, size)
    return Mix(1 - (bottom - top) * (right - left) / size**2, (top, left, bottom, right))


def mix_batch(images: Tensor, labels: Tensor, mix: Mix) -> tuple[Tensor, Mixed]:
    """Mix (B, C, S, S) images, in place, and their (B,) labels."""
    shifted = images.roll(1, 0)
    if mix.box is None:
        images.mul_(mix.weight).add_(shifted, alpha=1 - mix.weight)
    else:
        top, left, bottom, right = mix.box
        inside = (..., slice(top, bottom), slice(left, right))
        images[inside] = shifted[inside]
    return images, Mixed(labels, labels.roll(1, 0), mix.weight)


def mean_loss(labels: Tensor | Mixed, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `loss` of the labels; for mixed labels, both losses weighted."""
    if isinstance(labels, Tensor):
        return loss(labels)
    return labels.weight * loss(labels.labels) + (1 - labels.weight) * loss(labels.others)


def dominant(labels: Tensor | Mixed) -> Tensor:
    """Return (B,) int64 labels; for mixed labels, those with the larger weight."""
    if isinstance(labels, Tensor):
        return labels
    if isinstance(labels.weight, Tensor):
        return torch.where(labels.weight >= 0.5, labels.labels, labels.others)
    return labels.labels if labels.weight >= 0.5 else labels.others
