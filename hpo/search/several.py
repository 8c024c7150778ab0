"""Studies of several objectives: a trial's values, and pruning on the first metric.

Optuna neither stores curves nor prunes there. Our epochs table has the curves, so the pruner is
given a view of the study in which there is one objective and every trial has its curve.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import optuna

from hpo.definition.objectives import COSTS
from hpo.search.samplers import make_pruner
from hpo.search.study import Study
from hpo.storage import records
from hpo.storage.caching import FirstObjective
from hpo.storage.optuna_rdb import FencedStorage
from hpo.storage.records import EpochRow

FINISHED = ("COMPLETE", "PRUNED", "FAIL")


class FirstMetric:
    """The pruner of a study of several objectives, asked about its first metric."""

    def __init__(self, study: Study, storage: FencedStorage) -> None:
        self._study = study
        self._curves: dict[int, dict[int, float]] = {}
        self._settled = 0
        self._storage = FirstObjective(storage, lambda: self._curves)
        self._pruner = make_pruner(study.file)
        self._view = optuna.load_study(
            study_name=study.row.name, storage=self._storage, pruner=self._pruner
        )

    def falls_behind(self, trial_id: int) -> bool:
        """Whether the pruner ends the trial now, by the epochs in our table."""
        self._read()
        return self._pruner.prune(self._view, self._storage.get_trial(trial_id))

    def _read(self) -> None:
        """Curves of the first trials that are all over were read before and stay as they are."""
        study, metric = self._study, self._study.file.metric
        states = list(records.read_states(study.database, study.row.study_id).values())
        fresh = records.read_epochs(study.database, study.uuid, first=self._settled)
        kept = {number: one for number, one in self._curves.items() if number < self._settled}
        self._curves = kept | {number: _curve(rows, metric) for number, rows in fresh.items()}
        over = [state in FINISHED for state in states]
        self._settled = over.index(False) if False in over else len(over)


def _curve(rows: Iterable[EpochRow], metric: str) -> dict[int, float]:
    return {row.epoch: row.metrics[metric] for row in rows if math.isfinite(row.metrics[metric])}


def values_of(
    objectives: Sequence[str],
    rows: Sequence[EpochRow],
    best_epoch: int,
    network: Mapping[str, float],
    networks: int = 1,
) -> tuple[float, ...]:
    """The values of a trial that ran: metrics of `best_epoch`, costs of its epochs `rows`, the
    seconds of each of its `networks` (folds), and those of a network (see `hpo.engine.costs`)."""
    best = next(row.metrics for row in rows if row.epoch == best_epoch)
    costs = {**costs_of(rows, networks), **network}
    return tuple(costs[name] if name in COSTS else best[name] for name in objectives)


def costs_of(rows: Sequence[EpochRow], networks: int = 1) -> dict[str, float]:
    """Costs that epochs `rows` tell: the mean of their seconds, of each of `networks` (folds), and
    the most memory."""
    seconds = [row.metrics["seconds"] for row in rows]
    return {
        "epoch_seconds": sum(seconds) / len(seconds) / networks,
        "peak_memory_mb": max(row.metrics["peak_memory_mb"] for row in rows),
    }
