"""One trial from its lease to its end, with real training on a small part of the digits."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
import torch
from optuna.samplers._tpe.sampler import _split_trials
from optuna.trial import TrialState
from rich.console import Console

from hpo.cli.live import print_ending
from hpo.config.study import StudyFile, parse_study
from hpo.errors import Conflict
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search import trial as objective
from hpo.search.sampling import draft_params, make_sampler
from hpo.search.status import StudyStatus, read_status
from hpo.search.study import Study
from hpo.search.trial import TrialRunner
from hpo.storage import leases, records, tables
from hpo.storage.database import Database, connect
from hpo.storage.leases import ContactWindow, Ending
from hpo.storage.optuna import FencedStorage
from hpo.storage.records import Outcome, Trial
from hpo.training import learner
from hpo.workers.worker import Worker
from tests.harness.fakes import study_file
from tests.harness.filled import Trial as Filled
from tests.harness.filled import fill

TRAIN = """epochs = 2
[train.data]
limit_train = 100
[train.model]
cnn.filters = [4]
[train.runtime]
precision = "float32"
memory_format = "contiguous"
"""


def search(
    database: Database,
    home: Home,
    file: StudyFile | None = None,
    *,
    before: Callable[[Study], None] = lambda _study: None,
) -> StudyStatus:
    """Run a study to its end in this process."""
    study, _ = studies.create(database, file or study_file(trials=4, train=TRAIN))
    storage = FencedStorage(database)
    runner = TrialRunner(
        study, storage, study.optuna_study(storage), home, torch.device("cpu"), threads=1
    )
    before(study)
    Worker(study, storage, runner, home=home).run(threading.Event())
    return read_status(database, study.row.name)


def only(status: StudyStatus) -> Trial:
    assert len(status.trials) == 1
    return status.trials[0]


def test_a_trial_stores_every_metric_of_every_epoch(database: Database, home: Home) -> None:
    status = search(database, home)
    assert status.count("complete") == 4
    wanted = {"train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "val_macro_f1",
              "val_balanced_accuracy", "lr", "seconds",
              "images_per_s", "peak_memory_mb"}  # fmt: skip
    for trial in status.trials:
        assert [row.epoch for row in trial.epochs] == [1, 2]
        assert all(set(row.metrics) == wanted for row in trial.epochs)
        assert trial.value == max(row.metrics["val_top1"] for row in trial.epochs)
    best = status.best
    assert best is not None
    assert best.value == max(trial.value or 0 for trial in status.trials)
    view = studies.load(database, "toy").optuna_study(FencedStorage(database))
    assert view.best_value == best.value
    assert all(set(t.intermediate_values) == {1, 2} for t in view.trials)


def test_only_the_best_three_keep_weights(database: Database, home: Home) -> None:
    status = search(database, home, study_file(trials=6, train=TRAIN))
    kept = {int(path.parents[1].name) for path in home.root.rglob("weights.safetensors")}
    assert kept == {trial.number for trial in status.ranked()[:3]}
    assert list(home.root.rglob("*.ckpt")) == []


BAD = TRAIN.replace("epochs = 2", "epochs = 8\noptimizer = {weight_decay = 10.0}")
"""With a rate of 90 it diverges, with 1 it ends far worse than guessing."""


@pytest.mark.parametrize("metric", ["val_top1", "val_loss", "train_loss"])
def test_a_trial_that_diverged_is_never_optuna_s_best(
    database: Database, home: Home, metric: str
) -> None:
    """Though what comes after it is worse than guessing."""
    space = "optimizer.lr = [1.0, 90.0]\n[[baseline]]\noptimizer.lr = 90.0\n"
    file = study_file(trials=2, study=f'metric = "{metric}"', train=BAD, space=space)
    status = search(database, home, file)
    first, second = status.trials
    assert (first.state, first.value, first.best_epoch) == ("diverged", None, None)
    assert "not finite in epoch" in str(first.reason)
    assert second.state == "complete"
    assert second.value is not None
    assert status.best == second
    view = optuna.load_study(study_name="toy", storage=database.secret_url)
    assert view.best_trial.number == 1
    told = view.trials[0]
    assert told.state == TrialState.COMPLETE
    assert told.value == (math.inf if metric.endswith("loss") else -math.inf)
    below, above = _split_trials(view, view.trials, 1)
    assert [[trial.number for trial in part] for part in (below, above)] == [[1], [0]]


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "nsga2", "qmc", "random"])
def test_samplers_learn_from_trials_that_diverged(database: Database, sampler: str) -> None:
    space = "optimizer.lr = {low = 0.1, high = 0.9}\nmodel.dropout = {low = 0.0, high = 0.5}"
    study = fill(database, study_file(trials=9, space=space), [
        Filled("diverged", (0.4, math.nan)), Filled("complete", (0.02,)),
        Filled("diverged", (math.nan,)), Filled("complete", (0.5,)),
    ])  # fmt: skip
    view = study.optuna_study(FencedStorage(database))
    assert view.best_trial.number == 3
    options = {"tpe": "n_startup_trials = 2", "gp": "n_startup_trials = 2",
               "nsga2": "population_size = 2"}.get(sampler, "")  # fmt: skip
    chosen = ", ".join([f'name = "{sampler}"', *([options] if options else [])])
    file = study_file(trials=9, space=space, sampler="{" + chosen + "}")
    frozen = view.ask()._cached_frozen_trial
    drafted = draft_params(view, file.space, frozen, {}, lambda k: make_sampler(file, 4, 1, k))
    assert drafted.keys() == set(file.space)


def test_cma_es_models_the_ranges_that_every_trial_has() -> None:
    """Not those that all trials happened to have so far; and it learns nothing of what it did not
    draw: a trial that was planned as a whole."""
    when = '{low = 0.5, high = 0.9, when = {"optimizer.name" = "sgd"}}'
    space = "optimizer.lr = {low = 0.1, high = 0.9}\nmodel.dropout = {low = 0.0, high = 0.5}\n"
    space += f'optimizer.name = ["sgd", "adamw"]\noptimizer.momentum = {when}'
    sampler = '{name = "cmaes", with_margin = true, popsize = 4}'
    file, view = study_file(trials=9, space=space, sampler=sampler), optuna.create_study()
    drawn = []
    for number, name in enumerate(["sgd"] * 5 + ["adamw"] * 6):
        trial, planned = view.ask(), {"optimizer.name": name}
        if number == 10:
            planned |= {"optimizer.lr": 0.5, "model.dropout": 0.0}
        frozen = trial._cached_frozen_trial
        params = draft_params(
            view,
            file.space,
            frozen,
            planned,
            lambda k, n=number: make_sampler(file, n, 1, k),  # type: ignore[misc]
        )
        view._storage.set_trial_system_attr(trial._trial_id, "fixed_params", params)
        file.space.suggest(optuna.trial.Trial(view, trial._trial_id))
        view.tell(trial, number / 10)
        drawn.append(view.trials[-1].system_attrs)
    assert [len(one.get("x_for_tell", ())) for one in drawn] == [0, *[2] * 9, 0]
    generations = [[one[key] for key in one if key.endswith(":generation")] for one in drawn]
    assert generations == [[], *[[0]] * 4, *[[1]] * 4, [2], []]


def test_a_trial_after_its_last_epoch_is_complete_whatever_the_pruner_says(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def prune(self: object, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        asked.append(max(trial.intermediate_values))
        return max(trial.intermediate_values) == 2

    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", prune)
    file = study_file(trials=2, train=TRAIN, pruner="median")
    status = search(database, home, file)
    assert [trial.state for trial in status.trials] == ["complete"] * 2
    assert asked == [1, 1]
    view = studies.load(database, "toy").optuna_study(FencedStorage(database))
    assert all(set(trial.intermediate_values) == {1, 2} for trial in view.trials)


def test_a_recommended_trial_is_not_pruned_before_the_others_have_its_epochs(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", lambda self, study, trial: True)
    text = study_file(trials=6, train=TRAIN, pruner="median").text
    file = parse_study(text.replace("defaults = false", "defaults = true"), "toy.toml")
    status = search(database, home, file)
    assert [trial.origin.partition(":")[0] for trial in status.trials] == [
        "recommended", "recommended", "sampled", "sampled", "sampled", "sampled"
    ]  # fmt: skip
    assert [trial.state for trial in status.trials] == ["complete"] * 2 + ["pruned"] * 4
    told = studies.load(database, "toy").optuna_study(FencedStorage(database)).trials
    assert [trial.user_attrs["origin"] for trial in told] == [one.origin for one in status.trials]


def test_early_stopping_completes_a_trial_before_the_pruner_is_asked(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune",
                        lambda self, study, trial: max(trial.intermediate_values) >= 2)  # fmt: skip
    stops = 'epochs = 6\nearly_stopping = {patience = 1, min_delta = 9.0, metric = "val_top1"}'
    file = study_file(trials=1, train=TRAIN.replace("epochs = 2", stops), pruner="median")
    trial = only(search(database, home, file))
    assert (trial.state, len(trial.epochs)) == ("complete", 2)


@pytest.mark.parametrize("rule", [False, True])
def test_a_death_between_the_last_epoch_and_its_end_costs_nothing(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch, rule: bool
) -> None:
    """Whether the next worker goes on with the study, or ends what a stop rule leaves."""
    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune",
                        lambda self, study, trial: max(trial.intermediate_values) >= 2)  # fmt: skip
    original = objective.TrialRun._complete
    monkeypatch.setattr(objective.TrialRun, "_complete", _die)
    file = study_file(trials=1, train=TRAIN, pruner="median")
    with pytest.raises(OSError, match="went away"):
        search(database, home, file)
    monkeypatch.setattr(objective.TrialRun, "_complete", original)

    def stop(study: Study) -> None:
        if rule:
            records.stop_study(database, study.uuid, "rule", "enough")

    trial = only(search(database, home, file, before=stop))
    assert (trial.state, len(trial.epochs), len(trial.attempts)) == ("complete", 2, 2)
    assert [row.attempt for row in trial.epochs] == [1, 1]


def _die(*_args: object) -> None:
    raise OSError("the host went away")


def test_a_patient_pruner_without_another_is_early_stopping(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna.pruners.PatientPruner, "prune",
                        lambda self, study, trial: max(trial.intermediate_values) >= 3)  # fmt: skip
    pruner = '{name = "patient", wrapped_pruner = "none"}'
    file = study_file(trials=2, train=TRAIN.replace("epochs = 2", "epochs = 6"), pruner=pruner)
    status = search(database, home, file)
    for trial in status.trials:
        assert (trial.state, len(trial.epochs)) == ("complete", 3)
        assert trial.value == max(row.metrics["val_top1"] for row in trial.epochs)
        assert trial.reason == "patient: stopped improving, ended after epoch 3"
    assert {int(path.parents[1].name) for path in home.root.rglob("weights.safetensors")} == {0, 1}
    assert (status.best_pruned, status.pruned_note) == (None, None)
    view = studies.load(database, "toy").optuna_study(FencedStorage(database))
    assert [trial.state for trial in view.trials] == [TrialState.COMPLETE] * 2


def test_a_configuration_that_cannot_be_trained_fails_alone(database: Database, home: Home) -> None:
    space = "model.trainable_blocks = [7, 1]\n[[baseline]]\nmodel.trainable_blocks = 7"
    status = search(database, home, study_file(trials=2, train=TRAIN, space=space))
    assert status.trials[0].state == "failed"
    assert "trainable_blocks" in str(status.trials[0].reason)
    assert "Traceback" not in str(status.trials[0].reason)


def test_pruned_by_the_study_s_own_pruner(database: Database, home: Home) -> None:
    file = study_file(trials=1, train=TRAIN)
    text = file.text.replace('pruner = "none"', 'pruner = {name = "threshold", lower = 0.999}')
    trial = only(search(database, home, parse_study(text, "toy.toml")))
    assert (trial.state, len(trial.epochs)) == ("pruned", 1)
    assert trial.reason == "threshold pruned it after epoch 1"
    view = studies.load(database, "toy").optuna_study(FencedStorage(database))
    assert view.trials[0].state == TrialState.PRUNED


def test_a_stop_rule_ends_running_trials_after_their_epoch(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = objective.leases.record_epochs

    def fire(*args: Any, **kwargs: Any) -> Any:
        records.stop_study(database, args[1].study, "rule", "enough")
        return original(*args, **kwargs)

    monkeypatch.setattr(objective.leases, "record_epochs", fire)
    status = search(database, home, study_file(trials=3, train=TRAIN))
    trial = only(status)  # waiting ones are hidden
    assert (trial.state, len(trial.epochs)) == ("pruned", 1)
    assert trial.reason == "the study is over: a stop rule fired"
    assert status.state == "finished"


def test_a_trial_goes_on_from_the_beginning_where_the_checkpoint_is_elsewhere(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host has the database, not the files."""
    original = objective.leases.record_epochs
    calls: list[int] = []

    def die_once(*args: Any, **kwargs: Any) -> Any:
        done = original(*args, **kwargs)
        calls.append(args[2][-1].epoch)
        if len(calls) == 1:
            shutil.rmtree(home.root / "studies")
            raise OSError("the host went away")
        return done

    monkeypatch.setattr(objective.leases, "record_epochs", die_once)
    file = study_file(trials=1, train=TRAIN)
    with pytest.raises(OSError, match="went away"):
        search(database, home, file)
    trial = only(search(database, home, file))
    assert calls == [1, 1, 2]
    assert trial.state == "complete"
    assert [row.attempt for row in trial.epochs] == [2, 2]
    assert [a.outcome for a in trial.attempts] == ["lost", "complete"]


def test_a_trial_that_a_successor_ended_is_not_told_again(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna refuses it with a ValueError, before the storage is asked whose trial it is."""
    tell, late = optuna.Study.tell, threading.Event()

    def overtaken(view: optuna.Study, trial: optuna.Trial, *values: Any, **state: Any) -> Any:
        if not late.is_set():
            late.set()
            with database.write() as c:
                c.execute(sa.update(tables.attempts).values(until=0.0))
            study, contact = studies.load(database, "toy"), ContactWindow(0.0, time.time())
            taken = leases.claim(database, study.uuid, study.snapshot().free[0], "next", contact)
            assert taken is not None
            other = FencedStorage(database)
            with other.guarded(taken.lease, Ending(Outcome.COMPLETE, 0.5)):
                tell(study.optuna_study(other), trial.number, 0.5)
        return tell(view, trial, *values, **state)

    monkeypatch.setattr(optuna.Study, "tell", overtaken)
    trial = only(search(database, home, study_file(trials=1, train=TRAIN)))
    assert [one.outcome for one in trial.attempts] == ["lost", "complete"]
    view = studies.load(database, "toy").optuna_study(FencedStorage(database))
    assert (trial.state, view.trials[0].value) == ("complete", 0.5)


def test_what_runs_out_of_memory_is_marked_and_keeps_its_micro_batch(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = learner.Learner._loss

    def small_only(self: Any, forward: Any, images: torch.Tensor, labels: torch.Tensor) -> Any:
        if len(images) > 16:
            raise torch.OutOfMemoryError("pretended")
        return original(self, forward, images, labels)

    monkeypatch.setattr(learner.Learner, "_loss", small_only)
    file = study_file(trials=1, train=TRAIN.replace("epochs = 2", "epochs = 2\nbatch_size = 32"))
    trial = only(search(database, home, file))
    assert (trial.state, len(trial.attempts)) == ("complete", 1)
    view = studies.load(database, "toy").optuna_study(FencedStorage(database))
    assert view.trials[0].user_attrs["micro_batch"] == 16
    runtime = trial.attempts[-1].runtime
    assert runtime is not None
    assert runtime["micro_batch"] == 16


def test_other_images_under_the_same_name_are_refused(database: Database, home: Home) -> None:
    def began_elsewhere(study: Study) -> None:
        records.resolve_once(database, study.uuid, "data digits/0.15/0.15/0/100", "0123")

    with pytest.raises(Conflict, match="are not what the study began with"):
        search(database, home, before=began_elsewhere)
    status = read_status(database, "toy")
    assert [a.outcome for a in status.trials[0].attempts] == ["handed_back"]


def test_the_same_study_twice_gives_the_same_numbers(tmp_path: Path, home: Home) -> None:
    values = []
    for name in ("a", "b"):
        status = search(connect(f"sqlite:///{tmp_path / name}.db"), home)
        values.append([(t.params, t.value) for t in status.trials])
    assert values[0] == values[1]


def test_a_study_in_which_every_trial_diverges_ends_and_says_so(
    database: Database, home: Home
) -> None:
    train = TRAIN.replace("epochs = 2", "epochs = 8\noptimizer = {weight_decay = 10.0}")
    space = "optimizer.lr = {low = 80.0, high = 90.0}"
    status = search(database, home, study_file(trials=4, train=train, space=space))
    assert (status.state, status.finished, status.count("diverged")) == ("finished", 4, 4)
    assert {trial.value for trial in status.trials} == {None}
    assert status.best is None
    assert str(status.no_best).startswith("4 of 4 trials diverged, their loss was not finite")
    assert re.search(r"smaller optimizer\.lr \(tried: 8\S+ to 8\S+\)", str(status.no_best))
    told = io.StringIO()
    print_ending(database, status, Console(file=told, width=200), hpo="hpo", flag="")
    assert f"{status.no_best}. Trial by trial: hpo trials toy" in told.getvalue()
    view = studies.load(database, "toy").optuna_study(FencedStorage(database))
    assert [trial.state for trial in view.trials] == [TrialState.COMPLETE] * 4


def test_a_study_from_before_a_field_goes_on(database: Database) -> None:
    study, _ = studies.create(database, study_file())
    old = {**study.row.definition, "study": dict(study.row.definition["study"])}
    del old["study"]["keep_checkpoints"]
    records.update_study(database, study.uuid, definition=json.dumps(old))
    again, is_new = studies.create(database, study_file())
    assert (again.uuid, is_new) == (study.uuid, False)
    with pytest.raises(Conflict, match="keep_checkpoints: 0 -> 2"):
        studies.create(database, study_file(study="keep_checkpoints = 2"))
