"""Dry run of a study: data, networks, memory and time, without writing anything.

Every combination of the choices that shape the network is built; for each architecture, stem and
image size, the one with most trainable parameters runs a training step at the largest batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from hpo.config.base import toml_repr
from hpo.config.constraints import to_relax, unmet_reason
from hpo.config.parameters import Choice
from hpo.config.recommended import recommend
from hpo.config.remarks import remarks
from hpo.config.study import Proposal, StudyFile
from hpo.config.train import TrainConfig
from hpo.control import enter_phase
from hpo.data.dataset import DecodedImages, examine_data, sample_training_images
from hpo.data.report import DataReport
from hpo.errors import ConfigError, HpoError, InputError
from hpo.formatting import exact_duration, file_size, plural, rough_duration
from hpo.paths import Home
from hpo.search.rungs import what_decides
from hpo.trained.forecast import Forecast, forecast
from hpo.trained.quicker import LONG_S, faster, limit_for
from hpo.training import device as runtime
from hpo.training import feature_cache, models
from hpo.training.evaluation import require_functions
from hpo.training.metrics import asked, require_supported
from hpo.training.profiling import network_costs
from hpo.training.tasks import task_of
from hpo.training.weights import is_file, look, needed_weights

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


SAMPLE = 32
"""Training images that are decoded and loaded to time that."""
MOST_BUILT = 200
"""Most combinations that are built; beyond that each choice is built, not each combination."""
UNSHAPED = ("model.dropout", "model.cnn.dropout")
"""Fields of the model without an effect on shapes."""
SIZES = ("data.image_size", "data.resize_size", "data.resize")


@dataclass(frozen=True)
class CheckResult:
    """Data and costs of a study; `str` gives the output of `hpo check`."""

    name: str
    report: DataReport
    """Report of the first choice if the data are searched."""
    costs: tuple[Cost, ...]
    file: StudyFile
    workers: int
    device: str
    notes: tuple[str, ...]
    decides: str
    """What decides which trials go on, in words."""
    quicker: tuple[str, ...] = ()
    """What would make the study quicker, with factors."""
    first: tuple[Proposal, ...] = ()
    """Recommended configurations that a new study tries first."""

    @property
    def data(self) -> Mapping[str, Mapping[str, int]]:
        """Return {part: {class: images}}."""
        return self.report.parts

    @property
    def forecast(self) -> Forecast | None:
        """Return what the study will spend of its budgets; None if that cannot be told."""
        timed = [cost.mean_epoch_s for cost in self.costs if cost.mean_epoch_s is not None]
        mean = sum(timed) / len(timed) if timed else None
        file = replace(self.file, proposals=self.first)
        spread = _mean_spread(self.costs)
        once = self._once_s
        return forecast(file, workers=self.workers, epoch_s=mean, once_s=once, spread=spread)

    def _once_s(self, trials: float) -> float:
        """Return the seconds for outputs that the first worker to need them computes and caches."""
        images = sum(sum(self.data.get(part, {}).values()) for part in ("train", "val"))
        decoding = images * max((cost.decode_s for cost in self.costs), default=0.0)
        found = [cost.kept for cost in self.costs if cost.kept and cost.kept.fits]
        many = sum(one.prefixes for one in found)
        if not many:
            return decoding
        mean = sum(one.prefixes * one.once_s for one in found) / many
        return decoding + mean * math.ceil(min(many, trials) / self.workers)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, sizes in MB and bytes, times in seconds."""
        known = ("architecture", "stem", "image_size", "built", "parameters", "batch_size",
                 "memory_mb", "epoch_s", "spread", "decode_s", "obstacle")  # fmt: skip
        return {
            "study": self.name,
            "images": self.data,
            "data": list(self.report.lines()),
            "device": self.device,
            "workers": self.workers,
            "networks": [{name: getattr(cost, name) for name in known} for cost in self.costs],
            "forecast": None if self.forecast is None else asdict(self.forecast),
            "quicker": self.quicker,
            "decides": self.decides,
            "first": [{"origin": str(one), "params": dict(one.values)} for one in self.first],
            "notes": self.notes,
        }

    def __str__(self) -> str:
        trials, epochs = self.file.study.trials, self.file.max_epochs
        shown = "trials, as many as fit," if trials is None else plural(trials, "trial")
        head = f"study {self.name}: {shown} of up to {plural(epochs, 'epoch')}"
        lines = [head, self.decides, "data:"]
        lines += [f"  {line}" for line in self.report.lines()]
        lines += [f"  {line}" for line in _imbalance(self.data["train"])]
        lines += ["tried first, after the baselines:"] if self.first else []
        for one in self.first:
            given = ", ".join(f"{name} = {toml_repr(it)}" for name, it in one.values.items())
            lines += [f"  {one}", f"    {given}"]
        lines.append(f"networks, a step on {self.device}:")
        for cost in self.costs:
            lines.append(f"  {cost}")
            lines += [f"    {cost.kept.describe(epochs)}"] if cost.kept else []
            lines += [f"    {cost.obstacle}"] if cost.obstacle else []
        if (found := self.forecast) is not None:
            lines.append(f"in all: {found}")
        lines += [f"quicker: {', '.join(self.quicker)}"] if self.quicker else []
        return "\n".join([*lines, *self.notes, "nothing was written"])


def check(file: StudyFile, *, home: Home, device: str, workers: int, threads: int) -> CheckResult:
    """Open the data, build the networks and time a step of each on `device` with `threads` CPU
    threads, as each of `workers` would have.

    Raises DataError for data that cannot be used, InputError for an unknown device, and ConfigError
    naming every architecture that cannot be built or trained.
    """
    chosen = runtime.torch_device(device)
    configs = list(_configs(file))
    enter_phase("reading and decoding images")
    report = _examined(configs, home)
    data = report.parts
    counts = {part: sum(count.values()) for part, count in data.items()}
    for config in map(file.config, file.space.corners()):
        wanted = asked(config, *file.objectives)
        require_supported(wanted, data["val"])
        require_functions(wanted)
    classes = len(data["train"])
    for config in map(file.config, file.space.corners()):
        task_of(config).require(config, counts["train"], classes)
    costs, problems = [], []
    variants, still = _variants(file), _still_part(file)
    largest = max(configs, key=lambda config: config.data.image_size)
    images = sample_training_images(largest.data, SAMPLE)
    for group in grouped(configs):
        model, size = group[0].model, group[0].data.image_size
        enter_phase(f"timing {model.architecture} at {size} px")
        try:
            needed_weights(group)
            cost = estimate(group, classes, counts, chosen, threads, variants, images)
            costs.append(replace(cost, still=still))
        except HpoError as error:
            problems.append(f"{model.architecture} at {size} px: {error}")
    if problems:
        lines = "".join(f"\n  {one}" for one in problems)
        raise ConfigError(f"{len(problems)} networks of the space cannot be trained:{lines}")
    result = CheckResult(
        name=file.name,
        report=report,
        costs=tuple(costs),
        file=file,
        workers=workers,
        device=device,
        first=recommend(file),
        notes=(
            *_on_learning(file),
            *remarks(file),
            *_infeasible(file, configs, classes),
            *_notes(configs, home),
        ),
        decides=what_decides(file),
    )
    return replace(result, quicker=tuple(_quicker(result, classes, chosen)))


def _quicker(result: CheckResult, classes: int, device: torch.device) -> Iterator[str]:
    """Yield what would make a study that takes long quicker, most of all its slowest network."""
    found = result.forecast
    if found is None or found.seconds is None or found.seconds[1] < LONG_S:
        return
    timed = [cost for cost in result.costs if cost.epoch_s and cost.timed and not cost.kept]
    if timed:
        slowest = max(timed, key=lambda cost: cost.epoch_s or 0.0)
        yield from faster(result.file, slowest.timed or TrainConfig(), classes, device)
    if result.file.study.max_time is None:
        yield f"or a limit: --time {exact_duration(limit_for(found.seconds[0]))}"


def _mean_spread(costs: Sequence[Cost]) -> tuple[float, float]:
    """Return the mean of the fastest and of the slowest steps, relative to the medians."""
    timed = [cost.spread for cost in costs if cost.epoch_s is not None] or [(1.0, 1.0)]
    return sum(low for low, _ in timed) / len(timed), sum(high for _, high in timed) / len(timed)


def _on_learning(file: StudyFile) -> Iterator[str]:
    if source := file.study.learn_from:
        names = "every compatible study" if source == "auto" else ", ".join(source)
        yield (
            f"before these the study tries what it learns from {names}, chosen when it is created"
        )


def _infeasible(file: StudyFile, configs: list[TrainConfig], classes: int) -> Iterator[str]:
    """Yield the choices whose networks all violate the constraints on parameters and flops."""
    limits = [one for one in file.study.limits if one.name in ("parameters", "flops")]
    if not limits:
        return
    wanted, cpu = [one.name for one in limits], runtime.torch_device("cpu")
    known: dict[str, str | None] = {}
    found: list[str | None] = []
    for config in configs:
        key = f"{config.model!r} {config.data.image_size}"
        if key not in known:
            costs = network_costs(config, wanted, classes=classes, device=cpu)
            known[key] = unmet_reason(limits, costs)
        found.append(known[key])
    reasons = [why for why in found if why]
    if len(reasons) == len(found):
        yield f"every network is infeasible: relax in study.constraints {to_relax(limits, reasons)}"
        return
    tried = list(zip(_combinations(file), found, strict=True))
    for name, parameter in file.space.items():
        for value in parameter.bounds() if isinstance(parameter, Choice) else ():
            with_it = [why for values, why in tried if values.get(name) == value]
            if with_it and all(with_it):
                given = f"{name} = {toml_repr(value)}"
                yield f"{given} is infeasible in every network built: {with_it[0]}"


def _configs(file: StudyFile) -> Iterator[TrainConfig]:
    """Yield every combination of the choices that shape the network, at the largest batch, with an
    augmentation under which outputs of frozen layers can be cached, if one is searched."""
    batch = max(file.config(corner).batch_size for corner in file.space.corners())
    still = next((one for one, keeps in _augmentations(file) if keeps), {})
    for values in _combinations(file):
        chosen = {name: one for name, one in still.items() if name in values}
        yield file.config(values | chosen).model_copy(update={"batch_size": batch})


def _still_part(file: StudyFile) -> float:
    """Return the part of the searched augmentations with which frozen layers give the same outputs
    in every epoch; 1 where no network could use any."""
    found = [keeps for _, keeps in _augmentations(file)]
    return sum(found) / len(found) if any(found) else 1.0


def _augmentations(file: StudyFile) -> list[tuple[dict[str, Any], bool]]:
    """Return the combinations of the parameters that decide whether images are the same in every
    epoch, each with whether outputs of frozen layers can be cached under it; the two ends of all
    where there are too many."""
    first = _combinations(file)[0]
    ends = {
        name: parameter.bounds()
        for name, parameter in file.space.items()
        if name in first and (name.startswith("augment.") or name == "ema_decay")
    }
    rows = list(itertools.islice(itertools.product(*ends.values()), MOST_BUILT + 1))
    if len(rows) > MOST_BUILT:
        rows = [tuple(one[end] for one in ends.values()) for end in (0, -1)]
    found = []
    for row in rows:
        chosen = dict(zip(ends, row, strict=True))
        with suppress(ConfigError):  # not all go together
            found.append((chosen, feature_cache.is_cacheable(file.config(first | chosen))))
    return found


def _combinations(file: StudyFile) -> list[dict[str, Any]]:
    """Return all combinations of the parameters that shape the network, the others at their first
    value; more than MOST_BUILT are replaced by the corners of the space."""
    space = file.space
    found: list[dict[str, Any]] = [{}]
    for name, parameter in space.items():
        network = name.startswith("model.") or name.endswith(".trainable_blocks")
        shaping = (network or name in SIZES) and name not in UNSHAPED
        ends = parameter.bounds() if shaping else parameter.bounds()[:1]
        found = [
            values | ({name: end} if on else {})
            for values in found
            for on in [space.is_active(name, values)]
            for end in (ends if on else ends[:1])
        ]
        if len(found) > MOST_BUILT:
            return space.corners()
    return found


def _variants(file: StudyFile) -> int:
    """Return the number of choices of the data, sizes apart, that change the input images."""
    data = {name: one for name, one in file.space.items() if name.startswith("data.")}
    same = {*SIZES, "data.balance"}
    return math.prod(len(one.bounds()) for name, one in data.items() if name not in same)


def _examined(configs: list[TrainConfig], home: Home) -> DataReport:
    """Report on the data of the first configuration with every file decoded; examine the data of
    the others, too."""
    found: dict[str, DataReport] = {}
    for config in configs:
        key = config.data.model_copy(update=dict.fromkeys(("image_size", "resize_size"), 224))
        if repr(key) not in found:
            found[repr(key)] = examine_data(config.data, home.cache, remember=False)
    return next(iter(found.values()))


def _notes(configs: list[TrainConfig], home: Home) -> Iterator[str]:
    yield from look(needed_weights(configs))
    folds = max((config.data.folds or 0 for config in configs), default=0)
    if folds:
        yield (
            f"data.folds = {folds}: a trial trains {folds} networks at once, counted above; train "
            "and val are those of the first fold"
        )
    yield f"trials and decoded images will be under {home.root}"


def _imbalance(of_class: Mapping[str, int], least: float = 1.5) -> Iterator[str]:
    """Yield a line if the training classes are unequal."""
    most, fewest = (choose(of_class, key=lambda name: of_class[name]) for choose in (max, min))
    if (ratio := of_class[most] / max(1, of_class[fewest])) >= least:
        yield (
            f"unequal classes: {most} has {ratio:.3g} times as many training images as {fewest} "
            f'({of_class[most]} and {of_class[fewest]}); data.balance = "loss" or "sampling" lets '
            "them count alike"
        )
