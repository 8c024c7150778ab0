"""Searches whose scheduler promotes: exact, bit for bit what an uninterrupted trial computes, and
its paused trials seen, kept and finished as promised."""

from __future__ import annotations

import threading
from dataclasses import replace

import optuna
import pytest
import torch
from optuna.trial import TrialState

from hpo.config.study import StudyFile
from hpo.paths import Home, files_in
from hpo.search import scheduling
from hpo.search import study as studies
from hpo.search.retention import trial_of
from hpo.search.sampling import make_sampler
from hpo.search.standings import Standings
from hpo.search.status import StudyStatus, read_status
from hpo.search.study import Study
from hpo.search.trial import TrialRunner
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage, sampling_view
from hpo.storage.records import Outcome, Trial
from hpo.workers.worker import Worker
from tests.harness.fakes import study_file
from tests.harness.searches import TINY, search

EPOCHS, TRIALS, FINISH = 4, 9, 2
TRAIN = TINY.replace("epochs = 3", f"epochs = {EPOCHS}\ndata.limit_train = 400")
TRAIN = TRAIN.replace("batch_size = 64", "batch_size = 16").replace("[4]", "[8]")
SPACE = "optimizer.lr = {low = 3e-3, high = 3e-2, log = true}"
"""Better than guessing after an epoch."""


def promoted(name: str = "toy", *, trials: int = TRIALS, finish: int = FINISH) -> StudyFile:
    scheduler = f"{{name = 'promote', first_epochs = 1, reduction_factor = 3, finish = {finish}}}"
    study = f"scheduler = {scheduler}"
    return study_file(name=name, trials=trials, study=study, train=TRAIN, space=SPACE)


def curve(trial: Trial) -> list[float]:
    return [one.metrics["val_loss"] for one in trial.epochs]


def run(study: Study, home: Home, turns: int) -> None:
    """Let one worker take so many decisions, then stop it."""
    stop, storage = threading.Event(), FencedStorage(study.database)
    runner = TrialRunner(
        study, storage, study.optuna_study(storage), home, torch.device("cpu"), threads=1
    )
    worker = Worker(study, storage, runner, home=home)
    original, left = worker._turn, turns

    def turn(progress: object) -> str | None:
        nonlocal left
        left -= 1
        if left == 0:
            stop.set()
        return original(progress)  # type: ignore[arg-type]

    worker._turn = turn  # type: ignore[method-assign]
    worker.run(stop)


def test_a_study_ends_exact_and_costs_less(database: Database, home: Home) -> None:
    search(database, home, promoted())
    status = read_status(database, "toy")
    assert [trial.number for trial in status.trials] == list(range(TRIALS))
    assert status.count("complete") + status.count("pruned") == TRIALS
    assert status.count("complete") >= FINISH
    lengths = sorted(len(trial.epochs) for trial in status.trials)
    assert set(lengths) <= {1, 3, EPOCHS}
    assert sum(lengths) < TRIALS * EPOCHS / 1.6
    for trial in status.trials:
        outcomes = [one.outcome for one in trial.attempts]
        assert all(one == Outcome.PAUSED for one in outcomes[:-1])
        assert outcomes[-1] == trial.state
        if trial.state == "pruned":
            assert trial.reason == scheduling.OUTRANKED
            assert trial.attempts[-1].value == trial.value


def test_nothing_but_weights_and_predictions_is_left(database: Database, home: Home) -> None:
    study = search(database, home, promoted())
    left = [path.name for path in files_in(study.directory(home).trials)]
    assert 2 <= len(left) <= 6
    assert set(left) == {"predictions.npz", "weights.safetensors"}


def test_pauses_change_no_bit(database: Database, home: Home) -> None:
    search(database, home, promoted())
    search(database, home, study_file(name="whole", trials=TRIALS, train=TRAIN, space=SPACE))
    whole = {trial.number: trial for trial in read_status(database, "whole").trials}
    for trial in read_status(database, "toy").trials:
        assert trial.params == whole[trial.number].params
        assert curve(trial) == curve(whole[trial.number])[: len(trial.epochs)]


@pytest.fixture
def halfway(database: Database, home: Home) -> tuple[Study, StudyStatus]:
    """A study with some trials that paused, and no worker."""
    study, _ = studies.create(database, promoted())
    run(study, home, 4)
    return study, read_status(database, "toy")


def test_a_paused_trial_runs_for_optuna_and_is_free(
    halfway: tuple[Study, StudyStatus], database: Database
) -> None:
    study, status = halfway
    assert status.count("paused") >= 2
    assert status.state == "waiting"
    states = FencedStorage(database).get_all_trials(study.row.study_id)
    numbers = {trial.number for trial in status.trials if trial.state == "paused"}
    assert {one.number for one in states if one.state == TrialState.RUNNING} >= numbers
    snapshot = study.snapshot()
    assert {one.number for one in snapshot.paused} == numbers
    assert not numbers & {one.number for one in snapshot.free}
    assert snapshot.running == status.count("interrupted", "running")


def test_another_worker_goes_on(halfway: tuple[Study, StudyStatus], home: Home) -> None:
    study, before = halfway
    search(study.database, home, promoted())
    after = read_status(study.database, "toy")
    assert after.finished == TRIALS
    workers = {one.worker for trial in after.trials for one in trial.attempts}
    assert len(workers) == 2
    known = {trial.number: curve(trial) for trial in before.trials}
    assert all(curve(one)[: len(known[one.number])] == known[one.number] for one in after.trials
               if one.number in known)  # fmt: skip
    begun = [one for trial in after.trials for one in trial.attempts if one.epoch]
    spans = sum((one.epoch or 0) - (one.first_epoch or 0) + 1 for one in begun)
    assert spans == sum(len(trial.epochs) for trial in after.trials)  # none was trained twice


def test_what_lost_its_checkpoint_is_trained_again(
    halfway: tuple[Study, StudyStatus], home: Home
) -> None:
    study, before = halfway
    for path in files_in(study.directory(home).trials):
        path.unlink()
    search(study.database, home, promoted())
    after = {one.number: one for one in read_status(study.database, "toy").trials}
    assert all(one.state in ("complete", "pruned") for one in after.values())
    for trial in before.trials:
        assert curve(after[trial.number])[: len(trial.epochs)] == curve(trial)


def test_an_extended_study_lets_paused_trials_go_on(database: Database, home: Home) -> None:
    study = search(database, home, promoted(trials=5))
    before = read_status(database, "toy")
    assert before.state == "finished"
    studies.extend(study, trials=12)
    between = read_status(database, "toy")
    assert between.count("paused") == before.count("pruned") > 0
    run(studies.load(database, "toy"), home, 10**6)
    after = read_status(database, "toy")
    assert [trial.number for trial in after.trials] == list(range(12))
    assert after.finished == 12
    theirs = {one.number: one for one in study.optuna_study(FencedStorage(database)).trials}
    for trial in after.trials:
        assert theirs[trial.number].state == TrialState[Outcome(trial.state).optuna_state]
        assert [one.k for one in trial.attempts] == list(range(1, len(trial.attempts) + 1))
        if trial.number < 5:
            known = before.trials[trial.number]
            assert curve(trial)[: len(known.epochs)] == curve(known)


@pytest.mark.parametrize(("first", "more"), [(0.25, 0.1), (0.5, 0.5), (1.25, 0.25)])
def test_a_study_that_a_budget_ended_goes_on_and_ends(
    database: Database, home: Home, first: float, more: float
) -> None:
    """Wherever the budget left a trial, at a rung or between two: nobody waits for ever."""
    scheduler = "{name = 'promote', first_epochs = 2, reduction_factor = 2, finish = 2}"
    limits = f"scheduler = {scheduler}\nmax_full_trainings = {first}"
    file = study_file(trials=9, study=limits, train=TRAIN, space=SPACE)
    study = search(database, home, file)
    assert read_status(database, "toy").state == "finished"
    studies.extend(study, max_full_trainings=first + more)
    run(studies.load(database, "toy"), home, 10**6)
    status = read_status(database, "toy")
    assert status.state == "finished"
    spent = sum(len(trial.epochs) for trial in status.trials)
    assert (first + more) * EPOCHS <= spent <= (first + more) * EPOCHS + 1


def test_a_worker_that_saw_a_trial_pruned_goes_on_with_it(database: Database, home: Home) -> None:
    study, _ = studies.create(database, promoted(trials=3, finish=0))
    storage = FencedStorage(database)
    found = study.optuna_study(storage)
    for trials in (None, 9):
        if trials is not None:
            assert {one.state for one in found.trials} == {TrialState.PRUNED}
            studies.extend(study, trials=trials)
        runner = TrialRunner(study, storage, found, home, torch.device("cpu"), threads=1)
        Worker(study, storage, runner, home=home).run(threading.Event())
    status = read_status(database, "toy")
    assert status.finished == 9
    outcomes = {one.outcome for trial in status.trials for one in trial.attempts}
    assert outcomes <= {Outcome.PAUSED, Outcome.PRUNED, Outcome.COMPLETE}


def test_samplers_see_paused_trials_as_pruned(
    halfway: tuple[Study, StudyStatus], database: Database
) -> None:
    study, status = halfway
    numbers = {trial.number for trial in status.trials if trial.state == "paused"}
    storage = FencedStorage(database)
    found = study.optuna_study(storage)
    new = found.ask()
    view = sampling_view(found, storage.get_trial(new._trial_id), numbers)
    pruned = view.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    assert {one.number for one in pruned} == numbers
    assert all(one.intermediate_values for one in pruned)
    assert {one.number for one in found.get_trials() if one.state == TrialState.PRUNED} == set()


def test_one_new_trial_in_three_is_random() -> None:
    file = study_file(sampler="tpe", study="scheduler = 'promote'")
    kinds = [type(make_sampler(file, number, 1, 0)) for number in range(300)]
    assert 70 < kinds.count(optuna.samplers.RandomSampler) < 130
    assert kinds[:50] == [type(make_sampler(file, number, 2, 1)) for number in range(50)]
    never = study_file(sampler="tpe", study="scheduler = {name = 'promote', random_fraction = 0}")
    assert type(make_sampler(never, 0, 1, 0)) is optuna.samplers.TPESampler
    plain = study_file(sampler="tpe")
    assert {type(make_sampler(plain, number)) for number in range(50)} == {
        optuna.samplers.TPESampler
    }


def test_checkpoints_of_what_may_be_promoted_stay(database: Database, home: Home) -> None:
    study, _ = studies.create(database, promoted(trials=12, finish=0))
    run(study, home, 10)
    paused = {one.number for one in read_status(database, "toy").trials if one.state == "paused"}
    directory = study.directory(home)
    kept = {trial_of(directory.name_of(path)) for path in files_in(directory.trials)}
    standings = Standings(study)
    assert paused
    assert kept & paused == standings.kept(12, 0) & paused


def test_what_the_images_give_to_guesses_is_resolved_once(
    halfway: tuple[Study, StudyStatus],
) -> None:
    study, _ = halfway
    chance = Standings(study).rungs().chance
    assert chance is not None
    assert 0.1 < chance < 0.2  # ten classes, some 270 images


def test_a_recommended_trial_does_not_pause_before_the_searched_ones_have_its_epochs(
    database: Database, home: Home
) -> None:
    file = promoted(trials=6, finish=1)
    file = replace(file, study=file.study.model_copy(update={"defaults": True}))
    search(database, home, file)
    status = read_status(database, "toy")
    first, rest = status.trials[:2], status.trials[2:]
    assert all(trial.origin.startswith("recommended: ") for trial in first)
    assert [(one.state, len(one.epochs), len(one.attempts)) for one in first] == [
        ("complete", EPOCHS, 1)
    ] * 2
    assert {trial.origin for trial in rest} == {"sampled"}
    assert "pruned" in {trial.state for trial in rest}
