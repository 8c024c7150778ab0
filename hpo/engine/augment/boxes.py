"""Crops, erased rectangles and flips.

A box is (top, left, height, width) in the pixels of the picture; a crop may reach outside, where
the picture is black.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ASPECTS = 3 / 4, 4 / 3
_ERASED_AREA = 0.02, 0.33
_ERASED_ASPECTS = 1 / 3.3, 1 / 0.3  # width by height; torchvision has it the other way


def centre(sizes: Tensor, size: int) -> Tensor:
    """(N, 4) boxes of torchvision's CenterCrop, which rounds halves to even."""
    corner = ((sizes - size) / 2).round().long()
    return torch.cat([corner, torch.full_like(corner, size)], 1)


def padded_crop(sizes: Tensor, padding: int, size: int, source: torch.Generator) -> Tensor:
    """(N, 4) boxes of `size` x `size` anywhere in pictures with `padding` black pixels around."""
    room = sizes + 2 * padding - size + 1
    corner = below(room, source) - padding
    return torch.cat([corner, torch.full_like(corner, size)], 1)


def random_resized_crop(
    sizes: Tensor, scale: tuple[float, float], source: torch.Generator
) -> Tensor:
    """(N, 4) boxes as torchvision's RandomResizedCrop draws them: part of the area uniform in
    `scale`, aspect ratio log-uniform in 3/4..4/3, ten tries, else the largest centred box."""
    whole = _largest_centred(*sizes.double().unbind(1))
    return _ten_tries(sizes, sizes, scale, _ASPECTS, source, otherwise=whole)


def erased(count: int, probability: float, size: int, source: torch.Generator) -> Tensor:
    """(N, 4) boxes as torchvision's RandomErasing draws them in pictures of `size` pixels: smaller
    than the picture, else after ten tries nothing. Nothing is a box of zeros."""
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
    """Boxes of a part of the area uniform in `scale`, of log-uniform aspect, at most `largest`."""
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
    """Uniform integers from 0 to below `room`."""
    values = torch.rand(room.shape, generator=source, dtype=torch.float64)
    return torch.minimum((values * room).long(), room - 1)


def horizontal_flip(batch: Tensor, flip: Tensor) -> Tensor:
    """Mirror those pictures of a (B, S, S, C) batch left to right for which `flip`, (B,), holds.
    The batch may be overwritten."""
    return _mirrored(batch, flip, axis=2)


def vertical_flip(batch: Tensor, flip: Tensor) -> Tensor:
    """The same from top to bottom."""
    return _mirrored(batch, flip, axis=1)


def _mirrored(batch: Tensor, flip: Tensor, axis: int) -> Tensor:
    if batch.is_cuda:  # without asking the device which ones
        return torch.where(flip[:, None, None, None], batch.flip(axis), batch)
    for i in flip.nonzero().flatten().tolist():
        batch[i] = batch[i].flip(axis - 1)
    return batch


def erase(batch: Tensor, boxes: Tensor) -> Tensor:
    """Set what is inside (B, 4) boxes of (B, C, S, S) to 0, in place."""
    if not batch.is_cuda:
        for picture, (top, left, height, width) in zip(batch, boxes.tolist(), strict=True):
            picture[:, top : top + height, left : left + width] = 0
        return batch
    place = torch.arange(batch.shape[-1], device=batch.device)
    top, left, height, width = boxes[:, :, None].unbind(1)
    rows = (place >= top) & (place < top + height)
    columns = (place >= left) & (place < left + width)
    return batch.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)
