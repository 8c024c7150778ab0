"""The [study] table: what is optimized, by which sampler and pruner, and when to stop.

Samplers and pruners carry Optuna's names, options and defaults. Steps are epochs, counted from 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from hpo.config.base import (
    NONE,
    ConfigModel,
    Duration,
    LeaseSeconds,
    Seconds,
    as_tuple,
    fail,
    members,
)
from hpo.config.constraints import Constraint, Constraints, parse_constraints
from hpo.config.metrics import COSTS, MOST_OBJECTIVES, Metric, Objective


def _as_table(value: Any) -> Any:
    """Take a name alone for a table without options."""
    return {"name": value} if isinstance(value, str) else value


class Strategy(ConfigModel):
    """A sampler or pruner with its options."""

    model_config = ConfigDict(json_schema_extra={"required": ["name"]})

    def options(self) -> dict[str, Any]:
        """Return its options by Optuna's names, nested ones as parts."""
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
            fail("group", True, "needs multivariate = true")
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
            fail("with_margin", True, "not with use_separable_cma")
        if self.lr_adapt and (self.use_separable_cma or self.with_margin):
            fail("lr_adapt", True, "not with use_separable_cma or with_margin")
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
            fail("lower", None, "threshold needs lower, upper or both")
        if self.lower is not None and self.upper is not None and self.lower > self.upper:
            fail("lower", self.lower, f"allowed: at most upper = {self.upper}")
        return self


class NoPruner(Strategy):
    """Every trial runs to its end."""

    name: Literal["none"] = "none"


def _by_name(union: Any) -> BeforeValidator:
    """Let a model of `union` be given by its name alone, or by its table."""
    return BeforeValidator(_as_table, json_schema_input_type=Literal[*members(union)] | union)


_Wrapped = Hyperband | ASHA | Median | Percentile | Threshold | NoPruner
Wrapped = Annotated[_Wrapped, Field(discriminator="name"), _by_name(_Wrapped)]


class Patient(Strategy):
    """Ask `wrapped_pruner` only once a trial has stopped improving."""

    name: Literal["patient"] = "patient"
    wrapped_pruner: Wrapped = Field(default_factory=Median)
    """The pruner that is asked then, by name or table; none: the trial ends then."""
    patience: int = Field(default=3, ge=0)
    """Epochs without improvement before it is asked."""
    min_delta: float = Field(default=0.0, ge=0)
    """How much worse than before the latest epochs may be without the question."""


def _at_least(least: int) -> AfterValidator:
    """Validate a number that may also be auto."""

    def check(value: int | str) -> int | str:
        if isinstance(value, int) and value < least:
            raise ValueError(f'allowed: {least} and more, or "auto"')
        return value

    return AfterValidator(check)


class Promote(Strategy):
    """Asynchronous successive halving by promotion: trials pause at rungs, and the best go on."""

    name: Literal["promote"] = "promote"
    reduction_factor: Annotated[int | Literal["auto"], _at_least(2)] = "auto"
    """One of this many goes on at each rung; auto: 3, of trials below 10 epochs 4."""
    first_epochs: Annotated[int | Literal["auto"], _at_least(1)] = "auto"
    """Epochs up to the first rung; auto: 6 % of the largest `epochs`, and at least one after the
    warm-up or the first of several phases."""
    finish: int = Field(default=3, ge=0)
    """So many trials are complete at the end, if the budget allows."""
    random_fraction: float = Field(default=1 / 3, ge=0, le=1)
    """Part of the new trials that is drawn at random, so that the sampler's model, which knows
    many trials by their first epochs alone, is not all that is tried."""


_Samplers = TPE | Random | Grid | GP | CmaEs | QMC | NSGA2
_Pruners = _Wrapped | Patient
SAMPLERS, WRAPPED, PRUNERS = members(_Samplers), members(_Wrapped), members(_Pruners)
"""Models by the names of samplers and pruners."""
Sampler = Annotated[_Samplers, Field(discriminator="name"), _by_name(_Samplers)]
Scheduler = Annotated[
    Promote,
    BeforeValidator(_as_table, json_schema_input_type=Literal["auto", "promote"] | Promote),
]
Pruner = Annotated[_Pruners, Field(discriminator="name"), _by_name(_Pruners)]

OPENING = ("max_time", "max_full_trainings")
"""Limits beside which a study needs no number of trials."""

SMALL_STUDY = 40
"""Below this many trials hyperband's brackets are too thin: the median prunes where trials are not
promoted."""
LARGE_STUDY = 300
"""From this many trials on hyperband prunes by default: it is about as cheap there as promotion,
and keeps no checkpoints of trials that wait."""


NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"


def _name(value: str) -> str:
    if not re.fullmatch(NAME, value):
        raise ValueError(
            "allowed: 1 to 64 letters, digits, '.', '_' and '-', not starting with '.' or '-'"
        )
    return value


Objectives = Annotated[tuple[Objective, ...], BeforeValidator(as_tuple)]
TrackerName = Literal["tensorboard", "mlflow", "wandb"]


def _trackers(value: Any) -> Any:
    """Return a name, or a list of them without repeats, as a tuple; an empty list as None."""
    value = [value] if isinstance(value, str) else value
    return tuple(dict.fromkeys(value)) or None if isinstance(value, list | tuple) else value


TrackerNames = Annotated[tuple[TrackerName, ...] | None, BeforeValidator(_trackers)]


def _require_alone(study: Mapping[str, Any]) -> None:
    """Raise ConfigError if a study with a scheduler has a pruner too, other than none."""
    pruner = study.get("pruner")
    name = pruner.get("name") if isinstance(pruner, Mapping) else pruner
    if name not in (None, "none") and not isinstance(pruner, NoPruner):
        fail("pruner", name, "give either scheduler or pruner: promote decides which trials go on")


def _expected_trials(study: Mapping[str, Any]) -> int:
    """Return the number of trials that a study is given, or its default."""
    trials = study.get("trials")
    return trials if isinstance(trials, int) else 50


def _needs_pruner(study: Mapping[str, Any]) -> bool:
    """Return whether a study cannot be promoted: of several metrics, with a sampler that learns
    from complete trials alone, or with a patience that counts trials as they finish."""
    sampler = study.get("sampler")
    name = sampler.get("name") if isinstance(sampler, Mapping) else sampler
    return (
        study.get("metrics") is not None
        or name in ("gp", "cmaes")
        or isinstance(sampler, GP | CmaEs)
        or study.get("patience_trials") is not None
    )


def _learn_from(value: Any) -> Any:
    if value in (None, "auto"):
        return value
    names = value if isinstance(value, list | tuple) else ()
    if not names or not all(isinstance(one, str) and re.fullmatch(NAME, one) for one in names):
        raise ValueError('allowed: "auto", or a list of names of studies')
    return tuple(names)


LearnFrom = Annotated[
    Any,
    BeforeValidator(_learn_from),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "array", "minItems": 1,
                                                  "items": {"type": "string", "pattern": NAME}}]}),
]  # fmt: skip


class StudyConfig(ConfigModel):
    """What is optimized, by which sampler and pruner, and when to stop."""

    model_config = ConfigDict(
        json_schema_extra={"required": []}
    )  # the name is by default the file's

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
    trials: int | None = Field(default=50, ge=1, le=1_000_000)
    """Budget: exactly so many trials finish. Under grid its default is the number of points; beside
    max_time or max_full_trainings it is None: there is no limit on trials."""
    max_time: Duration | None = None
    """Stop after so much time by the clock, in which anything ran: "90s", "30m", "1h30m" or a
    number of seconds; pauses of the whole study do not count. None: never. As the other limits it
    is met after an epoch: running trials end with the one that they are at."""
    max_full_trainings: float | None = Field(default=None, gt=0)
    """Stop once the epochs of all trials are as many as those of so many full trainings, each of
    the largest epochs in the study; None: never. At most one epoch of each worker comes on top."""
    timeout_s: Seconds | None = None
    """Stop after so much work ("4h" or seconds), summed over all workers: with four after a fourth
    of that by the clock, which max_time limits; None: never."""
    target: float | None = None
    """Stop as soon as the best value reaches this; None: never."""
    patience_trials: int | None = Field(default=None, ge=1)
    """Stop after so many finished trials in a row without a better one; None: never."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the sampler; a training's own is train.seed."""
    sampler: Sampler = Field(default_factory=TPE)
    """By name, or a table {name = "tpe", ...} with its options."""
    scheduler: Scheduler | None = Field(default=None, json_schema_extra={"default": "auto"})
    """promote, or a table {name = "promote", ...} with its options: trials pause at rungs, and the
    best of each go on. Instead of a pruner. Default, or auto: promote below 300 trials of one
    metric, where the sampler learns from trials that are not complete and patience_trials is not
    given; else a pruner."""
    pruner: Pruner = Field(default_factory=NoPruner, json_schema_extra={"default": "auto"})
    """By name, or a table with its options, instead of a scheduler. Default: none with a scheduler;
    else hyperband, below 40 trials median. none where every trial must run to its end, as in the
    reproduction of a published grid."""
    defaults: bool = True
    """Try recommended configurations first, after the study's own baselines: up to four from
    published recipes and hpo's own studies for its architecture, its weights and the size of its
    images, cut to the space (`hpo check` shows them). At most a third of the trials; none under
    grid. They are chosen when the study is created, and never paused or pruned before the median of
    the searched trials has had as many epochs."""
    learn_from: LearnFrom = None
    """Names of earlier studies of the same database whose best configurations are tried first,
    before the recommended ones; auto: those of every compatible study. Compatible are studies of
    the same task, direction of the metric and kind of network that search some of the same
    parameters. They are chosen when the study is created (see also hpo run --learn-from)."""
    lease_s: LeaseSeconds = 30.0
    """Seconds after which another worker may take over the trial of a worker that is silent; 30 and
    more, except in tests."""
    stall_timeout_s: Seconds = 600.0
    """A worker that has made no step for so many seconds, nor decoded an image, is ended and
    replaced; its trial goes on elsewhere, and fails after five such attempts in a row."""
    keep_checkpoints: int = Field(default=0, ge=0, le=1_000_000)
    """The last checkpoints of so many best complete trials stay on disk, and in the artifacts;
    under promote of paused ones too, which go on from them if the study is extended. The weights of
    the best three stay anyway, or of the whole front of several metrics."""
    max_failures: int = Field(default=3, ge=1)
    """Stop after so many trials in a row have failed for the same reason."""
    log: TrackerNames = None
    """Experiment trackers that get every epoch: tensorboard, mlflow, wandb, each an extra of the
    same name. They decide no result: a study that exists takes over what the file says now."""

    @model_validator(mode="before")
    @classmethod
    def _default_scheduler(cls, data: Any) -> Any:
        """Choose what decides which trials go on, where the file leaves it open."""
        if not isinstance(data, Mapping):
            return data
        scheduler = data.get("scheduler", "auto")
        if scheduler not in ("auto", None, NONE):
            _require_alone(data)
            return data
        rest = {key: value for key, value in data.items() if key != "scheduler"}
        if data.get("pruner") is not None:
            return rest
        trials = _expected_trials(data)
        if scheduler == "auto" and trials < LARGE_STUDY and not _needs_pruner(data):
            return {**rest, "scheduler": "promote"}
        return {**rest, "pruner": "median" if trials < SMALL_STUDY else "hyperband"}

    @model_validator(mode="before")
    @classmethod
    def _open_ended(cls, data: Any) -> Any:
        """Without a number of trials, time or epochs alone end the study."""
        if not isinstance(data, Mapping) or not any(data.get(one) is not None for one in OPENING):
            return data
        return {"trials": None, **data}

    @model_validator(mode="after")
    def _ends(self) -> Self:
        grid = isinstance(self.sampler, Grid)
        if self.trials is None and not grid and all(getattr(self, x) is None for x in OPENING):
            fail("trials", None, "allowed only beside max_time or max_full_trainings")
        return self

    @model_validator(mode="before")
    @classmethod
    def _first_metric(cls, data: Any) -> Any:
        """`metric` is the first of `metrics`."""
        metrics = data.get("metrics") if isinstance(data, Mapping) else None
        if not isinstance(metrics, list | tuple) or not metrics:
            return data
        if data.get("metric", metrics[0]) != metrics[0]:
            fail("metric", data["metric"], "give either metric or metrics")
        if metrics[0] in COSTS:
            fail("metrics", metrics[0], "a metric of an epoch comes first")
        return {**data, "metric": metrics[0]}

    @model_validator(mode="after")
    def _promotes(self) -> Self:
        if self.scheduler is None:
            return self
        if self.metrics is not None:
            fail("scheduler", "promote", "it ranks by one metric; with several use a pruner")
        if self.patience_trials is not None:
            message = (
                "under promote trials are complete only at the end: give a pruner, or leave it out"
            )
            fail("patience_trials", self.patience_trials, message)
        return self

    @model_validator(mode="after")
    def _several(self) -> Self:
        metrics = self.metrics
        if metrics is None:
            return self
        if not 2 <= len(metrics) <= MOST_OBJECTIVES or len(set(metrics)) < len(metrics):
            allowed = f"2 to {MOST_OBJECTIVES} different ones; of a single one write metric"
            fail("metrics", metrics, allowed)
        if isinstance(self.sampler, CmaEs):
            allowed = "with several metrics: tpe, nsga2, gp, qmc, random, grid"
            fail("sampler", "cmaes", f"it knows one metric only; allowed {allowed}")
        return self

    @property
    def objectives(self) -> tuple[str, ...]:
        """What is optimized, one or several."""
        return self.metrics or (self.metric,)

    @property
    def limits(self) -> tuple[Constraint, ...]:
        """The constraints, one by one."""
        return parse_constraints(self.constraints)


def why_default(study: StudyConfig) -> str:
    """Say of which studies the scheduler or pruner of `study` is the default."""
    trials = _expected_trials({"trials": study.trials})
    if study.scheduler is not None:
        return f"default below {LARGE_STUDY} trials of one metric"
    if trials >= LARGE_STUDY:
        return f"default from {LARGE_STUDY} trials on"
    small = f"default below {SMALL_STUDY} trials" if trials < SMALL_STUDY else "default"
    return f"{small} {_why_pruner(study)}"


def _why_pruner(study: StudyConfig) -> str:
    """Say why trials are not promoted."""
    if study.metrics is not None:
        return "of several metrics"
    if isinstance(study.sampler, GP | CmaEs):
        return f"with {study.sampler.name}, which learns from complete trials alone"
    if study.patience_trials is not None:
        return "with patience_trials, which counts trials as they finish"
    return "with a one-cycle schedule, whose first epochs tell little"
