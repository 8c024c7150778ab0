"""What the networks of a study would cost here, by building them and timing a step of each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hpo.definition.config import TrainConfig
from hpo.definition.parameters import shown
from hpo.engine import features, models, runtime
from hpo.engine.weights import SUFFIXES
from hpo.errors import HpoError, InputError

EVALUATION = 1 / 3
"""Cost of an image in evaluation against training: no backward pass, which costs twice as much as
the forward one, and hardly anything where the head alone learns."""


@dataclass(frozen=True)
class Kept:
    """Frozen layers of a network, computed once and kept on disk."""

    choices: int
    """Combinations that have some."""
    beginnings: int
    """Different frozen layers among those, or of different images: each is computed and kept."""
    once_s: float
    """Seconds to compute them for all images, decoding apart; like what follows of the combination
    with most to learn."""
    epoch_s: float
    """Seconds of an epoch on what was kept; 0 where nothing learns."""
    size: int
    """Bytes on disk."""
    largest: int
    """Bytes of the larger part of it, training or validation."""
    limit_gb: float
    """`data.cache_limit_gb`, of each part."""

    @property
    def fits(self) -> bool:
        return self.largest <= self.limit_gb * 1e9

    def told(self, epochs: int) -> str:
        """For a trial of so many epochs."""
        each = f" for each of {self.beginnings} choices" if self.beginnings > 1 else ""
        limit = f"data.cache_limit_gb = {self.limit_gb:g}"
        if not self.fits:
            return (
                f"what its frozen layers give takes {size(self.size)}, more than {limit} allows: "
                "it is computed in every epoch"
            )
        later = duration(epochs * self.epoch_s) if self.epoch_s else "as long as their search"
        first = duration(self.once_s + epochs * self.epoch_s)
        return (
            f"frozen layers are computed once, {size(self.size)} on disk{each} ({limit}): the "
            f"first trial {first}, later ones {later}"
        )


@dataclass(frozen=True)
class Cost:
    """What a network costs at the largest batch."""

    architecture: str
    stem: str
    image_size: int
    built: int
    """Combinations of the other choices that were built."""
    parameters: int
    """Of the combination with most to learn, frozen ones included."""
    batch_size: int
    memory_mb: float | None
    """Of a training step, in MB (10^6 bytes); None where it does not fit the device."""
    epoch_s: float | None
    """Seconds of one epoch with validation, decoding and augmentation apart."""
    kept: Kept | None = None
    """Of the combination with most to learn among those that have frozen layers to keep."""
    obstacle: str | None = None
    """Why frozen layers of some combination are computed in every epoch that need not be."""

    @property
    def mean_epoch_s(self) -> float | None:
        """Of all combinations, once what is kept was computed."""
        if self.epoch_s is None or self.kept is None or not self.kept.fits:
            return self.epoch_s
        others = (self.built - self.kept.choices) * self.epoch_s
        return (self.kept.choices * self.kept.epoch_s + others) / self.built

    def __str__(self) -> str:
        name = f"{self.architecture} at {self.image_size} px"
        name += " (small stem)" if self.stem == "small" else ""
        text = f"{self.parameters:,} parameters"
        if self.memory_mb is None or self.epoch_s is None:
            return (
                f"{name}: {text}; a batch of {self.batch_size} does not fit the device, so it will "
                "be computed in smaller parts"
            )
        return (
            f"{name}: {text}, about {self.memory_mb:,.0f} MB at batch {self.batch_size}, "
            f"{duration(self.epoch_s)} an epoch"
        )


def grouped(configs: Sequence[TrainConfig]) -> Iterator[list[TrainConfig]]:
    """Configurations by architecture, stem and image size, each network once."""

    def group(config: TrainConfig) -> tuple[str, str, int]:
        return config.model.architecture, config.model.stem, config.data.image_size

    for _, found in itertools.groupby(sorted(configs, key=group), key=group):
        different: dict[str, TrainConfig] = {}
        for config in found:
            different.setdefault(f"{config.model!r} {_blocks(config)}", config)
        yield list(different.values())


def _blocks(config: TrainConfig) -> str:
    return str([phase.trainable_blocks for phase in config.all_phases()])


def estimate(
    group: Sequence[TrainConfig],
    classes: int,
    counts: Mapping[str, int],
    device: torch.device,
    threads: int,
    variants: int,
) -> Cost:
    """Build each of `group`, then let the one with most to learn make a step, and of those with
    frozen layers to keep the one with most to learn another. `counts`: images by part; `variants`:
    how many data sets or normalisations are searched. Raises what building a network raises."""
    cuts: dict[str, tuple[bool, str | None]] = {}
    built = [_built(config, classes, cuts) for config in group]
    place = max(range(len(group)), key=lambda i: built[i].learning)
    config = _at_most(group[place], counts["train"])
    memory, epoch, kept = None, None, None
    try:
        config = _settled(config, classes, device, threads)
        step = runtime.measure_step(config, classes=classes, device=device)
        memory = step.peak_memory_mb
        epoch = _epoch_images(config, counts) * step.seconds / step.images
        there = [i for i, one in enumerate(built) if one.keeps]
        if there:
            most = group[max(there, key=lambda i: built[i].learning)]
            most = _settled(_at_most(most, counts["train"]), classes, device, threads)
            beginnings = len({_beginning(group[i]) for i in there}) * variants
            kept = _kept(most, len(there), beginnings, classes, counts, device)
    except torch.OutOfMemoryError:
        pass  # shown as such: training would go on with smaller parts of the batch
    model, side, batch = config.model, config.data.image_size, config.batch_size
    total, obstacles = built[place].parameters, [why for _, why in cuts.values() if why]
    return Cost(
        *(model.architecture, model.stem, side, len(group), total, batch, memory, epoch, kept),
        obstacle=obstacles[0] if obstacles else None,
    )


def _at_most(config: TrainConfig, images: int) -> TrainConfig:
    return config.model_copy(update={"batch_size": min(config.batch_size, images)})


def _settled(config: TrainConfig, classes: int, device: torch.device, threads: int) -> TrainConfig:
    found = runtime.resolve(config, classes=classes, device=device, threads=threads)
    return config.model_copy(update={"runtime": found})


def _epoch_images(config: TrainConfig, counts: Mapping[str, int]) -> float:
    """Of an epoch of all folds, evaluation counted at what it costs against training."""
    learnt = 0 if config.frozen else counts["train"]
    seen = counts["val"] + (counts["train"] if config.task == "retrieval" else 0)
    head_alone = config.all_phases()[-1].trainable_blocks == 0
    return (learnt + seen * (1.0 if head_alone else EVALUATION)) * (config.data.folds or 1)


def _beginning(config: TrainConfig) -> str:
    """The same for configurations that share what is kept."""
    model = config.model.model_dump(exclude={"head", "dropout", "trainable_blocks"})
    return f"{model!r} {_blocks(config)}"


def _kept(
    config: TrainConfig,
    choices: int,
    beginnings: int,
    classes: int,
    counts: Mapping[str, int],
    device: torch.device,
) -> Kept | None:
    cost = runtime.measure_kept(config, classes=classes, device=device)
    if cost is None:
        return None
    views = 1 if config.frozen else features.shown(config.augment)
    train = counts["train"] * views
    again = counts["train"] if config.task == "retrieval" and views > 1 else 0
    images = train + again + counts["val"]
    largest = max(train, counts["val"])
    if config.data.folds:
        images *= config.data.folds if config.data.normalize == "dataset" else 1
        largest = largest if config.data.limit_train else counts["val"] * views
    return Kept(
        choices=choices,
        beginnings=beginnings,
        once_s=images * cost.compute_s,
        epoch_s=_epoch_images(config, counts) * cost.step_s / cost.images,
        size=images * cost.bytes,
        largest=largest * cost.bytes,
        limit_gb=config.data.cache_limit_gb,
    )


@dataclass(frozen=True)
class _Built:
    """A network that could be built."""

    learning: int
    """Parameters that learn in the end."""
    parameters: int
    keeps: bool
    """Whether it has frozen layers to keep."""


def _built(config: TrainConfig, classes: int, cuts: dict[str, tuple[bool, str | None]]) -> _Built:
    """A local file of weights is read, a name is not downloaded. `cuts`: whether frozen layers can
    be kept, or else why not, of each beginning that was seen before; this one is added."""
    weights = config.model.weights
    try:
        model = models.build(
            config.model,
            classes=classes,
            image_size=config.data.image_size,
            pretrained=weights is not None and is_file(weights),
        )
        for phase in config.all_phases():
            frozen = models.set_trainable(model, phase.trainable_blocks)
    except HpoError as error:
        chosen = config.model.model_dump(exclude_defaults=True, exclude={"architecture", "stem"})
        raise InputError(f"{error} (with {shown(chosen)})" if chosen else str(error)) from error
    parameters = list(model.parameters())
    learning = sum(one.numel() for one in parameters if one.requires_grad)
    beginning = f"{_beginning(config)} {features.lasting(config)}"
    if beginning not in cuts:
        cut, why = features.cut_or_obstacle(model, frozen, config, torch.device("cpu"))
        cuts[beginning] = cut is not None, why
    return _Built(learning, sum(one.numel() for one in parameters), cuts[beginning][0])


def is_file(weights: str) -> bool:
    """Whether `model.weights` names a file, not one of torchvision's."""
    return Path(weights).suffix in SUFFIXES or "/" in weights


def size(count: float) -> str:
    """Bytes for people: 0.3 MB, 12 MB, 3.4 GB."""
    value, unit = (count / 1e9, "GB") if count >= 1e9 else (count / 1e6, "MB")
    return f"{value:,.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"


def approximately(seconds: float) -> str:
    """Return a duration as an estimate: about 3 min, under 0.1 s."""
    text = duration(seconds)
    return text if text.startswith("under") else f"about {text}"


def duration(seconds: float) -> str:
    """Rough, for people: 0.4 s, 12 s, 3 min, 2.5 h."""
    if seconds < 0.1:
        return "under 0.1 s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
