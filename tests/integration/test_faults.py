"""What hpo promises for each fault, with real processes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpo.search.status import read_status
from hpo.storage.database import Database
from hpo.storage.leases import MAX_FRUITLESS
from tests.integration.test_scenes import check_exact, computed_twice, on_both, run

pytestmark = pytest.mark.process

NO_STEP = "made no step for 3 s (study.stall_timeout_s)"


@pytest.mark.parametrize("scene", ["hanging_training", "hanging_loading"])
def test_a_trial_that_always_hangs_fails_with_the_reason(
    url: str, database: Database, scene: str
) -> None:
    run("faults", scene, url)
    trial = read_status(database, "toy").trials[0]
    *lost, last = trial.attempts
    assert [(one.outcome, one.reason) for one in lost] == [("lost", NO_STEP)] * MAX_FRUITLESS
    assert len({one.worker for one in trial.attempts}) == MAX_FRUITLESS + 1
    assert trial.state == "failed"
    assert last.reason == (
        f"5 attempts in a row died without finishing an epoch; the last one: {NO_STEP}"
    )


@on_both
def test_a_training_that_hangs_is_killed_and_goes_on_elsewhere(
    url: str, database: Database
) -> None:
    run("faults", "hanging_once", url)
    first, second = check_exact(database, "toy", 1).trials[0].attempts
    assert (first.outcome, first.reason) == ("lost", NO_STEP)
    assert second.outcome == "complete"
    assert first.worker != second.worker


def test_a_worker_that_was_stopped_for_ever_is_replaced(url: str, database: Database) -> None:
    assert run("faults", "stopped_for_ever", url)["stopped"] == 1
    trial = check_exact(database, "toy", 1).trials[0]
    first, second = trial.attempts
    assert (first.outcome, first.reason) == ("lost", NO_STEP)
    assert second.outcome == "complete"
    assert trial.epochs[0].attempt == first.k  # it went on from there
    assert trial.epochs[-1].attempt == second.k


def test_what_hangs_without_a_supervisor_is_left_to_others(url: str, database: Database) -> None:
    told = run("faults", "hanging_alone", url)
    assert (told["code"], told["still_there"]) == (0, True)
    first, second = check_exact(database, "toy", 1).trials[0].attempts
    assert (first.worker, first.outcome, first.reason) == ("first", "lost", NO_STEP)
    assert (second.worker, second.outcome) == ("second", "complete")


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of 1 MiB with the run directory on it."""
    mount, disk = shutil.which("mount"), tmp_path / "disk"
    disk.mkdir()
    command = [str(mount), "-t", "tmpfs", "-o", "size=1m", "hpo-test", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no disk of 1 MiB can be mounted here: it takes root and CAP_SYS_ADMIN")
    monkeypatch.setenv("HPO_HOME", str(disk))
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@on_both
def test_a_full_disk_hands_the_trial_back_and_goes_on_once_there_is_room(
    url: str, database: Database, small_disk: Path
) -> None:
    told = run("faults", "disk_full", url)["told"]
    assert len(told) == 2
    for message in told:
        assert message.startswith("waiting for room: ")
        assert f"does not fit: the disk mounted at {small_disk} has " in message
        assert ".ckpt" in message
    status = check_exact(database, "toy", 3)
    assert status.count("complete") == 3
    outcomes = [one.outcome for trial in status.trials for one in trial.attempts]
    assert sorted(outcomes) == ["complete"] * 3 + ["handed_back"] * 2
    assert computed_twice(status) <= 2
    assert not list(small_disk.rglob(".epoch-*"))  # no half of a checkpoint


@on_both
def test_of_a_hundred_waiting_trials_a_hundred_are_claimed(url: str) -> None:
    told = run("races", "claims", url, "1")
    assert told["handed_out"] == told["distinct"] == [100]


@on_both
def test_eight_processes_make_one_study_in_a_new_database(url: str) -> None:
    told = run("races", "creates", url, "2")
    assert told["survivors"] == [8, 8]
    assert told["alike"] == [True, True]


@on_both
def test_of_two_that_finish_a_trial_one_is_heard(url: str) -> None:
    told = run("races", "finishes", url, "10")
    assert told["accepted"] == [1] * 10
    assert told["true"] == 10


@on_both
def test_sigterm_in_mid_epoch_hands_the_trial_back(url: str, database: Database) -> None:
    told = run("faults", "handed_back", url, "3")
    assert len(told["handed_back"]) == 3
    assert max(told["handed_back"]) < 60  # its lease has ten minutes
    attempts = read_status(database, "toy").trials[0].attempts
    assert [one.outcome for one in attempts] == ["handed_back"] * 3


@on_both
def test_a_worker_that_was_stopped_writes_nothing_after_it_was_superseded(url: str) -> None:
    told = run("faults", "stopped_at_random", url, "4")
    assert told["codes"] == [0, 0, 0]
    assert told["taken_over"] > 0
    assert told["refused"] >= told["taken_over"]
    assert told["accepted"] == 0


@on_both
def test_a_trial_outlives_those_who_die_while_they_take_it_over(url: str) -> None:
    told = run("faults", "takeover_killed", url, "3")
    assert (told["killed"], told["lost"]) == (3, 0)
    # The dead one's first write alone, or both without their commit, leave nothing behind.
    assert told["attempts"] == [2, 2, 3]


@on_both
def test_a_damaged_checkpoint_loses_no_trial_and_changes_no_epoch(url: str) -> None:
    told = run("faults", "damaged_checkpoint", url, "3")
    assert (told["lost"], told["wrong"], told["noted"]) == (0, 0, 3)


@on_both
def test_neither_time_zones_nor_wrong_clocks_make_a_worker_dead(
    url: str, database: Database
) -> None:
    told = run("faults", "wrong_clocks", url)
    assert told["codes"] == [0, 0, 0, 0]
    assert told["false_deaths"] == 0
    status = check_exact(database, "toy", 3)
    assert [len(trial.attempts) for trial in status.trials] == [1, 1, 1]
    assert len({trial.attempts[0].worker for trial in status.trials}) == 3
