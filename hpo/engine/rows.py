"""Values that cross from one part of a network to the other, as one row of bytes for each image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

ALIGNED = 16
"""Bytes on which each of several tensors begins in a row."""
EXACT, ROUGH = 1e-3, 2e-2
"""Largest difference, as part of the largest value, that is rounding: in float32, and in less."""


class Unfit(Exception):
    """Values cannot be kept for each image apart; the reason in a few words."""


@dataclass(frozen=True)
class Piece:
    """A tensor in the rows of B images, whose number is one of its dimensions."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    """For one image."""
    images: int
    """Which dimension is that of the images."""
    order: tuple[int, ...]
    """All dimensions as they follow one another in memory: what computes with the tensor finds the
    same layout."""

    @property
    def size(self) -> int:
        """Bytes in a row."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def _stored(self) -> list[int]:
        """All dimensions as they follow one another in the rows."""
        return [self.images, *(dim for dim in self.order if dim != self.images)]

    def pack(self, value: Tensor) -> Tensor:
        """(B, size) uint8."""
        stored = value.permute(self._stored)
        return stored.reshape(len(stored), -1).contiguous().view(torch.uint8)

    def __call__(self, rows: Tensor) -> Tensor:
        own = rows[:, self.start : self.start + self.size].contiguous().view(self.dtype)
        sizes = [*self.shape[: self.images], len(rows), *self.shape[self.images :]]
        stored = own.view([sizes[dim] for dim in self._stored])
        ordered = stored.permute([self._stored.index(dim) for dim in self.order]).contiguous()
        return ordered.permute([self.order.index(dim) for dim in range(len(sizes))])


@dataclass(frozen=True)
class Same:
    """Something that does not depend on the images."""

    value: Any

    def __call__(self, rows: Tensor) -> Any:
        return self.value


@dataclass(frozen=True)
class Count:
    """How many images there are."""

    def __call__(self, rows: Tensor) -> int:
        return len(rows)


@dataclass(frozen=True)
class Shape:
    """The shape of a tensor."""

    sizes: tuple[Same | Count, ...]

    def __call__(self, rows: Tensor) -> torch.Size:
        return torch.Size([size(rows) for size in self.sizes])


Leaf = Piece | Same | Count | Shape


@dataclass(frozen=True)
class Packing:
    """How some values are packed."""

    leaves: tuple[Leaf, ...]
    size: int
    """Bytes of a row."""
    _tree: TreeSpec

    def pack(self, values: Sequence[Any]) -> Tensor:
        """(B, size) uint8."""
        found = [
            functional.pad(rows, (0, _padded(leaf.size) - leaf.size)) if self._several else rows
            for leaf, value in zip(self.leaves, tree_flatten(tuple(values))[0], strict=True)
            if isinstance(leaf, Piece)
            for rows in [leaf.pack(value)]
        ]
        return torch.cat(found, 1) if self._several else found[0]

    def unpack(self, rows: Tensor) -> Sequence[Any]:
        """The values for B images, from (B, size) uint8."""
        values: Sequence[Any] = tree_unflatten([leaf(rows) for leaf in self.leaves], self._tree)
        return values

    @property
    def _several(self) -> bool:
        return sum(isinstance(leaf, Piece) for leaf in self.leaves) > 1


def packing(few: Sequence[Any], more: Sequence[Any], counts: tuple[int, int]) -> Packing:
    """How `few` can be packed, values for some images; `more` are the same for these and others
    after them, `counts` says how many. Raises Unfit."""
    flat, tree = tree_flatten(tuple(few))
    again, other = tree_flatten(tuple(more))
    if tree != other:
        raise Unfit("how many values there are depends on the images")
    stored = [one.untyped_storage().data_ptr() for one in flat if isinstance(one, Tensor)]
    if not stored:
        raise Unfit("no tensor is left of an image")
    if len(stored) > len(set(stored)):
        raise Unfit("two of its tensors share their memory")
    leaves: list[Leaf] = []
    size = 0
    for one, also in zip(flat, again, strict=True):
        leaf = _leaf(one, also, counts, size)
        leaves.append(leaf)
        size += _padded(leaf.size) if isinstance(leaf, Piece) else 0
    found = [leaf for leaf in leaves if isinstance(leaf, Piece)]
    return Packing(tuple(leaves), found[0].size if len(found) == 1 else size, tree)


def _padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _leaf(few: Any, more: Any, counts: tuple[int, int], start: int) -> Leaf:
    if isinstance(few, Tensor):
        return _piece(few, more, counts, start)
    if isinstance(few, torch.Size):
        return Shape(tuple(_number(one, also, counts) for one, also in zip(few, more, strict=True)))
    return _number(few, more, counts)


def _number(few: Any, more: Any, counts: tuple[int, int]) -> Same | Count:
    if (few, more) == counts:
        return Count()
    if type(few) is not type(more) or few != more:
        raise Unfit("a number depends on how many images there are")
    return Same(few)


def _piece(few: Tensor, more: Tensor, counts: tuple[int, int], start: int) -> Piece:
    sizes = enumerate(zip(few.shape, more.shape, strict=False))
    differing = [dim for dim, (one, other) in sizes if one != other]
    if (
        few.ndim != more.ndim
        or len(differing) != 1
        or (few.shape[differing[0]], more.shape[differing[0]]) != counts
    ):
        raise Unfit("the images are not a dimension of a tensor")
    (images,) = differing
    if few.layout != torch.strided or not close(few, more.narrow(images, 0, counts[0])):
        raise Unfit("what it gives for an image depends on the others of the batch")
    strides = few.stride()
    order = sorted(range(few.ndim), key=lambda dim: (-strides[dim], dim != images))
    shape = (*few.shape[:images], *few.shape[images + 1 :])
    return Piece(start, few.dtype, shape, images, tuple(order))


def close(one: Tensor, other: Tensor) -> bool:
    """Whether they are equal but for rounding."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    part = EXACT if one.dtype in (torch.float32, torch.float64) else ROUGH
    one, other = one.float(), other.float()
    largest = other.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if other.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=part * largest, equal_nan=True)
