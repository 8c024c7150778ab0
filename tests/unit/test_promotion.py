"""Promotion as a pure function: which of the paused trials may go on."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpo.search.promotion import (
    Rungs,
    Standing,
    chance_level,
    geometric,
    may_be_promoted,
    may_go_on,
    promotable,
)

RUNGS = Rungs(epochs=(1, 3, 9), reduction_factor=3, finish=2)


def paused(*values: float, epochs: int = 1, first: int = 0) -> list[Standing]:
    """Trials that paused after so many epochs, each with one value all along."""
    return [
        RUNGS.standing(first + number, "paused", [value] * epochs)
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("first", "factor", "last", "rungs"),
    [
        (1, 3, 15, (1, 3, 9)),
        (1, 4, 6, (1, 4)),
        (3, 3, 50, (3, 9, 27)),
        (3, 3, 3, ()),
        (1, 2, 8, (1, 2, 4)),
    ],
)
def test_rungs_lie_below_the_last_epoch(
    first: int, factor: int, last: int, rungs: tuple[int, ...]
) -> None:
    assert geometric(first, factor, last) == rungs


def test_one_of_three_goes_on() -> None:
    assert promotable(RUNGS, paused(0.1, 0.2), closing=False) == []
    assert promotable(RUNGS, paused(0.1, 0.3, 0.2), closing=False) == [1]
    assert promotable(RUNGS, paused(0.1, 0.3, 0.2, 0.4, 0.5, 0.0), closing=False) == [4, 3]


def test_of_equals_the_earlier_goes_on() -> None:
    assert promotable(RUNGS, paused(0.2, 0.2, 0.2), closing=False) == [0]


def test_the_highest_rung_comes_first() -> None:
    low = paused(0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    high = paused(0.3, 0.2, 0.1, epochs=3, first=9)
    assert promotable(RUNGS, [*low, *high], closing=False) == [9, 0, 8, 7, 6]


def test_those_that_went_on_keep_their_places_at_a_rung() -> None:
    gone_on = RUNGS.standing(9, "running", [0.9, 0.9])
    over = RUNGS.standing(8, "over", [0.8])
    assert promotable(RUNGS, [*paused(0.1, 0.2, 0.3, 0.4), gone_on, over], closing=False) == []
    assert promotable(RUNGS, [*paused(0.1, 0.2, 0.3, 0.4, 0.85), gone_on], closing=False) == [4]


def test_a_trial_that_is_among_the_best_does_not_pause() -> None:
    others = paused(0.1, 0.2)
    asks = RUNGS.standing(7, "running", [0.3])
    assert may_go_on(RUNGS, [*others, asks], 7, closing=False)
    worse = RUNGS.standing(7, "running", [0.15])
    assert not may_go_on(RUNGS, [*others, worse], 7, closing=False)
    between = RUNGS.standing(7, "running", [0.0, 0.0])
    assert may_go_on(RUNGS, [*others, between], 7, closing=False)  # asks at rungs alone
    assert may_go_on(RUNGS, others, 7, closing=False)  # its successor ended it; the fence says so


def test_the_best_are_finished_when_no_trial_is_left_to_begin() -> None:
    trials = paused(0.1, 0.3, epochs=1)
    assert promotable(RUNGS, trials, closing=True) == [1, 0]
    complete = RUNGS.standing(9, "complete", [0.2] * 15)
    assert promotable(RUNGS, [*trials, complete], closing=True) == [1]
    running = RUNGS.standing(8, "running", [0.9, 0.9])
    assert promotable(RUNGS, [*trials, complete, running], closing=True) == []
    assert may_go_on(RUNGS, [*trials, complete], 1, closing=True)


def test_what_a_stop_rule_interrupted_goes_on_first() -> None:
    """After `hpo extend`, in the closing phase or not: else nobody would ever take them."""
    unbegun = RUNGS.standing(8, "paused", [])
    between = RUNGS.standing(9, "paused", [0.1, 0.1])
    trials = [*paused(0.1, 0.3, 0.2), unbegun, between]
    for closing in (False, True):
        assert promotable(RUNGS, trials, closing=closing) == [8, 9, 1]
    assert {8, 9} <= may_be_promoted(RUNGS, trials, 3, spare=0)


def test_promotion_comes_before_finishing() -> None:
    trials = [*paused(0.5, 0.4, 0.3), *paused(0.9, epochs=3, first=3)]
    one = Rungs(epochs=(1, 3, 9), reduction_factor=2, finish=4)
    assert promotable(one, trials, closing=True) == [0]  # of 4 at the rung 3 went on already: 3, 0


def test_where_nothing_beats_guessing_all_go_on() -> None:
    rungs = Rungs(epochs=(1, 3), reduction_factor=3, finish=0, chance=0.12)
    guessing = [rungs.standing(number, "paused", [0.1]) for number in range(3)]
    assert promotable(rungs, guessing, closing=False) == [0, 1, 2]
    learnt = rungs.standing(9, "paused", [0.5])
    assert promotable(rungs, [*guessing, learnt], closing=False) == [9]


def test_less_is_better_of_a_loss_and_nan_is_worst() -> None:
    rungs = Rungs(epochs=(1,), reduction_factor=3, finish=0, maximize=False)
    values = {0: [1.0], 1: [math.nan], 2: [0.5]}
    trials = [rungs.standing(number, "paused", curve) for number, curve in values.items()]
    assert promotable(rungs, trials, closing=False) == [2]
    assert rungs.standing(0, "paused", [2.0, math.nan, 1.0, 3.0]).loss == 1.0


def test_only_what_can_still_be_promoted_is_kept() -> None:
    trials = paused(*(number / 100 for number in range(30)))
    kept = may_be_promoted(RUNGS, trials, 30, spare=1)
    assert kept == set(range(19, 30))  # ceil(30 / 3) + 1
    assert may_be_promoted(RUNGS, trials, 300, spare=0) == set(range(30))


@given(st.lists(st.floats(0, 1), max_size=40), st.integers(2, 5), st.booleans())
def test_what_is_promotable_is_kept_and_may_go_on(
    values: list[float], factor: int, closing: bool
) -> None:
    rungs = Rungs(epochs=(1, factor), reduction_factor=factor, finish=3)
    trials = [rungs.standing(number, "paused", [value]) for number, value in enumerate(values)]
    found = promotable(rungs, trials, closing=closing)
    assert set(found) <= may_be_promoted(rungs, trials, len(trials), spare=0)
    assert all(may_go_on(rungs, trials, number, closing=closing) for number in found)
    if not closing:
        assert len(found) == len(values) // factor


@pytest.mark.parametrize(
    ("metric", "counts", "level"),
    [
        ("val_top1", [50, 50], 0.5 + 2 * math.sqrt(0.25 / 100)),
        ("val_top1", [90, 10], 0.9 + 2 * math.sqrt(0.09 / 100)),
        ("val_loss", [50, 50], math.log(2)),
        ("val_top5", [1, 1, 1], 1.0),
        ("val_macro_f1", [30, 20, 50], 1 / 3 + 2 * math.sqrt(2 / 9 / 100)),
        ("mine:score", [50, 50], None),
        ("val_top1", [], None),
    ],
)
def test_chance(metric: str, counts: list[int], level: float | None) -> None:
    found = chance_level(metric, counts)
    assert found == (level if level is None else pytest.approx(level))
