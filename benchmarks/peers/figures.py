"""What runs of searches come to: times to an accuracy, medians, ratios with their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Run:
    """One search of one arm."""

    arm: str
    seed: int
    seconds: float
    """Wall time of the whole command."""
    curve: list[tuple[float, float]]
    """Of each epoch of all trials, as they were finished: seconds since the command's start, and
    validation accuracy."""
    config: dict[str, Any]
    """The winner."""
    accuracy: float
    """The winner's, on validation images, as the search saw it."""
    tests: dict[str, float] = field(default_factory=dict)
    """Test accuracy of the winner retrained, by seed."""

    @property
    def best(self) -> float:
        """The best validation accuracy of any epoch."""
        return max(accuracy for _, accuracy in self.curve)

    def reached(self, target: float) -> tuple[float, int]:
        """Seconds and epochs until a validation accuracy; infinity and all epochs: never."""
        for epochs, (seconds, accuracy) in enumerate(self.curve, 1):
            if accuracy >= target:
                return seconds, epochs
        return math.inf, len(self.curve)


def spread(values: Sequence[float], form: str = ".0f") -> str:
    """Median (least to most)."""
    if not values:
        return "–"
    shown = [never_or(value, form) for value in (statistics.median(values), *extremes(values))]
    return shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def extremes(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def never_or(value: float, form: str) -> str:
    return "never" if math.isinf(value) else format(value, form)


def ratio(theirs: Mapping[int, float], ours: Mapping[int, float]) -> tuple[float, float, float]:
    """Geometric mean of what the same seeds' values come to, theirs over ours, with the ends of its
    interval by Student's t over the logarithms; NaN ends for fewer than two seeds."""
    logs = [math.log(theirs[seed] / ours[seed]) for seed in sorted(theirs.keys() & ours.keys())]
    if not logs:
        return math.nan, math.nan, math.nan
    mean = statistics.fmean(logs)
    if len(logs) == 1:
        return math.exp(mean), math.nan, math.nan
    half = student(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def difference(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float]:
    """Difference of the means, and half of its interval (Welch); NaN for fewer than two values."""
    if not theirs or not ours:
        return math.nan, math.nan
    gap = statistics.fmean(theirs) - statistics.fmean(ours)
    if len(theirs) < 2 or len(ours) < 2:
        return gap, math.nan
    parts = [statistics.variance(values) / len(values) for values in (theirs, ours)]
    freedom = [part**2 / (len(v) - 1) for part, v in zip(parts, (theirs, ours), strict=True)]
    total = sum(parts)
    if total == 0:
        return gap, 0.0
    return gap, student(total**2 / sum(freedom)) * math.sqrt(total)


def student(freedom: float) -> float:
    from scipy import stats

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


HEADINGS = (
    *("", "n", "seconds", "x hpo's [95 %]", "epochs", "s to target", "epochs to target"),
    *("best val", "retrained test, %", "less hpo's, points [95 %]"),
)


def rows(runs: Sequence[Run], arms: Sequence[str], base: str, target: float) -> list[list[str]]:
    """One row for each of `arms` that has runs: `HEADINGS`."""
    by_arm = {arm: {run.seed: run for run in runs if run.arm == arm} for arm in arms}
    return [_row(arm, own, by_arm[base], target) for arm, own in by_arm.items() if own]


def _row(arm: str, own: Mapping[int, Run], base: Mapping[int, Run], target: float) -> list[str]:
    found = list(own.values())
    times, epochs = zip(*(run.reached(target) for run in found), strict=True)
    tests = tested(found)
    return [
        arm,
        str(len(found)),
        spread([run.seconds for run in found]),
        _ratio_text(*ratio(_seconds(own), _seconds(base))),
        spread([len(run.curve) for run in found]),
        spread(times),
        spread([e if math.isfinite(t) else math.inf for t, e in zip(times, epochs, strict=True)]),
        spread([run.best for run in found], ".3f"),
        spread(tests, ".1f"),
        _difference_text(*difference(tests, tested(list(base.values())))),
    ]


def tested(runs: Sequence[Run]) -> list[float]:
    """Percent of the test images named right: of each run, the mean over its retrained seeds."""
    return [100 * statistics.fmean(run.tests.values()) for run in runs if run.tests]


def _seconds(runs: Mapping[int, Run]) -> dict[int, float]:
    return {seed: run.seconds for seed, run in runs.items()}


def _ratio_text(mean: float, low: float, high: float) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:.2f}" + ("" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]")


def _difference_text(gap: float, half: float) -> str:
    if math.isnan(gap):
        return "–"
    return f"{gap:+.1f}" + ("" if math.isnan(half) else f" [{gap - half:+.1f}, {gap + half:+.1f}]")
