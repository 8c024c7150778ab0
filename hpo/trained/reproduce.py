"""A run, trained once more: what is the same bit by bit, and what explains the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from hpo.control import Control
from hpo.data import dataset
from hpo.errors import Conflict, DataError
from hpo.formatting import number
from hpo.intervals import wilson
from hpo.paths import Home
from hpo.trained.environment import CODE, differences
from hpo.trained.retrain import retrain
from hpo.trained.run import PARTS, RunDir, SeedResult, TrainedRun, load_run, score_name
from hpo.training.device import available_devices, default_device

TIMED = ("seconds", "images_per_s", "peak_memory_mb")
"""Columns of the curves that no two trainings share."""
HARMLESS = ("hpo", "python")
"""Parts of an environment that change no bit by themselves."""


@dataclass(frozen=True)
class SeedDifference:
    """A seed and its second training."""

    seed: int
    weights: int
    """Number of weights."""
    differing: int
    """How many of them have other bits."""
    largest: float
    """Largest absolute difference of a weight."""
    epoch: int | None
    """First epoch with another metric; None if all are equal."""
    before: float
    """Its score, then and now."""
    now: float

    @property
    def exact(self) -> bool:
        """True if weights, curves and score are equal bit by bit."""
        return not self.differing and self.epoch is None and self.before == self.now

    def __str__(self) -> str:
        score = f"{number(self.before)} {'=' if self.before == self.now else '->'}"
        score = f"score {score} {number(self.now)}"
        if self.exact:
            return f"seed {self.seed}: all {self.weights:,} weights and all epochs equal; {score}"
        first = "" if self.epoch is None else f", from epoch {self.epoch} on"
        return (
            f"seed {self.seed}: {self.differing:,} of {self.weights:,} weights differ, by at most "
            f"{self.largest:.2g}{first}; {score}"
        )


@dataclass(frozen=True)
class Reproduction:
    """A run beside its second training."""

    run: str
    again: str
    part: str
    """What the scores were measured on: test, val or train."""
    score: str
    """Name of the score."""
    images: int
    """Images of that part."""
    changed: dict[str, str]
    """What is not as it was, by name: versions, code, device."""
    reasons: tuple[str, ...]
    """Why other bits are to be expected; none: they are not."""
    seeds: tuple[SeedDifference, ...]

    @property
    def exact(self) -> bool:
        """True if every seed is the same bit by bit."""
        return all(one.exact for one in self.seeds)

    @property
    def within(self) -> bool:
        """True if the mean scores differ by no more than the number of images leaves open."""
        before, now = self._means
        if self.score != "top1" or not self.images:
            return before == now
        return wilson(before, self.images).overlaps(wilson(now, self.images))

    @property
    def _means(self) -> tuple[float, float]:
        return fmean(one.before for one in self.seeds), fmean(one.now for one in self.seeds)

    @property
    def reproduced(self) -> bool:
        """True if it is the same bit by bit, or as near as what changed allows."""
        return self.exact or (bool(self.reasons) and self.within)

    @property
    def verdict(self) -> str:
        """Return the outcome in a sentence."""
        if self.exact:
            return "reproduced: bit for bit"
        before, now = self._means
        means = f"{PARTS[self.part]} {self.score} {number(before)} -> {number(now)}"
        if not self.reasons:
            changed = "the code changed" if self.changed else "nothing that decides them changed"
            return f"not reproduced: other weights, although {changed} ({means})"
        why = f"other bits are to be expected: {'; '.join(self.reasons)}"
        if self.within:
            return f"reproduced within the noise of {self.images:,} images ({means}); {why}"
        return f"not reproduced: {means} is more than {self.images:,} images explain; {why}"

    def lines(self) -> Iterator[str]:
        """Yield the comparison, and its verdict last."""
        yield f"{self.run} again in {self.again}"
        yield from (f"changed: {name} {change}" for name, change in self.changed.items())
        yield from map(str, self.seeds)
        yield self.verdict

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        outcome = {"reproduced": self.reproduced, "exact": self.exact, "verdict": self.verdict}
        return {**asdict(self), **outcome}


def reproduce(
    path: Path,
    *,
    out: Path | None = None,
    home: Home,
    device: str | None = None,
    control: Control | None = None,
    progress: Callable[[str], object] = lambda line: None,
) -> Reproduction:
    """Train the run at `path`, or the one seed of it that it names, again as run.json and
    config.toml say, into the directory `out` (beside it by default), and compare. Precision, layout
    and threads are those that were chosen then, not timed again. `device` is by default of the
    run's kind, if there is one here. Interrupted, the same call goes on.

    Raises DataError where the images are not those of the run, Conflict where `out` holds a
    finished training, and as `retrain` does.
    """
    run = load_run(path)
    beside = out or _beside(path)
    if RunDir(beside).summary.exists():
        raise Conflict(f"{beside} holds a finished training; remove it, or choose another with -o")
    seeds = [one.seed for one in run.seeds]
    config = run.config.model_copy(update={"seed": seeds[0]})
    found = dataset.open_data(config.data, home.cache).fingerprint
    if found != run.metadata.fingerprint:
        raise DataError(
            f"{config.data.title}: these are not the images of the run (fingerprint {found} "
            f"instead of {run.metadata.fingerprint}), so it cannot be reproduced; restore them"
        )
    again = retrain(
        config,
        run.provenance,
        seeds=seeds[-1] - seeds[0] + 1,
        out=beside,
        home=home,
        device=device or _device_like(run),
        keep_validation=run.metadata.keep_validation,
        control=control,
        progress=progress,
    )
    return compare_runs(run, again)


def _beside(path: Path) -> Path:
    """Return the folder next to `path` for its second training."""
    named = path if path.name not in ("", "..") else path.resolve()
    return named.with_name(f"{named.name}.again")


def _device_like(run: TrainedRun) -> str:
    """Return a device here of the kind that trained the run; the default one if there is none."""
    kind = run.metadata.environment.get("device")
    here = available_devices()
    return next((one for one in here if one.partition(":")[0] == kind), default_device())


def compare_runs(run: TrainedRun, again: TrainedRun) -> Reproduction:
    """Compare a run with its second training, seed by seed."""
    part, score = run.measured_part, score_name(run)
    second = {one.seed: one for one in again.seeds}
    changed = differences(run.metadata.environment, again.metadata.environment)
    seeds = tuple(_compare(one, second[one.seed], part, score) for one in run.seeds)
    if not run.metadata.environment:
        changed = {}
    pairs = [(one, second[one.seed]) for one in run.seeds]
    return Reproduction(
        run=str(run.path),
        again=str(again.path),
        part=part,
        score=score,
        images=run.seeds[0].metrics["images"][part],
        changed=changed,
        reasons=tuple(_reasons(run, changed, pairs)),
        seeds=seeds,
    )


def _reasons(
    run: TrainedRun, changed: dict[str, str], pairs: Sequence[tuple[SeedResult, SeedResult]]
) -> Iterator[str]:
    """Yield what lets the same training come out with other bits."""
    if run.config.runtime.deterministic is False:
        yield "the run was trained by algorithms that give other bits each time"
    if not run.metadata.environment:
        yield "the run is of an earlier version, which recorded no versions and no device"
    for name, change in changed.items():
        if name not in HARMLESS and not name.startswith(CODE):
            yield f"{name} {change}"
    for one, other in pairs:
        before, now = one.metrics["micro_batch"], other.metrics["micro_batch"]
        if before != now:
            yield f"seed {one.seed}: {before} images at once then, {now} now (memory)"


def _compare(one: SeedResult, other: SeedResult, part: str, score: str) -> SeedDifference:
    before, now = load_file(one.files.weights), load_file(other.files.weights)
    unequal = {name: _bits(array) != _bits(now[name]) for name, array in before.items()}
    return SeedDifference(
        seed=one.seed,
        weights=sum(array.size for array in before.values()),
        differing=sum(int(bits.any(axis=1).sum()) for bits in unequal.values()),
        largest=max(
            float(np.abs(before[name].astype(np.float64) - now[name].astype(np.float64)).max())
            if bits.any()
            else 0.0
            for name, bits in unequal.items()
        ),
        epoch=_first_difference(one, other),
        before=float(one.metrics[part][score]),
        now=float(other.metrics[part][score]),
    )


def _bits(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the bytes of each number of an array, (numbers, bytes)."""
    return np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8)


def _first_difference(one: SeedResult, other: SeedResult) -> int | None:
    """Return the first epoch with another metric, or that only one of them has."""
    pairs = zip_longest(_untimed(one), _untimed(other))
    return next((i for i, (before, now) in enumerate(pairs, 1) if before != now), None)


def _untimed(seed: SeedResult) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if name not in TIMED} for row in seed.epochs
    ]
