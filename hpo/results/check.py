"""What a study would do here, tried without writing anything: no cache, no database, no download.

Every combination of the choices that shape the network is built; of each architecture, stem and
image size the one with most to learn makes a training step at the largest batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpo.definition.config import TrainConfig
from hpo.definition.constraints import to_relax, unmet
from hpo.definition.parameters import Choice, shown
from hpo.definition.remarks import remarks
from hpo.definition.studyfile import StudyFile
from hpo.engine import models, runtime
from hpo.engine.costs import network_costs
from hpo.engine.data_report import DataReport
from hpo.engine.datasets import examine_data
from hpo.engine.embedding import width
from hpo.engine.goals import asked, require_supported
from hpo.engine.measures import require_functions
from hpo.engine.retrieval import require_components
from hpo.engine.weights import require_name
from hpo.errors import ConfigError, HpoError
from hpo.paths import Home
from hpo.results.estimate import Cost, approximately, estimate, grouped, is_file

MOST_BUILT = 200
"""Combinations that are built; beyond it every choice is, but not every combination."""
UNSHAPED = ("model.dropout", "model.cnn.dropout")
"""Fields of the model that change no shape."""
SIZES = ("data.image_size", "data.resize_size", "data.resize")


@dataclass(frozen=True)
class CheckResult:
    """Data and costs of a study; `str` is what `hpo check` prints."""

    name: str
    report: DataReport
    """Of the first choice where the data are searched."""
    costs: tuple[Cost, ...]
    trials: int
    epochs: int
    """The most of a trial."""
    workers: int
    device: str
    notes: tuple[str, ...]

    @property
    def data(self) -> Mapping[str, Mapping[str, int]]:
        """{part: {class: images}}."""
        return self.report.parts

    @property
    def total_s(self) -> float | None:
        """Seconds of the whole budget if no trial is pruned; None where nothing could be timed."""
        timed = [cost.mean_epoch_s for cost in self.costs if cost.mean_epoch_s is not None]
        if not timed:
            return None
        rounds = math.ceil(self.trials / self.workers)
        return self._once_s() + rounds * self.epochs * sum(timed) / len(timed)

    def _once_s(self) -> float:
        """Seconds for what is computed once and kept: by whichever worker comes first."""
        found = [cost.kept for cost in self.costs if cost.kept and cost.kept.fits]
        many = sum(one.beginnings for one in found)
        if not many:
            return 0.0
        mean = sum(one.beginnings * one.once_s for one in found) / many
        return mean * math.ceil(min(many, self.trials) / self.workers)

    def __str__(self) -> str:
        lines = [f"study {self.name}: {self.trials} trials of up to {self.epochs} epochs", "data:"]
        lines += [f"  {line}" for line in self.report.lines()]
        lines += [f"  {line}" for line in _imbalance(self.data["train"])]
        lines.append(f"networks, a step on {self.device}:")
        for cost in self.costs:
            lines.append(f"  {cost}")
            lines += [f"    {cost.kept.told(self.epochs)}"] if cost.kept else []
            lines += [f"    {cost.obstacle}"] if cost.obstacle else []
        if self.total_s is not None:
            lines.append(
                f"in all: {approximately(self.total_s)} with {self.workers} "
                f"worker{'s' * (self.workers > 1)}; pruning shortens it"
            )
        return "\n".join([*lines, *self.notes, "nothing was written"])


def check(file: StudyFile, *, home: Home, device: str, workers: int, threads: int) -> CheckResult:
    """Find the data, build the networks, time a step of each, on `device` with `threads` CPU
    threads as each of `workers` would have.

    Raises DataError for data that cannot be used, InputError for an unknown device, and ConfigError
    naming every architecture that cannot be built or trained, together.
    """
    chosen = runtime.torch_device(device)
    configs = list(_configs(file))
    report = _examined(configs, home)
    data = report.parts
    counts = {part: sum(count.values()) for part, count in data.items()}
    for config in map(file.config, file.space.corners()):
        wanted = asked(config, *file.objectives)
        require_supported(wanted, data["val"])
        require_functions(wanted)
    classes = len(data["train"])
    _check_components(file, counts["train"], classes)
    costs, problems = [], []
    variants = _variants(file)
    for group in grouped(configs):
        try:
            for name in {config.model.weights for config in group}:
                if name is not None and not is_file(name):
                    require_name(name, group[0].model.architecture)
            costs.append(estimate(group, classes, counts, chosen, threads, variants))
        except HpoError as error:
            model = group[0].model
            problems.append(f"{model.architecture} at {group[0].data.image_size} px: {error}")
    if problems:
        lines = "".join(f"\n  {one}" for one in problems)
        raise ConfigError(f"{len(problems)} networks of the space cannot be trained:{lines}")
    return CheckResult(
        name=file.name,
        report=report,
        costs=tuple(costs),
        trials=file.study.trials,
        epochs=file.max_epochs,
        workers=workers,
        device=device,
        notes=(*remarks(file), *_infeasible(file, configs, classes), *_notes(configs, home)),
    )


def _check_components(file: StudyFile, images: int, classes: int) -> None:
    """Raise ConfigError where a retrieval asks for more principal components than there can be."""
    widths: dict[str, int] = {}
    for config in map(file.config, file.space.corners()):
        if config.task != "retrieval" or not config.retrieval.pca:
            continue
        size = config.data.image_size
        bare = config.model.model_copy(update={"weights": None})
        key = f"{bare!r} {size}"
        if key not in widths:
            widths[key] = width(models.build(bare, classes=classes, image_size=size), size)
        require_components(config.retrieval.pca, images, widths[key])


def _infeasible(file: StudyFile, configs: list[TrainConfig], classes: int) -> Iterator[str]:
    """What no network of the space with it meets of the constraints on parameters and flops."""
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
            known[key] = unmet(limits, costs)
        found.append(known[key])
    reasons = [why for why in found if why]
    if len(reasons) == len(found):
        yield f"every network is infeasible: relax in study.constraints {to_relax(limits, reasons)}"
        return
    tried = list(zip(_combinations(file), found, strict=True))
    for name, parameter in file.space.items():
        for value in parameter.ends() if isinstance(parameter, Choice) else ():
            with_it = [why for values, why in tried if values.get(name) == value]
            if with_it and all(with_it):
                yield f"{name} = {shown(value)} is infeasible in every network built: {with_it[0]}"


def _configs(file: StudyFile) -> Iterator[TrainConfig]:
    """Configurations with every combination of what shapes the network, at the largest batch."""
    batch = max(file.config(corner).batch_size for corner in file.space.corners())
    for values in _combinations(file):
        config = file.config(values)
        yield config.model_copy(update={"batch_size": batch})


def _combinations(file: StudyFile) -> list[dict[str, Any]]:
    """All combinations of what shapes the network, other parameters at their first value; only
    each choice once where these are too many."""
    space = file.space
    found: list[dict[str, Any]] = [{}]
    for name, parameter in space.items():
        network = name.startswith("model.") or name.endswith(".trainable_blocks")
        shaping = (network or name in SIZES) and name not in UNSHAPED
        ends = parameter.ends() if shaping else parameter.ends()[:1]
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
    """How many choices of the data, size apart, give frozen layers other images."""
    data = {name: one for name, one in file.space.items() if name.startswith("data.")}
    same = {*SIZES, "data.balance"}
    return math.prod(len(one.ends()) for name, one in data.items() if name not in same)


def _examined(configs: list[TrainConfig], home: Home) -> DataReport:
    """The data of the first configuration, every file decoded; every other kind of data is judged
    as well."""
    found: dict[str, DataReport] = {}
    for config in configs:
        key = config.data.model_copy(update=dict.fromkeys(("image_size", "resize_size"), 224))
        if repr(key) not in found:
            found[repr(key)] = examine_data(config.data, home.cache, remember=False)
    return next(iter(found.values()))


def _notes(configs: list[TrainConfig], home: Home) -> Iterator[str]:
    names = {
        f"{config.model.weights} of {config.model.architecture}"
        for config in configs
        if config.model.weights is not None and not is_file(config.model.weights)
    }
    if names:
        yield f"the first trial downloads {', '.join(sorted(names))}"
    folds = max((config.data.folds or 0 for config in configs), default=0)
    if folds:
        yield (
            f"data.folds = {folds}: a trial trains {folds} networks at once, counted above; train "
            "and val are those of the first fold"
        )
    yield f"trials and decoded images will be under {home.root}"


def _imbalance(of_class: Mapping[str, int], least: float = 1.5) -> Iterator[str]:
    """How unequal the training classes are, where they are."""
    most, fewest = (choose(of_class, key=lambda name: of_class[name]) for choose in (max, min))
    if (ratio := of_class[most] / max(1, of_class[fewest])) >= least:
        yield (
            f"unequal classes: {most} has {ratio:.3g} times as many training images as {fewest} "
            f'({of_class[most]} and {of_class[fewest]}); data.balance = "loss" or "sampling" lets '
            "them count alike"
        )
