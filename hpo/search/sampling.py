"""Samplers and pruners by name, rebuilt for every trial, and what a trial tries.

Optuna neither stores curves nor prunes there. Our epochs table has the curves, so the pruner is
given a view of the study in which there is one objective and every trial has its curve.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import optuna
from optuna import pruners, samplers
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from hpo.config.metrics import COSTS
from hpo.config.space import Space
from hpo.config.strategies import (
    ASHA,
    GP,
    TPE,
    CmaEs,
    Hyperband,
    Median,
    NoPruner,
    Patient,
    Percentile,
    Strategy,
    Threshold,
)
from hpo.config.study import StudyFile
from hpo.control import enter_phase
from hpo.search.scheduling import plan_of
from hpo.storage import records
from hpo.storage.database import Database
from hpo.storage.leases import Claim
from hpo.storage.optuna import FencedStorage, FirstObjective, read_again, sampling_view
from hpo.storage.records import FINISHED_STATES, Epoch, StudyRow


def derive_seed(*parts: object) -> int:
    """Return a 32-bit seed that depends on all `parts` and nothing else."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def make_sampler(file: StudyFile, *seeds: int) -> samplers.BaseSampler:
    """Return the study's sampler, seeded by the study's seed and `seeds` (trial number, attempt,
    draw): two workers never draw the same, and a study repeats where its history does."""
    spec = file.study.sampler
    if _is_at_random(file, *seeds[:1]):
        return samplers.RandomSampler(seed=derive_seed(file.study.seed, *seeds))
    # One scrambled sequence per study: QMC takes its next point by a counter in the database.
    parts = (file.study.seed,) if spec.name == "qmc" else (file.study.seed, *seeds)
    kinds: dict[str, Callable[..., samplers.BaseSampler]] = {
        "tpe": samplers.TPESampler,
        "random": samplers.RandomSampler,
        "grid": samplers.RandomSampler,  # its points are planned; nothing is left to draw
        "gp": samplers.GPSampler,
        "cmaes": partial(_OfRanges, file.space.ranges),
        "qmc": samplers.QMCSampler,
        "nsga2": samplers.NSGAIISampler,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return kinds[spec.name](seed=derive_seed(*parts), **spec.options())


class _OfRanges(samplers.CmaEsSampler):
    """CMA-ES over the ranges that every trial has. Optuna's own takes those that all trials had so
    far: once one comes without, its model has a dimension too many, and it draws at random."""

    def __init__(self, ranges: Collection[str], **options: Any) -> None:
        super().__init__(**options)
        self._ranges = frozenset(ranges)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return what is drawn together."""
        found = super().infer_relative_search_space(study, trial)
        return {name: one for name, one in found.items() if name in self._ranges}


def _is_at_random(file: StudyFile, number: int = 0) -> bool:
    """Return whether trial `number` is drawn at random although the sampler has a model."""
    scheduler = file.study.scheduler
    if scheduler is None or not isinstance(file.study.sampler, TPE | GP | CmaEs):
        return False
    drawn = derive_seed(file.study.seed, number, "at random") / 2**32
    return drawn < scheduler.random_fraction


def make_pruner(file: StudyFile) -> pruners.BasePruner:
    """Return the study's pruner; Hyperband's largest resource is the space's largest `epochs`, as
    it was at first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return _pruner(file, file.study.pruner)


def _pruner(file: StudyFile, spec: Strategy) -> pruners.BasePruner:
    options = spec.options()
    if isinstance(spec, Hyperband):
        options["max_resource"] = file.planned_epochs
    if isinstance(spec, Patient):
        inner = options["wrapped_pruner"]
        # Optuna's way to say that patience alone decides; a NopPruner in it would never prune.
        options["wrapped_pruner"] = None if is_early_stopping(spec) else _pruner(file, inner)
    return _PRUNERS[type(spec)](**options)


def is_early_stopping(pruner: Strategy) -> bool:
    """Return whether `pruner` ends a trial by its own curve alone, once it stops improving."""
    return isinstance(pruner, Patient) and isinstance(pruner.wrapped_pruner, NoPruner)


def compares(pruner: Strategy) -> bool:
    """Return whether `pruner` ends a trial because others are better."""
    if isinstance(pruner, Patient):
        return compares(pruner.wrapped_pruner)
    return not isinstance(pruner, Threshold | NoPruner)


_PRUNERS: dict[type[Strategy], Callable[..., pruners.BasePruner]] = {
    Hyperband: pruners.HyperbandPruner,
    ASHA: pruners.SuccessiveHalvingPruner,
    Median: pruners.MedianPruner,
    Percentile: pruners.PercentilePruner,
    Patient: pruners.PatientPruner,
    Threshold: pruners.ThresholdPruner,
    NoPruner: pruners.NopPruner,
}


class DraftTrial:
    """A trial that is thought through before anything is written.

    It answers `suggest_*` as Optuna's own trial does (planned values first, then the sampler's
    joint draw, then a single one), so that a repeated configuration can be drawn again.
    """

    def __init__(
        self,
        study: optuna.Study,
        sampler: samplers.BaseSampler,
        frozen: FrozenTrial,
        planned: Mapping[str, Any],
    ) -> None:
        self._study, self._sampler, self._frozen = study, sampler, frozen
        self._planned = planned
        sampler.before_trial(study, frozen)
        self.params: dict[str, Any] = {}

    @cached_property
    def _space(self) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(self._study, self._frozen)

    @cached_property
    def _joint(self) -> dict[str, Any]:
        """The joint draw: none for a trial that is planned as a whole, which would be taken for one
        that the sampler has drawn."""
        return self._sampler.sample_relative(self._study, self._frozen, self._space)

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        if name in self._planned:
            value = self._planned[name]
        elif name in self._joint and self._space.get(name) == distribution:
            value = self._joint[name]
        else:
            value = self._sampler.sample_independent(self._study, self._frozen, name, distribution)
        # Through the stored form and back, so that what is drafted is what will be read.
        self.params[name] = distribution.to_external_repr(distribution.to_internal_repr(value))
        return self.params[name]

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Draft a value, as Optuna's trials suggest one."""
        distribution = optuna.distributions.FloatDistribution(low, high, log=log, step=step)
        return float(self._suggest(name, distribution))

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        """Draft a value, as Optuna's trials suggest one."""
        distribution = optuna.distributions.IntDistribution(low, high, log=log, step=step)
        return int(self._suggest(name, distribution))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Draft a value, as Optuna's trials suggest one."""
        return self._suggest(name, optuna.distributions.CategoricalDistribution(choices))


REDRAWS = 5


def draft_params(
    study: optuna.Study,
    space: Space,
    frozen: FrozenTrial,
    planned: Mapping[str, Any],
    new_sampler: Callable[[int], samplers.BaseSampler],
    paused: Collection[int] = (),
) -> dict[str, Any]:
    """Return the parameters, in Optuna's form, for the trial `frozen` that tries `planned` and
    samples the rest with `new_sampler(draw)`, which takes the trials `paused` for pruned ones.

    A configuration that some trial has already is drawn again up to REDRAWS times, then allowed:
    in a small discrete space there may be no other.
    """
    fixed = space.encode(planned)
    others = [t.params for t in study.get_trials(deepcopy=False) if t.number != frozen.number]
    params: dict[str, Any] = {}
    with warnings.catch_warnings():
        # GP takes the infinite value of a trial that diverged for the worst finite one.
        warnings.filterwarnings("ignore", message="Clip non-finite values")
        for draw in range(REDRAWS + 1):
            draft = DraftTrial(
                sampling_view(study, frozen, paused), new_sampler(draw), frozen, fixed
            )
            space.suggest(draft)
            params = draft.params
            if params not in others or params.keys() <= fixed.keys():
                break
    return params


def open_trial(
    file: StudyFile,
    study: optuna.Study,
    storage: FencedStorage,
    claim: Claim,
    paused: Callable[[], Collection[int]] = tuple,
) -> optuna.trial.Trial:
    """Decide what the trial of `claim` tries, write that down first, then start it; all of it
    repeatable. The sampler takes the trials `paused` for pruned ones."""
    lease = claim.lease
    read_again(study, lease.trial_id)  # `hpo extend` lets pruned trials go on
    study.get_trials(deepcopy=False)  # Optuna's cache must know the trial before its first write
    frozen = storage.get_trial(lease.trial_id)
    if "fixed_params" not in frozen.system_attrs:
        enter_phase("choosing parameters")
        plan = plan_of(file, lease.number, claim.enqueued, claim.enqueued_before)
        sampler = partial(make_sampler, file, lease.number, lease.k)
        params = draft_params(study, file.space, frozen, plan.values, sampler, paused())
        storage.set_trial_user_attr(lease.trial_id, "origin", plan.origin)
        storage.set_trial_system_attr(lease.trial_id, "fixed_params", params)
    if frozen.state == TrialState.WAITING:
        storage.set_trial_state_values(lease.trial_id, TrialState.RUNNING)
    study.sampler = make_sampler(file, lease.number, lease.k, 0)
    return optuna.trial.Trial(study, lease.trial_id)


class FirstMetric:
    """The pruner of a study of several objectives, asked about its first metric."""

    def __init__(
        self, file: StudyFile, row: StudyRow, database: Database, storage: FencedStorage
    ) -> None:
        self._metric, self._row, self._database = file.metric, row, database
        self._curves: dict[int, dict[int, float]] = {}
        self._settled = 0
        self._storage = FirstObjective(storage, lambda: self._curves)
        self._pruner = make_pruner(file)
        self._view = optuna.load_study(
            study_name=row.name, storage=self._storage, pruner=self._pruner
        )

    def falls_behind(self, trial_id: int) -> bool:
        """Return whether the pruner ends the trial now, by the epochs in our table."""
        self._read()
        return self._pruner.prune(self._view, self._storage.get_trial(trial_id))

    def _read(self) -> None:
        """Read the curves anew but for those of the first trials that are all over."""
        states = list(records.read_states(self._database, self._row.study_id).values())
        fresh = records.read_epochs(self._database, self._row.uuid, first=self._settled)
        kept = {number: one for number, one in self._curves.items() if number < self._settled}
        self._curves = kept | {number: _curve(rows, self._metric) for number, rows in fresh.items()}
        over = [state in FINISHED_STATES for state in states]
        self._settled = over.index(False) if False in over else len(over)


def _curve(rows: Iterable[Epoch], metric: str) -> dict[int, float]:
    return {row.epoch: row.metrics[metric] for row in rows if math.isfinite(row.metrics[metric])}


def values_of(
    objectives: Sequence[str],
    rows: Sequence[Epoch],
    best: Epoch,
    network: Mapping[str, float],
    networks: int = 1,
) -> tuple[float, ...]:
    """Return the values of a trial that ran: metrics of its `best` epoch, costs of its epochs
    `rows`, the seconds of each of its `networks` (folds), and those of a network
    (`hpo.training.profiling`)."""
    costs = {**costs_of(rows, networks), **network}
    return tuple(costs[name] if name in COSTS else best.metrics[name] for name in objectives)


def costs_of(rows: Sequence[Epoch], networks: int = 1) -> dict[str, float]:
    """Return the costs that epochs `rows` tell: the mean of their seconds, of each of `networks`
    (folds), and the most memory."""
    seconds = [row.metrics["seconds"] for row in rows]
    return {
        "epoch_seconds": sum(seconds) / len(seconds) / networks,
        "peak_memory_mb": max(row.metrics["peak_memory_mb"] for row in rows),
    }
