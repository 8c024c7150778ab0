"""Configuration of the network: architecture, head, weights, trainable blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from hpo.config.base import (
    TIMM_PATTERN,
    ConfigModel,
    NameOrFunction,
    Ratio,
    Sizes,
    as_tuple,
    fail,
)

# torchvision's classification models by name, kept here so that a study file is validated without
# importing torch; a test holds the list against torchvision's own.
TORCHVISION_ARCHITECTURES = (
    *("alexnet", "convnext_base", "convnext_large", "convnext_small", "convnext_tiny"),
    *("densenet121", "densenet161", "densenet169", "densenet201"),
    *("efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3"),
    *("efficientnet_b4", "efficientnet_b5", "efficientnet_b6", "efficientnet_b7"),
    *("efficientnet_v2_l", "efficientnet_v2_m", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "mobilenet_v2"),
    *("mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_16gf", "regnet_x_1_6gf"),
    *("regnet_x_32gf", "regnet_x_3_2gf", "regnet_x_400mf", "regnet_x_800mf", "regnet_x_8gf"),
    *("regnet_y_128gf", "regnet_y_16gf", "regnet_y_1_6gf", "regnet_y_32gf", "regnet_y_3_2gf"),
    *("regnet_y_400mf", "regnet_y_800mf", "regnet_y_8gf", "resnet101", "resnet152", "resnet18"),
    *("resnet34", "resnet50", "resnext101_32x8d", "resnext101_64x4d", "resnext50_32x4d"),
    *("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"),
    *("squeezenet1_0", "squeezenet1_1", "swin_b", "swin_s", "swin_t", "swin_v2_b", "swin_v2_s"),
    *("swin_v2_t", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19"),
    *("vgg19_bn", "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32"),
    *("wide_resnet101_2", "wide_resnet50_2"),
)
ARCHITECTURES = ("small_cnn", *TORCHVISION_ARCHITECTURES)


_Item = TypeVar("_Item")

COLOURS = 3
"""Channels of a image."""


def _odd(value: Any) -> Any:
    if isinstance(value, int) and value % 2 == 0:
        raise ValueError("allowed: 1, 3, 5, ... 31: an even kernel has no middle")
    return value


Kernel = Annotated[int, BeforeValidator(_odd), Field(ge=1, le=31)]
Flags = Annotated[tuple[bool, ...], BeforeValidator(as_tuple)]


def repeated(values: Sequence[_Item], count: int) -> tuple[_Item, ...]:
    """Return `count` items of `values`, the last one repeated if there are fewer."""
    return tuple(values[min(i, len(values) - 1)] for i in range(count))


class CnnConfig(ConfigModel):
    """The network `small_cnn`: per item of `filters` a convolution (padded, so that stride 1 keeps
    the image's size; with bias), maybe batch norm, ReLU, maybe a pool; then fully connected
    layers. The other lists speak of the same convolutions; shorter ones repeat their last item."""

    filters: Annotated[Sizes, Field(min_length=1)] = (32, 64, 128)
    """Filters of each convolution."""
    kernels: Annotated[tuple[Kernel, ...], BeforeValidator(as_tuple)] = (3,)
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
    """Average the last image to this side, whatever its own; 0: take all of its pixels."""
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


_BLOCKS = "'all', 0 or more (the last k blocks), {first = k}, or {start = i, stop = j}"


def _blocks(value: Any) -> Any:
    """Validate `trainable_blocks`; a table stays a table, so that TOML and JSON round-trip."""

    def count(item: Any, least: int) -> bool:
        return isinstance(item, int) and not isinstance(item, bool) and item >= least

    if value == "all" or count(value, 0):
        return value
    if isinstance(value, Mapping):
        if set(value) == {"first"} and count(value["first"], 1):
            return dict(value)
        if set(value) == {"start", "stop"} and count(value["start"], 0):
            start, stop = value["start"], value["stop"]
            if count(stop, start + 1):
                return dict(value)
    raise ValueError(f"allowed: {_BLOCKS}")


Blocks = Annotated[
    Any,
    BeforeValidator(_blocks),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": "all"},
                {"type": "integer", "minimum": 0},
                {"type": "object", "required": ["first"], "additionalProperties": False,
                 "properties": {"first": {"type": "integer", "minimum": 1}}},
                {"type": "object", "required": ["start", "stop"], "additionalProperties": False,
                 "properties": {"start": {"type": "integer", "minimum": 0},
                                "stop": {"type": "integer", "minimum": 1}}},
            ]
        }
    ),
]  # fmt: skip


def _options(value: Any) -> Any:
    for name in value if isinstance(value, Mapping) else ():
        if not str(name).isidentifier() or name in ("classes", "image_size"):
            raise ValueError("allowed: names of arguments other than classes and image_size")
    return value


def _option(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise ValueError("allowed: a number, a text, true or false")
    return value


Option = Annotated[
    Any,
    BeforeValidator(_option),
    WithJsonSchema({"anyOf": [{"type": kind} for kind in ("boolean", "number", "string")]}),
]
Options = Annotated[dict[str, Option], BeforeValidator(_options)]

Activation = Literal["relu", "leaky_relu"]


class HeadConfig(ConfigModel):
    """A classifier of one's own: per hidden layer linear, batch norm, activation, dropout; then a
    linear layer to the classes. Lists shorter than `hidden` repeat their last item."""

    hidden: Sizes = (128,)
    """Units of each hidden layer; empty: one linear layer."""
    activations: Annotated[tuple[Activation, ...], BeforeValidator(as_tuple)] = ("relu",)
    """relu or leaky_relu (slope 0.01), per hidden layer."""
    dropout: Annotated[tuple[Ratio, ...], BeforeValidator(as_tuple)] = (0.0,)
    """Dropout after each hidden layer, 0 to 1."""
    batch_norm: bool = False
    """Batch norm between each hidden linear layer and its activation."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("activations", "dropout"):
            values = getattr(self, name)
            if self.hidden and not 1 <= len(values) <= len(self.hidden):
                fail(name, list(values), f"1 to {len(self.hidden)} items, one per hidden layer")
        return self


class ModelConfig(ConfigModel):
    """The network, where its weights come from, and which part of it is trained."""

    architecture: Annotated[str, NameOrFunction("architecture", ARCHITECTURES, TIMM_PATTERN)] = (
        "small_cnn"
    )
    """small_cnn, the name of a torchvision classification model, `timm:NAME` or `timm:NAME.TAG` of
    timm's (docs/timm.md), or `module:function` of your own, found from the working directory:
    called with classes (int) and image_size (int, pixels), it returns the nn.Module that maps
    (B, 3, image_size, image_size) to (B, classes)."""
    weights: str | None = None
    """None (random), a torchvision weights name (IMAGENET1K_V1, DEFAULT), of timm's DEFAULT or a
    tag (augreg_in21k), or a local file:
    .safetensors, or a state dict (.pt, .pth; read without unpickling code)."""
    stem: Literal["default", "small"] = "default"
    """small: a first convolution of 3 x 3, stride 1, and no max-pool, for images of 32 pixels."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout of the architecture's own classifier; None: as the architecture has it."""
    head: HeadConfig | None = None
    """A classifier of one's own; None: the architecture's, with its last layer replaced."""
    trainable_blocks: Blocks = "all"
    """all; 0: the head alone; k: the last k blocks; {first = k}: the first k; {start = i, stop =
    j}: blocks i to j - 1, counted from 0. A block is one child of torchvision's `features` that
    has weights, one layerN of a ResNet, one encoder layer of a transformer; of timm's what it
    groups as such; in an architecture of your own, an item of its attribute `blocks`, or else a
    child of its `features`. The head (there the last linear layer) is always trained."""
    options: Options = Field(default_factory=dict)
    """Only for an architecture of your own or of timm's: further arguments of its function, by name
    (drop_path_rate); searched as model.options.NAME."""
    cnn: CnnConfig = Field(default_factory=CnnConfig)
    """small_cnn only: the network by its lists."""
