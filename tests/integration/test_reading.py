"""Trials that are read row by row are those that Optuna itself would read."""

from __future__ import annotations

import copy
import math

import optuna
import pytest
import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage, add_waiting, cached
from hpo.storage.schema import create_schema

pytestmark = pytest.mark.databases("sqlite", "postgresql")


def fill(storage: FencedStorage, directions: list[str]) -> optuna.Study:
    """A study with a trial of every kind."""
    study = optuna.create_study(storage=storage, directions=directions)
    values = [[0.5, math.inf], [0.25, -math.inf], [1e300, 0.0]]
    for number, value in enumerate(values):
        trial = study.ask()
        trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        trial.suggest_int("width", 1, 9, step=2)
        if number:
            trial.suggest_categorical("norm", ["batch", None, 3])
        if len(directions) == 1:
            for step, reported in ((3, 0.5), (1, math.nan), (2, math.inf), (4, -math.inf)):
                trial.report(reported, step)
        trial.set_user_attr("note", {"é": [1, None]})
        storage.set_trial_system_attr(trial._trial_id, "hpo:x", number)
        study.tell(trial, value[: len(directions)])
    study.tell(study.ask(), state=TrialState.PRUNED)
    study.tell(study.ask(), state=TrialState.FAIL)
    study.ask().suggest_float("lr", 1e-4, 1e-1, log=True)
    add_waiting(storage, study._study_id)
    return study


def told(trial: FrozenTrial) -> str:
    """All of it, nan as nan; databases give reports in any order."""
    same = copy.copy(trial)
    same.intermediate_values = dict(sorted(trial.intermediate_values.items()))
    return repr(same)


@pytest.mark.parametrize("directions", [["minimize"], ["maximize", "minimize"]])
def test_trials_are_read_as_optuna_reads_them(database: Database, directions: list[str]) -> None:
    create_schema(database)
    storage = FencedStorage(database)
    other = fill(storage, directions)
    study = fill(storage, directions)
    mine = [trial._trial_id for trial in storage.get_all_trials(study._study_id)]
    assert len(mine) == 7
    nothing: set[int] = set()
    for included, after in (
        (nothing, -1), (nothing, mine[3]), ({mine[0], mine[6]}, mine[3]), ({mine[1]}, mine[6]),
        (nothing, mine[6]), ({other.trials[0]._trial_id}, mine[6]),
    ):  # fmt: skip
        for states in (None, (TrialState.COMPLETE,), (TrialState.WAITING, TrialState.RUNNING)):
            expected = RDBStorage._get_trials(storage, study._study_id, states, included, after)
            found = storage._get_trials(study._study_id, states, included, after)
            assert [told(one) for one in found] == [told(one) for one in expected]
    orders = [[list(one.params) for one in read] for read in (study.trials, other.trials)]
    assert orders[0] == orders[1]


@pytest.mark.usefixtures("far_east")
def test_one_trial_is_read_as_optuna_reads_it(database: Database) -> None:
    create_schema(database)
    storage = FencedStorage(database)
    for trial in fill(storage, ["minimize"]).trials:
        expected = RDBStorage.get_trial(storage, trial._trial_id)
        assert told(storage.get_trial(trial._trial_id)) == told(expected)
    with pytest.raises(KeyError):
        storage.get_trial(10**6)


def test_who_asks_for_finished_trials_reads_no_others(database: Database) -> None:
    create_schema(database)
    storage = FencedStorage(database)
    name = fill(storage, ["minimize"]).study_name
    read: list[str] = []
    sa.event.listen(
        database.engine, "before_cursor_execute", lambda c, cur, text, *rest: read.append(text)
    )
    study = optuna.load_study(study_name=name, storage=cached(storage))
    finished = study.get_trials(states=(TrialState.COMPLETE,))
    assert [told(one) for one in finished] == [told(one) for one in study.trials[:3]]
    asker = study.ask()
    asker.suggest_float("lr", 1e-4, 1e-1, log=True)
    read.clear()
    study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    assert not [text for text in read if "trial_params" in text]
    # Who asks for the others gets all of them, whatever was asked before.
    assert study.get_trials(states=(TrialState.RUNNING,))[-1].params == asker.params
    study.tell(asker, 0.125)
    assert study.get_trials(states=(TrialState.COMPLETE,))[-1].params == asker.params


def test_a_study_that_is_gone_is_told(database: Database) -> None:
    create_schema(database)
    storage = FencedStorage(database)
    study = fill(storage, ["minimize"])
    storage.delete_study(study._study_id)
    with pytest.raises(KeyError):
        storage._get_trials(study._study_id, None, set(), -1)
