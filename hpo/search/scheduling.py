"""Pure decisions: what trial n tries, and whether a study goes on. No clock, no database.

Facts go in, a decision comes out, so that both are tested by table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpo.storage.leases import Contact, Facts, Free

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """Take one of these, in this order."""

    free: tuple[Free, ...]


@dataclass(frozen=True)
class Drain:
    """A stop rule fired: take these abandoned running trials and tell them pruned."""

    free: tuple[Free, ...]
    reason: str


@dataclass(frozen=True)
class Wait:
    """Nothing to take now: others run what is left."""


@dataclass(frozen=True)
class Over:
    """The study is over, or stopped."""

    reason: str


Decision = Run | Drain | Wait | Over


def fired(facts: Facts, *, maximize: bool, max_failures: int) -> str | None:
    """The stop rule that fires now, in words; None while the search goes on.

    The number of trials is no rule: trials at or above the budget are simply never taken.
    """
    best, target = facts.best, facts.target
    if best is not None and target is not None and (best >= target if maximize else best <= target):
        return f"the target {target:g} was reached: {best:g}"
    if facts.timeout_s is not None and facts.active_s >= facts.timeout_s:
        return f"timeout_s = {facts.timeout_s:g} of training were spent"
    if facts.patience_trials is not None and facts.since_best >= facts.patience_trials:
        return f"{facts.since_best} trials in a row brought nothing better than {best:g}"
    same = facts.failures[:max_failures]
    if len(same) == max_failures and len(set(same)) == 1:
        return f"{max_failures} trials in a row failed for the same reason: {same[0]}"
    return None


def decide(facts: Facts, rule: str | None) -> Decision:
    """What a worker does next, given the facts and the stop rule that has fired, if any."""
    if facts.stop == "user":
        return Over(facts.stop_reason or "stopped")
    if rule is not None:
        left = tuple(free for free in facts.free if free.started)
        if left:
            return Drain(left, rule)
        return Wait() if facts.running else Over(rule)
    if facts.finished >= facts.trials:
        return Over(f"all {facts.trials} trials are finished")
    return Run(facts.free) if facts.free else Wait()


def within_reach(facts: Facts, contact: Contact, lease_s: float) -> Facts:
    """The facts without trials whose owner's lease has run out, unless `contact` spans a lease: the
    owner may only have been as cut off as we were."""
    if contact.spans(lease_s):
        return facts
    return replace(facts, free=tuple(free for free in facts.free if not free.expired))


def apart(free: Sequence[Free], running: int, pick: Callable[[int], int]) -> tuple[Free, ...]:
    """`free` in the order in which to try to take them: first what was begun, then waiting trials.
    As many workers as there are running trials may be at it, too, so each begins at another waiting
    one, lest all wait for the first; in their own order where nobody else runs any. `pick(n)` gives
    one of 0 to n - 1.
    """
    begun = tuple(one for one in free if one.started)
    waiting = tuple(one for one in free if not one.started)
    first = pick(min(len(waiting), running + 1)) if waiting else 0
    return (*begun, *waiting[first:], *waiting[:first])


def missing(facts: Facts) -> int:
    """Waiting trials to add now: a few ahead of need, never more than the budget wants.

    A thousand waiting trials would make every poll ten times slower.
    """
    ahead = facts.running + 2
    return max(0, min(ahead - facts.waiting, facts.trials - facts.created))


def planned(
    number: int,
    baselines: Sequence[Values],
    grid: Sequence[Values],
    enqueued: Values | None,
    enqueued_before: int,
) -> Values:
    """What trial `number` tries: an enqueued configuration, else the next baseline, else the next
    grid point; empty: everything is sampled.

    `enqueued_before` trials of smaller numbers took an enqueued configuration instead. A pure
    function of what is stored, so a successor plans what its predecessor did.
    """
    if enqueued is not None:
        return enqueued
    place = number - enqueued_before
    if place < len(baselines):
        return baselines[place]
    rest = [point for point in grid if point not in baselines]
    place -= len(baselines)
    return rest[place] if place < len(rest) else {}
