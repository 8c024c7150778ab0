"""Intervals of trials, trials that tie with the best, curves that still rise."""

from __future__ import annotations

import math
import random

import pytest

from hpo.intervals import Interval, of_difference, wilson
from hpo.search.noise import Noise, reference
from hpo.storage.records import Epoch, Trial

COUNTS = {"ant": 100, "bee": 53}
TOP1 = Noise("val_top1", True, COUNTS)


def trial(
    number: int, value: float | None, *, state: str = "complete", origin: str = "sampled"
) -> Trial:
    return Trial(number, state, {}, value, None, (), (), None, origin=origin)


def curve(values: list[float], metric: str = "val_top1", state: str = "complete") -> Trial:
    rows = tuple(Epoch(e, 1, 0.0, {metric: v}, None) for e, v in enumerate(values, 1))
    known = [value for value in values if not math.isnan(value)]
    better = max if metric == "val_top1" else min
    best = values.index(better(known)) + 1 if known else None
    return Trial(0, state, {}, better(known) if known else None, best, rows, (), None)


def test_a_difference_against_published_values() -> None:
    """Newcombe 1998 (difference of proportions), table II, method 10: 56/70 - 48/80, 9/10 - 3/10,
    10/10 - 0/10."""
    for a, m, b, n, low, high in (
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (10, 10, 0, 10, 0.6075, 1.0),
    ):
        found = of_difference(a / m, wilson(a / m, m), b / n, wilson(b / n, n))
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_what_has_an_interval() -> None:
    best = trial(0, 101 / 153)
    assert TOP1.interval(best) == wilson(101 / 153, 153)
    assert TOP1.describe(best) == "95 % 0.582 to 0.730 on 153 images"
    recall = Noise("val_recall:bee", True, COUNTS)
    assert recall.interval(trial(0, 0.5)) == wilson(0.5, 53)
    for none in (
        Noise("val_loss", False, COUNTS),
        Noise("val_macro_f1", True, COUNTS),
        Noise("val_recall:wasp", True, COUNTS),
        Noise("val_top1", True, {}),
    ):
        assert none.interval(best) is none.describe(best) is none.ties(best, [best]) is None
    assert TOP1.interval(trial(0, None)) is None


def test_of_folds_the_spread_counts() -> None:
    """Whatever the metric: t of 4 degrees of freedom is 2.776."""
    row = Epoch(1, 1, 0.0, {"val_loss": 0.5, "val_loss_std": 0.1}, None)
    folded = Trial(0, "complete", {}, 0.5, 1, (row,), (), None)
    noise = Noise("val_loss", False, COUNTS, folds=5)
    found = noise.interval(folded)
    assert found is not None
    assert found.high - 0.5 == pytest.approx(2.7764 * 0.1 / 5**0.5, abs=1e-4)
    assert str(noise.describe(folded)).endswith("on 5 folds")
    assert noise.interval(trial(0, 0.5)) is None


def test_trials_that_tie_with_the_best() -> None:
    trials = [trial(0, 0.40), trial(1, 0.66), trial(2, 0.60), trial(3, 0.65)]
    assert [one.number for one in TOP1.ties(trials[1], trials) or ()] == [2, 3]
    many = Noise("val_top1", True, {"all": 50_000})
    assert many.ties(trials[1], trials) == []
    folds = Noise("val_loss", False, {}, folds=3)
    rows = [Epoch(1, 1, 0.0, {"val_loss": x, "val_loss_std": 0.01}, None) for x in (0.2, 0.21, 0.9)]
    lost = [Trial(n, "complete", {}, row.metrics["val_loss"], 1, (row,), (), None)
            for n, row in enumerate(rows)]  # fmt: skip
    assert folds.ties(lost[0], lost) == [lost[1]]


def test_ties_hold_the_trial_that_is_truly_best() -> None:
    """Also where errors are independent, which is the worst case, and trials are many."""
    draw, noise, held = random.Random(3), Noise("val_top1", True, {"all": 200}), 0
    for _ in range(200):
        truths = [0.8 + 0.03 * draw.random() for _ in range(20)]
        trials = [trial(n, sum(draw.random() < p for _ in range(200)) / 200)
                  for n, p in enumerate(truths)]  # fmt: skip
        best = max(trials, key=lambda one: one.value or 0.0)
        ties = noise.ties(best, trials)
        assert ties is not None
        held += truths.index(max(truths)) in {best.number, *(one.number for one in ties)}
    assert held >= 190


@pytest.mark.parametrize(
    ("values", "rises"),
    [
        ([0.45, 0.5, 0.6, 0.66], True),
        ([0.45, 0.66, 0.6, 0.65], False),
        ([0.2, 0.8, 0.9, 0.9005, 0.9006, 0.9007, 0.9008, 0.9009], False),  # flat by now
        ([*(i / 40 for i in range(20)), 0.49], True),  # best in the last but one of 21
        ([0.5], False),
        ([0.1, 0.1], False),
        ([0.1, math.nan], False),
    ],
)
def test_a_curve_that_still_rises(values: list[float], *, rises: bool) -> None:
    assert TOP1.still_rises(curve(values)) == rises
    losses = [1 - value for value in values]
    assert Noise("val_loss", False, {}).still_rises(curve(losses, "val_loss")) == rises
    assert not TOP1.still_rises(curve(values, state="pruned"))


def test_what_the_best_is_compared_with() -> None:
    sampled, none = trial(0, 0.5), trial(1, None, origin="baseline 1")
    source = trial(2, 0.6, origin="recommended: a paper")
    baseline = trial(3, 0.4, state="pruned", origin="baseline 2")
    assert reference([sampled, none, source, baseline]) == baseline
    assert reference([sampled, none, source]) == source
    assert reference([sampled, none]) is None


def test_intervals_do_not_leave_a_perfect_score() -> None:
    best = trial(0, 1.0)
    assert TOP1.interval(best) == Interval(pytest.approx(0.9755, abs=1e-4), 1.0)
    assert TOP1.ties(best, [best, trial(1, 0.99)]) == [trial(1, 0.99)]
