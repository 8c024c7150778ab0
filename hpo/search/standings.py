"""How the trials of a study stand under promotion: curves, read again only where they grew."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hpo.search import promotion, scheduling
from hpo.search.promotion import CHANCE, STATES, Place, Prospects, Rungs, Standing, rungs_of
from hpo.search.study import Study
from hpo.storage import records
from hpo.storage.records import Outcome
from hpo.storage.snapshot import StudySnapshot


class Standings:
    """The trials of a study with a scheduler, as promotion sees them."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._marks: dict[int, tuple[int, float]] = {}
        self._curves: dict[int, list[float]] = {}
        self._chance: dict[str, float | None] = {}

    def prospects(self, snapshot: StudySnapshot) -> Prospects | None:
        """Return which paused trials may go on now; None in a study without a scheduler."""
        if self._study.file.study.scheduler is None:
            return None
        rungs, standings = self.rungs(), self.read()
        closing = self._closing(snapshot, standings)
        found = promotion.promotable(rungs, standings, closing=closing) if snapshot.paused else []
        return Prospects(tuple(found), closing)

    def outranked(self, number: int, epochs: int) -> Place | None:
        """Return where a trial stands that has trained for `epochs` and is to pause now; None if it
        may train on."""
        rungs = self.rungs()
        if self._study.file.study.scheduler is None or epochs not in rungs.epochs:
            return None
        standings = self.read()
        closing = self._closing(self._study.snapshot(), standings)
        if promotion.may_go_on(rungs, standings, number, closing=closing):
            return None
        return promotion.place(rungs, standings, number)

    def paused(self) -> set[int]:
        """Return the paused trials."""
        outcomes = records.read_outcomes(self._study.database, self._study.uuid)
        return {number for number, outcome in outcomes.items() if outcome == Outcome.PAUSED}

    def kept(self, trials: int, workers: int) -> set[int]:
        """Return the trials that may still go on if the study has `trials` in the end: those that
        run, and the best of those that are paused."""
        standings = self.read()
        running = {one.number for one in standings if one.state == "running"}
        # Of a study without end it is enough to look ahead: what was dropped is trained again.
        most = min(trials, 2 * max(len(standings), 10))
        return running | promotion.may_be_promoted(self.rungs(), standings, most, workers)

    def rungs(self) -> Rungs:
        """Return the study's rungs."""
        return rungs_of(self._study.file, self._known_chance())

    def resolve_chance(self, counts: Sequence[int]) -> None:
        """Write down what guessing reaches on validation images of which `counts` are of each
        class, once for the study."""
        study = self._study
        self._known_chance()
        if CHANCE not in self._chance:
            level = promotion.chance_level(study.file.metric, counts)
            records.resolve_once(study.database, study.uuid, CHANCE, level)

    def _known_chance(self) -> float | None:
        if not self._chance:
            study = self._study
            self._chance = records.read_resolved(study.database, study.uuid, CHANCE)
        return self._chance.get(CHANCE)

    def read(self) -> list[Standing]:
        """Return how all trials stand that were begun."""
        database, uuid = self._study.database, self._study.uuid
        outcomes = records.read_outcomes(database, uuid)
        self._read_curves()
        rungs = self.rungs()
        return [
            rungs.standing(number, state, self._curves.get(number, ()))
            for number, outcome in outcomes.items()
            if (state := STATES.get(_state(outcome))) is not None
        ]

    def _read_curves(self) -> None:
        """Read the curves of trials that have new epochs."""
        database, uuid, metric = self._study.database, self._study.uuid, self._study.file.metric
        marks = records.read_epoch_marks(database, uuid)
        grown = [number for number, mark in marks.items() if self._marks.get(number) != mark]
        if grown:
            fresh = records.read_epochs(database, uuid, first=min(grown))
            for number, rows in fresh.items():
                self._curves[number] = [row.metrics.get(metric, math.nan) for row in rows]
        self._marks = marks

    def _closing(self, snapshot: StudySnapshot, standings: Sequence[Standing]) -> bool:
        """Return whether no new trial is to begin, or only once enough are complete."""
        if scheduling.all_begun(snapshot):
            return True
        complete = sum(one.state == "complete" for one in standings)
        return complete < self.rungs().finish and scheduling.closing(snapshot)


def _state(outcome: Outcome | None) -> str:
    """Return the state of a trial by how its last attempt ended."""
    if outcome in (None, Outcome.HANDED_BACK, Outcome.LOST):
        return "running"
    return str(outcome)
