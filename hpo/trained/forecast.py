"""How many trials, epochs and hours a study will take: an estimate, before it runs."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from hpo.config.study import StudyFile
from hpo.formatting import plural, rough_duration
from hpo.search.eta import PRUNED
from hpo.search.promotion import Rungs, geometric

Range = tuple[float, float]
"""The least and the most that is expected."""

WITHIN = 0.8, 1.25
"""Those replays are within these factors of the fit."""
PROMOTED = 1.6
"""Workers do not wait until all have reached a rung, so more are promoted than the best of all: in
the same replays up to this many times the epochs."""
MOST_TRIALS = 1_000_000


@dataclass(frozen=True)
class Forecast:
    """What a study is expected to spend until its first budget is spent."""

    trials: Range
    epochs: Range
    max_epochs: int
    """Epochs of a full training."""
    seconds: Range | None
    """By the clock; None where no epoch could be timed."""
    workers: int
    ends: str = ""
    """The budget of time or epochs that ends it; empty: its trials do."""
    exact: bool = False
    """Whether the number of epochs is no estimate: every trial has all of them."""

    def __str__(self) -> str:
        full = self.epochs[0] / self.max_epochs, self.epochs[1] / self.max_epochs
        trials = _range(self.trials, "trial", about=bool(self.ends))
        trainings = _range(full, "full training", about=not self.exact)
        text = f"{trials}, {trainings} = {_range(self.epochs, 'epoch')}"
        if self.seconds is not None:
            time = " to ".join(dict.fromkeys(map(rough_duration, self.seconds)))
            about = "about " * (" to " not in time and not time.startswith("under"))
            text += f", {about}{time} with {plural(self.workers, 'worker')}"
        return text + (f" ({self.ends} ends it)" if self.ends else "")


def forecast(
    file: StudyFile,
    *,
    workers: int,
    epoch_s: float | None,
    once_s: Callable[[float], float],
    spread: Range = (1.0, 1.0),
) -> Forecast | None:
    """Return what a study will spend; None where its only budget is one of time and no epoch could
    be timed. `epoch_s`: seconds of an epoch, None if unknown, and `spread` its uncertainty as two
    factors; `once_s`: seconds by the clock of what that many trials compute once for all."""
    given, epochs_of_all = file.study.trials, math.inf
    pace = 1 / workers if given is None else math.ceil(given / workers) / given
    once, expected = once_s(given or MOST_TRIALS), (math.inf, math.inf)
    if given is not None:
        expected, epochs_of_all = expected_epochs(file, given), given * file.max_epochs
    limits = _limits(file, None if not epoch_s else epoch_s * pace, workers, once)
    ends = min(limits, key=lambda name: limits[name], default="")
    limit = limits.get(ends, math.inf)
    if min(limit, expected[1]) == math.inf:
        return None
    trials: Range = (given or 0, given or 0)
    if limit < expected[1]:
        least, most = _trials_for(file, limit)
        trials = (min(least, given or least), min(most, given or most))
        expected = (min(limit, expected[0]), limit)
    else:
        ends = ""
    seconds = None
    if epoch_s is not None:
        each = [epochs * epoch_s * pace for epochs in expected]
        seconds = (once + each[0] * spread[0], once + each[1] * spread[1])
    exact = expected[0] == epochs_of_all
    return Forecast(trials, expected, file.max_epochs, seconds, workers, ends, exact)


def _limits(
    file: StudyFile, epoch_s: float | None, workers: int, once_s: float
) -> dict[str, float]:
    """Return after how many epochs each budget of time or epochs is spent; `epoch_s` of all workers
    together."""
    study, found = file.study, {}
    if study.max_full_trainings is not None:
        found["max_full_trainings"] = study.max_full_trainings * file.max_epochs
    if study.max_time is not None and epoch_s:
        found["max_time"] = max(0.0, study.max_time - once_s) / epoch_s
    if study.timeout_s is not None and epoch_s:
        found["timeout_s"] = max(0.0, study.timeout_s / workers - once_s) / epoch_s
    return found


def expected_epochs(file: StudyFile, trials: int) -> Range:
    """Return the epochs that so many trials of a study spend, by what decides which of them go
    on."""
    study, longest = file.study, file.max_epochs
    most = float(trials * longest)
    if study.scheduler is not None:
        stops = geometric(file.first_rung, file.reduction_factor, longest)
        whole = min(len(file.proposals), trials)  # recommended trials hardly ever pause
        rungs = Rungs(stops, file.reduction_factor, max(0, study.scheduler.finish - whole))
        least = promoted_epochs(rungs, trials - whole, longest)
        return whole * longest + least, min(most, whole * longest + PROMOTED * least)
    name = study.pruner.name
    if name == "none":
        return most, most
    a, b = PRUNED.get(name, PRUNED["median"])
    mean = most * (1 / longest + a / trials**b)
    least = min(most, max(float(trials), WITHIN[0] * mean))
    return least, min(most, WITHIN[1] * mean) if name in PRUNED else most


def promoted_epochs(rungs: Rungs, trials: int, longest: int) -> float:
    """Return the epochs of `trials` of up to `longest` if at each rung exactly the best go on, and
    then the best of the others until `rungs.finish` are complete."""
    stops = (*rungs.epochs, longest)
    reached = [trials // rungs.reduction_factor**rung for rung in range(len(stops))]
    began = (0, *rungs.epochs)
    spent = sum(
        count * (stop - start) for count, stop, start in zip(reached, stops, began, strict=True)
    )
    missing = max(0, min(rungs.finish, trials) - reached[-1])
    for rung in reversed(range(len(rungs.epochs))):
        more = min(missing, reached[rung] - reached[rung + 1])
        spent += more * (longest - rungs.epochs[rung])
        missing -= more
    return float(spent)


def _trials_for(file: StudyFile, epochs: float) -> Range:
    """Return how many trials such a number of epochs is expected to be enough for."""

    def enough(end: int) -> int:
        def needed(number: int) -> float:
            return expected_epochs(file, number)[end]

        return max(1, bisect_right(range(1, MOST_TRIALS), epochs, key=needed))

    return enough(1), enough(0)


def _range(values: Range, noun: str, *, about: bool = False) -> str:
    """Return `14 trials`, `about 14 trials`, `9 to 14 trials`."""
    ends = list(dict.fromkeys(_two_digits(one) for one in values))
    words = f"{' to '.join(ends)} {noun}{'s' * (ends != ['1'])}"
    return f"about {words}" if about and len(ends) == 1 else words


def _two_digits(value: float) -> str:
    """Return a number with two digits, a whole one as it is."""
    if value >= 100 and value != int(value):
        size = 10 ** (int(math.log10(value)) - 1)
        value = round(value / size) * size
    return f"{value:,.0f}" if value >= 9.95 or value == int(value) else f"{value:.1f}"
