"""One trial, from its lease to its end: the only module where Optuna meets training.

Order within an epoch: checkpoint file -> the same in the artifacts, where there are some -> one
transaction {metrics, pointer to the checkpoint} -> report -> prune question. Whoever takes over
after a death between any two of them resumes from the pointer, makes up for missing reports, asks,
then trains. While the database is unavailable the next epoch begins nevertheless: what could not be
recorded waits on disk (`epochs`), and the end of the trial waits for the database.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import TrialState

from hpo.config.constraints import unmet_reason
from hpo.config.metrics import COSTS, worst_value
from hpo.config.study import StudyFile
from hpo.config.train import BEFORE, RuntimeConfig, TrainConfig
from hpo.control import Control, ProgressCallback, enter_phase
from hpo.data.dataset import Data, open_data
from hpo.data.images import Images
from hpo.data.split import listing_differences
from hpo.errors import ConfigError, Fenced, Interrupted, TrialFailed
from hpo.paths import Home
from hpo.search import predictions, retention, scheduling, sync
from hpo.search.fingerprints import agree_on_images
from hpo.search.journal import EpochJournal
from hpo.search.noise import VALIDATED
from hpo.search.promotion import Place
from hpo.search.sampling import (
    FirstMetric,
    compares,
    costs_of,
    is_early_stopping,
    open_trial,
    values_of,
)
from hpo.search.standings import Standings
from hpo.search.study import Study
from hpo.search.sync import Checkpoints
from hpo.search.trackers import Run, Trackers, scalars
from hpo.storage import leases, records
from hpo.storage.leases import Claim, Ending, Lease
from hpo.storage.optuna import FencedStorage, read_again
from hpo.storage.records import Epoch, Outcome, Ranking
from hpo.storage.retry import Outage
from hpo.training import device as runtime
from hpo.training import models
from hpo.training.checkpoint import Checkpoint, save_weights
from hpo.training.inputs import TrainingData
from hpo.training.profiling import network_costs
from hpo.training.train import EpochResult, is_last, train

log = logging.getLogger(__name__)


@dataclass
class TrialRunner:
    """Resources of a worker, shared by the trials that it runs one after another."""

    study: Study
    storage: FencedStorage
    optuna_study: optuna.Study
    home: Home
    device: torch.device
    threads: int
    force: bool = False
    """Go on where the images are not those that the study began with, and record it."""
    _data: tuple[Any, Data] | None = None

    @cached_property
    def first_metric(self) -> FirstMetric:
        """The pruner, where there are several objectives."""
        study = self.study
        return FirstMetric(study.file, study.row, study.database, self.storage)

    @cached_property
    def standings(self) -> Standings:
        """How the trials stand, in a study whose scheduler promotes them."""
        return Standings(self.study)

    @cached_property
    def trackers(self) -> Trackers:
        """Where epochs are logged beside the database."""
        folder = self.study.directory(self.home).tensorboard
        return Trackers.of(self.study.file.study.log or (), self.home, folder)

    def close(self) -> None:
        """Let trackers that are behind catch up."""
        self.trackers.close()

    def data(self, config: TrainConfig, worker: str, tick: ProgressCallback) -> Data:
        """Return the images for `config`, opened once for trials that share them; refuses other
        images under the same name than those that the study began with."""
        if self._data is None or self._data[0] != config.data:
            enter_phase("reading the images")
            data = open_data(config.data, self.home.cache, tick, folded=True)
            agree_on_images(
                self.study.database,
                self.study.uuid,
                config.data,
                data.fingerprint,
                partial(listing_differences, self.home.cache, here=data.fingerprint),
                worker=worker,
                force=self.force,
            )
            counts = _class_counts(data, _validation_sets(data))
            named = dict(zip(data.classes, counts, strict=True))
            records.resolve_once(self.study.database, self.study.uuid, VALIDATED, named)
            self._data = config.data, data
        return self._data[1]

    def run(self, claim: Claim, control: Control) -> None:
        """Run the trial of `claim` to its end and tell Optuna, all under its lease.

        Raises Interrupted (the caller hands the trial back), Fenced (it is somebody else's now) and
        StorageError; a configuration that cannot be trained ends its trial as failed instead.
        """
        lease, study = claim.lease, self.study
        with self.storage.guarded(lease):
            trial = open_trial(study.file, self.optuna_study, self.storage, claim, self._paused)
            try:
                ending = TrialRun(self, claim, trial, control).run()
            except (TrialFailed, ConfigError) as error:
                ending = Ending(Outcome.FAILED, reason=str(error))
            except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
                if _is_device_fault(error):
                    raise  # the device is in an unknown state: only a new process helps
                log.exception("trial %d failed", lease.number)
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                ending = Ending(Outcome.FAILED, reason=reason)
            if ending.outcome == Outcome.PAUSED:
                _pause(self, lease, ending.reason or "")
            else:
                _tell(self, lease, trial, ending)
        self.trackers.end(_tracked(study, lease), ending.outcome.words, _results(study, ending))
        retention.apply_retention(study, self.home, self.standings)

    def _paused(self) -> Collection[int]:
        """Return the trials that wait at a rung, in a study where they do."""
        return () if self.study.file.study.scheduler is None else self.standings.paused()

    def drain(self, claim: Claim, reason: str, control: Control) -> None:
        """End a trial that nobody runs, because the study is over: pruned, unless it has all its
        epochs."""
        lease, file = claim.lease, self.study.file
        stored = records.read_epochs(self.study.database, self.study.uuid, lease.trial_id)
        read_again(self.optuna_study, lease.trial_id)
        with self.storage.guarded(lease):
            trial = optuna.trial.Trial(self.optuna_study, lease.trial_id)
        value = None
        if rows := stored.get(lease.number):
            if best := Ranking(file.directions).best_epoch(rows):
                value = best.metrics[file.metric]
            config = file.config(file.space.decode(self.storage.get_trial(lease.trial_id).params))
            if is_last(config, [row.metrics for row in rows]):
                self.run(claim, control)
                return
        with self.storage.guarded(lease):
            _tell(self, lease, trial, Ending(Outcome.PRUNED, value, reason))


def _config(runner: TrialRunner, lease: Lease, trial: optuna.trial.Trial) -> TrainConfig:
    """Return the configuration from the parameters as they are *stored*: of two workers that
    suggested, only one wrote."""
    runner.study.file.space.suggest(trial)
    return runner.study.file.config(_params(runner, lease))


def _is_recommended(file: StudyFile, claim: Claim) -> bool:
    """Return whether the trial is one of those that are recommended to a study."""
    number, place = claim.lease.number, (claim.enqueued, claim.enqueued_before)
    return bool(file.proposals) and scheduling.plan_of(file, number, *place).is_protected


def _params(runner: TrialRunner, lease: Lease) -> dict[str, Any]:
    """Return the values of the searched fields, as they are stored."""
    stored = runner.storage.get_trial(lease.trial_id).params
    return runner.study.file.space.decode(stored)


def _training_data(data: Data) -> TrainingData | list[TrainingData]:
    classes, names = len(data.classes), tuple(data.classes)
    if not data.folds:
        return TrainingData(classes, data.train, data.val, data.mean, data.std, names)
    return [
        TrainingData(classes, one.train, one.val, one.mean, one.std, names) for one in data.folds
    ]


def _validation_sets(data: Data) -> list[Images]:
    """Return the validation images, of each fold."""
    return [one.val for one in data.folds] or [data.val]


def _class_counts(data: Data, sets: Sequence[Images]) -> list[int]:
    """Return the number of images of each class in all `sets`."""
    labels = np.concatenate([one.labels for one in sets])
    return [int(count) for count in np.bincount(labels, minlength=len(data.classes))]


MEASURED = ("precision", "memory_format", "deterministic", "compile")
"""Fields of the runtime that all trials of an architecture share."""


def _runtime(
    runner: TrialRunner, claim: Claim, config: TrainConfig, data: Data, tick: ProgressCallback
) -> RuntimeConfig:
    """Return how this trial computes. Whoever takes it over keeps that; what is `auto` is measured
    once per study, device type, architecture and size: each changes the bits of a result."""
    if claim.runtime is not None:
        return RuntimeConfig.recorded(claim.runtime)
    study, model = runner.study, config.model
    key = f"runtime {runner.device.type} {model.architecture} {model.stem} {config.data.image_size}"
    known = records.read_resolved(study.database, study.uuid, "runtime ")
    chosen = known.get(key)
    if chosen is None:
        # A study that began without some of these fields goes on so.
        before = BEFORE if any(BEFORE.keys() - one.keys() for one in known.values()) else {}
        enter_phase("measuring precisions")
        found = runtime.resolve(
            config.model_copy(update={"runtime": _filled(config.runtime, before)}),
            classes=len(data.classes),
            device=runner.device,
            threads=runner.threads,
            steps=config.epochs * (len(data.train) // config.batch_size),
            tick=tick,
        )
        measured = {name: getattr(found, name) for name in MEASURED}
        chosen = records.resolve_once(study.database, study.uuid, key, measured)
    resolved = _filled(config.runtime, {**BEFORE, **chosen}).model_copy(
        update={"threads": config.runtime.threads or runner.threads}
    )
    leases.keep_runtime(study.database, claim.lease, resolved.model_dump())
    return resolved


def _filled(given: RuntimeConfig, chosen: Mapping[str, Any]) -> RuntimeConfig:
    """Return `given` with what was `chosen` for its fields that are `auto`."""
    open_ = {name: value for name, value in chosen.items() if getattr(given, name) == "auto"}
    return given.model_copy(update=open_)


def _tracked(study: Study, lease: Lease) -> str:
    """Return the key of a trial in trackers, the same for each attempt."""
    return f"{study.uuid}-{lease.number}"


def _results(study: Study, ending: Ending) -> dict[str, float]:
    """Return the values of a trial that ended, as trackers show them."""
    values = ending.objectives or (() if ending.value is None else (ending.value,))
    names = [f"best_{name}" for name in study.file.objectives]
    return dict(zip(names, values, strict=False))


class TrialRun:
    """The epochs of one trial: those that are stored, then those that this attempt computes."""

    def __init__(
        self, runner: TrialRunner, claim: Claim, trial: optuna.trial.Trial, control: Control
    ) -> None:
        if len(claim.fruitless) >= leases.MAX_FRUITLESS:
            raise TrialFailed(
                f"{len(claim.fruitless)} attempts in a row died without finishing an epoch; the "
                f"last one: {claim.fruitless[0]}"
            )
        self.runner, self.lease, self.trial, self.control = runner, claim.lease, trial, control
        self.metric = runner.study.file.metric
        self.objectives = runner.study.file.objectives
        self.ranking = Ranking(runner.study.file.directions)
        self.limits = runner.study.file.study.limits
        self.is_recommended = _is_recommended(runner.study.file, claim)
        config = _config(runner, claim.lease, trial)
        self.data = runner.data(config, claim.lease.worker, self._tick)
        if runner.study.file.study.scheduler is not None:
            first = _validation_sets(self.data)[:1]
            runner.standings.resolve_chance(_class_counts(self.data, first))
        resolved = _runtime(runner, claim, config, self.data, self._tick)
        self.config = config.model_copy(update={"runtime": resolved})
        self.directory = runner.study.directory(runner.home)
        found = sync.find(runner.study.database, runner.study.uuid, runner.home)
        self.checkpoints = Checkpoints(self.directory, found, self.lease)
        self.journal = EpochJournal(runner.study, self.checkpoints)
        self.journal.read(self.config, self._moved)
        self.outage = Outage(f"trial {self.lease.number} goes on, its results wait on disk")
        self.key, params = _tracked(runner.study, self.lease), scalars(_params(runner, self.lease))
        name, epochs = f"trial-{self.lease.number}", [row.metrics for row in self.rows]
        runner.trackers.open(Run(runner.study.row.name, name, self.key, params, epochs))

    @property
    def rows(self) -> list[Epoch]:
        """Finished epochs in order."""
        return self.journal.rows

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to continue from."""
        return self.journal.checkpoint

    def _tick(self) -> None:
        """Note that something before the first epoch goes on."""
        self.control.step(epoch=0, images=0)

    def run(self) -> Ending:
        """Train until the trial ends; return its ending."""
        try:
            return self._run()
        except Fenced:
            if self.journal.waiting:
                log.warning("trial %d: attempt %d leaves %d epoch(s) unrecorded",
                            self.lease.number, self.lease.k, self.journal.waiting)  # fmt: skip
            raise

    def _run(self) -> Ending:
        ending = self._flush_and_check() or self._unfit()
        if ending is not None:
            return ending
        self._begin_epoch()
        results = train(
            self.config,
            _training_data(models.normalized(self.data, self.config)),
            self.control,
            device=self.runner.device,
            metric=self.metric,
            also=[name for name in self.objectives if name not in COSTS],
            checkpoint=self.checkpoints.path,
            resume=self.checkpoint,
            cache=self.runner.home.cache,
        )
        with closing(results):
            for result in results:
                self.checkpoints.share(result.checkpoint, self._moved)
                ending = self._finish_epoch(result)
                if ending is not None:
                    return ending
        return self._complete()

    def _over_limits(self) -> str | None:
        """Return which constraints the epochs so far do not meet, in words; None where they meet
        all."""
        if not self.limits or not self.rows or self.journal.is_behind:
            return None
        return unmet_reason(self.limits, costs_of(self.rows, self._networks))

    def _unfit(self) -> Ending | None:
        """Return the ending of a trial whose network does not meet the constraints; None where it
        does. One that has epochs did: its latency is measured once."""
        if self.journal.known:
            return None
        names = {one.name for one in self.limits}
        for wanted in (names & {"parameters", "flops"}, names & {"latency_ms"}):
            self._tick()
            if reason := unmet_reason(self.limits, self._network_costs(wanted)):
                return Ending(Outcome.INFEASIBLE, reason=reason)
        return None

    def _complete(self, reason: str | None = None) -> Ending:
        """Return the ending of a trial that has all that it is to have, its weights kept."""
        ending = Ending(Outcome.COMPLETE, self._best(), reason, self._values())
        self._keep_weights(ending)
        return ending

    def _begin_epoch(self) -> None:
        leases.begin_epoch(
            self.runner.study.database, self.lease, len(self.rows) + 1, self._progress()
        )

    def _finish_epoch(self, result: EpochResult) -> Ending | None:
        """Store, report, ask; the next epoch begins only if this returns None."""
        self.journal.add(result)
        if result.last:
            return self._flush_and_check()
        ending = None
        if self.outage.is_due:
            with self.outage.noted(), self.runner.study.database.retrying(None):
                ending = self._flush_and_check()
                if ending is None:
                    self._begin_epoch()
        return ending

    def _flush_and_check(self) -> Ending | None:
        """Record the epochs that the database does not have, report them, and ask whether to go on.
        After the last epoch nobody is asked: the trial is complete.

        Raises Interrupted where the study was stopped, Fenced, and StorageUnavailable.
        """
        stop = self.journal.deliver(self._progress())
        for row in self.rows:
            self.runner.trackers.log(self.key, row.epoch, row.metrics)
        self._remember()
        self._report()
        if self._diverged:
            reason = f"loss not finite in epoch {self.rows[-1].epoch}"
            return Ending(Outcome.DIVERGED, reason=reason)
        if missed := self._over_limits():
            return Ending(Outcome.INFEASIBLE, reason=f"{missed}; after epoch {self.rows[-1].epoch}")
        if is_last(self.config, [row.metrics for row in self.rows]):
            return None
        if self.rows and not self.journal.is_behind and self._falls_behind():
            return self._pruned()
        if stop != "rule" and not self.journal.is_behind and (place := self._outranked()):
            return Ending(Outcome.PAUSED, self._best(), str(place))
        if stop == "user":
            raise Interrupted("the study was stopped")
        spent = self.runner.study.spent() if self.rows else None
        if stop == "rule" or spent:
            reason = f"the study is over: {spent or 'a stop rule fired'}"
            return Ending(Outcome.PRUNED, self._best(), reason)
        return None

    def _remember(self) -> None:
        """Mark a trial whose micro-batch was halved for lack of memory: with batch norm that
        changes the result, so its retraining uses the same."""
        micro_batch = self.journal.micro_batch
        before = self.config.runtime.micro_batch or self.config.batch_size
        if micro_batch in (None, before):
            return
        runtime = self.config.runtime.model_copy(update={"micro_batch": micro_batch})
        leases.keep_runtime(self.runner.study.database, self.lease, runtime.model_dump())
        self.trial.set_user_attr("micro_batch", micro_batch)
        self.config = self.config.model_copy(update={"runtime": runtime})

    @property
    def _diverged(self) -> bool:
        """True if a loss of the last epoch is not finite."""
        last = self.rows[-1].metrics if self.rows else {}
        return not all(math.isfinite(last[name]) for name in last if name.endswith("_loss"))

    def _report(self) -> None:
        """Report the epochs that Optuna does not have yet, but those of a loss that is not finite;
        of several objectives it has none."""
        if self.ranking.has_several or self._diverged:
            return
        known = self.runner.storage.get_trial(self.lease.trial_id).intermediate_values
        for row in self.rows:
            if row.epoch not in known:
                self.trial.report(row.metrics[self.metric], row.epoch)

    @property
    def _is_protected(self) -> bool:
        """True if it goes on although others are better, as a recommended one does at first."""
        if not self.is_recommended or not self.rows:
            return False
        study = self.runner.study
        enqueued = [number for _, number in records.read_enqueued(study.database, study.uuid)]
        first = dict(scheduling.first_trials(study.file, enqueued))
        lengths = records.count_epochs(study.database, study.uuid)
        return scheduling.is_protected(len(self.rows), lengths, first)

    def _falls_behind(self) -> bool:
        """Ask the pruner, once Optuna has every epoch."""
        if compares(self.runner.study.file.study.pruner) and self._is_protected:
            return False
        if self.ranking.has_several:
            return self.runner.first_metric.falls_behind(self.lease.trial_id)
        return self.trial.should_prune()

    def _pruned(self) -> Ending:
        """Return the ending of a trial that the pruner ends; one that ends by its own curve alone
        is complete, as after early stopping."""
        pruner, epoch = self.runner.study.file.study.pruner, self.rows[-1].epoch
        if is_early_stopping(pruner):
            return self._complete(f"{pruner.name}: stopped improving, ended after epoch {epoch}")
        return Ending(Outcome.PRUNED, self._best(), f"{pruner.name} pruned it after epoch {epoch}")

    def _outranked(self) -> Place | None:
        """Ask the scheduler, at a rung, once the database has every epoch; return where the trial
        stands if it is to pause."""
        found = self.runner.standings.outranked(self.lease.number, len(self.rows))
        return None if found is not None and self._is_protected else found

    def _values(self) -> tuple[float, ...] | None:
        """Return the values of several objectives, costs measured now; None where there is one."""
        if not self.ranking.has_several:
            return None
        best = self.ranking.best_epoch(self.rows)
        network = self._network_costs(self.objectives, self.checkpoint)
        return values_of(self.objectives, self.rows, best or self.rows[-1], network,
                         self._networks)  # fmt: skip

    @property
    def _networks(self) -> int:
        """So many learn at once: the folds, or one."""
        return max(1, len(self.data.folds))

    def _network_costs(
        self, wanted: Collection[str], checkpoint: Path | None = None
    ) -> dict[str, float]:
        return network_costs(
            self.config,
            wanted,
            classes=len(self.data.classes),
            device=self.runner.device,
            checkpoint=checkpoint,
        )

    def _best(self) -> float:
        """Return the objective: the best epoch's metric."""
        known = self.journal.known
        return (self.ranking.best_epoch(known) or known[-1]).metrics[self.metric]

    def _progress(self) -> dict[str, Any]:
        last = self.rows[-1].metrics if self.rows else {}
        return {
            "number": self.lease.number,
            "epoch": min(len(self.rows) + 1, self.config.epochs),
            "epochs": self.config.epochs,
            "value": last.get(self.metric),
            "images_per_s": last.get("images_per_s"),
            "reason": None,
        }

    def _keep_weights(self, ending: Ending) -> None:
        """Save the best epoch's weights and predictions if the trial is among the best so far."""
        study = self.runner.study
        if self.checkpoint is None or not retention.is_kept(study, ending):
            return
        about = {"study": study.row.name, "trial": str(self.lease.number)}
        path = self.directory.weights(self.lease.number, self.lease.k)
        checkpoint = Checkpoint.load(self.checkpoint)
        save_weights(path, checkpoint.best_weights, about)
        self.checkpoints.share(path, self._moved)
        self._keep_predictions([one.get("predictions", {}) for one in checkpoint.networks])

    def _keep_predictions(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Save what those weights predicted on the validation images, of each fold, beside them."""
        sets = _validation_sets(self.data)
        path = self.directory.predictions(self.lease.number, self.lease.k)
        if predictions.save(path, self.data.classes, sets, found):
            self.checkpoints.put(path, self._moved)

    def _moved(self) -> None:
        """Tell the watchdog that a file is on its way. Whether to stop is asked at the next step of
        the training: an epoch that is finished is recorded first."""
        with suppress(Interrupted, Fenced):
            self.control.step(epoch=len(self.rows) + 1, images=0)


def _pause(runner: TrialRunner, lease: Lease, reason: str) -> None:
    """Let go of a trial, which stays running for Optuna: any worker may go on with it."""
    if not leases.release(runner.study.database, lease, Outcome.PAUSED, reason):
        raise lease.lost()
    log.info("trial %d: paused, %s", lease.number, reason)


def _tell(runner: TrialRunner, lease: Lease, trial: optuna.trial.Trial, ending: Ending) -> None:
    """End the trial in Optuna and our attempt in one transaction. Attributes go in before: a
    finished trial is immutable."""
    state = TrialState[ending.outcome.optuna_state]
    for name, value in _attributes(runner, lease, ending).items():
        trial.set_user_attr(name, value)
    with runner.storage.guarded(lease, ending):
        values = ending.objectives or ending.value
        if ending.outcome.is_worthless:
            values = tuple(worst_value(name) for name in runner.study.file.objectives)
        try:
            runner.optuna_study.tell(
                trial, values if state == TrialState.COMPLETE else None, state=state
            )
        except ValueError:
            # Optuna refuses a trial that has ended, before the storage is asked whose it is.
            leases.renew(runner.study.database, lease)
            raise
    shown = "" if ending.value is None else f" {ending.value:.4f}"
    log.info("trial %d: %s%s %s", lease.number, ending.outcome, shown, ending.reason or "")


def _attributes(runner: TrialRunner, lease: Lease, ending: Ending) -> dict[str, Any]:
    """Return what Optuna's own tools show of a trial beside its values."""
    stored = records.read_epochs(runner.study.database, runner.study.uuid, lease.trial_id)
    rows = stored.get(lease.number, [])
    best = Ranking(runner.study.file.directions).best_epoch(rows)
    found = {
        "outcome": ending.outcome,
        "reason": ending.row()["reason"],
        "best_epoch": best and best.epoch,
        "seconds": round(sum(row.metrics.get("seconds", 0.0) for row in rows), 1) if rows else None,
        "host": socket.gethostname(),
    }
    return {name: value for name, value in found.items() if value is not None}


def _is_device_fault(error: Exception) -> bool:
    """Return True for a CUDA error other than lack of memory: the process is unusable."""
    return "CUDA error" in str(error)
