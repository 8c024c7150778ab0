"""Pure decisions: what trial n tries, and whether a study goes on. No clock, no database.

A snapshot goes in, a decision comes out, so that both are tested by table.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpo.config.study import Proposal, StudyFile
from hpo.formatting import exact_duration
from hpo.search.promotion import Prospects
from hpo.storage.leases import ClaimableTrial, ContactWindow
from hpo.storage.snapshot import Spending, StudySnapshot

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """Take one of these, in this order."""

    free: tuple[ClaimableTrial, ...]


@dataclass(frozen=True)
class Drain:
    """A stop rule fired, or promotion has come to its end: take these abandoned or paused trials
    and tell them pruned."""

    free: tuple[ClaimableTrial, ...]
    reason: str


@dataclass(frozen=True)
class Wait:
    """Nothing to take now: others run what is left."""


@dataclass(frozen=True)
class Over:
    """The study is over, or stopped."""

    reason: str


Decision = Run | Drain | Wait | Over


@dataclass(frozen=True)
class StopRule:
    """A stop rule that has fired."""

    reason: str
    option: str
    """The option of `hpo extend` that raises its limit; empty: there is none."""


CLOSING = 2 / 3
"""Part of a budget of time or epochs after which a study closes: it begins no new trial."""


def stop_rule(snapshot: StudySnapshot, *, maximize: bool, max_failures: int) -> StopRule | None:
    """Return the stop rule that fires now; None while the search goes on.

    The number of trials is no rule: trials at or above the budget are simply never taken.
    """
    best, target = snapshot.best, snapshot.target
    if best is not None and target is not None and (best >= target if maximize else best <= target):
        return StopRule(f"the target {target:g} was reached: {best:g}", option("target"))
    if (spent := spent_budget(snapshot)) is not None:
        return spent
    if snapshot.patience_trials is not None and snapshot.since_best >= snapshot.patience_trials:
        since = snapshot.since_best
        reason = f"{since} trials in a row brought nothing better than {best:g}"
        return StopRule(reason, option("patience_trials"))
    same = snapshot.failures[:max_failures]
    if len(same) == max_failures and len(set(same)) == 1:
        return StopRule(f"{max_failures} trials in a row failed for the same reason: {same[0]}", "")
    return None


def spent_budget(spending: Spending) -> StopRule | None:
    """Return the budget of time or epochs that is spent, the first in the order of their names in
    `[study]`; None while all have something left."""
    for name, part in budget_parts(spending).items():
        if part >= 1.0:
            return StopRule(_spent_reason(name, spending), option(name))
    return None


def option(name: str) -> str:
    """Return the option of `hpo extend` for a field of `[study]`."""
    return f"--{name.replace('_', '-')}"


def _spent_reason(name: str, spending: Spending) -> str:
    if name == "max_full_trainings":
        spent = f"{spending.spent_epochs} epochs were spent"
        return f"max_full_trainings = {spending.max_full_trainings:g}: {spent}"
    if name == "max_time":
        return f"max_time = {exact_duration(spending.max_time_s or 0.0)} is over"
    return f"timeout_s = {spending.timeout_s:g} of training were spent"


def budget_parts(spending: Spending) -> dict[str, float]:
    """Return which part of each budget of time or epochs is spent, by its name in `[study]`; 1 and
    more: all of it. Those without a limit are left out."""
    spent = {
        "max_time": (spending.elapsed_s, spending.max_time_s),
        "max_full_trainings": (spending.full_trainings, spending.max_full_trainings),
        "timeout_s": (spending.active_s, spending.timeout_s),
    }
    return {name: part / limit for name, (part, limit) in spent.items() if limit is not None}


def closing(spending: Spending) -> bool:
    """Return whether two thirds of a budget of time or epochs are spent: what is left is for trials
    that have begun."""
    return any(part >= CLOSING for part in budget_parts(spending).values())


OUTRANKED = "paused, and not among the best at the end of the study"


def decide(
    snapshot: StudySnapshot, rule: str | None, prospects: Prospects | None = None
) -> Decision:
    """Return what a worker does next. `rule` is the stop rule that has fired, if any; `prospects`
    are those of paused trials, in a study whose scheduler promotes them."""
    if snapshot.stop == "user":
        return Over(snapshot.stop_reason or "stopped")
    if rule is not None:
        left = (*(free for free in snapshot.free if free.started), *snapshot.paused)
        if left:
            return Drain(left, rule)
        return Wait() if snapshot.running else Over(rule)
    if snapshot.finished >= snapshot.trials:
        return Over(f"all {snapshot.trials} trials are finished")
    free = snapshot.free if prospects is None else _with_promoted(snapshot, prospects)
    if free:
        return Run(free)
    if snapshot.paused and all_begun(snapshot) and not snapshot.running:
        return Drain(snapshot.paused, OUTRANKED)
    return Wait()


def _with_promoted(snapshot: StudySnapshot, prospects: Prospects) -> tuple[ClaimableTrial, ...]:
    """Return what is free: what was begun, then promotable trials, then new ones, but none of
    these while others are to be finished."""
    paused = {one.number: one for one in snapshot.paused}
    begun = tuple(one for one in snapshot.free if one.started)
    promoted = tuple(paused[number] for number in prospects.promotable if number in paused)
    new = tuple(one for one in snapshot.free if not one.started)
    if prospects.closing and (snapshot.running or snapshot.paused):
        new = ()
    return (*begun, *promoted, *new)


def all_begun(snapshot: StudySnapshot) -> bool:
    """Return whether no trial within the budget of trials is left to begin."""
    return snapshot.created >= snapshot.trials and not snapshot.waiting


def within_reach(snapshot: StudySnapshot, contact: ContactWindow, lease_s: float) -> StudySnapshot:
    """Return the snapshot without trials whose lease has run out, unless `contact` spans a lease:
    their owners may only have been as cut off as we were."""
    if contact.spans(lease_s):
        return snapshot
    return replace(snapshot, free=tuple(free for free in snapshot.free if not free.expired))


def claim_order(
    free: Sequence[ClaimableTrial], running: int, pick: Callable[[int], int]
) -> tuple[ClaimableTrial, ...]:
    """Return `free` in the order in which to claim them: first what was begun, then waiting trials.
    As many workers as there are running trials may be at it, too, so each begins at another waiting
    one, lest all wait for the first; in their own order where nobody else runs any. `pick(n)` gives
    one of 0 to n - 1.
    """
    begun = tuple(one for one in free if one.started)
    waiting = tuple(one for one in free if not one.started)
    first = pick(min(len(waiting), running + 1)) if waiting else 0
    return (*begun, *waiting[first:], *waiting[:first])


def missing(snapshot: StudySnapshot) -> int:
    """Return how many waiting trials to add now: a few ahead of need, within the budget.

    A thousand waiting trials would make every poll ten times slower.
    """
    ahead = snapshot.running + 2
    return max(0, min(ahead - snapshot.waiting, snapshot.trials - snapshot.created))


@dataclass(frozen=True)
class Plan:
    """What a trial tries, and where that comes from."""

    values: Values
    """Config values; what is missing is sampled."""
    origin: str
    """Such as `baseline 1`, `recommended: SOURCE`, `enqueued`, `grid` or `sampled`."""
    is_protected: bool = False
    """Whether it is known to be good and so not pruned early (`is_protected`)."""


def first_plans(baselines: Sequence[Values], proposals: Sequence[Proposal] = ()) -> list[Plan]:
    """Return what a study tries before its grid or its sampler, in order."""
    numbered = [Plan(one, f"baseline {i}") for i, one in enumerate(baselines, 1)]
    return [*numbered, *(Plan(one.values, str(one), is_protected=True) for one in proposals)]


def planned(
    number: int,
    first: Sequence[Plan],
    grid: Sequence[Values],
    enqueued: Values | None,
    enqueued_before: int,
) -> Plan:
    """Return what trial `number` tries: an enqueued configuration, else the next of `first`, else
    the next grid point; else everything is sampled.

    `enqueued_before` trials of smaller numbers took an enqueued configuration instead. A pure
    function of what is stored, so a successor plans what its predecessor did.
    """
    if enqueued is not None:
        return Plan(enqueued, "enqueued")
    place = number - enqueued_before
    if place < len(first):
        return first[place]
    tried = [one.values for one in first]
    rest = [point for point in grid if point not in tried]
    place -= len(first)
    return Plan(rest[place], "grid") if place < len(rest) else Plan({}, "sampled")


def plan_of(file: StudyFile, number: int, enqueued: Values | None, enqueued_before: int) -> Plan:
    """Return what trial `number` of the study of `file` tries (see `planned`)."""
    grid = file.space.grid() if file.study.sampler.name == "grid" else ()
    place = number - file.known_trials
    return planned(place, _first_plans_of(file), grid, enqueued, enqueued_before)


def _first_plans_of(file: StudyFile) -> list[Plan]:
    """Return what the study of `file` tries before its grid or its sampler; none of that again that
    was taken over."""
    known = () if file.taken_over is None else file.taken_over.baselines
    plans = first_plans(file.baselines, file.proposals)
    return [plan for place, plan in enumerate(plans) if place not in known]


def first_trials(file: StudyFile, enqueued: Collection[int | None]) -> Iterator[tuple[int, Plan]]:
    """Yield the trials that try what comes before the search, each with its plan."""
    numbers = (n for n in itertools.count(file.known_trials) if n not in enqueued)
    yield from zip(numbers, _first_plans_of(file), strict=False)


def is_protected(epoch: int, lengths: Mapping[int, int], first: Collection[int]) -> bool:
    """Return whether a recommended trial goes on after `epoch` (from 1) although others are better:
    while the median of the searched trials' numbers of epochs is smaller.

    `lengths`: finished epochs by trial number, where there are any; those of the `first` trials,
    which try what comes before the search, do not count.
    """
    others = [count for number, count in lengths.items() if number not in first]
    return not others or statistics.median(others) < epoch
