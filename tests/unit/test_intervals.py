"""Intervals against published values, and how often they hold the truth."""

from __future__ import annotations

import random

import pytest

from hpo.intervals import Interval, of_mean, tied_with_first, wilson


def test_wilson_against_published_values() -> None:
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for hits, images, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(hits / images, images)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_mean_against_the_table_of_t() -> None:
    found = of_mean([1.0, 2.0, 3.0])
    assert found is not None
    half = 4.302653 / 3**0.5  # t of 2 degrees of freedom, 97.5 %
    assert found.low == pytest.approx(2 - half, abs=1e-5)
    assert found.high == pytest.approx(2 + half, abs=1e-5)
    assert of_mean([0.5]) is None


@pytest.mark.parametrize("truth", [0.5, 0.9, 0.98])
def test_wilson_holds_the_truth_as_often_as_it_says(truth: float) -> None:
    draw = random.Random(7)
    images, rounds = 150, 2_000
    held = 0
    for _ in range(rounds):
        found = wilson(sum(draw.random() < truth for _ in range(images)) / images, images)
        held += found.low <= truth <= found.high
    assert 0.93 <= held / rounds <= 0.98


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_means_hold_the_truth_as_often_as_they_say(seeds: int) -> None:
    draw = random.Random(7)
    rounds, held = 2_000, 0
    for _ in range(rounds):
        found = of_mean([draw.gauss(0.8, 0.02) for _ in range(seeds)])
        assert found is not None
        held += found.low <= 0.8 <= found.high
    assert 0.93 <= held / rounds <= 0.97


def test_overlap_and_bad_input() -> None:
    assert Interval(0.1, 0.2).overlaps(Interval(0.2, 0.3))
    assert not Interval(0.1, 0.2).overlaps(Interval(0.21, 0.3))
    with pytest.raises(ValueError, match="0 images"):
        wilson(0.5, 0)
    with pytest.raises(ValueError, match=r"1\.5"):
        wilson(1.5, 10)


def test_groups_that_do_not_differ_are_rarely_told_apart() -> None:
    draw = random.Random(7)
    rounds, told = 300, 0
    for _ in range(rounds):
        groups = [[draw.gauss(0.9, 0.01) for _ in range(3)] for _ in range(4)]
        groups.sort(key=lambda group: -sum(group))
        told += len(tied_with_first(groups)) < 3
    assert 0.01 <= told / rounds <= 0.08


def test_groups_that_differ_are_told_apart() -> None:
    best, good, bad = [0.91, 0.92, 0.9], [0.9, 0.92, 0.91], [0.7, 0.71, 0.69]
    assert tied_with_first([best, good, bad]) == [1]
    assert tied_with_first([best]) == []
    assert tied_with_first([[0.9, 0.9], [0.9, 0.9], [0.8, 0.8]]) == [1]
    with pytest.raises(ValueError, match="fewer than two"):
        tied_with_first([best, [0.9]])
