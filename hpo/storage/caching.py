"""Optuna's storage as samplers, pruners and the dashboard read it: through Optuna's own cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import optuna
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import TrialState

from hpo.storage.optuna_rdb import FencedStorage


class Cached(_CachedStorage):
    """Finished trials are kept in memory; of the others only what is asked for is read. A pruner
    asks after each epoch for finished ones, and so each worker would read what all others do."""

    _backend: FencedStorage

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Any = None
    ) -> list[optuna.trial.FrozenTrial]:
        is_finished = states is not None and all(
            state.is_finished() for state in TrialState if state in states
        )
        with self._backend.unfinished_bare() if is_finished else nullcontext():
            return super().get_all_trials(study_id, deepcopy=deepcopy, states=states)


def cached(storage: FencedStorage) -> optuna.storages.BaseStorage:
    """What samplers and the dashboard read."""
    return Cached(storage)


class FirstObjective(Cached):
    """A study of several objectives as if it had the first alone, for pruners: Optuna's refuse any
    other. `curves()` gives its value after each epoch by trial number; Optuna stores none of them.
    Writes go to the storage behind."""

    def __init__(
        self, storage: FencedStorage, curves: Callable[[], Mapping[int, Mapping[int, float]]]
    ) -> None:
        super().__init__(storage)
        self._curves = curves

    def get_study_directions(self, study_id: int) -> list[optuna.study.StudyDirection]:
        return super().get_study_directions(study_id)[:1]

    def get_trial(self, trial_id: int) -> optuna.trial.FrozenTrial:
        return _with_curve(super().get_trial(trial_id), self._curves())

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Any = None
    ) -> list[optuna.trial.FrozenTrial]:
        curves = self._curves()
        found = super().get_all_trials(study_id, deepcopy=deepcopy, states=states)
        return [_with_curve(trial, curves) for trial in found]


def _with_curve(
    trial: optuna.trial.FrozenTrial, curves: Mapping[int, Mapping[int, float]]
) -> optuna.trial.FrozenTrial:
    seen = copy.copy(trial)  # the original belongs to the cache
    seen.intermediate_values = dict(curves.get(trial.number, {}))
    seen.values = trial.values and trial.values[:1]
    return seen
