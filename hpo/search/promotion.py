"""Promotion: the rungs of a study, and which of the trials paused there may go on.

Asynchronous successive halving by promotion (Li et al. 2020, arXiv:1810.05934): every trial pauses
at the first rung; of the n trials that reached a rung the best floor(n / reduction_factor) may go
on to the next. In the closing phase, when no new trial is to begin, the best unfinished ones go on
until `finish` trials are complete. No clock, no database: curves go in, a decision comes out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from hpo.config.study import StudyFile
from hpo.formatting import ordinal
from hpo.storage.records import Trial

State = Literal["running", "paused", "complete", "over"]
"""How a trial stands: over is pruned for good, which still counts among those of its rungs."""
CHANCE = "chance"
"""Key of what guessing reaches, which the first worker that sees the images resolves."""

STATES: dict[str, State] = {
    "running": "running",
    "interrupted": "running",
    "paused": "paused",
    "complete": "complete",
    "pruned": "over",
}
"""How trials stand by their states; the others have no place at a rung."""


@dataclass(frozen=True)
class Rungs:
    """Where trials pause, and how many of them go on."""

    epochs: tuple[int, ...]
    """Epochs after which a trial asks whether it may go on, rising, all below its last."""
    reduction_factor: int
    finish: int
    """So many trials are to be complete at the end."""
    maximize: bool = True
    chance: float | None = None
    """Value that guessing gives; a rung where no trial beats it decides nothing."""

    def standing(self, number: int, state: State, values: Sequence[float]) -> Standing:
        """Return how the trial stands whose metric after epoch 1, 2, ... is `values`."""
        losses: list[float] = []
        least = math.inf
        for value in values:
            if not math.isnan(value):
                least = min(least, -value if self.maximize else value)
            losses.append(least)
        reached = tuple(losses[epoch - 1] for epoch in self.epochs if epoch <= len(losses))
        return Standing(number, state, len(losses), reached, least)

    def beats_chance(self, loss: float) -> bool:
        """Return whether a value, as a loss, is better than guessing."""
        return self.chance is None or loss < (-self.chance if self.maximize else self.chance)


@dataclass(frozen=True)
class Standing:
    """How far one trial is, and how good."""

    number: int
    state: State
    epochs: int
    losses: tuple[float, ...]
    """Its best value up to each rung that it reached; less is better."""
    loss: float
    """Its best value so far; less is better."""


@dataclass(frozen=True)
class Prospects:
    """What promotion has to offer now."""

    promotable: tuple[int, ...]
    """Paused trials that may go on, in the order in which to take them."""
    closing: bool
    """No new trial is to begin: the best of those that were begun are finished."""


@dataclass(frozen=True)
class Place:
    """Where a trial stands among those that reached the same rung."""

    epoch: int
    """The epoch of the highest rung that it reached."""
    rank: int
    """From 1."""
    among: int
    going_on: int
    """So many of them may go on, the best ones."""

    def __str__(self) -> str:
        stands = f"{ordinal(self.rank)} of {self.among} after epoch {self.epoch}"
        if not self.going_on:
            return f"{stands}, too few yet for one to go on"
        best = "the best one goes" if self.going_on == 1 else f"the best {self.going_on} go"
        return f"{stands}; {best} on"


@dataclass(frozen=True)
class RungCount:
    """How many trials came to a rung, and what became of them."""

    epoch: int
    reached: int
    went_on: int
    """Trained beyond it, or do so now."""
    paused: int
    """Wait there."""
    threshold: float | None
    """The value of the last one that may go on; None where none may, or all."""


def geometric(first: int, reduction_factor: int, last: int) -> tuple[int, ...]:
    """Return rungs at `first`, `first * reduction_factor`, ..., all below `last` epochs."""
    rungs = []
    while first < last:
        rungs.append(first)
        first *= reduction_factor
    return tuple(rungs)


def may_go_on(rungs: Rungs, standings: Sequence[Standing], number: int, *, closing: bool) -> bool:
    """Return whether trial `number` may train beyond the epochs that it has; it asks at rungs
    alone. One without a standing may: another worker has ended it, whose lease says so."""
    one = next((one for one in standings if one.number == number), None)
    if one is None or one.epochs not in rungs.epochs:
        return True
    rung = len(one.losses) - 1
    return number in _promoted(rungs, rung, standings) or (
        closing and number in _finalists(rungs, standings)
    )


def promotable(rungs: Rungs, standings: Sequence[Standing], *, closing: bool) -> list[int]:
    """Return the paused trials that may go on, in the order in which to take them: those that are
    at no rung, since a stop rule interrupted them; then of the highest rung first, there the best
    first; if there are none in the closing phase, the best ones."""
    paused = {one.number for one in standings if one.state == "paused"}
    found = [one.number for one in _between(rungs, standings)]
    paused -= set(found)
    for rung in reversed(range(len(rungs.epochs))):
        here = {one.number for one in standings if len(one.losses) == rung + 1} & paused
        found += [number for number in _promoted(rungs, rung, standings) if number in here]
    if found or not closing:
        return found
    return [number for number in _finalists(rungs, standings) if number in paused]


def may_be_promoted(rungs: Rungs, standings: Sequence[Standing], most: int, spare: int) -> set[int]:
    """Return the paused trials that may still go on if `most` trials reach each rung: the others
    never can. `spare` more of each rung allow for workers that decide at the same time."""
    paused = [one for one in standings if one.state == "paused"]
    kept = {one.number for one in sorted(paused, key=_by_loss)[: rungs.finish + spare]}
    kept |= {one.number for one in _between(rungs, standings)}
    places = math.ceil(most / rungs.reduction_factor) + spare
    for rung in range(len(rungs.epochs)):
        here = {one.number for one in paused if len(one.losses) == rung + 1}
        kept |= here & {one.number for one in _ranked(rung, standings)[:places]}
    return kept


def _between(rungs: Rungs, standings: Iterable[Standing]) -> list[Standing]:
    """Return the paused trials that are at no rung, where alone it is asked whether to go on."""
    return [one for one in standings if one.state == "paused" and one.epochs not in rungs.epochs]


def _promoted(rungs: Rungs, rung: int, standings: Iterable[Standing]) -> list[int]:
    """Return the trials that may go beyond `rung`, best first: all where none is better than
    guessing, since their order there is noise."""
    ranked = _ranked(rung, standings)
    if ranked and not rungs.beats_chance(ranked[0].losses[rung]):
        return [one.number for one in ranked]
    return [one.number for one in ranked[: len(ranked) // rungs.reduction_factor]]


def _ranked(rung: int, standings: Iterable[Standing]) -> list[Standing]:
    """Return the trials that reached `rung`, best value up to it first; of equals the earlier."""
    here = [one for one in standings if len(one.losses) > rung]
    return sorted(here, key=lambda one: (one.losses[rung], one.number))


def _finalists(rungs: Rungs, standings: Sequence[Standing]) -> list[int]:
    """Return the unfinished trials, best first, that are to be complete at the end."""
    complete = sum(one.state == "complete" for one in standings)
    open_ = [one for one in standings if one.state in ("paused", "running") and one.losses]
    left = max(0, rungs.finish - complete)
    return [one.number for one in sorted(open_, key=_by_loss)[:left]]


def place(rungs: Rungs, standings: Sequence[Standing], number: int) -> Place | None:
    """Return where trial `number` stands among those of the highest rung that it reached; None if
    it reached none."""
    one = next((one for one in standings if one.number == number), None)
    if one is None or not one.losses:
        return None
    rung = len(one.losses) - 1
    ranked = [other.number for other in _ranked(rung, standings)]
    going_on = len(_promoted(rungs, rung, standings))
    return Place(rungs.epochs[rung], ranked.index(number) + 1, len(ranked), going_on)


def count_rungs(rungs: Rungs, standings: Sequence[Standing]) -> list[RungCount]:
    """Return the rungs with their trials, the first one first."""
    return [_count(rungs, rung, standings) for rung in range(len(rungs.epochs))]


def _count(rungs: Rungs, rung: int, standings: Sequence[Standing]) -> RungCount:
    epoch, ranked = rungs.epochs[rung], _ranked(rung, standings)
    promoted = len(_promoted(rungs, rung, standings))
    threshold = None
    if 0 < promoted < len(ranked):
        loss = ranked[promoted - 1].losses[rung]
        threshold = -loss if rungs.maximize else loss
    here = [one for one in ranked if len(one.losses) == rung + 1]
    return RungCount(
        epoch=epoch,
        reached=len(ranked),
        went_on=sum(one.epochs > epoch or one.state == "running" for one in ranked),
        paused=sum(one.state == "paused" for one in here),
        threshold=threshold,
    )


def expected_epochs(
    rungs: Rungs,
    last: int,
    trials: int,
    standings: Sequence[Standing] = (),
    first: Collection[int] = (),
) -> float:
    """Return how many epochs `trials` trials of up to `last` epochs will have had at the end, those
    of `standings` included. The `first` ones, which may go on although others are better, do not
    tell how many of the others will.

    A few more than one of `reduction_factor` go on at a rung: early ones that later are not among
    the best any more, by chance about half the square root of the trials there, and more where the
    sampler learns, which shows in those that went on already. Once all are begun it is known who
    goes on next.
    """
    total = trials * float((*rungs.epochs, last)[0])
    there, expected = float(trials), float(max(0, trials - len(first)))
    for rung, (before, epoch) in enumerate(pairwise((*rungs.epochs, last))):
        went = {one.number for one in standings if one.epochs > before}
        going = went | set(_promoted(rungs, rung, standings))
        if len(standings) < trials:
            came = [one for one in standings if one.number not in first and len(one.losses) > rung]
            usual = expected / rungs.reduction_factor + math.sqrt(expected) / 2
            if len(came) >= rungs.reduction_factor:
                usual = max(usual, expected * sum(one.number in went for one in came) / len(came))
            expected = min(expected, usual)
            known = {one.number for one in standings if one.number in first}
            ahead = len(first) - len(known - going)
            usual = expected + ahead
        else:
            usual = 0.0
        there = min(there, max(usual, len(going), rungs.finish))
        total += there * (epoch - before)
    return total


def _by_loss(one: Standing) -> tuple[float, int]:
    return one.loss, one.number


def chance_level(metric: str, counts: Sequence[int]) -> float | None:
    """Return what guessing reaches in `metric` on validation images of which `counts` are of each
    class, two standard errors included: of always the most frequent classes for val_top1 and
    val_top5, of their shares as probabilities for val_loss; None where it is not known.
    """
    images, classes = sum(counts), len(counts)
    if not images or classes < 2:
        return None
    shares = sorted((count / images for count in counts), reverse=True)
    if metric == "val_loss":
        return -sum(share * math.log(share) for share in shares if share)
    level = {
        "val_top1": shares[0],
        "val_top5": min(sum(shares[:5]), 1.0),
        "val_balanced_accuracy": 1 / classes,
        "val_macro_f1": 1 / classes,
    }.get(metric)
    return None if level is None else level + 2 * math.sqrt(level * (1 - level) / images)


def rungs_of(file: StudyFile, chance: float | None = None) -> Rungs:
    """Return the rungs of a study, whose guesses reach `chance`."""
    scheduler = file.study.scheduler
    return Rungs(
        epochs=geometric(file.first_rung, file.reduction_factor, file.max_epochs),
        reduction_factor=file.reduction_factor,
        finish=0 if scheduler is None else scheduler.finish,
        maximize=file.direction == "maximize",
        chance=chance,
    )


def standings_of(rungs: Rungs, metric: str, trials: Iterable[Trial]) -> list[Standing]:
    """Return how `trials` stand at the rungs, by the values of `metric`."""
    return [
        rungs.standing(
            trial.number,
            STATES[trial.state],
            [row.metrics.get(metric, math.nan) for row in trial.epochs],
        )
        for trial in trials
        if trial.state in STATES
    ]


def what_decides(file: StudyFile) -> str:
    """Say in a line what decides which trials go on, and why that where hpo chose it."""
    study, why = file.study, file.why_decided
    reason = f" ({why})" if why else ""
    if study.scheduler is None:
        to_end = ": every trial runs to its end" if study.pruner.name == "none" else ""
        return f"pruner {study.pruner.name}{reason}{to_end}"
    rungs, name = rungs_of(file), f"scheduler {study.scheduler.name}{reason}"
    if not rungs.epochs:
        return f"{name}: {where_rungs_are(file)}, so every trial runs to its end"
    finish = f"; the best {rungs.finish} are finished" if rungs.finish else ""
    return f"{name}: {where_rungs_are(file)}; one in {rungs.reduction_factor} goes on{finish}"


def where_rungs_are(file: StudyFile) -> str:
    """Say where the rungs of a study are: `first rung after epoch 1, then 3, 9 of 20`."""
    if not (epochs := rungs_of(file).epochs):
        return f"no rung below epoch {file.max_epochs}"
    first, *later = epochs
    then = f", then {', '.join(map(str, later))}" if later else ""
    return f"first rung after epoch {first}{then} of {file.max_epochs}"


def study_note(file: StudyFile) -> str:
    """Return a note on a study for the dashboard, as Markdown."""
    decides = what_decides(file)
    text = (
        f"{decides[0].upper()}{decides[1:]}.\n\nThe parameter importance in this dashboard is "
        "Optuna's: its shares add up even where no parameter has an effect. What stands out from "
        f"chance is in `hpo report {file.name}`.\n"
    )
    if file.study.scheduler is not None:
        text += (
            "\nA trial that is Running and has no worker is paused at a rung: it goes on if it is "
            "among the best there, and is Pruned at the end of the study otherwise. "
            f"`hpo status {file.name}` counts them, `hpo trial {file.name} N` says where one "
            "stands.\n"
        )
    return text
