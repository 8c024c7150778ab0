"""Confidence intervals of accuracies, of means over seeds, and of differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Range that holds the true value with probability `CONFIDENCE`."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.3f} to {self.high:.3f}"

    def within(self, low: float, high: float) -> Interval:
        """Return its part from `low` to `high`, the values that are possible."""
        return Interval(min(max(self.low, low), high), max(min(self.high, high), low))

    def overlaps(self, other: Interval) -> bool:
        """Return whether the two share a value."""
        return self.low <= other.high and other.low <= self.high


def wilson(share: float, images: int, confidence: float = CONFIDENCE) -> Interval:
    """Return the interval of a `share` (0 to 1) that was counted on `images` images.

    Wilson's score interval (E. B. Wilson, 1927), which also holds near 0 and 1 and for few images,
    where the normal approximation leaves the range. Raises ValueError without images.
    """
    if images < 1 or not 0 <= share <= 1:
        raise ValueError(f"a share of {share} on {images} images has no interval")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    spread = z * z / images
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / images + spread / (4 * images)) / (1 + spread)
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def of_mean(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Return Student's interval of the mean of independent `values`, as of several seeds; None for
    fewer than two, which tell nothing of their spread."""
    if len(values) < 2:
        return None
    return of_spread(fmean(values), stdev(values), len(values), confidence)


def of_spread(mean: float, std: float, count: int, confidence: float = CONFIDENCE) -> Interval:
    """Return Student's interval of the `mean` of `count` values, 2 at least, whose standard
    deviation (n - 1) is `std`."""
    from scipy.special import stdtrit

    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * std / math.sqrt(count)
    return Interval(mean - half, mean + half)


def of_difference(one: float, of_one: Interval, other: float, of_other: Interval) -> Interval:
    """Return the interval of `one` - `other`, from the intervals of both at the confidence wanted.

    Newcombe's hybrid score interval (1998, method 10) where they are Wilson's. It takes the two as
    independent; of networks that err on the same images it is wider than it need be.
    """
    below = math.hypot(one - of_one.low, of_other.high - other)
    above = math.hypot(of_one.high - one, other - of_other.low)
    return Interval(one - other - below, one - other + above)


def tied_with_first(groups: Sequence[Sequence[float]], confidence: float = CONFIDENCE) -> list[int]:
    """Return the places of the groups, of two or more values each, whose mean cannot be told from
    that of the first one; the first itself is not among them.

    Tukey's and Kramer's test of all pairs, which takes the spread within a group for the same in
    all: of groups that do not differ, some pair is told apart in 5 % of cases only, however many
    pairs there are. Raises ValueError for a group of fewer than two values.
    """
    if any(len(group) < 2 for group in groups):
        raise ValueError("a group of fewer than two values has no spread")
    if len(groups) < 2:
        return []
    if not any(stdev(group) for group in groups):
        return [i for i, group in enumerate(groups[1:], 1) if group[0] == groups[0][0]]
    from scipy.stats import tukey_hsd

    chances = tukey_hsd(*groups).pvalue[0]
    return [i for i in range(1, len(groups)) if chances[i] > 1 - confidence]
