"""Confidence intervals of accuracies and of means over seeds."""

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
    from scipy.special import stdtrit

    t = float(stdtrit(len(values) - 1, (1 + confidence) / 2))
    half = t * stdev(values) / math.sqrt(len(values))
    mean = fmean(values)
    return Interval(mean - half, mean + half)
