"""The [study] table: what is optimized, by which sampler and pruner, and when to stop.

Samplers and pruners carry Optuna's names, options and defaults. Steps are epochs, counted from 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from hpo.config.base import (
    Part,
    explain,
    listed,
)
from hpo.config.constraints import (
    Constraint,
    Constraints,
    parsed,
)
from hpo.config.metrics import (
    COSTS,
    MOST_OBJECTIVES,
    Metric,
    Objective,
)
from hpo.config.space import shown
from hpo.errors import (
    ConfigError,
    nearest,
)


def _wrong(key: str, message: str) -> ValueError:
    """What a rule between fields raises, naming the one at fault (see `fields.explain`)."""
    return ValueError(f"\0{key}\0{message}")


class Strategy(Part):
    """A sampler or pruner with its options."""

    def options(self) -> dict[str, Any]:
        """Its options by Optuna's names, nested ones as parts."""
        return {name: value for name, value in self if name != "name"}


class TPE(Strategy):
    """Tree-structured Parzen estimator: learns from all trials, also pruned ones."""

    name: Literal["tpe"] = "tpe"
    n_startup_trials: int = Field(default=10, ge=0)
    """Trials drawn at random before the model is used."""
    n_ei_candidates: int = Field(default=24, ge=1)
    """Candidates of which the most promising is tried."""
    multivariate: bool = True
    """Model parameters together instead of one by one."""
    group: bool = False
    """Model each combination of active parameters apart, for spaces with `when`; experimental in
    Optuna; needs multivariate."""
    constant_liar: bool = True
    """Keep away from what other workers are trying now."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.group and not self.multivariate:
            raise _wrong("group", "true: needs multivariate = true")
        return self


class Random(Strategy):
    """Every trial drawn at random."""

    name: Literal["random"] = "random"


class Grid(Strategy):
    """Every point once; every range needs a step or is a list of choices."""

    name: Literal["grid"] = "grid"


class GP(Strategy):
    """Gaussian process: for few, costly trials (slow beyond some 500); learns from completed trials
    only, so use it with pruner = "none". Needs the extra `samplers`."""

    name: Literal["gp"] = "gp"
    n_startup_trials: int = Field(default=10, ge=0)
    """Trials drawn at random before the model is used."""
    deterministic_objective: bool = False
    """Take values as free of noise; experimental in Optuna."""


class CmaEs(Strategy):
    """Covariance matrix adaptation: for continuous spaces and many trials; learns from completed
    trials only. Needs the extra `samplers`."""

    name: Literal["cmaes"] = "cmaes"
    n_startup_trials: int = Field(default=1, ge=0)
    """Trials drawn at random before the model is used."""
    popsize: int | None = Field(default=None, ge=2)
    """Trials of a generation; None: 4 + 3 ln(number of parameters)."""
    consider_pruned_trials: bool = False
    """Learn from pruned trials too, as Optuna advises with hyperband; experimental in Optuna."""
    use_separable_cma: bool = False
    """Diagonal covariance, for many parameters; experimental in Optuna."""
    with_margin: bool = False
    """Keep integer and stepped parameters moving; experimental in Optuna; not with
    use_separable_cma."""
    lr_adapt: bool = False
    """Adapt the learning rate, for noisy values; experimental in Optuna; alone only."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.with_margin and self.use_separable_cma:
            raise _wrong("with_margin", "true: not with use_separable_cma")
        if self.lr_adapt and (self.use_separable_cma or self.with_margin):
            raise _wrong("lr_adapt", "true: not with use_separable_cma or with_margin")
        return self


class QMC(Strategy):
    """Quasi-random points that fill the space evenly; best with a power of two of trials. Needs the
    extra `samplers`."""

    name: Literal["qmc"] = "qmc"
    qmc_type: Literal["sobol", "halton"] = "sobol"
    """The sequence."""
    scramble: bool = False
    """Randomize the sequence by the study's seed."""


class NSGA2(Strategy):
    """Genetic algorithm: for many trials."""

    name: Literal["nsga2"] = "nsga2"
    population_size: int = Field(default=50, ge=2)
    """Trials of a generation."""
    mutation_prob: float | None = Field(default=None, ge=0, le=1)
    """Probability to change each parameter; None: 1 / number of parameters."""
    crossover_prob: float = Field(default=0.9, ge=0, le=1)
    """Probability to mix two parents."""
    swapping_prob: float = Field(default=0.5, ge=0, le=1)
    """Probability to take each parameter from the other parent."""


class Hyperband(Strategy):
    """Successive halving in several brackets; the largest `epochs` of the space is the most that a
    trial gets."""

    name: Literal["hyperband"] = "hyperband"
    min_resource: int = Field(default=1, ge=1)
    """Fewest epochs of a trial; at most the largest `epochs`."""
    reduction_factor: int = Field(default=3, ge=2)
    """One of this many goes on at each rung."""
    bootstrap_count: int = Field(default=0, ge=0)
    """Trials that a rung must have seen before one goes on."""


class ASHA(Strategy):
    """Asynchronous successive halving (Optuna's SuccessiveHalvingPruner)."""

    name: Literal["asha"] = "asha"
    min_resource: int = Field(default=1, ge=1)
    """Epochs up to the first rung; Optuna's own default works out as 1 below 200 epochs."""
    reduction_factor: int = Field(default=4, ge=2)
    """One of this many goes on at each rung."""
    min_early_stopping_rate: int = Field(default=0, ge=0)
    """Rungs left out at the start."""
    bootstrap_count: int = Field(default=0, ge=0)
    """Trials that a rung must have seen before one goes on."""


class _AgainstOthers(Strategy):
    n_startup_trials: int = Field(default=5, ge=0)
    """Trials that must have finished before any is pruned."""
    n_warmup_steps: int = Field(default=0, ge=0)
    """No pruning before this epoch."""
    interval_steps: int = Field(default=1, ge=1)
    """Epochs between two questions."""
    n_min_trials: int = Field(default=1, ge=1)
    """Trials that must have reached an epoch before it is used."""


class Median(_AgainstOthers):
    """Prune what is worse than the median of the others at the same epoch."""

    name: Literal["median"] = "median"


class Percentile(_AgainstOthers):
    """Prune what is outside the best `percentile` of the others at the same epoch."""

    name: Literal["percentile"] = "percentile"
    percentile: float = Field(default=25.0, ge=0, le=100)
    """Percent of the trials that go on."""


class Threshold(Strategy):
    """Prune what is below `lower` or above `upper`."""

    name: Literal["threshold"] = "threshold"
    lower: float | None = None
    """Smallest value that goes on."""
    upper: float | None = None
    """Largest value that goes on."""
    n_warmup_steps: int = Field(default=0, ge=0)
    """No pruning before this epoch."""
    interval_steps: int = Field(default=1, ge=1)
    """Epochs between two questions."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.lower is None and self.upper is None:
            raise _wrong("lower", "missing: threshold needs lower, upper or both")
        if self.lower is not None and self.upper is not None and self.lower > self.upper:
            raise _wrong("lower", f"{self.lower}: allowed: at most upper = {self.upper}")
        return self


class NoPruner(Strategy):
    """Every trial runs to its end."""

    name: Literal["none"] = "none"


Wrapped = Annotated[
    Hyperband | ASHA | Median | Percentile | Threshold | NoPruner, Field(discriminator="name")
]


class Patient(Strategy):
    """Ask `wrapped_pruner` only once a trial has stopped improving."""

    name: Literal["patient"] = "patient"
    wrapped_pruner: Wrapped = Field(default_factory=Median)
    """The pruner that is asked then, by name or table; none: the trial ends then."""
    patience: int = Field(default=3, ge=0)
    """Epochs without improvement before it is asked."""
    min_delta: float = Field(default=0.0, ge=0)
    """How much worse than before the latest epochs may be without the question."""


Sampler = Annotated[TPE | Random | Grid | GP | CmaEs | QMC | NSGA2, Field(discriminator="name")]
Pruner = Annotated[
    Hyperband | ASHA | Median | Percentile | Patient | Threshold | NoPruner,
    Field(discriminator="name"),
]

_SAMPLERS: tuple[type[Strategy], ...] = (TPE, Random, Grid, GP, CmaEs, QMC, NSGA2)
_WRAPPED: tuple[type[Strategy], ...] = (Hyperband, ASHA, Median, Percentile, Threshold, NoPruner)
Kinds = dict[str, type[Strategy]]
SAMPLERS: Kinds = {one.model_fields["name"].default: one for one in _SAMPLERS}
WRAPPED: Kinds = {one.model_fields["name"].default: one for one in _WRAPPED}
PRUNERS: Kinds = {**WRAPPED, "patient": Patient}

SMALL_STUDY = 40
"""Below this many trials hyperband's brackets are too thin, and the median prunes by default."""


NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"


def _name(value: str) -> str:
    if not re.fullmatch(NAME, value):
        raise ValueError(
            "allowed: 1 to 64 letters, digits, '.', '_' and '-', not starting with '.' or '-'"
        )
    return value


Objectives = Annotated[tuple[Objective, ...], BeforeValidator(listed)]


class StudyConfig(Part):
    """What is optimized, by which sampler and pruner, and when to stop."""

    name: Annotated[str, AfterValidator(_name), Field(json_schema_extra={"pattern": NAME})]
    """1 to 64 letters, digits, `.`, `_` and `-`, not starting with `.` or `-`; default: the file's
    name."""
    metric: Metric = "val_top1"
    """A trial's value is its best epoch's: losses are minimized, the others maximized. val_top1,
    val_top5, val_loss, val_macro_f1, val_balanced_accuracy and val_macro_auc (one against the
    rest), each as the mean over the classes that have images; val_recall:CLASS, the recall of one
    class; or module:function of your own, found as a loss is: (probabilities (N, C) float32, labels
    (N,) int64), both of NumPy -> a number, maximized unless written module:function:minimize."""
    metrics: Objectives | None = None
    """Instead of metric: 2 to 4 of them, for the trials that none beats in all (the Pareto front).
    The first is a metric of an epoch; it decides on pruning, target, patience_trials and which
    epoch is best, whose values the others have. Costs are minimized: latency_ms (median time of one
    image on the trial's device), parameters (count), flops (multiply-adds of one image),
    epoch_seconds (mean of its epochs; of folds of one), peak_memory_mb (10^6 bytes, most of its
    epochs; of folds all of them together)."""
    constraints: Constraints = None
    """Bounds on the costs of a trial, as {parameters = "<= 1e6", latency_ms = "< 20"}, with <=, <,
    >= or >; the costs are those of metrics. A trial that does not meet them ends at once as
    infeasible, which counts in trials and is never best: by parameters, flops and latency_ms before
    its first epoch, by epoch_seconds and peak_memory_mb of its epochs so far after each."""
    trials: int = Field(default=50, ge=1, le=1_000_000)
    """Budget: exactly so many trials finish. Under grid its default is the number of points."""
    timeout_s: float | None = Field(default=None, gt=0)
    """Stop after so many seconds of work, pauses of the whole study not counted; None: never."""
    target: float | None = None
    """Stop as soon as the best value reaches this; None: never."""
    patience_trials: int | None = Field(default=None, ge=1)
    """Stop after so many finished trials in a row without a better one; None: never."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the sampler; a training's own is train.seed."""
    sampler: Sampler = Field(default_factory=TPE)
    """By name, or a table {name = "tpe", ...} with its options."""
    pruner: Pruner = Field(default_factory=Hyperband)
    """By name, or a table with its options. Default: hyperband, below 40 trials median. none where
    every trial must run to its end, as in the reproduction of a published grid."""
    lease_s: float = Field(default=30.0, ge=1, le=86_400)
    """Seconds after which another worker may take over the trial of a worker that is silent; 30 and
    more, except in tests."""
    stall_timeout_s: float = Field(default=600.0, gt=0)
    """A worker that has made no step for so many seconds, nor decoded an image, is ended and
    replaced; its trial goes on elsewhere, and fails after five such attempts in a row."""
    keep_checkpoints: int = Field(default=0, ge=0, le=1_000_000)
    """The last checkpoints of so many best complete trials stay on disk, and in the artifacts. The
    weights of the best three stay anyway, or of the whole front of several metrics."""
    max_failures: int = Field(default=3, ge=1)
    """Stop after so many trials in a row have failed for the same reason."""

    @model_validator(mode="before")
    @classmethod
    def _pruner_by_budget(cls, data: Any) -> Any:
        trials = data.get("trials") if isinstance(data, Mapping) else None
        if isinstance(trials, int) and trials < SMALL_STUDY:
            return {"pruner": Median(), **data}
        return data

    @model_validator(mode="before")
    @classmethod
    def _first_metric(cls, data: Any) -> Any:
        """`metric` is the first of `metrics`."""
        metrics = data.get("metrics") if isinstance(data, Mapping) else None
        if not isinstance(metrics, list | tuple) or not metrics:
            return data
        if data.get("metric", metrics[0]) != metrics[0]:
            raise _wrong("metric", f"{shown(data['metric'])}: give either metric or metrics")
        if metrics[0] in COSTS:
            raise _wrong("metrics", f"{shown(metrics[0])}: a metric of an epoch comes first")
        return {**data, "metric": metrics[0]}

    @model_validator(mode="after")
    def _several(self) -> Self:
        metrics = self.metrics
        if metrics is None:
            return self
        if not 2 <= len(metrics) <= MOST_OBJECTIVES or len(set(metrics)) < len(metrics):
            allowed = f"2 to {MOST_OBJECTIVES} different ones; of a single one write metric"
            raise _wrong("metrics", f"{shown(list(metrics))}: {allowed}")
        if isinstance(self.sampler, CmaEs):
            allowed = "with several metrics: tpe, nsga2, gp, qmc, random, grid"
            raise _wrong("sampler", f"'cmaes': it knows one metric only; allowed {allowed}")
        return self

    @property
    def objectives(self) -> tuple[str, ...]:
        """What is optimized, one or several."""
        return self.metrics or (self.metric,)

    @property
    def limits(self) -> tuple[Constraint, ...]:
        """The constraints, one by one."""
        return parsed(self.constraints)

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, where: str = "", prefix: str = "study.") -> Self:
        """Validate the [study] table; samplers and pruners may be given by name alone.

        Raises ConfigError naming the wrong key, its value, and what is allowed.
        """
        data = dict(data)
        for table, kinds in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
            if table in data:
                data[table] = _strategy(data[table], kinds, where, f"{prefix}{table}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise explain(error, cls, where=where, prefix=prefix) from None


def _strategy(given: Any, kinds: Mapping[str, type[Strategy]], where: str, key: str) -> Strategy:
    options = {"name": given} if isinstance(given, str) else given
    what = key.rpartition(".")[2].removeprefix("wrapped_")
    if not isinstance(options, Mapping):
        example = f'{{name = "{next(iter(kinds))}"}}'
        raise ConfigError(f"{shown(given)}: a name, or a table {example}", key=key, where=where)
    if "name" not in options:
        raise ConfigError(f"missing; {nearest('', kinds)}", key=f"{key}.name", where=where)
    name = options["name"]
    if not isinstance(name, str) or name not in kinds:
        hint = nearest(name, kinds)
        raise ConfigError(f"{shown(name)}: unknown {what}; {hint}", key=key, where=where)
    options = dict(options)
    if kinds[name] is Patient and "wrapped_pruner" in options:
        inner = options["wrapped_pruner"]
        options["wrapped_pruner"] = _strategy(inner, WRAPPED, where, f"{key}.wrapped_pruner")
    try:
        return kinds[name].model_validate(options)
    except ValidationError as error:
        raise explain(error, kinds[name], where=where, prefix=f"{key}.") from None
