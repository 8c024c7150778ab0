"""Changes of colour: torchvision's functional.adjust_*, in place, a factor for each picture."""

from __future__ import annotations

import torch
from torch import Tensor

_GREY = 0.2989, 0.587, 0.114  # ITU-R BT.601, rounded as torchvision has it


def brightness(batch: Tensor, factors: Tensor) -> Tensor:
    """(B, 3, S, S) in 0..1 times (B,) factors."""
    return batch.mul_(per_picture(factors)).clamp_(0, 1)


def contrast(batch: Tensor, factors: Tensor) -> Tensor:
    """Blend with the mean grey of each picture."""
    return _blend(batch, grey(batch).mean((1, 2, 3), keepdim=True), factors)


def saturation(batch: Tensor, factors: Tensor) -> Tensor:
    """Blend with each pixel's grey."""
    return _blend(batch, grey(batch), factors)


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


def grayscale(batch: Tensor, chosen: Tensor) -> Tensor:
    """Take the colour from those pictures for which `chosen`, (B,) bool, holds."""
    if batch.is_cuda:  # without asking the device which ones
        return torch.where(per_picture(chosen), grey(batch), batch, out=batch)
    for i in chosen.nonzero().flatten().tolist():
        batch[i] = grey(batch[i : i + 1])[0]
    return batch


def grey(batch: Tensor) -> Tensor:
    """(B, 1, S, S) of (B, 3, S, S)."""
    red, green, blue = batch.unbind(1)
    return (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue)[:, None]


def per_picture(values: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1)."""
    return values[:, None, None, None]


def _blend(batch: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    weight = per_picture(factors)
    return batch.mul_(weight).add_(other * (1 - weight)).clamp_(0, 1)
