"""Study files: a validated StudyFile, its definition, and differences of two.

Everything is validated here, before a worker starts; an error names the file, the key, its value,
and what is allowed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tomli_w

from hpo.config import toml
from hpo.config.augment import PRESET_OR_CROP
from hpo.config.base import NONE, combined, flatten, is_timm, toml_repr, with_values
from hpo.config.data import DEFAULT_ROOT, FOLDERS
from hpo.config.document import Document
from hpo.config.metrics import COSTS, direction, direction_of, user_function
from hpo.config.space import Space, parse_space
from hpo.config.strategies import NSGA2, CmaEs, Grid, Hyperband, Patient, StudyConfig, why_default
from hpo.config.train import BEFORE, TrainConfig, check_path, field_errors
from hpo.errors import ConfigError
from hpo.io import same_place

FIRST_RUNG = 0.06
"""Part of the largest number of epochs after which trials are first compared, under promote."""
FEW_EPOCHS = 10
"""Below so many epochs there are few rungs, and each must sort out more."""


@dataclass(frozen=True)
class Proposal:
    """A configuration that a study tries before it searches, after the baselines of its file."""

    kind: Literal["learned", "recommended"]
    values: dict[str, Any]
    """{dotted path: config value}, maybe partial."""
    source: str
    """Where it comes from, in words."""

    def __str__(self) -> str:
        """Return `recommended: SOURCE`, or `learned from SOURCE`."""
        return (
            f"learned from {self.source}"
            if self.kind == "learned"
            else f"{self.kind}: {self.source}"
        )


@dataclass(frozen=True)
class Verified:
    """The study whose best configurations another one trains again, with other seeds."""

    study: str
    """Its name."""
    uuid: str


@dataclass(frozen=True)
class TakenOver:
    """Trials of an earlier study that are the first ones of a new one, outside its budget."""

    study: str
    """The earlier study's name."""
    trials: tuple[int, ...]
    """Their numbers there, in the order of their numbers here."""
    baselines: tuple[int, ...] = ()
    """Baselines, by their places from 0, that are among them and are not tried again."""

    def origin(self, number: int) -> str:
        """Return where trial `number` comes from, in words."""
        return f"from {self.study}, trial {self.trials[number]}"


@dataclass(frozen=True)
class StudyFile:
    """A validated study."""

    study: StudyConfig
    train: dict[str, Any]
    """Fixed values as they were given, nested."""
    space: Space
    baselines: tuple[dict[str, Any], ...] = ()
    """{dotted path: config value} each, tried first; under grid complete, else maybe partial."""
    text: str = field(default="", compare=False)
    """The file as it was read; empty where the study comes from a database."""
    automatic: bool = field(default=False, compare=False)
    """Whether the file leaves to hpo which trials go on, by a scheduler or a pruner."""
    proposals: tuple[Proposal, ...] = field(default=(), compare=False)
    """What it tries after its baselines, chosen when the study was created."""
    verifies: Verified | None = field(default=None, compare=False)
    """Where it is the verification of another study, that one."""
    taken_over: TakenOver | None = field(default=None, compare=False)
    """What it took over from an earlier study when it was created."""
    began_with: int | None = field(default=None, compare=False)
    """The most epochs that a trial could have at first, where it was extended to more."""

    @property
    def name(self) -> str:
        """The study's name."""
        return self.study.name

    @property
    def known_trials(self) -> int:
        """Number of trials that were taken over: those of the smallest numbers."""
        return 0 if self.taken_over is None else len(self.taken_over.trials)

    @property
    def learned(self) -> tuple[Proposal, ...]:
        """What it tries first because it did well in earlier studies."""
        return tuple(one for one in self.proposals if one.kind == "learned")

    @property
    def metric(self) -> str:
        """The metric that decides on pruning, target and best epoch."""
        return self.study.metric

    @property
    def objectives(self) -> tuple[str, ...]:
        """The metrics that are optimized: `metric` alone, or several of which it is the first."""
        return self.study.objectives

    @property
    def directions(self) -> dict[str, Literal["minimize", "maximize"]]:
        """The direction of each objective."""
        return {name: direction_of(name) for name in self.objectives}

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """The direction of `metric`."""
        return direction(self.study.metric)

    @cached_property
    def max_epochs(self) -> int:
        """The most epochs that a trial of this study can have."""
        return max(self.config(corner).epochs for corner in self.space.corners())

    @property
    def planned_epochs(self) -> int:
        """The number of epochs that its rungs and brackets are made for: the first one, since they
        stay where they are when there are more."""
        return self.began_with or self.max_epochs

    @property
    def tied_to_length(self) -> str | None:
        """Why its trials cannot go on with more epochs, in words; None where they can."""
        if "epochs" in self.space:
            return "epochs is searched, so each trial has a number of its own"
        if isinstance(self.study.sampler, NSGA2):
            return "nsga2 goes on from generations of trials that are over"
        ties = (self.config(corner).tied_to_length for corner in self.space.corners())
        return next((one for one in ties if one is not None), None)

    @cached_property
    def first_rung(self) -> int:
        """Epochs after which trials are first compared, under promote."""
        scheduler = self.study.scheduler
        if scheduler is not None and scheduler.first_epochs != "auto":
            return int(scheduler.first_epochs)
        configs = [self.config(corner) for corner in self.space.corners()]
        begun = max(one.schedule.warmup_epochs for one in configs)
        if any(one.phases for one in configs):
            begun = max(begun, *(one.phases[0].epochs for one in configs if one.phases))
        # A first rung that tells nothing makes a model with early halving worse than chance.
        return max(1, round(FIRST_RUNG * self.planned_epochs), math.ceil(begun) + 1 if begun else 1)

    @property
    def reduction_factor(self) -> int:
        """One trial of this many goes on at each rung, under promote."""
        scheduler = self.study.scheduler
        if scheduler is not None and scheduler.reduction_factor != "auto":
            return int(scheduler.reduction_factor)
        return 4 if self.planned_epochs < FEW_EPOCHS else 3

    @property
    def why_decided(self) -> str | None:
        """Where what decides which trials go on is hpo's choice, in words; None where the file
        chooses."""
        return why_default(self.study) if self.automatic else None

    def decides_as(self, other: StudyFile) -> bool:
        """Return whether the same scheduler or pruner decides which trials go on, at the same
        epochs."""
        mine, theirs = (
            (one.study.scheduler, one.study.pruner, one.planned_epochs, one.max_epochs)
            for one in (self, other)
        )
        return mine == theirs

    def user_modules(self, *fields: str) -> list[str]:
        """Return modules of the user's that `fields`, fixed or searched, name as module:function;
        `study.metric` stands for all objectives."""
        fixed = flatten(self.train)
        values = [
            value
            for name in fields
            for value in (self.space[name].bounds() if name in self.space else [fixed.get(name)])
        ]
        if "study.metric" in fields:
            values += self.objectives
        found = [user_function(str(one)) for one in values]
        return sorted({one.partition(":")[0] for one in found if one})

    @property
    def uses_timm(self) -> bool:
        """True if an architecture, fixed or searched, is of timm's."""
        name = "model.architecture"
        fixed = [flatten(self.train).get(name)]
        values = self.space[name].bounds() if name in self.space else fixed
        return any(is_timm(str(one)) for one in values)

    def config(self, values: Mapping[str, Any]) -> TrainConfig:
        """Return the training with `values` ({dotted path: config value}) for the searched fields.

        Raises ConfigError for values that do not fit the fields or each other.
        """
        return TrainConfig.parse(with_values(self.train, values))

    def definition(self) -> dict[str, Any]:
        """Return all that decides the study, defaults included, as plain data for JSON.

        Parameters are a list, since their order counts and not every database keeps that of keys.
        """
        proposals = [asdict(one) for one in self.proposals]
        return {
            "study": json.loads(self.study.model_dump_json(exclude_none=True)),
            "train": self._resolved_train(),
            "space": [{"name": name, **one} for name, one in self.space.to_dict().items()],
            "baselines": [dict(baseline) for baseline in self.baselines],
            **({"proposals": proposals} if proposals else {}),
            **({"verifies": asdict(self.verifies)} if self.verifies else {}),
            **({"taken_over": asdict(self.taken_over)} if self.taken_over else {}),
            **({"began_with": self.began_with} if self.began_with else {}),
        }

    def _resolved_train(self) -> dict[str, Any]:
        """Return fixed values and the defaults of all fields that are not searched."""
        given = flatten(self.train)
        resolved = flatten(self.config(self.space.corners()[0]).to_dict())
        if "data.image_size" in self.space and "data.resize_size" not in given:
            del resolved["data.resize_size"]  # follows the size
        if "phases" in given and "epochs" not in given:
            resolved.pop("epochs", None)  # follows the phases
        if PRESET_OR_CROP & set(self.space):  # which decide what the preset stands for
            augment = {path for path in resolved if path.startswith("augment.")}
            resolved = {k: v for k, v in resolved.items() if k not in augment or k in given}
            off = {path for path, one in given.items() if one == NONE and path[:8] == "augment."}
            resolved |= {path: given[path] for path in given if path in {*off, "augment.preset"}}
        lists = {path: value for path, value in given.items() if isinstance(value, list)}
        resolved |= lists  # whose items may be searched
        return with_values({}, {k: value for k, value in resolved.items() if k not in self.space})

    @classmethod
    def load(cls, path: Path | str, overrides: Mapping[str, Any] | None = None) -> StudyFile:
        """Read the study file `path`; its name, where it gives none, is that of the file.

        `overrides` are `--set` values by key, such as {"study.trials": 20, "epochs": 5}. Raises
        ConfigError.

        >>> from hpo import StudyFile
        >>> file = StudyFile.load("studies/digits.toml", {"study.trials": 20})
        >>> file.name, file.study.trials, list(file.space)[:2]
        ('digits', 20, ['optimizer.name', 'optimizer.lr'])
        """
        path = Path(path)
        return parse_study(toml.read_text(path), str(path), overrides, {"name": path.stem})

    @classmethod
    def from_dict(
        cls, tables: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
    ) -> StudyFile:
        """Return the study of `tables`, which are those of a study file: study, train, space and
        baseline (a list), nested or by dotted names. Raises ConfigError.

        >>> from hpo import StudyFile
        >>> file = StudyFile.from_dict({
        ...     "study": {"name": "digits", "trials": 20},
        ...     "train": {"epochs": 5, "data.dataset": "digits"},
        ...     "space": {"optimizer.lr": {"low": 1e-3, "high": 0.1, "log": True}},
        ... })
        >>> file.config({"optimizer.lr": 0.01}).optimizer.lr
        0.01
        """
        return parse_study(toml.dump(tables), "", overrides)

    @classmethod
    def from_definition(cls, definition: Mapping[str, Any], text: str = "") -> StudyFile:
        """Return the study of a stored `definition`; raises ConfigError if it is none."""
        space = {one["name"]: _without(one, "name") for one in definition["space"]}
        document = Document(
            study=dict(definition["study"]),
            train=dict(definition["train"]),
            space=space,
            baselines=list(definition["baselines"]),
        )
        proposals = tuple(Proposal(**one) for one in definition.get("proposals", ()))
        verifies = Verified(**definition["verifies"]) if "verifies" in definition else None
        taken = definition.get("taken_over")
        taken_over = taken and TakenOver(
            taken["study"], tuple(taken["trials"]), tuple(taken["baselines"])
        )
        return replace(
            _build(document, text),
            proposals=proposals,
            verifies=verifies,
            taken_over=taken_over,
            began_with=definition.get("began_with"),
        )


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the differences of two definitions, a line each: `study.trials: 20 -> 40`. The same
    folder of images or file of labels by another path is no difference, nor are trackers, which
    decide no result, nor what no file says: proposals, trials that were taken over, and how many
    epochs there were at first."""
    before, after = _flat_definition(old), _flat_definition(new)
    before.pop("study.log", None)
    after.pop("study.log", None)
    for place in ("train.data.root", "train.data.labels"):
        if same_place(before.get(place), after.get(place)):
            before.pop(place, None)
            after.pop(place, None)
    return [
        f"{key}: {_side(before, key)} -> {_side(after, key)}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def _flat_definition(definition: Mapping[str, Any]) -> dict[str, Any]:
    named = {one["name"]: _without(one, "name") for one in definition["space"]}
    numbered = {str(i): one for i, one in enumerate(definition["baselines"], 1)}
    unsaid = ("proposals", "taken_over", "began_with")
    rest = {key: value for key, value in definition.items() if key not in unsaid}
    return flatten({**rest, "space": named, "baselines": numbered})


def _side(flat: Mapping[str, Any], key: str) -> str:
    return toml_repr(flat[key]) if key in flat else "(not given)"


def _without(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != name}


def parse_study(
    text: str,
    where: str = "",
    overrides: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> StudyFile:
    """Return the study that `text` (TOML) describes: `where` names it in messages, `defaults` are
    for [study]. Raises ConfigError."""
    document = Document.read(toml.parse(text, where), where)
    for key, value in (overrides or {}).items():
        try:
            document.override(key, value)
        except ConfigError as error:
            raise error.at("--set") from None
    document.study = {**(defaults or {}), **document.study}
    try:
        file = _build(document, text)
        _require_ranges(file)  # not of a study that was made before: its trials stay readable
    except ConfigError as error:
        raise error.at(where) from None
    return file


def _require_ranges(file: StudyFile) -> None:
    """Raise ConfigError if the space has nothing that the sampler could learn."""
    if isinstance(file.study.sampler, CmaEs) and not file.space.ranges:
        raise ConfigError(
            "'cmaes': it searches ranges of numbers that every trial has, and there are none in "
            "[space]: all would be drawn at random; allowed: tpe, gp, nsga2, qmc, random, grid",
            key="study.sampler",
        )


def _build(document: Document, text: str) -> StudyFile:
    train = _with_absolute_root(document.train)
    if errors := field_errors(train, "train."):
        raise combined(errors)
    space = parse_space(document.space, train)
    if not space:
        raise ConfigError(
            "nothing is searched: give at least one range or list of choices, for example "
            "optimizer.lr = {low = 1e-4, high = 0.1, log = true}; `hpo train` trains a single "
            "configuration",
            key="space",
        )
    study = _study_config(_with_pruner(_with_metric(document.study, train), document), space)
    baselines = _checked(document.baselines, space, train, complete=isinstance(study.sampler, Grid))
    file = StudyFile(study, train, space, baselines, text, _is_automatic(document.study))
    for values in [*space.corners(), *(_tried(file, one) for one in baselines)]:
        _check_together(file, values)
        for metric in study.objectives:
            if metric not in COSTS:
                key = "study.metrics" if study.metrics else "study.metric"
                file.config(values).require_metric(metric, key)
    _check_resources(file)
    return file


def _with_metric(given: dict[str, Any], train: Mapping[str, Any]) -> dict[str, Any]:
    """Return [study]; a retrieval that gives no metric has its own."""
    if train.get("task") != "retrieval" or {"metric", "metrics"} & given.keys():
        return given
    return {**given, "metric": "val_precision_at_k"}


def _is_automatic(given: Mapping[str, Any]) -> bool:
    return "pruner" not in given and given.get("scheduler", "auto") == "auto"


def _with_pruner(given: dict[str, Any], document: Document) -> dict[str, Any]:
    """Return [study]; where the last epochs of a one-cycle schedule decide, a trial's first ones do
    not tell which trials to promote."""
    fixed = flatten(document.train).get("schedule.name")
    searched = document.space.get("schedule.name", ())
    choices = searched.get("choices", ()) if isinstance(searched, Mapping) else searched
    if _is_automatic(given) and "onecycle" in (fixed, *choices):
        return {**given, "scheduler": NONE}
    return given


def _study_config(given: dict[str, Any], space: Space) -> StudyConfig:
    """Validate [study]; a grid's number of points is its default budget and its largest."""
    study = StudyConfig.parse(given, prefix="study.")
    if not isinstance(study.sampler, Grid):
        return study
    try:
        points = len(space.grid())
    except ConfigError as error:
        message = f"{error.message}; or use another study.sampler"
        raise ConfigError(message, key=f"space.{error.key}") from None
    if study.trials is None or "trials" not in given:
        return StudyConfig.parse({**given, "trials": points}, prefix="study.")
    if study.trials > points:
        message = f"{study.trials}: the grid has {points} points; allowed: 1 to {points}"
        raise ConfigError(message, key="study.trials")
    return study


def _checked(
    baselines: Iterable[dict[str, Any]], space: Space, train: Mapping[str, Any], complete: bool
) -> tuple[dict[str, Any], ...]:
    checked: list[dict[str, Any]] = []
    for number, values in enumerate(baselines, 1):
        try:
            checked.append(_checked_baseline(values, space, train, complete))
        except ConfigError as error:
            key = f"baseline {number}" + (f": {error.key}" if error.key else "")
            raise ConfigError(error.message, key=key) from None
        if checked[-1] in checked[:-1]:
            first = checked.index(checked[-1]) + 1
            message = f"the same as baseline {first}: remove one"
            raise ConfigError(message, key=f"baseline {number}")
    return tuple(checked)


def _checked_baseline(
    values: dict[str, Any], space: Space, train: Mapping[str, Any], complete: bool
) -> dict[str, Any]:
    if not values:
        raise ConfigError("empty: give at least one searched parameter")
    fixed = flatten(train)
    for name in values:
        if name in space:
            continue
        check_path(name)
        if name in fixed:
            message = f"fixed at {toml_repr(fixed[name])} in [train]: remove it here"
        else:
            message = "not searched: put it under [space], or under [train] to fix it"
        raise ConfigError(message, key=name)
    try:
        space.check(values, complete)
    except ConfigError as error:
        hint = "; under grid a baseline is complete" if error.message.startswith("missing") else ""
        raise ConfigError(error.message + hint, key=error.key) from None
    return space.decode(space.encode(values))


def _tried(file: StudyFile, baseline: dict[str, Any]) -> dict[str, Any]:
    """Return what a baseline, maybe partial, is judged by: where it does not go together with the
    defaults of what it leaves out, which is searched, with the first values of that."""
    try:
        file.config(baseline)
    except ConfigError:
        return file.space.around(baseline)
    return baseline


def _check_together(file: StudyFile, values: Mapping[str, Any]) -> None:
    """Raise ConfigError unless `values` and the fixed ones make a training: rules between fields
    are met before the search starts, not in the middle of it."""
    try:
        file.config(values)
    except ConfigError as error:
        table = "space" if error.key in file.space else "train"
        key = f"{table}.{error.key}" if error.key else ""
        tried = ", ".join(f"{name} = {toml_repr(value)}" for name, value in values.items())
        message = f"{error.message} (with {tried}, which [space] or a baseline allows)"
        raise ConfigError(message, key=key) from None


def _check_resources(file: StudyFile) -> None:
    first = "auto" if file.study.scheduler is None else file.study.scheduler.first_epochs
    if first != "auto" and file.first_rung >= file.max_epochs:
        allowed = f"1 to {file.max_epochs - 1}, below the largest number of epochs"
        raise ConfigError(f"{first}: allowed: {allowed}", key="study.scheduler.first_epochs")
    pruner, key = file.study.pruner, "study.pruner.min_resource"
    if isinstance(pruner, Patient):
        pruner, key = pruner.wrapped_pruner, "study.pruner.wrapped_pruner.min_resource"
    if isinstance(pruner, Hyperband) and pruner.min_resource > file.max_epochs:
        allowed = f"1 to {file.max_epochs}, the largest number of epochs"
        raise ConfigError(f"{pruner.min_resource}: allowed: {allowed}", key=key)


def _with_absolute_root(train: Mapping[str, Any]) -> dict[str, Any]:
    """Return [train] with absolute paths: a worker may run in another directory."""
    data = train.get("data")
    if not isinstance(data, Mapping):
        return dict(train)
    given = {name: data.get(name) for name in ("root", "labels")}
    if data.get("dataset", "digits") not in ("digits", *FOLDERS):
        given["root"] = given["root"] or DEFAULT_ROOT
    absolute = {
        f"data.{name}": str(Path(path).expanduser().absolute())
        for name, path in given.items()
        if isinstance(path, str) and path not in ("", NONE)
    }
    return with_values(train, absolute)


def load_config(
    path: Path, overrides: Mapping[str, Any] | None = None, *, recorded: bool = False
) -> tuple[TrainConfig, dict[str, Any]]:
    """Read a TrainConfig, exported or written by hand, and its [provenance] table ({} if none).

    `overrides` are `--set` values by field path. In a file with provenance, or that is `recorded`,
    runtime fields that are missing were not there yet when it was written (see
    `RuntimeConfig.recorded`). Raises ConfigError, also for a study file.
    """
    where = str(path)
    data = toml.parse(toml.read_text(path), where)
    if {"study", "space", "train"} & set(data):
        raise ConfigError(
            "a study file, not a configuration: `hpo run` searches it, `hpo export` writes the "
            "configuration of its best trial",
            where=where,
        )
    provenance = data.pop("provenance", {})
    if not isinstance(provenance, Mapping):
        raise ConfigError(f"{toml_repr(provenance)}: a table", key="provenance", where=where)
    runtime = data.get("runtime")
    if (provenance or recorded) and isinstance(runtime, Mapping):
        data["runtime"] = {**BEFORE, **runtime}
    fields = _overridden(data, overrides or {}, where)
    return TrainConfig.parse(_with_absolute_root(fields), where=where), dict(provenance)


def _overridden(
    data: Mapping[str, Any], overrides: Mapping[str, Any], where: str = ""
) -> dict[str, Any]:
    """Return nested fields with `overrides` (with or without `train.`) in place."""
    values = {key.removeprefix("train."): value for key, value in overrides.items()}
    try:
        for key in values:
            check_path(key)
        return with_values(toml.nest(data, where), values)
    except ConfigError as error:
        raise error.at("--set") from None


def dump_config(
    config: TrainConfig, provenance: Mapping[str, Any] | None = None, comments: Iterable[str] = ()
) -> str:
    """Return `config` as TOML that `load_config` takes back: `comments` above, [provenance] below.

    Entries of `provenance` that are None are left out, since TOML has no null.
    """
    lines = [line for comment in comments for line in comment.splitlines()]
    head = "".join(
        f"# {''.join(c for c in line if c.isprintable())}".rstrip() + "\n" for line in lines
    )
    known = {key: value for key, value in (provenance or {}).items() if value is not None}
    data = {**config.to_dict(), **({"provenance": known} if known else {})}
    return head + ("\n" if head else "") + tomli_w.dumps(data)
