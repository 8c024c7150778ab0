"""TrainConfig: everything that decides one training, as frozen, validated parts.

A field's dotted path (`optimizer.lr`) is its name everywhere: in TOML, in Optuna, in the dashboard,
in reports and in exports. Every field has a default, a unit where it has one, and a range; the JSON
Schema that `hpo schema` prints is made from this module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from hpo.definition.architectures import ARCHITECTURES
from hpo.definition.fields import Part, complaint, explain, fail, model_at
from hpo.errors import ConfigError, nearest

Metric = Literal["val_top1", "val_top5", "val_loss", "train_top1", "train_loss"]
METRICS: tuple[str, ...] = get_args(Metric)


def direction(metric: str) -> Literal["minimize", "maximize"]:
    """Losses are minimized, everything else is maximized."""
    return "minimize" if metric.endswith("_loss") else "maximize"


def _architecture(value: Any) -> Any:
    if isinstance(value, str) and value not in ARCHITECTURES:
        raise ValueError(f"unknown architecture; {nearest(value, ARCHITECTURES)}")
    return value


def _tuple(value: Any) -> Any:
    """TOML has lists only; frozen parts hold tuples."""
    return tuple(value) if isinstance(value, list) else value


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


Ratio = Annotated[float, Field(ge=0, le=1)]
Rates = Annotated[tuple[Annotated[float, Field(ge=0)], ...], BeforeValidator(_tuple)]
Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_tuple)]
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


class DataConfig(Part):
    """Where the images come from, how they are split, and the size at which they are kept."""

    dataset: Literal["digits", "folder"] = "digits"
    """digits: scikit-learn's 1,797 scans of handwritten digits, 8 x 8 pixels. folder: images by
    class under `root`, either train/ [val/] [test/] or one folder per class."""
    root: str | None = None
    """Folder of the images, for dataset = "folder"; relative to the working directory."""
    image_size: int = Field(default=224, ge=8, le=1024)
    """Side of the square that the model sees, in pixels; default 8 for digits, 224 otherwise."""
    resize: Literal["crop", "squash"] = "crop"
    """crop: resize the shorter side to `resize_size`, keep the aspect ratio, evaluate on the centre
    (torchvision's Resize + CenterCrop). squash: stretch to a square."""
    resize_size: int = Field(default=256, ge=8, le=2048)
    """Shorter side after resizing, in pixels; default: image_size up to 64, above it image_size x
    256 / 224, torchvision's own ratio. Not used by squash."""
    normalize: Literal["dataset", "imagenet"] = "dataset"
    """Mean and standard deviation: of the training part, or ImageNet's. With torchvision's weights
    use imagenet."""
    val_fraction: float = Field(default=0.15, gt=0, lt=1)
    """Part of the images for validation where the data has no val/ folder."""
    test_fraction: float = Field(default=0.15, ge=0, lt=1)
    """Part of the images for the test where the data has neither train/ nor test/; 0: no test."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of the split; training seeds never move an image between parts."""
    limit_train: int | None = Field(default=None, ge=1)
    """Use a seeded, stratified part of this many training images, for cheap searches."""
    skip_unreadable: bool = False
    """Leave out files that cannot be read as images (counted and listed) instead of stopping."""
    max_pixels: int = Field(default=50_000_000, ge=64)
    """Refuse images of more pixels than this before they are decoded."""
    cache_limit_gb: float = Field(default=20.0, ge=0)
    """Largest cache of decoded images, in GB (10^9 bytes); beyond it images are decoded in every
    epoch by `loader_workers` processes, with the same results."""
    loader_workers: int = Field(default=2, ge=0, le=64)
    """Processes that decode images where no cache is used; 0: in the training process."""

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        digits = data.get("dataset", "digits") == "digits"
        size = data.setdefault("image_size", 8 if digits else 224)
        if isinstance(size, int):
            data.setdefault("resize_size", size if size <= 64 else round(size * 256 / 224))
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dataset == "folder" and not self.root:
            fail("root", self.root, 'dataset = "folder" needs the folder of the images')
        if self.dataset == "digits" and self.root:
            fail("root", self.root, 'digits come with scikit-learn; use dataset = "folder"')
        if self.resize == "crop" and self.resize_size < self.image_size:
            fail("resize_size", self.resize_size, f"at least image_size = {self.image_size}")
        if self.val_fraction + self.test_fraction >= 1:
            left = f"with test_fraction = {self.test_fraction} nothing is left for training"
            fail("val_fraction", self.val_fraction, left)
        return self


Activation = Literal["relu", "leaky_relu"]


class HeadConfig(Part):
    """A classifier of one's own: per hidden layer linear, batch norm, activation, dropout; then a
    linear layer to the classes. Lists shorter than `hidden` repeat their last item."""

    hidden: Sizes = (128,)
    """Units of each hidden layer; empty: one linear layer."""
    activations: Annotated[tuple[Activation, ...], BeforeValidator(_tuple)] = ("relu",)
    """relu or leaky_relu (slope 0.01), per hidden layer."""
    dropout: Annotated[tuple[Ratio, ...], BeforeValidator(_tuple)] = (0.0,)
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
        WithJsonSchema({"type": "string", "enum": list(ARCHITECTURES)}),
    ] = "small_cnn"
    """small_cnn, or the name of a torchvision classification model."""
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
    j}: blocks i to j - 1, counted from 0. A block is one child of torchvision's `features`, one
    layerN of a ResNet, one encoder layer of a transformer. The head is always trained."""
    filters: Sizes = (32, 64, 128)
    """small_cnn only: filters of each convolution (3 x 3, batch norm, ReLU, max-pool)."""


class OptimizerConfig(Part):
    """The optimizer, by PyTorch's names."""

    name: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd"
    """sgd, adam, adamw (decoupled weight decay) or rmsprop."""
    lr: float = Field(default=0.1, gt=0, le=100)
    """Learning rate; the largest of the schedule."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """sgd and rmsprop only."""
    nesterov: bool = False
    """sgd only; needs momentum above 0."""
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    """L2 penalty; adamw decouples it from the gradient."""
    betas: Annotated[tuple[Ratio, Ratio], BeforeValidator(_tuple)] = (0.9, 0.999)
    """adam and adamw only: decay rates of the two moments."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.nesterov and self.name == "sgd" and self.momentum == 0:
            fail("nesterov", True, "needs momentum above 0")
        return self


class ScheduleConfig(Part):
    """How the learning rate moves over the epochs."""

    name: Literal["constant", "step", "cosine", "plateau", "onecycle", "replay"] = "cosine"
    """constant; step: x gamma every step_size epochs; cosine: to min_lr at the end, per step;
    plateau: x factor after `patience` epochs without a better `metric`; onecycle: up, then down;
    replay: the recorded `rates`, one per epoch."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Linear warm-up from 0 over this many epochs (fractions allowed)."""
    min_lr: float = Field(default=0.0, ge=0)
    """Smallest rate of cosine and plateau."""
    step_size: int = Field(default=10, ge=1)
    """step only: epochs between two drops."""
    gamma: float = Field(default=0.1, gt=0, le=1)
    """step only: factor of a drop."""
    factor: float = Field(default=0.1, gt=0, lt=1)
    """plateau only: factor of a drop."""
    patience: int = Field(default=10, ge=0)
    """plateau only: epochs without improvement before a drop."""
    metric: Metric = "val_loss"
    """plateau only: the metric watched."""
    pct_start: float = Field(default=0.3, gt=0, lt=1)
    """onecycle only: part of the steps in which the rate rises."""
    rates: Rates = ()
    """replay only: the learning rate of each epoch."""


class AugmentConfig(Part):
    """Random changes of training images; all off by default."""

    horizontal_flip: Ratio = 0.0
    """Probability of a left-right flip."""
    crop_padding: int = Field(default=0, ge=0, le=256)
    """Pixels of black padding on each side before a random crop back to image_size; 0: off."""
    random_resized_crop: Annotated[tuple[float, float], BeforeValidator(_tuple)] | None = None
    """[least, most] part of the picture's area in a random resized crop (aspect 3/4 to 4/3), taken
    from the whole picture; None: off."""
    rotation: float = Field(default=0.0, ge=0, le=180)
    """Random rotation within +- this many degrees."""
    brightness: float = Field(default=0.0, ge=0, le=1)
    """Colour jitter: factor within 1 +- this."""
    contrast: float = Field(default=0.0, ge=0, le=1)
    """Colour jitter: factor within 1 +- this."""
    saturation: float = Field(default=0.0, ge=0, le=1)
    """Colour jitter: factor within 1 +- this."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Colour jitter: shift within +- this part of the colour circle."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        crop = self.random_resized_crop
        if crop is not None and not 0 < crop[0] <= crop[1] <= 1:
            fail("random_resized_crop", list(crop), "[least, most] with 0 < least <= most <= 1")
        if crop is not None and self.crop_padding:
            fail("crop_padding", self.crop_padding, "0 beside random_resized_crop: use one crop")
        return self


class EarlyStoppingConfig(Part):
    """Stop a training that no longer improves."""

    patience: int | None = Field(default=None, ge=1)
    """Epochs without improvement before training stops; None: never."""
    metric: Metric = "val_loss"
    """The metric watched."""
    min_delta: float = Field(default=0.0, ge=0)
    """Smaller changes do not count as improvement."""


class RuntimeConfig(Part):
    """How the arithmetic is done; every field changes the last bits of a result. What is `auto`
    (or 0) is resolved once per study, stored with it and with each trial, and exported."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: automatic mixed precision. auto: whichever trains faster here, measured."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Layout of images in memory. auto: whichever trains faster here, measured."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of a trial; 0: this machine's cores divided by its workers."""
    micro_batch: int = Field(default=0, ge=0)
    """Largest batch that is computed at once, the gradients summed to batch_size; 0: batch_size."""


class TrainConfig(Part):
    """Everything that decides one training. Same config, same conditions: the same numbers."""

    epochs: int = Field(default=10, ge=1, le=10_000)
    """Passes over the training images."""
    batch_size: int = Field(default=128, ge=1, le=65_536)
    """Images per optimizer step."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of weights, order, augmentation and dropout; never of the split."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Cross-entropy's label smoothing."""
    clip_grad_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient; None: not clipped."""
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    early_stopping: EarlyStoppingConfig = Field(default_factory=EarlyStoppingConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)

    @model_validator(mode="before")
    @classmethod
    def _sized_data(cls, data: Any) -> Any:
        """Defaults of `data` depend on its data set, so it is always validated, never assumed."""
        return {**data, "data": data.get("data", {})} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        schedule = self.schedule
        if schedule.warmup_epochs >= self.epochs:
            fail("schedule.warmup_epochs", schedule.warmup_epochs,
                  f"less than epochs = {self.epochs}")  # fmt: skip
        if schedule.name == "replay" and len(schedule.rates) < self.epochs:
            fail(
                "schedule.rates",
                f"{len(schedule.rates)} rates",
                f"one for each of {self.epochs} epochs",
            )
        if schedule.name != "replay" and schedule.rates:
            fail("schedule.rates", "given", 'only with schedule.name = "replay"')
        if schedule.min_lr > self.optimizer.lr:
            fail("schedule.min_lr", schedule.min_lr, f"at most optimizer.lr = {self.optimizer.lr}")
        return self

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, where: str = "", prefix: str = "") -> Self:
        """Validate nested `data`; raises ConfigError naming each wrong field, its value and what is
        allowed. `prefix` stands before the dotted path in messages (`train.` in a study file)."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise explain(error, cls, where=where, prefix=prefix) from None

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data without None, ready for TOML or JSON; `parse` takes it back."""
        return json.loads(self.model_dump_json(exclude_none=True))  # type: ignore[no-any-return]


def field_errors(data: Mapping[str, Any], prefix: str = "") -> list[ConfigError]:
    """What is wrong with single fields of nested `data`, leaving out rules between fields: those
    cannot be judged before every searched value is in its place."""
    try:
        TrainConfig.model_validate(dict(data))
    except ValidationError as error:
        items = error.errors(include_url=False)
        alone = [item for item in items if not item["msg"].startswith("Value error, \0")]
        return [complaint(item, TrainConfig, prefix) for item in alone]
    return []


def field_paths(model: type[BaseModel] = TrainConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted path of a single field, in the order of the definition."""
    for name in model.model_fields:
        part = model_at(model, [name])
        if part:
            yield from field_paths(part, f"{prefix}{name}.")
        else:
            yield prefix + name


def check_path(path: str) -> None:
    """Raise ConfigError unless `path` names a field of TrainConfig, or an item of a list by index
    (`model.head.hidden.0`)."""
    known = list(field_paths())
    base = path
    while base.rpartition(".")[2].isdigit():
        base = base.rpartition(".")[0]
    if base not in known:
        raise ConfigError(f"unknown field; {nearest(path, known)}", key=path)
