"""How much of a study's values is noise: intervals, trials that tie, curves that still rise.

A value that counts images (`val_top1`, `val_recall:CLASS`) has the interval of their number; under
cross-validation every metric has that of its spread over the folds. Others have none. What a
training seed adds is in neither: `hpo verify` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpo.config.metrics import recall_class
from hpo.intervals import CONFIDENCE, Interval, of_difference, of_spread, wilson
from hpo.storage.records import Trial

VALIDATED = "validated"
"""Key of {class: number of validation images}, which the first worker that sees them resolves."""
COUNTED = ("val_top1", "val_top5")
"""Metrics that are a share of all validation images."""
LAST = 0.1
"""A curve still rises if its best epoch is in this last part of it..."""
GAIN = 0.05
"""...and if its last quarter brought at least this part of its whole gain."""


@dataclass(frozen=True)
class Noise:
    """What is known of the noise in a study's values."""

    metric: str
    maximize: bool
    images: Mapping[str, int]
    """Validation images of each class, of all folds together; empty if unknown."""
    folds: int | None = None

    @property
    def counted(self) -> int | None:
        """Number of images that the metric is a share of; None for other metrics."""
        name = recall_class(self.metric)
        if name is not None:
            return self.images.get(name) or None
        return sum(self.images.values()) or None if self.metric in COUNTED else None

    @property
    def basis(self) -> str | None:
        """Return what the intervals come from: `269 images`, `5 folds`; None without any."""
        if self.folds:
            return f"{self.folds} folds"
        return None if self.counted is None else f"{self.counted:,} images"

    def interval(self, trial: Trial, confidence: float = CONFIDENCE) -> Interval | None:
        """Return the interval of a trial's value; None where none is honest."""
        if trial.value is None:
            return None
        if self.folds:
            std = self._std(trial)
            known = std is not None and math.isfinite(std)
            if not known or not std:
                return None
            found = of_spread(trial.value, std, self.folds, confidence)
            return found if self.counted is None else found.within(0.0, 1.0)
        if self.counted is None or not 0 <= trial.value <= 1:
            return None
        return wilson(trial.value, self.counted, confidence)

    def _std(self, trial: Trial) -> float | None:
        """Return the standard deviation over the folds in the best epoch."""
        rows = [row for row in trial.epochs if row.epoch == trial.best_epoch]
        return rows[0].metrics.get(f"{self.metric}_std") if rows else None

    def describe(self, trial: Trial) -> str | None:
        """Return `95 % 0.582 to 0.730 on 153 images` of a trial's value; None without interval."""
        found = self.interval(trial)
        return None if found is None else f"{CONFIDENCE * 100:.0f} % {found} on {self.basis}"

    def ties(self, best: Trial, others: Sequence[Trial]) -> list[Trial] | None:
        """Return those of `others` that cannot be told from `best`; None where that is unknown.

        One-sided comparisons with the best, all of them together at `CONFIDENCE` (Šidák), so that
        with this probability the trial that is truly best is among them or `best` itself.
        """
        others = [one for one in others if one.number != best.number]
        each = CONFIDENCE ** (1 / max(1, len(others)))
        mine = self.interval(best, 2 * each - 1)
        if mine is None or best.value is None:
            return None
        found = []
        for one in others:
            other = self.interval(one, 2 * each - 1)
            if other is not None and one.value is not None:
                apart = of_difference(best.value, mine, one.value, other)
                if (apart.low <= 0) if self.maximize else (apart.high >= 0):
                    found.append(one)
        return found

    def still_rises(self, trial: Trial) -> bool:
        """Return whether a complete trial was best in (nearly) its last epoch and its curve was
        still getting better there."""
        if trial.state != "complete" or trial.best_epoch is None:
            return False
        sign = 1.0 if self.maximize else -1.0
        curve = [sign * row.metrics.get(self.metric, math.nan) for row in trial.epochs]
        if len(curve) < 2 or not all(map(math.isfinite, curve)):
            return False
        if trial.best_epoch < len(curve) - int(LAST * len(curve)):
            return False
        quarter = max(1, len(curve) // 4)
        before, best = max(curve[:-quarter]), max(curve)
        return best - before >= GAIN * (best - curve[0]) and best > before


def as_dict(interval: Interval | None) -> dict[str, float] | None:
    """Return an interval as plain data: {"low", "high", "confidence"}."""
    if interval is None:
        return None
    return {"low": interval.low, "high": interval.high, "confidence": CONFIDENCE}


def reference(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial that a study's best is compared with: the first baseline with a value, else
    the first recommended one; None without any."""
    known = sorted((one for one in trials if one.value is not None), key=lambda one: one.number)
    for origin in ("baseline", "recommended"):
        for one in known:
            if one.origin.startswith(origin):
                return one
    return None
