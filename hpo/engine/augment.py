"""Random changes of training pictures, a batch at a time, with an explicit generator.

All draws of an epoch are made beforehand, on the CPU, from (seed, epoch, what is drawn): they are
the same on every device, and one augmentation does not shift the draws of another. The order is
fixed: crop, flip, one resampling by a matrix per picture, then colour.

Crops are boxes (top, left, height, width) in the pixels of the picture; a box may reach outside,
where the picture is black.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from hpo.definition.augment import AugmentConfig

_ASPECTS = 3 / 4, 4 / 3
_CACHED = 200_000  # floats
_GREY = 0.2989, 0.587, 0.114  # ITU-R BT.601, rounded as torchvision has it


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True)
class Draws:
    """What happens to each of N pictures, in the order in which they are shown; None: nothing."""

    boxes: Tensor | None = None
    """(N, 4) int64; None: the centre."""
    flip: Tensor | None = None
    """(N,) bool."""
    matrix: Tensor | None = None
    """(N, 3, 3): see `warp`."""
    brightness: Tensor | None = None
    """(N,) factors; contrast and saturation likewise."""
    contrast: Tensor | None = None
    saturation: Tensor | None = None
    hue: Tensor | None = None
    """(N,) shifts, in turns of the colour circle."""

    @property
    def colours(self) -> list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor]]:
        """The changes of colour that are on, in their order."""
        changes = (brightness, contrast, saturation, hue)
        amounts = (self.brightness, self.contrast, self.saturation, self.hue)
        return [(c, a) for c, a in zip(changes, amounts, strict=True) if a is not None]

    def __getitem__(self, part: slice) -> Draws:
        return self._each(lambda values: values[part])

    def to(self, device: torch.device) -> Draws:
        """On `device`, without waiting for the copy."""
        if device.type != "cuda":
            return self._each(lambda values: values.to(device))
        return self._each(lambda values: values.pin_memory().to(device, non_blocking=True))

    def _each(self, function: Callable[[Tensor], Tensor]) -> Draws:
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return Draws(**{name: None if v is None else function(v) for name, v in values.items()})


def draw(config: AugmentConfig, sizes: Tensor, size: int, seed: int, epoch: int) -> Draws:
    """All draws of an epoch for pictures of `sizes`, (N, 2) heights and widths, that end up as
    squares of `size` pixels."""
    count = len(sizes)

    def uniform(purpose: str, low: float, high: float) -> Tensor:
        values = torch.rand(count, generator=generator(seed, epoch, purpose), dtype=torch.float64)
        return (low + (high - low) * values).float()

    def factors(purpose: str, width: float) -> Tensor | None:
        return uniform(purpose, max(0.0, 1 - width), 1 + width) if width else None

    boxes = generator(seed, epoch, "crop")
    flip = config.horizontal_flip
    return Draws(
        boxes=_boxes(config, sizes, size, boxes),
        flip=uniform("flip", 0, 1) < flip if flip else None,
        matrix=rotation(uniform("rotation", -config.rotation, config.rotation))
        if config.rotation
        else None,
        brightness=factors("brightness", config.brightness),
        contrast=factors("contrast", config.contrast),
        saturation=factors("saturation", config.saturation),
        hue=uniform("hue", -config.hue, config.hue) if config.hue else None,
    )


def apply(batch: Tensor, draws: Draws) -> Tensor:
    """Resample and colour (B, 3, S, S) float32 pictures in 0..1, in place."""
    colours = draws.colours
    if draws.matrix is None and not colours:
        return batch
    # A CPU is quickest with what fits its cache, a GPU with everything at once.
    count = len(batch) if batch.is_cuda else max(1, _CACHED // batch[0].numel())
    for at in range(0, len(batch), count):
        part = slice(at, at + count)
        pictures = batch[part]
        if draws.matrix is not None:
            pictures.copy_(warp(pictures, draws.matrix[part]))
        for change, amounts in colours:
            change(pictures, amounts[part])
    return batch


# Crops and flips


def _boxes(
    config: AugmentConfig, sizes: Tensor, size: int, source: torch.Generator
) -> Tensor | None:
    if config.random_resized_crop is not None:
        return random_resized_crop(sizes, config.random_resized_crop, source)
    if config.crop_padding:
        return padded_crop(sizes, config.crop_padding, size, source)
    return None


def centre(sizes: Tensor, size: int) -> Tensor:
    """(N, 4) boxes of torchvision's CenterCrop, which rounds halves to even."""
    corner = ((sizes - size) / 2).round().long()
    return torch.cat([corner, torch.full_like(corner, size)], 1)


def padded_crop(sizes: Tensor, padding: int, size: int, source: torch.Generator) -> Tensor:
    """(N, 4) boxes of `size` x `size` anywhere in pictures with `padding` black pixels around."""
    room = sizes + 2 * padding - size + 1
    corner = _below(room, source) - padding
    return torch.cat([corner, torch.full_like(corner, size)], 1)


def random_resized_crop(
    sizes: Tensor, scale: tuple[float, float], source: torch.Generator
) -> Tensor:
    """(N, 4) boxes as torchvision's RandomResizedCrop draws them: part of the area uniform in
    `scale`, aspect ratio log-uniform in 3/4..4/3, ten tries, else the largest centred box."""
    heights, widths = sizes.double().unbind(1)
    boxes = _largest_centred(heights, widths)
    waiting = torch.ones(len(sizes), dtype=torch.bool)
    for _ in range(10):
        u = torch.rand(2, len(sizes), generator=source, dtype=torch.float64)
        area = heights * widths * (scale[0] + (scale[1] - scale[0]) * u[0])
        low, high = map(math.log, _ASPECTS)
        aspect = torch.exp(low + (high - low) * u[1])
        shape = torch.stack([(area / aspect).sqrt().round(), (area * aspect).sqrt().round()], 1)
        corner = _below((sizes - shape.long() + 1).clamp(min=1), source)
        fits = ((shape > 0) & (shape <= sizes)).all(1)
        boxes = torch.where((waiting & fits)[:, None], torch.cat([corner, shape.long()], 1), boxes)
        waiting &= ~fits
    return boxes


def _largest_centred(heights: Tensor, widths: Tensor) -> Tensor:
    low, high = _ASPECTS
    height = torch.minimum(heights, (widths / low).round())
    width = torch.minimum(widths, (heights * high).round())
    corner = torch.stack([(heights - height) // 2, (widths - width) // 2], 1)
    return torch.cat([corner, torch.stack([height, width], 1)], 1).long()


def _below(room: Tensor, source: torch.Generator) -> Tensor:
    """Uniform integers from 0 to below `room`."""
    values = torch.rand(room.shape, generator=source, dtype=torch.float64)
    return torch.minimum((values * room).long(), room - 1)


def horizontal_flip(batch: Tensor, flip: Tensor) -> Tensor:
    """Mirror those pictures of a (B, S, S, C) batch left to right for which `flip`, (B,), holds.
    The batch may be overwritten."""
    if batch.is_cuda:  # without asking the device which ones
        return torch.where(flip[:, None, None, None], batch.flip(2), batch)
    for i in flip.nonzero().flatten().tolist():
        batch[i] = batch[i].flip(1)
    return batch


# One resampling


def rotation(degrees: Tensor) -> Tensor:
    """(B, 3, 3) matrices that turn pictures counter-clockwise about their centre."""
    angle = torch.deg2rad(degrees.double())
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    cos, sin = angle.cos(), angle.sin()
    rows = [cos, -sin, zero, sin, cos, zero, zero, zero, one]
    return torch.stack(rows, 1).view(-1, 3, 3).float()


def warp(batch: Tensor, matrix: Tensor) -> Tensor:
    """Resample square pictures (B, C, S, S) once, bilinearly, black outside.

    `matrix`, (B, 3, 3), takes homogeneous (x, y, 1) of the result to the picture, both in -1..1
    with the centre at 0; several changes compose as one product.
    """
    grid = F.affine_grid(matrix[:, :2], list(batch.shape), align_corners=False)
    return F.grid_sample(batch, grid, "bilinear", "zeros", align_corners=False)


# Colour: torchvision's functional.adjust_*, in place, with a factor for each picture


def brightness(batch: Tensor, factors: Tensor) -> Tensor:
    """(B, 3, S, S) in 0..1 times (B,) factors."""
    return batch.mul_(_per_picture(factors)).clamp_(0, 1)


def contrast(batch: Tensor, factors: Tensor) -> Tensor:
    """Blend with the mean grey of each picture."""
    return _blend(batch, _grey(batch).mean((1, 2, 3), keepdim=True), factors)


def saturation(batch: Tensor, factors: Tensor) -> Tensor:
    """Blend with each pixel's grey."""
    return _blend(batch, _grey(batch), factors)


def hue(batch: Tensor, shifts: Tensor) -> Tensor:
    """Turn the hue by (B,) turns, value and saturation kept (HSV, Smith 1978).

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


def _blend(batch: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    weight = _per_picture(factors)
    return batch.mul_(weight).add_(other * (1 - weight)).clamp_(0, 1)


def _grey(batch: Tensor) -> Tensor:
    red, green, blue = batch.unbind(1)
    return (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue)[:, None]


def _per_picture(values: Tensor) -> Tensor:
    return values[:, None, None, None]
