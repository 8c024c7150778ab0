"""Time that a study still needs: what an epoch takes, and how many are expected.

Trials differ: recommended ones run to their end, most others are pruned soon after. So epochs that
are missing are counted, each kind of trial by its own kind, and timed by those so far; what a trial
needs beside its epochs is counted once an attempt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from hpo.storage.records import FINAL, Attempt, Trial

PRIOR = 3.0
"""What is expected of a kind of trial counts as much as so many that were seen."""
PRUNED: Mapping[str, tuple[float, float]] = {
    "median": (1.9, 0.40),
    "hyperband": (0.83, 0.25),
    "asha": (0.47, 0.25),
}
"""Under a pruner n trials of E epochs spend the part 1 / E + a / n**b of all their epochs: a and b,
fitted to replays (`benchmarks.replay`) with TPE: 20 and 50 trials of 51 epochs and 32 of 6 over
LCBench and TaskSet, 200 of 51 by 4 workers, 30 of 15 on digits."""
SAMPLED = ("sampled", "grid", "enqueued")
"""Origins of trials that pruners end at any time."""


@dataclass(frozen=True)
class Pace:
    """What trials take, in seconds of a worker."""

    attempt_s: float
    """Beside the epochs: to begin and to end."""
    epoch_s: float

    def seconds(self, epochs: float, attempts: float) -> float:
        """Return the seconds of so many epochs in so many attempts."""
        return epochs * self.epoch_s + attempts * self.attempt_s


def pace_of(trials: Iterable[Trial]) -> Pace | None:
    """Return what the epochs and attempts so far took; None before the first epoch."""
    gaps: list[float] = []
    firsts: list[float] = []
    ended: list[tuple[float, int]] = []
    for trial in trials:
        for attempt in trial.attempts:
            times = _epoch_ends(trial, attempt)
            if times:
                firsts.append(times[0] - attempt.started)
                gaps += [b - a for a, b in pairwise(times)]
                if attempt.ended is not None:
                    ended.append((attempt.ended - attempt.started, len(times)))
    if not firsts:
        return None
    if gaps:
        epoch_s = fmean(gaps)
    elif ended:
        epoch_s = sum(seconds for seconds, _ in ended) / sum(epochs for _, epochs in ended)
    else:
        epoch_s = median(firsts)
    beside = [seconds - epochs * epoch_s for seconds, epochs in ended]
    return Pace(max(0.0, median(beside or [first - epoch_s for first in firsts])), epoch_s)


def _epoch_ends(trial: Trial, attempt: Attempt) -> list[float]:
    return [row.finished for row in trial.epochs if row.attempt == attempt.k]


@dataclass(frozen=True)
class Lengths:
    """How many epochs trials have in the end: those that nothing ends early, and the others."""

    whole: float
    pruned: float

    def rest(self, trial: Trial, most: int) -> float:
        """Return how many epochs a trial that is not finished still gets; one that outlived the
        others half of what it could."""
        done, whole = len(trial.epochs), trial.origin not in SAMPLED
        left = (self.whole if whole else self.pruned) - done
        return max(0.5, left if left > 0 else (most - done) / 2)


def lengths_of(trials: Sequence[Trial], budget: int, first: int, most: int, pruner: str) -> Lengths:
    """Return how long trials are of up to `most` epochs: as seen, and as `pruner` usually makes
    them in a study of `budget` trials of which the `first` ones run to their end."""
    ended = [one for one in trials if one.state in FINAL and one.epochs]
    complete = [len(one.epochs) for one in ended if one.state == "complete"]
    whole = (sum(complete) + PRIOR * most) / (len(complete) + PRIOR)
    if pruner == "none":
        return Lengths(whole, whole)
    a, b = PRUNED.get(pruner, PRUNED["median"])
    together = budget * (1 + most * a / max(1, budget) ** b) - first * whole
    usual = min(whole, max(1.0, together / max(1, budget - first)))
    sampled = [len(one.epochs) for one in trials if one.origin in SAMPLED and one.epochs]
    return Lengths(whole, (sum(sampled) + PRIOR * usual) / (len(sampled) + PRIOR))


def time_left(
    pace: Pace, epochs: float, attempts: float, *, workers: int, longest: float = 0.0
) -> float:
    """Return the seconds that `workers` need for so many epochs and attempts; no less than one of
    them for the `longest` trial, in epochs."""
    together = pace.seconds(epochs, attempts) / max(1, workers)
    return max(0.0, together, longest * pace.epoch_s)
