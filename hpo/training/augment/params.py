"""Augmentation parameters of an epoch: drawn beforehand, applied batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import reduce

import torch
from torch import Tensor

from hpo.config.augment import AugmentConfig
from hpo.training.augment import ops, policies
from hpo.training.augment.ops import at_once, generator, moved

_VIEWS = -1
"""Seed of cached views, which no training can have."""


@dataclass(frozen=True)
class AugmentParams:
    """Augmentation parameters of N images, in the order of the epoch; None: this augmentation is
    off."""

    boxes: Tensor | None = None
    """(N, 4) int64 crop boxes; None: centre crops."""
    flip: Tensor | None = None
    """(N,) bool: mirror left to right."""
    vertical_flip: Tensor | None = None
    """(N,) bool."""
    operations: Tensor | None = None
    """(N, rounds) int64, on the host: indices of `policies.OPERATIONS`."""
    amounts: Tensor | None = None
    """(N, rounds): magnitudes of the operations."""
    warps: Tensor | None = None
    """(N, rounds, 2, 3): matrices of the geometric operations."""
    matrix: Tensor | None = None
    """(N, 3, 3), or (N, 2, 3) without perspective: see `geometry.warp`."""
    brightness: Tensor | None = None
    """(N,) factors, as for contrast and saturation."""
    contrast: Tensor | None = None
    saturation: Tensor | None = None
    hue: Tensor | None = None
    """(N,) shifts, in turns of the colour circle."""
    grayscale: Tensor | None = None
    """(N,) bool."""
    erased: Tensor | None = None
    """(N, 4) int64: erased boxes."""

    @property
    def colours(self) -> list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor]]:
        """The enabled colour changes with their values, in order."""
        names = ("brightness", "contrast", "saturation", "hue", "grayscale")
        drawn = [(getattr(ops, name), getattr(self, name)) for name in names]
        return [(change, amounts) for change, amounts in drawn if amounts is not None]

    def __getitem__(self, part: slice | Tensor) -> AugmentParams:
        """Return the parameters of some of the images."""
        return self._each(lambda values: values[part])

    def to(self, device: torch.device) -> AugmentParams:
        """Copy to `device` without waiting, except `operations`, which stay on the host."""
        there = self._each(lambda values: moved(values, device))
        return replace(there, operations=self.operations)

    def _each(self, function: Callable[[Tensor], Tensor]) -> AugmentParams:
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return AugmentParams(
            **{name: None if v is None else function(v) for name, v in values.items()}
        )


def draw_params(
    config: AugmentConfig,
    sizes: Tensor,
    size: int,
    seed: int = _VIEWS,
    epoch: int = 0,
    *,
    view: int | None = None,
) -> AugmentParams:
    """Draw all parameters of an epoch for images of `sizes`, (N, 2) heights and widths, that become
    squares of `size` pixels.

    With `view`, return those of that cached view of the N images, independent of seed and epoch;
    `sizes` must then be in the order of the data set.
    """
    if view is not None:
        seed, epoch = _VIEWS, view
    return _ParamSampler(config.scaled(), sizes, size, seed, epoch).all()


@dataclass(frozen=True)
class _ParamSampler:
    """Draws each kind of parameter with a generator of its own, so that none shifts another."""

    config: AugmentConfig
    sizes: Tensor
    size: int
    seed: int
    epoch: int

    def all(self) -> AugmentParams:
        config = self.config
        operations, amounts, warps = self.policy()
        return AugmentParams(
            boxes=self.crops(),
            flip=self.chosen("flip", config.horizontal_flip),
            vertical_flip=self.chosen("vertical_flip", config.vertical_flip),
            operations=operations,
            amounts=amounts,
            warps=warps,
            matrix=self.matrix(),
            brightness=self.factors("brightness", config.brightness),
            contrast=self.factors("contrast", config.contrast),
            saturation=self.factors("saturation", config.saturation),
            hue=self.uniform("hue", -config.hue, config.hue) if config.hue else None,
            grayscale=self.chosen("grayscale", config.grayscale),
            erased=self.erased(),
        )

    def source(self, purpose: str) -> torch.Generator:
        return generator(self.seed, self.epoch, purpose)

    def uniform(self, purpose: str, low: float, high: float) -> Tensor:
        values = torch.rand(len(self.sizes), generator=self.source(purpose), dtype=torch.float64)
        return (low + (high - low) * values).float()

    def chosen(self, purpose: str, probability: float) -> Tensor | None:
        return self.uniform(purpose, 0, 1) < probability if probability else None

    def factors(self, purpose: str, width: float) -> Tensor | None:
        return self.uniform(purpose, max(0.0, 1 - width), 1 + width) if width else None

    def crops(self) -> Tensor | None:
        if self.config.random_resized_crop is not None:
            scale = self.config.random_resized_crop
            return ops.random_resized_crop(self.sizes, scale, self.source("crop"))
        if self.config.crop_padding:
            padding = self.config.crop_padding
            return ops.padded_crop(self.sizes, padding, self.size, self.source("crop"))
        return None

    def policy(self) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
        policy = self.config.policy
        if policy == "none":
            return None, None, None
        rounds = self.config.policy_ops if policy == "randaugment" else 1
        source, magnitude = self.source("policy"), self.config.magnitude
        kinds, amounts = policies.draw_operations(
            policy, len(self.sizes), rounds, magnitude, self.size, source
        )
        return kinds, amounts, policies.matrices(kinds, amounts, self.size)

    def matrix(self) -> Tensor | None:
        """Combine rotation, affine and perspective into one matrix per image."""
        config = self.config
        parts = []
        if config.rotation:
            degrees = self.uniform("rotation", -config.rotation, config.rotation)
            parts.append(ops.rotation(degrees))
        if config.translate or config.scale or config.shear:
            parts.append(self.affine())
        if config.perspective and config.perspective_probability:
            parts.append(self.perspective())
            return reduce(torch.matmul, parts)
        return reduce(torch.matmul, parts)[:, :2] if parts else None

    def affine(self) -> Tensor:
        """Draw affine matrices; shifts are whole pixels, as in torchvision's RandomAffine."""
        largest = self.config.translate * self.size
        shift = [self.uniform(f"translate {axis}", -largest, largest) for axis in "xy"]
        scale = self.uniform("scale", *(self.config.scale or (1.0, 1.0)))
        shear = self.uniform("shear", -self.config.shear, self.config.shear)
        return ops.affine(torch.stack(shift, 1).round(), scale, shear, self.size)

    def perspective(self) -> Tensor:
        """Draw perspective matrices; each corner moves inwards by whole pixels, as in torchvision's
        RandomPerspective."""
        count, source = len(self.sizes), self.source("perspective")
        largest = int(self.config.perspective * (self.size // 2))
        moves = ops.below(torch.full((count, 4, 2), largest + 1), source)
        corners = ops.corner_pixels(self.size)
        inwards = torch.where(corners > 0, -1, 1)
        chosen = torch.rand(count, generator=source) < self.config.perspective_probability
        moved_corners = corners + inwards * moves * chosen[:, None, None]
        return ops.perspective(moved_corners, self.size)

    def erased(self) -> Tensor | None:
        probability = self.config.erasing
        if not probability:
            return None
        return ops.erased(len(self.sizes), probability, self.size, self.source("erasing"))


def apply_uint8(pixels: Tensor, params: AugmentParams) -> Tensor:
    """Flip (B, S, S, 3) uint8 images and apply the policy. The batch may be overwritten."""
    if params.flip is not None:
        pixels = ops.horizontal_flip(pixels, params.flip)
    if params.vertical_flip is not None:
        pixels = ops.vertical_flip(pixels, params.vertical_flip)
    if params.operations is None or params.amounts is None or params.warps is None:
        return pixels
    return policies.apply_operations(pixels, params.operations, params.amounts, params.warps)


def apply_float(batch: Tensor, params: AugmentParams) -> Tensor:
    """Resample (B, 3, S, S) float32 images in 0..1 and change their colours, in place."""
    colours = params.colours
    if params.matrix is None and not colours:
        return batch
    count = at_once(batch)
    for at in range(0, len(batch), count):
        part = slice(at, at + count)
        images = batch[part]
        if params.matrix is not None:
            images.copy_(ops.warp(images, params.matrix[part]))
        for change, amounts in colours:
            change(images, amounts[part])
    return batch
