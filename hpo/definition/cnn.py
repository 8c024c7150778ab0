"""A convolutional network described by lists, one item for each convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from hpo.definition.fields import Part, Sizes, fail, listed

_Item = TypeVar("_Item")

COLOURS = 3
"""Channels of a picture."""


def _odd(value: Any) -> Any:
    if isinstance(value, int) and value % 2 == 0:
        raise ValueError("allowed: 1, 3, 5, ... 31: an even kernel has no middle")
    return value


Kernel = Annotated[int, BeforeValidator(_odd), Field(ge=1, le=31)]
Flags = Annotated[tuple[bool, ...], BeforeValidator(listed)]


def repeated(values: Sequence[_Item], count: int) -> tuple[_Item, ...]:
    """`count` items of `values`, the last one repeated where there are fewer."""
    return tuple(values[min(i, len(values) - 1)] for i in range(count))


class CnnConfig(Part):
    """The network `small_cnn`: per item of `filters` a convolution (padded, so that stride 1 keeps
    the picture's size; with bias), maybe batch norm, ReLU, maybe a pool; then fully connected
    layers. The other lists speak of the same convolutions; shorter ones repeat their last item."""

    filters: Annotated[Sizes, Field(min_length=1)] = (32, 64, 128)
    """Filters of each convolution."""
    kernels: Annotated[tuple[Kernel, ...], BeforeValidator(listed)] = (3,)
    """Side of each convolution's kernel in pixels: odd, 1 to 31."""
    strides: Sizes = (1,)
    """Stride of each convolution in pixels, 1 or more."""
    norm: Flags = (True,)
    """Whether batch norm follows each convolution."""
    pool: Literal["max", "average"] = "max"
    """What the pools behind the ReLUs compute."""
    pool_sizes: Sizes = (2,)
    """Side and stride of the pool behind each ReLU in pixels; 1: none. A pool rounds up: what does
    not fill a window makes one more."""
    residual: Flags = (False,)
    """Whether the input of each convolution is added to its output (after batch norm, before ReLU):
    only with stride 1 and as many filters as the input has channels."""
    adaptive_pool: int = Field(default=1, ge=0, le=64)
    """Average the last picture to this side, whatever its own; 0: take all of its pixels."""
    hidden: Sizes = ()
    """Units of each fully connected layer with ReLU before the last layer."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the last layer, from 0 to below 1; model.dropout, where given, stands in."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        count = len(self.filters)
        for name in ("kernels", "strides", "norm", "pool_sizes", "residual"):
            values = getattr(self, name)
            if not 1 <= len(values) <= count:
                fail(name, list(values), f"1 to {count} items, one per convolution")
        inputs = (COLOURS, *self.filters)
        strides, residual = repeated(self.strides, count), repeated(self.residual, count)
        for i in range(count):
            if residual[i] and (inputs[i] != self.filters[i] or strides[i] != 1):
                fail(
                    "residual",
                    list(self.residual),
                    f"convolution {i} (from 0) makes {self.filters[i]} channels of {inputs[i]} "
                    f"with stride {strides[i]}: a connection around it needs as many, and stride 1",
                )
        return self
