"""The time that is said to be left, replayed over recorded searches.

`tests/data/searches.json` has when workers, attempts and epochs of six searches on digits began and
ended, in seconds, on a machine that was busy with other work: with one and with two workers, under
promotion and under the median pruner.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from hpo.search.status import StudyStatus
from hpo.storage.records import Attempt, Epoch, Outcome, Ranking, Trial
from tests.harness.fakes import study_file
from tests.unit.test_live import status, worker

SEARCHES: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data" / "searches.json").read_text()
)
PARTS = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8)
WORST = 2.7
"""No prediction is farther from the truth than by this factor; other programs took
the processor at times."""


@dataclass(frozen=True)
class Search:
    """A recorded search, which can be looked at as it was at any moment."""

    scheme: str
    chance: float
    workers: list[tuple[float, float]]
    trials: list[dict[str, Any]]

    @property
    def span(self) -> tuple[float, float]:
        """When the first attempt began and the last one ended."""
        times = [one for trial in self.trials for one in trial["attempts"]]
        return min(one[1] for one in times), max(one[2] for one in times)

    def at(self, now: float) -> StudyStatus:
        """Return the status at `now`."""
        decides = {"promote": {"study": 'scheduler = "promote"'}, "median": {"pruner": "median"}}
        file = study_file(trials=30, train="epochs = 15", **decides[self.scheme])
        live = tuple(
            worker(f"w{i}") for i, (start, end) in enumerate(self.workers) if start <= now < end
        )
        trials = tuple(self.trial(number, now) for number in range(len(self.trials)))
        found = status(trials, live)
        row = replace(found.row, trials=30)
        return replace(found, row=row, file=file, now=now, chance=self.chance)

    def trial(self, number: int, now: float) -> Trial:
        """Return a trial as it was at `now`."""
        told = self.trials[number]
        attempts = [
            _attempt(number, k, *one, now=now)
            for k, one in enumerate(told["attempts"], 1)
            if one[1] <= now
        ]
        epochs = tuple(
            Epoch(n, k, finished, {"val_top1": value}, None)
            for n, (k, finished, value) in enumerate(told["epochs"], 1)
            if finished <= now
        )
        best = Ranking({"val_top1": "maximize"}).best_epoch(epochs)
        state = "waiting" if not attempts else attempts[-1].outcome or "running"
        return Trial(number, str(state), {}, best and best.metrics["val_top1"], best and best.epoch,
                     epochs, tuple(attempts), None, origin=told["origin"])  # fmt: skip


def _attempt(
    number: int, k: int, place: int, start: float, end: float, outcome: str, *, now: float
) -> Attempt:
    live = end > now
    return Attempt(
        number=number, k=k, worker=f"w{place}", started=start, ended=None if live else end,
        outcome=None if live else Outcome(outcome), reason=None, value=None, first_epoch=None,
        epoch=None, runtime=None, live=live,
    )  # fmt: skip


def ratios(name: str) -> Iterator[float]:
    """Yield predicted by true time left, at PARTS of a search."""
    search = Search(**SEARCHES[name])
    start, end = search.span
    for part in PARTS:
        now = start + part * (end - start)
        left = search.at(now).eta_s
        assert left is not None
        yield left / (end - now)


@pytest.mark.parametrize("name", SEARCHES)
def test_the_time_left_is_near_the_truth(name: str) -> None:
    found = list(ratios(name))
    assert all(1 / WORST < one < WORST for one in found), found


def test_the_time_left_is_as_often_too_long_as_too_short() -> None:
    found = [one for name in SEARCHES for one in ratios(name)]
    assert 0.8 < median(found) < 1.25, sorted(found)
    assert median(max(one, 1 / one) for one in found) < 1.35


def test_nothing_is_said_before_the_first_epoch() -> None:
    search = Search(**SEARCHES["median1"])
    assert search.at(search.span[0] + 0.1).eta_s is None
