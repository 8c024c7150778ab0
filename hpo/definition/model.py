"""The network: its architecture, its head, where its weights come from, what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from hpo.definition.architectures import ARCHITECTURES
from hpo.definition.cnn import CnnConfig
from hpo.definition.fields import OWN, Part, Ratio, Sizes, fail, is_own, listed
from hpo.errors import nearest


def _architecture(value: Any) -> Any:
    if isinstance(value, str) and value not in ARCHITECTURES and not is_own(value):
        hint = (
            "your own is named module:function" if ":" in value else nearest(value, ARCHITECTURES)
        )
        raise ValueError(f"unknown architecture; {hint}")
    return value


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


class HeadConfig(Part):
    """A classifier of one's own: per hidden layer linear, batch norm, activation, dropout; then a
    linear layer to the classes. Lists shorter than `hidden` repeat their last item."""

    hidden: Sizes = (128,)
    """Units of each hidden layer; empty: one linear layer."""
    activations: Annotated[tuple[Activation, ...], BeforeValidator(listed)] = ("relu",)
    """relu or leaky_relu (slope 0.01), per hidden layer."""
    dropout: Annotated[tuple[Ratio, ...], BeforeValidator(listed)] = (0.0,)
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


class ModelConfig(Part):
    """The network, where its weights come from, and which part of it is trained."""

    architecture: Annotated[
        str,
        BeforeValidator(_architecture),
        WithJsonSchema({"anyOf": [{"enum": list(ARCHITECTURES)}, OWN]}),
    ] = "small_cnn"
    """small_cnn, the name of a torchvision classification model, or `module:function` of your own,
    found from the working directory: called with classes (int) and image_size (int, pixels), it
    returns the nn.Module that maps (B, 3, image_size, image_size) to (B, classes)."""
    weights: str | None = None
    """None (random), a torchvision weights name (IMAGENET1K_V1, DEFAULT), or a local file:
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
    has weights, one layerN of a ResNet, one encoder layer of a transformer; in an architecture of
    your own, an item of its attribute `blocks`, or else a child of its `features`. The head (there
    the last linear layer) is always trained."""
    options: Options = Field(default_factory=dict)
    """Only for an architecture of your own: further arguments of its function, by name; searched as
    model.options.NAME."""
    cnn: CnnConfig = Field(default_factory=CnnConfig)
    """small_cnn only: the network by its lists."""
