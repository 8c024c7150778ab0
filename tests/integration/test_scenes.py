"""The promise, with real processes: exactly the budget, whatever is killed, stopped or deleted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.status import StudyStatus, read_status
from hpo.storage.database import Database
from hpo.storage.records import FINAL
from tests.harness.fakes import study_file
from tests.harness.scenes import PAUSES, WRITES, small_study
from tests.harness.stage import play
from tests.harness.verdict import promotions

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: str) -> dict[str, Any]:
    """Run a scene or a swarm in a process of its own; its JSON."""
    return play(module, *arguments, folder=Home.default().root.parent)


on_both = pytest.mark.databases("sqlite", "postgresql")


def computed_twice(status: StudyStatus) -> int:
    """Epochs that were begun more often than once, from the attempts and epochs tables."""
    begun = sum(
        attempt.epoch - (attempt.first_epoch or 0) + 1
        for trial in status.trials
        for attempt in trial.attempts
        if attempt.epoch
    )
    return begun - sum(len(trial.epochs) for trial in status.trials)


def check_exact(database: Database, name: str, budget: int) -> StudyStatus:
    status = read_status(database, name)
    assert [trial.number for trial in status.trials] == list(range(budget))
    assert status.count(*FINAL) == budget
    assert status.count("running", "interrupted", "waiting") == 0
    for trial in status.trials:
        assert [a.k for a in trial.attempts] == list(range(1, len(trial.attempts) + 1))
        assert sum(a.outcome in FINAL for a in trial.attempts) == 1
    return status


@pytest.mark.databases("postgresql", "mysql", *["sqlite"] * 3)
def test_eight_workers_run_exactly_the_budget_of_a_grid(url: str, database: Database) -> None:
    space = "batch_size = [8, 16, 32, 64, 128]\nseed = [0, 1, 2, 3, 4, 5, 6, 7]"
    studies.create(database, study_file(trials=40, sampler="grid", space=space))
    run("swarm", url, "toy", "8", "instant")
    status = check_exact(database, "toy", 40)
    tried = [json.dumps(trial.params, sort_keys=True) for trial in status.trials]
    assert len(set(tried)) == 40


@pytest.mark.databases("postgresql", "mysql", "sqlite")
def test_eight_workers_take_each_enqueued_configuration_once(url: str, database: Database) -> None:
    study, _ = studies.create(database, study_file(trials=40))
    for place in range(40):
        studies.enqueue(study, {"optimizer.lr": 1e-3 * (place + 1)})
    run("swarm", url, "toy", "8", "instant")
    status = check_exact(database, "toy", 40)
    assert len({trial.params["optimizer.lr"] for trial in status.trials}) == 40


def test_forty_kills_at_random_instants(url: str, database: Database) -> None:
    studies.create(database, small_study("toy", trials=30, epochs=30))
    told = run("swarm", url, "toy", "3", "real", "40", "0", "0.5")
    status = check_exact(database, "toy", 30)
    assert told["killed"] == 40
    assert computed_twice(status) <= told["killed"]


def test_killed_after_each_write(url: str, database: Database) -> None:
    run("scenes", "killed_between_writes", url)
    reference = check_exact(database, "reference", 3).trials[0]
    for number, (name, _, _) in enumerate(WRITES):
        status = check_exact(database, f"write-{number}", 3)
        assert computed_twice(status) <= 1, name
        first = status.trials[0]
        assert [row.epoch for row in first.epochs] == [1, 2, 3], name
        if first.params != reference.params:
            assert name in ("fill turn", "filling", "claim"), name  # nothing was decided yet
            continue
        # Claim over, it gives the numbers that an undisturbed training gives, bit for bit.
        for row, expected in zip(first.epochs, reference.epochs, strict=True):
            for metric in ("train_loss", "val_loss", "val_top1"):
                assert row.metrics[metric] == expected.metrics[metric], (name, row.epoch)


def test_killed_after_each_write_of_a_pause_and_a_promotion(url: str, database: Database) -> None:
    run("scenes", "killed_while_promoting", url)
    whole = check_exact(database, "whole", 4)
    expected = {trial.params["optimizer.lr"]: trial for trial in whole.trials}
    for number, (name, *_) in enumerate(PAUSES):
        status = check_exact(database, f"pause-{number}", 4)
        assert computed_twice(status) <= 1, name
        assert list(promotions(status)) == [], name
        assert sum(len(trial.epochs) for trial in status.trials) < 12, name
        for trial in status.trials:
            known = expected[trial.params["optimizer.lr"]]
            for row, wanted in zip(trial.epochs, known.epochs, strict=False):
                for metric in ("train_loss", "val_loss", "val_top1"):
                    assert row.metrics[metric] == wanted.metrics[metric], (name, row.epoch)


@on_both
def test_a_worker_stopped_past_its_lease_drops_its_trial_and_goes_on(
    url: str, database: Database
) -> None:
    told = run("scenes", "stopped_past_its_lease", url)
    assert told["codes"] == [0, 0]
    status = check_exact(database, "toy", 4)
    taken_over = [trial for trial in status.trials if len(trial.attempts) > 1]
    assert len(taken_over) == 1
    assert [a.outcome for a in taken_over[0].attempts] == ["lost", "complete"]
    assert [a.worker for a in taken_over[0].attempts] == ["first", "second"]


@pytest.mark.databases("postgresql")
def test_a_worker_stopped_in_a_promoted_trial_drops_it(url: str, database: Database) -> None:
    told = run("scenes", "stopped_in_a_promoted_trial", url)
    assert told["codes"] == [0, 0]
    status = check_exact(database, "toy", 4)
    assert list(promotions(status)) == []
    (taken,) = [one for one in status.trials if any(a.outcome == "lost" for a in one.attempts)]
    outcomes = [one.outcome for one in taken.attempts]
    assert outcomes[:2] == ["paused", "lost"]
    assert [one.worker for one in taken.attempts[1:3]] == ["first", "second"]
    assert computed_twice(status) <= 1


def test_sigterm_hands_the_trial_back_at_once(url: str, database: Database) -> None:
    told = run("scenes", "handed_back_on_sigterm", url)
    assert max(told["seconds"]) < 30  # the lease of 60 s was not waited for
    status = read_status(database, "toy")
    outcomes = [a.outcome for trial in status.trials for a in trial.attempts]
    assert outcomes.count("handed_back") == 3


@pytest.mark.databases
def test_thirty_two_processes_make_one_study(url: str, database: Database) -> None:
    assert run("scenes", "created_by_many", url)["codes"] == [0] * 32
    assert read_status(database, "toy").row.trials == 6


def test_a_study_deleted_and_made_again_under_a_worker(url: str, database: Database) -> None:
    told = run("scenes", "deleted_under_a_worker", url)
    assert told == {"code": 0, "made": True, "same_id": False}
    status = check_exact(database, "toy", 2)
    assert {a.worker for trial in status.trials for a in trial.attempts}.isdisjoint({"old"})
