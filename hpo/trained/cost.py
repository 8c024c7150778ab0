"""Cost of training a network of a study: memory and time, from a timed step.

Outputs of frozen layers that are computed once and cached count where there are such.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from hpo.config.base import toml_repr
from hpo.config.train import TrainConfig
from hpo.data.dataset import DecodedImages
from hpo.errors import HpoError, InputError
from hpo.formatting import file_size, rough_duration
from hpo.training import device as runtime
from hpo.training import feature_cache, models
from hpo.training.weights import is_file

EVALUATION = 1 / 3
"""Cost of evaluating an image relative to training: there is no backward pass, which costs twice as
much as the forward pass, unless only the head is trained."""


@dataclass(frozen=True)
class CachedFeatures:
    """Outputs of frozen layers, computed once and cached on disk."""

    choices: int
    """Combinations with such layers."""
    prefixes: int
    """Different frozen prefixes, of networks or of images: the outputs of each are cached."""
    once_s: float
    """Seconds to compute one for all images without decoding; as the rest, of the combination with
    most trainable parameters."""
    epoch_s: float
    """Seconds of an epoch on cached outputs; 0 if nothing is trained."""
    size: int
    """Bytes on disk."""
    largest: int
    """Bytes of its larger part, training or validation."""
    limit_gb: float
    """`data.cache_limit_gb`, which limits each part."""

    @property
    def fits(self) -> bool:
        """Return whether they are within the limit."""
        return self.largest <= self.limit_gb * 1e9

    def describe(self, epochs: int) -> str:
        """Return a line on a trial of `epochs`."""
        each = f" for each of {self.prefixes} choices" if self.prefixes > 1 else ""
        limit = f"data.cache_limit_gb = {self.limit_gb:g}"
        if not self.fits:
            return (
                f"the outputs of its frozen layers take {file_size(self.size)}, more than {limit} "
                "allows: they are computed in every epoch"
            )
        later = rough_duration(epochs * self.epoch_s) if self.epoch_s else "as long as their search"
        first = rough_duration(self.once_s + epochs * self.epoch_s)
        return (
            f"frozen layers are computed once, {file_size(self.size)} on disk{each} ({limit}): the "
            f"first trial {first}, later ones {later}"
        )


@dataclass(frozen=True)
class Cost:
    """Cost of training a network at the largest batch."""

    architecture: str
    stem: str
    image_size: int
    built: int
    """Number of combinations of the other choices."""
    parameters: int
    """Parameters of the combination with most trainable ones, frozen ones included."""
    batch_size: int
    memory_mb: float | None
    """Peak memory of a training step in MB (10^6 bytes); None if it does not fit the device."""
    epoch_s: float | None
    """Seconds of one epoch with validation and loading, once the images are decoded."""
    kept: CachedFeatures | None = None
    """Of the combination with most trainable parameters among those with outputs to cache."""
    obstacle: str | None = None
    """Why frozen layers of some combination are computed in every epoch nevertheless."""
    spread: tuple[float, float] = (1.0, 1.0)
    """The fastest and the slowest timed step, relative to the median."""
    decode_s: float = 0.0
    """Seconds to decode an image, once."""
    timed: TrainConfig | None = None
    """What was timed."""
    still: float = 1.0
    """Part of the augmentations that are searched with which outputs can be cached."""

    @property
    def kept_part(self) -> float:
        """Return the part of the trials that train on cached outputs."""
        fits = self.kept is not None and self.kept.fits
        return self.still * self.kept.choices / self.built if self.kept and fits else 0.0

    @property
    def mean_epoch_s(self) -> float | None:
        """Return the mean over all combinations, once the cached outputs were computed."""
        if self.epoch_s is None or self.kept is None:
            return self.epoch_s
        return self.kept_part * self.kept.epoch_s + (1 - self.kept_part) * self.epoch_s

    @property
    def _epoch_words(self) -> str:
        """Return the time of an epoch, on cached outputs where there are some."""
        full = f"{rough_duration(self.epoch_s or 0.0)} an epoch"
        if self.kept is None or not self.kept_part:
            return full
        fast = f"{rough_duration(self.kept.epoch_s)} an epoch on outputs of frozen layers"
        return fast if self.kept_part == 1 else f"{full}, {fast}"

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
            f"{self._epoch_words}"
        )


def grouped(configs: Sequence[TrainConfig]) -> Iterator[list[TrainConfig]]:
    """Group configurations by architecture, stem and image size, each network once."""

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
    images: DecodedImages,
) -> Cost:
    """Build each of `group`; time a step of the one with most trainable parameters, and another of
    the one with most among those with outputs to cache. `counts`: images by part; `variants`: data
    sets or normalisations that are searched. Raises what building a network raises."""
    cuts: dict[str, tuple[bool, str | None]] = {}
    built = [_built(config, classes, cuts) for config in group]
    place = max(range(len(group)), key=lambda i: built[i].trainable)
    config = _at_most(group[place], counts["train"])
    memory, epoch, kept, spread = None, None, None, (1.0, 1.0)
    try:
        config = _resolved(config, classes, device, threads)
        step = runtime.measure_step(config, classes=classes, device=device)
        memory = step.peak_memory_mb
        spread = step.spread
        load_s = runtime.measure_loader(config, images, device)
        shown = (counts["train"] + counts["val"]) * (config.data.folds or 1)
        epoch = _epoch_images(config, counts) * step.seconds / step.images
        epoch += _beside(shown * load_s, epoch, device)
        there = [i for i, one in enumerate(built) if one.keeps]
        if there:
            most = group[max(there, key=lambda i: built[i].trainable)]
            most = _resolved(_at_most(most, counts["train"]), classes, device, threads)
            prefixes = len({_prefix_key(group[i]) for i in there}) * variants
            kept = _kept(most, len(there), prefixes, classes, counts, device)
    except torch.OutOfMemoryError:
        pass  # shown as such: training would go on with smaller parts of the batch
    model, side, batch = config.model, config.data.image_size, config.batch_size
    total, obstacles = built[place].parameters, [why for _, why in cuts.values() if why]
    return Cost(
        *(model.architecture, model.stem, side, len(group), total, batch, memory, epoch, kept),
        obstacle=obstacles[0] if obstacles else None,
        spread=spread,
        decode_s=images.decode_s,
        timed=config,
    )


def _beside(loading_s: float, training_s: float, device: torch.device) -> float:
    """Return the seconds that loading adds to an epoch: on a GPU it runs ahead in a thread."""
    return max(0.0, loading_s - training_s) if device.type == "cuda" else loading_s


def _at_most(config: TrainConfig, images: int) -> TrainConfig:
    return config.model_copy(update={"batch_size": min(config.batch_size, images)})


def _resolved(config: TrainConfig, classes: int, device: torch.device, threads: int) -> TrainConfig:
    found = runtime.resolve(config, classes=classes, device=device, threads=threads)
    return config.model_copy(update={"runtime": found})


def _epoch_images(config: TrainConfig, counts: Mapping[str, int]) -> float:
    """Return the images of an epoch of all folds, evaluated ones by their relative cost."""
    learnt = 0 if config.frozen else counts["train"]
    seen = counts["val"] + (counts["train"] if config.looks_up else 0)
    head_alone = config.all_phases()[-1].trainable_blocks == 0
    return (learnt + seen * (1.0 if head_alone else EVALUATION)) * (config.data.folds or 1)


def _prefix_key(config: TrainConfig) -> str:
    """Return a key that configurations with the same cached outputs share."""
    model = config.model.model_dump(exclude={"head", "dropout", "trainable_blocks"})
    return f"{model!r} {_blocks(config)}"


def _kept(
    config: TrainConfig,
    choices: int,
    prefixes: int,
    classes: int,
    counts: Mapping[str, int],
    device: torch.device,
) -> CachedFeatures | None:
    cost = runtime.measure_feature_cache(config, classes=classes, device=device)
    if cost is None:
        return None
    views = 1 if config.frozen else feature_cache.num_views(config.augment)
    train = counts["train"] * views
    again = counts["train"] if config.looks_up and views > 1 else 0
    images = train + again + counts["val"]
    largest = max(train, counts["val"])
    if config.data.folds:
        images *= config.data.folds if config.data.normalize == "dataset" else 1
        largest = largest if config.data.limit_train else counts["val"] * views
    return CachedFeatures(
        choices=choices,
        prefixes=prefixes,
        once_s=images * cost.compute_s,
        epoch_s=_epoch_images(config, counts) * cost.step_s / cost.images,
        size=images * cost.bytes,
        largest=largest * cost.bytes,
        limit_gb=config.data.cache_limit_gb,
    )


@dataclass(frozen=True)
class _Built:
    """A network that was built."""

    trainable: int
    """Parameters that are trainable in some phase."""
    parameters: int
    keeps: bool
    """Whether outputs of its frozen layers can be cached."""


def _built(config: TrainConfig, classes: int, cuts: dict[str, tuple[bool, str | None]]) -> _Built:
    """Build a network; a local file of weights is read, a name is not downloaded. `cuts`: whether
    outputs can be cached, or else why not, by prefix; that of `config` is added."""
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
        raise InputError(f"{error} (with {toml_repr(chosen)})" if chosen else str(error)) from error
    parameters = list(model.parameters())
    trainable = sum(one.numel() for one in parameters if one.requires_grad)
    key = f"{_prefix_key(config)} {feature_cache.is_cacheable(config)}"
    if key not in cuts:
        cut, why = feature_cache.find_cut_or_obstacle(model, frozen, config, torch.device("cpu"))
        cuts[key] = cut is not None, why
    return _Built(trainable, sum(one.numel() for one in parameters), cuts[key][0])
