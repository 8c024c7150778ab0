"""TrainConfig: everything that decides one training, frozen and validated.

A field's dotted path (`optimizer.lr`) is its name everywhere: in TOML, in Optuna, in the dashboard,
in reports and in exports. Every field has a default, a unit where it has one, and a range; the JSON
Schema that `hpo schema` prints is made from this module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from hpo.config.augment import AugmentConfig
from hpo.config.base import (
    RULE,
    ConfigModel,
    NameOrFunction,
    Rates,
    Ratio,
    as_tuple,
    auto_or_flag,
    complaint,
    fail,
    field_type,
    is_model,
    list_path,
    toml_repr,
    type_at,
)
from hpo.config.data import DataConfig
from hpo.config.metrics import CLASSIFIED, RECALL, Metric, recall_class, suggestion, user_function
from hpo.config.model import Blocks, ModelConfig
from hpo.config.retrieval import RETRIEVED, RetrievalConfig
from hpo.errors import ConfigError, nearest


class PhaseConfig(ConfigModel):
    """A stretch of epochs with its own trainable blocks and learning rate. The optimizer starts
    anew with it, and the schedule runs from its start to its end."""

    epochs: int = Field(ge=1, le=10_000)
    """Epochs of this phase; has no default."""
    trainable_blocks: Blocks | None = None
    """As model.trainable_blocks, which is the default."""
    lr: float | None = Field(default=None, gt=0, le=100)
    """Largest learning rate of this phase; default: optimizer.lr."""


@dataclass(frozen=True)
class Phase:
    """A phase with nothing left open; a training without phases is one."""

    number: int
    """From 0."""
    start: int
    """Epochs before it."""
    epochs: int
    trainable_blocks: Any
    lr: float


OPTIONS = "model.options"
"""The one table whose names are the user's."""
LOSSES = ("cross_entropy", "focal")
SPANNING = ("cosine", "onecycle")
"""Schedules that run from the first epoch to the last: each rate depends on how many there are."""


class OptimizerConfig(ConfigModel):
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
    betas: Annotated[tuple[Ratio, Ratio], BeforeValidator(as_tuple)] = (0.9, 0.999)
    """adam and adamw only: decay rates of the two moments."""
    backbone_lr_factor: float = Field(default=1.0, gt=0, le=100)
    """The head learns at the learning rate, everything else at this many times that."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.nesterov and self.name == "sgd" and self.momentum == 0:
            fail("nesterov", True, "needs momentum above 0")
        return self


class ScheduleConfig(ConfigModel):
    """How the learning rate moves over the epochs, of each phase where there are phases."""

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


class EarlyStoppingConfig(ConfigModel):
    """Stop a training that no longer improves; with phases only in the last one, its epochs alone
    counted."""

    patience: int | None = Field(default=None, ge=1)
    """Epochs without improvement before training stops; None: never."""
    metric: Metric = "val_loss"
    """The metric watched."""
    min_delta: float = Field(default=0.0, ge=0)
    """Smaller changes do not count as improvement."""


class RuntimeConfig(ConfigModel):
    """How the arithmetic is done; every field changes the last bits of a result. What is `auto`
    (or 0) is resolved once per study, stored with it and with each trial, and exported."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: automatic mixed precision. auto: whichever trains faster here, measured."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Layout of images in memory. auto: whichever trains faster here, measured."""
    deterministic: Annotated[Literal["auto"] | bool, BeforeValidator(auto_or_flag)] = "auto"
    """true: the same bits on the same device, whatever the speed. false: on an NVIDIA GPU the
    fastest arithmetic (TF32, cuDNN's autotuner, fused optimizers), whose last bits vary. auto:
    false on an NVIDIA GPU, true elsewhere."""
    compile: Literal["auto", "none", "cuda-graph", "inductor"] = "auto"
    """cuda-graph: a training step is recorded once and replayed without its launches (NVIDIA GPUs).
    inductor: torch.compile as well, which takes up to minutes first. auto: whichever trains faster
    on an NVIDIA GPU, measured; none elsewhere."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of a trial; 0: this machine's cores divided by its workers."""
    micro_batch: int = Field(default=0, ge=0)
    """Largest batch that is computed at once, the gradients summed to batch_size; 0: batch_size."""

    @classmethod
    def recorded(cls, data: Mapping[str, Any]) -> Self:
        """Return the runtime that a trial or a run recorded; fields that it lacks were not there
        yet (see BEFORE)."""
        return cls.model_validate({**BEFORE, **data})


BEFORE: Mapping[str, Any] = {"deterministic": True, "compile": "none"}
"""How everything was computed before a runtime had these fields."""


class TrainConfig(ConfigModel):
    """Everything that decides one training. Same config, same conditions: the same numbers.

    >>> from hpo import TrainConfig
    >>> config = TrainConfig.parse({"epochs": 5, "optimizer": {"name": "adamw", "lr": 0.003}})
    >>> config.epochs, config.optimizer.lr, config.batch_size
    (5, 0.003, 128)
    >>> TrainConfig.parse({"epochs": 0})
    Traceback (most recent call last):
    hpo.errors.ConfigError: epochs: 0: ...
    """

    task: Literal["classification", "retrieval"] = "classification"
    """classification, or retrieval: the nearest training images by the network's features."""
    epochs: int = Field(default=10, ge=1, le=10_000)
    """Passes over the training images; with `phases` the default is their sum; always 1 for a
    retrieval with model.trainable_blocks = 0, where nothing learns."""
    batch_size: int = Field(default=128, ge=1, le=65_536)
    """Images per optimizer step."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of weights, order, augmentation and dropout; never of the split."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of cross_entropy and focal."""
    loss: Annotated[str, NameOrFunction("loss", LOSSES)] = "cross_entropy"
    """What training minimizes: cross_entropy, focal, or `module:function` of your own, found from
    the working directory: (logits (B, C) float32, labels (B,) int64) -> mean () or losses (B,).
    val_loss is the cross-entropy, whatever is trained with."""
    focal_gamma: float = Field(default=2.0, ge=0, le=20)
    """focal only: how much less an image counts that is already right; 0: cross_entropy."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the weights, such as 0.999; it is what is
    evaluated and kept. None: off."""
    clip_grad_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient; None: not clipped."""
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    early_stopping: EarlyStoppingConfig = Field(default_factory=EarlyStoppingConfig)
    retrieval: RetrievalConfig = Field(default_factory=RetrievalConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    phases: Annotated[tuple[PhaseConfig, ...], BeforeValidator(as_tuple)] = ()
    """Phases, one after another ([[train.phases]] in a study file); empty: one as long as epochs.
    A phase is searched by its number from 0: phases.1.lr."""

    @model_validator(mode="before")
    @classmethod
    def _summed_epochs(cls, data: Any) -> Any:
        """Set `epochs` to the sum of the phases' unless it is given."""
        phases = data.get("phases") if isinstance(data, dict) else None
        if not phases or "epochs" in data or not isinstance(phases, list | tuple):
            return data
        lengths = [one.get("epochs") if isinstance(one, dict) else None for one in phases]
        whole = all(isinstance(one, int) and one > 0 for one in lengths)
        return {**data, "epochs": sum(lengths)} if whole else data

    @model_validator(mode="before")
    @classmethod
    def _sized_data(cls, data: Any) -> Any:
        """Validate `data` also where it is not given: its defaults depend on its data set."""
        return {**data, "data": data.get("data", {})} if isinstance(data, dict) else data

    @model_validator(mode="before")
    @classmethod
    def _single_epoch(cls, data: Any) -> Any:
        """Train one epoch where nothing learns: it has seen everything then."""
        if not isinstance(data, dict) or data.get("task") != "retrieval":
            return data
        model, epochs = data.get("model"), data.get("epochs", 10)
        frozen = isinstance(model, dict) and model.get("trainable_blocks") == 0
        frozen = frozen and not data.get("phases")
        valid = isinstance(epochs, int) and 1 < epochs <= 10_000
        return {**data, "epochs": 1} if frozen and valid else data

    @property
    def looks_up(self) -> bool:
        """True if validation images are looked up among the training images."""
        return self.task == "retrieval"

    @property
    def frozen(self) -> bool:
        """True if nothing learns: retrieval by the features of a network as it is."""
        blocks = self.model.trainable_blocks
        return self.looks_up and blocks == 0 and not self.phases

    @property
    def tied_to_length(self) -> str | None:
        """Why more epochs would change those that it has, in words; None where a longer training
        begins with the same ones."""
        if self.frozen:
            return "nothing learns, so one epoch is all"
        if self.phases:
            return "the phases say how many epochs there are"
        name = self.schedule.name
        if name in SPANNING:
            return f"schedule.name = {toml_repr(name)} runs over all epochs, however many"
        return None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The fixed names of metrics that this training gives, if it has validation images."""
        if self.task == "classification":
            return CLASSIFIED
        return RETRIEVED if self.frozen else (*RETRIEVED, "val_loss", "train_top1", "train_loss")

    def gives(self, metric: str) -> bool:
        """Return whether this training gives `metric`, if it has validation images."""
        free = recall_class(metric) is not None or user_function(metric) is not None
        return metric in self.metrics or (free and self.task == "classification")

    def require_metric(self, metric: str, key: str) -> None:
        """Raise ConfigError, naming `key`, unless this training gives `metric`."""
        if not self.gives(metric):
            raise ConfigError(self._without(metric), key=key)

    def _without(self, metric: str) -> str:
        frozen = " with model.trainable_blocks = 0" if self.frozen else ""
        given = ", ".join(self.metrics)
        if self.task == "classification":
            given += f", {RECALL}CLASS, module:function"
        hint = suggestion(metric, self.metrics)
        hint = f"{hint} " if hint.startswith("did") else ""
        return f"{metric!r}: task = {self.task!r}{frozen} does not give it; {hint}allowed: {given}"

    @model_validator(mode="after")
    def _watched(self) -> Self:
        """Refuse to watch a metric that this training does not give."""
        watched = {}
        if self.schedule.name == "plateau":
            watched["schedule.metric"] = self.schedule.metric
        if self.early_stopping.patience is not None:
            watched["early_stopping.metric"] = self.early_stopping.metric
        for key, metric in watched.items():
            if not self.gives(metric) and not self.frozen:
                fail(key, metric, self._without(metric).partition(": ")[2])
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.frozen:
            return self  # no schedule is followed
        schedule = self.schedule
        if self.phases and sum(one.epochs for one in self.phases) != self.epochs:
            lengths = " + ".join(str(one.epochs) for one in self.phases)
            fail("phases", lengths, f"phases do not add up to epochs = {self.epochs}; correct one "
                 "of them, or leave epochs out")  # fmt: skip
        self._fits_phases()
        if schedule.name == "replay" and len(schedule.rates) < self.epochs:
            fail(
                "schedule.rates",
                f"{len(schedule.rates)} rates",
                f"one for each of {self.epochs} epochs",
            )
        if schedule.name != "replay" and schedule.rates:
            fail("schedule.rates", "given", 'only with schedule.name = "replay"')
        if self.data.balance == "loss" and self.loss not in ("cross_entropy", "focal"):
            fail("data.balance", "loss", 'with a loss of your own: "sampling" or "none"')
        return self

    def _fits_phases(self) -> None:
        """Refuse a schedule that does not fit into each phase, or the whole training."""
        schedule = self.schedule
        for phase in self.all_phases():
            of = f" of phase {phase.number}" if self.phases else ""
            if schedule.warmup_epochs >= phase.epochs:
                fail("schedule.warmup_epochs", schedule.warmup_epochs,
                     f"less than epochs = {phase.epochs}{of}")  # fmt: skip
            if schedule.min_lr > phase.lr:
                name = f"lr = {phase.lr}{of}" if of else f"optimizer.lr = {phase.lr}"
                fail("schedule.min_lr", schedule.min_lr, f"at most {name}")

    def all_phases(self) -> list[Phase]:
        """Return the phases with their defaults; without any, the whole training as one."""
        blocks, lr = self.model.trainable_blocks, self.optimizer.lr
        if not self.phases:
            return [Phase(0, 0, self.epochs, blocks, lr)]
        found: list[Phase] = []
        start = 0
        for number, one in enumerate(self.phases):
            own = blocks if one.trainable_blocks is None else one.trainable_blocks
            found.append(Phase(number, start, one.epochs, own, lr if one.lr is None else one.lr))
            start += one.epochs
        return found

    def phase_of(self, epoch: int) -> Phase:
        """Return the phase in which `epoch` (from 1) lies."""
        return [one for one in self.all_phases() if one.start < max(epoch, 1)][-1]

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain data without None, for TOML or JSON; `parse` takes it back."""
        return json.loads(self.model_dump_json(exclude_none=True))  # type: ignore[no-any-return]


def field_errors(data: Mapping[str, Any], prefix: str = "") -> list[ConfigError]:
    """Return what is wrong with single fields of nested `data`, leaving out rules between fields:
    those cannot be judged before every searched value is in its place."""
    try:
        TrainConfig.model_validate(dict(data))
    except ValidationError as error:
        items = [item for item in error.errors() if item["type"] != RULE]
        return [complaint(item, TrainConfig, prefix) for item in items]
    return []


def value_error(path: str, value: Any) -> ConfigError | None:
    """Return what is wrong with `value` for the field, or item of a list, at `path`; rules between
    fields are left out."""
    model: type[BaseModel] = TrainConfig
    steps = path.split(".")
    while len(steps) > 1 and is_model(inner := field_type(model, steps[0])):
        model, steps = inner, steps[1:]
    loc = [0 if step.isdigit() else step for step in steps]
    for step in reversed(loc):
        value = [value] if step == 0 else {step: value}
    try:
        model.model_validate(value)
    except ValidationError as error:
        for item in error.errors():
            if item["loc"][: len(loc)] == tuple(loc) and item["type"] != RULE:
                found = complaint(item, model)
                rest = found.key.split(".")[len(loc) :]
                return ConfigError(found.message, key=".".join([path, *rest]))
    return None


@cache
def field_paths(model: type[BaseModel] = TrainConfig, prefix: str = "") -> tuple[str, ...]:
    """Return the dotted path of every single field, in the order of the definition."""
    found: list[str] = []
    for name in model.model_fields:
        inner = field_type(model, name)
        found += field_paths(inner, f"{prefix}{name}.") if is_model(inner) else [prefix + name]
    return tuple(found)


def is_option(path: str) -> bool:
    """Return whether `path` names an argument of the user's architecture, which may be any."""
    return re.fullmatch(rf"{re.escape(OPTIONS)}\.[^\W\d]\w*", path) is not None


def check_path(path: str) -> None:
    """Raise ConfigError unless `path` names a field of TrainConfig, an item of a list by index
    (`model.head.hidden.0`), a field of an item (`phases.1.lr`), or an option."""
    name, known = path, list(field_paths())
    if is_option(path) or path in known:
        return
    if list_path(path) in known:
        if type_at(TrainConfig, path) is not None:
            return
        item, _, last = path.rpartition(".")
        kind = type_at(TrainConfig, item)
        name, known = (last, list(kind.model_fields)) if is_model(kind) else (path, known)
    raise ConfigError(f"unknown field; {nearest(name, known)}", key=path)
