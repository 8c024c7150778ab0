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
from hpo.data.dataset import examine_data, sample_training_images
from hpo.data.report import DataReport
from hpo.errors import ConfigError, HpoError
from hpo.formatting import exact_duration, plural
from hpo.paths import Home
from hpo.search.promotion import what_decides
from hpo.trained.cost import Cost, estimate, grouped
from hpo.trained.forecast import Forecast, forecast
from hpo.training import device as runtime
from hpo.training import feature_cache
from hpo.training.evaluation import require_functions
from hpo.training.metrics import asked, require_supported
from hpo.training.profiling import network_costs
from hpo.training.tasks import task_of
from hpo.training.weights import look, needed_weights

SAMPLE = 32
"""Training images that are decoded and loaded to time that."""
MOST_BUILT = 200
"""Most combinations that are built; beyond that each choice is built, not each combination."""
UNSHAPED = ("model.dropout", "model.cnn.dropout")
"""Fields of the model without an effect on shapes."""
SIZES = ("data.image_size", "data.resize_size", "data.resize")
LONG_S = 600.0
"""A search that may take longer is shown what would be quicker."""
LIMITS_S = tuple(60.0 * one for one in (5, 10, 20, 30, 60, 120, 240, 480, 1_440))
WORTH = 0.75
"""Largest part of the time that makes a change worth a word."""
SMALLEST = 64
"""Smallest image size that is proposed."""
BLOCKS = 2
"""Trainable blocks that are proposed for pretrained weights."""
FEWEST_EPOCHS = 4


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
        yield from _faster(result.file, slowest.timed or TrainConfig(), classes, device)
    if result.file.study.max_time is None:
        yield f"or a limit: --time {exact_duration(_limit_for(found.seconds[0]))}"


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


def _faster(
    file: StudyFile, config: TrainConfig, classes: int, device: torch.device
) -> Iterator[str]:
    """Yield changes of what is not searched, each with the part of the time that is left: by fewer
    epochs, and by measured steps of `config` on smaller images and with frozen blocks."""
    if "epochs" not in file.space and not config.phases and config.epochs >= FEWEST_EPOCHS:
        yield f"epochs = {config.epochs // 2} ({_fraction(config.epochs // 2 / config.epochs)})"
    before = _step_s(config, classes, device)
    for name, changed in _changed(file, config):
        after = _step_s(changed, classes, device)
        if before and after and after / before <= WORTH:
            yield f"{name} (about {_fraction(after / before)})"


def _changed(file: StudyFile, config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """Yield configurations that differ from `config` in one setting, which is named."""
    size = int(config.data.image_size * 0.7) // 32 * 32
    resized = any(one.startswith(("data.image_size", "data.resize")) for one in file.space)
    if size >= SMALLEST and not resized:
        data = config.data.model_copy(update={"image_size": size})
        yield f"data.image_size = {size}", config.model_copy(update={"data": data})
    frozen = any(one.endswith("trainable_blocks") for one in file.space) or config.phases
    if config.model.weights is not None and not frozen and config.model.trainable_blocks == "all":
        model = config.model.model_copy(update={"trainable_blocks": BLOCKS})
        changed = config.model_copy(update={"model": model})
        yield f"model.trainable_blocks = {BLOCKS}", changed


def _step_s(config: TrainConfig, classes: int, device: torch.device) -> float | None:
    """Return the seconds of a step; None where it cannot be taken."""
    try:
        return runtime.measure_step(config, classes=classes, device=device).seconds
    except (HpoError, torch.OutOfMemoryError):
        return None


def _fraction(ratio: float) -> str:
    """Return a part as a fraction: 1/2, 2/3, 1/8."""
    if ratio > 0.58:
        return "2/3"
    return f"1/{max(2, round(1 / ratio))}"


def _limit_for(seconds: float) -> float:
    """Return a limit of time below what a search is expected to take."""
    return max([one for one in LIMITS_S if one <= seconds / 2], default=LIMITS_S[0])
