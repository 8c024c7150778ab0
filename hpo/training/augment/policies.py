"""Augmentation policies: RandAugment (Cubuk et al. 2019) and TrivialAugment (Mueller and Hutter
2021).

Operations and magnitudes are those of torchvision's RandAugment and TrivialAugmentWide; resampling
is bilinear, black outside. The operation of each image is known on the host, so that images with
the same operation are processed together and the device is never synchronised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from hpo.training.augment import ops
from hpo.training.augment.ops import at_once, grey, moved, per_image

Policy = Literal["randaugment", "trivialaugment"]

BINS = 31
"""Magnitudes of each operation, from none to the largest."""
OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
_GEOMETRIC = OPERATIONS[1:6]
_SIGNED = OPERATIONS[1:10]


def magnitudes(policy: Policy, size: int) -> Tensor:
    """Return (14, 31) magnitudes of `OPERATIONS` for images of `size` pixels, without sign.

    Shear: tangent; translate: pixels; rotate: degrees; colours and sharpness: distance of the
    factor from 1; posterize: bits; solarize: threshold in 0..255; otherwise 0.
    """
    wide = policy == "trivialaugment"
    shift, blend = (32.0, 0.99) if wide else (150 / 331 * size, 0.9)
    shear, turn = (0.99, 135.0) if wide else (0.3, 30.0)
    largest = [0.0, shear, shear, shift, shift, turn, *[blend] * 4]
    rows = [torch.linspace(0, one, BINS) for one in largest]
    bits = (8 - torch.arange(BINS) / ((BINS - 1) / (6 if wide else 4))).round()
    nothing = torch.zeros(BINS)
    table = torch.stack([*rows, bits, 255 * torch.linspace(1, 0, BINS), nothing, nothing])
    for name in ("translate_x", "translate_y"):
        table[OPERATIONS.index(name)].trunc_()
    return table


def draw_operations(
    policy: Policy, count: int, rounds: int, magnitude: int, size: int, source: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw (N, rounds) int64 indices of `OPERATIONS` and their (N, rounds) float32 signed
    magnitudes: of bin `magnitude` for randaugment, of any bin up to it for trivialaugment."""
    shape = (count, rounds)
    kinds = torch.randint(len(OPERATIONS), shape, generator=source)
    bins = torch.randint(magnitude + 1, shape, generator=source)
    if policy == "randaugment":
        bins.fill_(magnitude)
    negative = torch.rand(shape, generator=source) < 0.5
    signed = torch.tensor([name in _SIGNED for name in OPERATIONS])[kinds]
    amounts = magnitudes(policy, size)[kinds, bins]
    return kinds, torch.where(signed & negative, -amounts, amounts)


def matrices(kinds: Tensor, amounts: Tensor, size: int) -> Tensor:
    """Return (..., 2, 3) float32 matrices for `geometry.warp`; the identity for operations that are
    not geometric."""
    chosen = {name: kinds == OPERATIONS.index(name) for name in _GEOMETRIC}
    turns = ops.rotation(torch.where(chosen["rotate"], amounts, 0).flatten())[:, :2]
    result = turns.reshape(*kinds.shape, 2, 3)
    # The corner at the top left stays in place: torchvision shears about it.
    for axis, name in enumerate(("shear_x", "shear_y")):
        slope = torch.where(chosen[name], amounts, 0)
        result[..., axis, 1 - axis] += slope
        result[..., axis, 2] += slope
    for axis, name in enumerate(("translate_x", "translate_y")):
        result[..., axis, 2] -= torch.where(chosen[name], amounts, 0) * (2 / size)
    return result


def apply_operations(pixels: Tensor, kinds: Tensor, amounts: Tensor, warps: Tensor) -> Tensor:
    """Apply (B, rounds) operations one after another to (B, S, S, 3) uint8 images, in place.

    `kinds` is on the host, `amounts` and `warps` (see `matrices`) are on the device of the images.
    """
    for turn, column in enumerate(kinds.unbind(1)):
        order = moved(column.argsort(), pixels.device)
        groups = torch.split(order, column.bincount(minlength=len(OPERATIONS)).tolist())
        by_name = dict(zip(OPERATIONS, groups, strict=True))
        geometric = torch.cat([by_name[name] for name in _GEOMETRIC])
        _change(pixels, geometric, warps[:, turn], _warped)
        for name, change in _CHANGES.items():
            _change(pixels, by_name[name], amounts[:, turn], change)
    return pixels


def _change(
    pixels: Tensor, chosen: Tensor, values: Tensor, change: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Apply `change` to the images at the indices `chosen`."""
    if not len(chosen):
        return
    for index in torch.split(chosen, at_once(pixels)):
        images = pixels.index_select(0, index).permute(0, 3, 1, 2)
        changed = change(images, values.index_select(0, index)).permute(0, 2, 3, 1)
        if pixels.is_cuda:
            pixels.index_copy_(0, index, changed)
        else:  # three times as quick on a CPU
            for place, image in zip(index.tolist(), changed, strict=True):
                pixels[place].copy_(image)


# Each takes and returns (B, 3, S, S) uint8. As in torchvision a blend is cut off, not rounded. What
# looks at more than one value at a time is quicker channel by channel.


def _warped(images: Tensor, matrix: Tensor) -> Tensor:
    return ops.warp(images.float(), matrix).round_().to(torch.uint8)


def _brightness(images: Tensor, amounts: Tensor) -> Tensor:
    return (images * per_image(1 + amounts)).clamp_(0, 255).to(torch.uint8)


def _color(images: Tensor, amounts: Tensor) -> Tensor:
    images = images.contiguous()
    return _blend(images, grey(images).floor_(), amounts)


def _contrast(images: Tensor, amounts: Tensor) -> Tensor:
    images = images.contiguous()
    means = grey(images).floor_().mean((1, 2, 3), keepdim=True)
    return _blend(images, means, amounts)


def _sharpness(images: Tensor, amounts: Tensor) -> Tensor:
    """Blend with a 3 x 3 mean in which the middle counts five times; the border stays."""
    images = images.contiguous()
    values = images.float()
    inside = values[:, :, 1:-1, 1:-1]
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = around.add_(inside, alpha=4).div_(13).round_()
    # As a difference, so that what is even stays as it is.
    sharp = smooth.sub_(inside).mul_(per_image(-amounts)).add_(inside).clamp_(0, 255)
    result = images.clone()
    result[:, :, 1:-1, 1:-1] = sharp.to(torch.uint8)
    return result


def _blend(images: Tensor, other: Tensor, amounts: Tensor) -> Tensor:
    weight = per_image(1 + amounts)
    return (images * weight).add_(other * (1 - weight)).clamp_(0, 255).to(torch.uint8)


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    dropped = torch.exp2(8 - bits).round()  # exact on a CPU
    return images & per_image(256 - dropped).to(torch.uint8)


def _solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    bright = images >= per_image(thresholds.ceil().to(torch.uint8))
    return images ^ bright.to(torch.uint8).mul_(255)


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    values = images.contiguous().float()
    low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
    even = low == high  # nothing to stretch: stays as it is
    low, width = torch.where(even, 0, low), torch.where(even, 255, high - low)
    return values.sub_(low).div_(width / 255).clamp_(0, 255).to(torch.uint8)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    """Equalise each channel's histogram, in integers as Pillow does."""
    flat = images.contiguous().flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int32, device=flat.device)
    counts.scatter_add_(2, flat, counts.new_ones(1).expand_as(flat))
    brightest = counts.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - brightest) // 255
    before = counts.cumsum(2) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp_(0, 255).to(torch.uint8)
    same = torch.arange(256, dtype=torch.uint8, device=flat.device).expand_as(table)
    return torch.where(step == 0, same, table).gather(2, flat).view(images.shape)


_CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
