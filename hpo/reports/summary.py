"""A study in plain language, as data: what was searched, what won, against what, by how much beyond
noise, what mattered, and what to try next.

Reads no database and imports no Optuna; the importances are the caller's, where they are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import TYPE_CHECKING

from hpo.config.parameters import Choice, Float, Int, is_same
from hpo.config.train import value_error
from hpo.formatting import number, plural, setting
from hpo.search.promotion import chance_level
from hpo.search.status import StudyStatus
from hpo.storage.records import Trial

if TYPE_CHECKING:
    from hpo.reports.importance import Importances

COUNTED = ("complete", "pruned", "diverged", "infeasible", "failed", "running", "paused")
"""States of trials that the first sentence counts."""
MOST_NAMED = 5
"""Most trials, choices or parameters that a sentence names."""
BEST, EDGE, CHANCE = 5, 0.1, 0.01
"""So many of the best trials press against a bound if more of them lie in this last part of a range
than values drawn at random would with this probability, over all parameters together."""
FEW_TRIALS, PER_PARAMETER = 10, 3
"""A search has few trials below the first, and below so many for each parameter."""
COARSE = 0.02
"""A difference that an accuracy must tell apart; if it cannot, there are few validation images."""


class Kind(StrEnum):
    """What a sentence is about, in the order in which they are read."""

    SEARCHED = "searched"
    WON = "won"
    AGAINST = "against"
    NOISE = "noise"
    MATTERED = "mattered"
    NEXT = "next"


@dataclass(frozen=True)
class Sentence:
    """One sentence of a summary, with its full stop."""

    kind: Kind
    text: str


def summarize(status: StudyStatus, found: Importances | None = None) -> list[Sentence]:
    """Return the summary of a study in any state; without importances it does not tell what
    mattered."""
    told: list[tuple[Kind, str]] = [(Kind.SEARCHED, _searched(status)), (Kind.WON, _won(status))]
    if status.best is not None:
        told += [(Kind.AGAINST, text) for text in _against(status, status.best)]
        told += [(Kind.NOISE, text) for text in _noise(status)]
    if found is not None:
        told.append((Kind.MATTERED, mattered(found)))
    if status.state in ("finished", "stopped"):
        told += [(Kind.NEXT, text) for text in _next(status)]
    return [Sentence(kind, text) for kind, text in told]


def texts(sentences: Iterable[Sentence], *kinds: Kind) -> list[str]:
    """Return the sentences of these kinds, in order."""
    return [one.text for one in sentences if one.kind in kinds]


def as_dicts(sentences: Iterable[Sentence]) -> list[dict[str, str]]:
    """Return the sentences as plain data: {"kind", "text"} each."""
    return [{"kind": str(one.kind), "text": one.text} for one in sentences]


def _searched(status: StudyStatus) -> str:
    names, images = list(status.file.space), sum(status.validated.values())
    on = f" on {plural(images, 'validation image')}" if images else ""
    folds = f" in {status.noise.folds} folds" if status.noise.folds else ""
    kinds = [f"{n} {kind}" for kind in COUNTED if (n := status.count(kind))]
    trials = plural(status.begun, "trial") + (f" ({', '.join(kinds)})" if kinds else "")
    by = ", ".join(status.file.objectives)
    return f"Searched {plural(len(names), 'parameter')} in {trials}, by {by}{on}{folds}."


def _won(status: StudyStatus) -> str:
    best = status.best
    if best is None:
        return f"{_capital(status.no_best or 'no trial is complete yet')}."
    interval = status.noise.describe(best)
    value = f"{status.file.metric} {number(best.value)}" + (f" ({interval})" if interval else "")
    so_far = "" if status.state == "finished" else " so far"
    epoch = f" in epoch {best.best_epoch} of {len(best.epochs)}" if best.best_epoch else ""
    return f"Trial {best.number} is the best{so_far}: {value}{epoch}."


def _against(status: StudyStatus, best: Trial) -> Iterator[str]:
    other = status.reference
    if other is None:
        values = [one.value for one in status.ranked() if one.value is not None]
        if len(values) > 2:
            yield f"The median of {len(values)} complete trials is {number(median(values))}."
        return
    name = other.origin.partition(":")[0].removesuffix(" 1")
    if other.number == best.number:
        yield f"That is the {name} configuration itself: no other trial was better."
        return
    apart = (best.value or 0.0) - (other.value or 0.0)
    side = f"{number(abs(apart))} {'above' if apart > 0 else 'below'}" if apart else "equal to"
    ended = "" if other.state == "complete" else f", {other.state} after epoch {len(other.epochs)}"
    yield (
        f"The {name} (trial {other.number}{ended}) reached {number(other.value)}: the best "
        f"{'' if other.state == 'complete' else 'complete one '}is {side} it"
        f"{_verdict(status, other)}."
    )


def _verdict(status: StudyStatus, other: Trial) -> str:
    """Return whether the difference of a trial from the best is noise."""
    if status.ties is None or other.state != "complete":
        return ""
    return ", within noise" if other in status.ties else ", beyond noise"


def _noise(status: StudyStatus) -> Iterator[str]:
    ties = status.ties
    if ties is None:
        metric = status.file.metric
        yield f"How much of that is noise is unknown: {metric} has no interval here."
    elif ties:
        yield f"Not distinguishable: {plural(len(ties), 'trial')} within noise{_numbers(ties)}."
    elif len(status.ranked()) > 1:
        yield "No other complete trial is within noise of it."


def _numbers(trials: Sequence[Trial]) -> str:
    shown = ", ".join(str(one.number) for one in trials[:MOST_NAMED])
    return f" ({shown}{', ...' if len(trials) > MOST_NAMED else ''})"


def mattered(found: Importances) -> str:
    """Return what mattered beyond chance in a sentence, or that nothing did."""
    if found.verdict:
        return f"{_capital(found.verdict)}."
    shares = [(name, one) for name, one in found.shares.items() if name in found.outstanding]
    named = ", ".join(f"{name} ({share:.0%})" for name, share in shares[:MOST_NAMED])
    return f"Parameter importance beyond chance, in {found.compared}: {named}."


def _next(status: StudyStatus) -> Iterator[str]:
    """Yield what to try next, the most urgent first."""
    if (verified := status.file.verifies) is not None:  # its trials are other seeds of a search's
        yield f"hpo verify {verified.study} ranks its configurations."
        return
    yield from _guessing(status)
    yield from _pressing(status)
    yield from _rising(status)
    yield from _tied(status)
    yield from _coarse(status)
    yield from _untried(status)
    yield from _few(status)


def _guessing(status: StudyStatus) -> Iterator[str]:
    """Yield a sentence where some long trials did no better than guessing."""
    counts = list(status.validated.values())
    level = chance_level(status.file.metric, counts) if counts else None
    if level is None:
        return
    sign = 1.0 if status.noise.maximize else -1.0
    long = [one for one in status.ranked("complete", "pruned")
            if 2 * len(one.epochs) >= status.file.max_epochs]  # fmt: skip
    none = [one for one in long if one.value is not None and sign * (one.value - level) <= 0]
    if len(none) < 2:
        return
    shares = {count / sum(counts) for count in counts}
    single = status.file.metric == "val_top1" and all(
        any(math.isclose(row.metrics.get("val_top1", -1.0), share) for share in shares)
        for one in none for row in one.epochs
    )  # fmt: skip
    what = "always named one class" if single else "did no better than guessing"
    names = [one.params["optimizer.lr"] for one in none if "optimizer.lr" in one.params]
    rates = f" (optimizer.lr {min(names):.3g} to {max(names):.3g})" if names else ""
    bound = f"at {'most' if status.noise.maximize else 'least'} {number(level)}"
    yield (
        f"{len(none)} of {len(long)} trials {what}, {status.file.metric} {bound}{rates}: try other "
        "learning rates, more epochs or pretrained weights."
    )


def _pressing(status: StudyStatus) -> Iterator[str]:
    """Yield a sentence for each bound of a range that the best trials press against."""
    ranked = status.ranked("complete", "pruned", "paused")
    if len(ranked) < 2 * BEST:
        return
    ranges = {name: one for name, one in status.file.space.items() if isinstance(one, Float | Int)}
    for name, one in ranges.items():
        places = [_place(one, t.params[name]) for t in ranked[:BEST] if name in t.params]
        for is_low in (True, False):
            near = sum((place if is_low else 1 - place) <= EDGE + 1e-9 for place in places)
            share = _edge_share(one, is_low=is_low)
            by_chance = _at_least(near, len(places), share) * 2 * len(ranges)
            if near and by_chance <= CHANCE and (beyond := _beyond(name, one, is_low=is_low)):
                bound = f"{name} = {setting(one.low if is_low else one.high)}"
                few = f"{near} of the best {len(places)}"
                yield f"The best trials press against {bound} ({few}): let it go {beyond}."


def _place(parameter: Float | Int, value: float) -> float:
    """Return 0 to 1 from the lowest to the highest value."""
    low, high, place = float(parameter.low), float(parameter.high), float(value)
    if parameter.log:
        low, high, place = math.log(low), math.log(high), math.log(place)
    return (place - low) / (high - low) if low < high else 0.5


def _edge_share(parameter: Float | Int, *, is_low: bool) -> float:
    """Return the probability of a random value in the first or last EDGE of a range."""
    if parameter.log and isinstance(parameter, Int):
        low, high = float(parameter.low), float(parameter.high)
        edge = low * (high / low) ** (EDGE if is_low else 1 - EDGE)
        whole = math.log((high + 0.5) / (low - 0.5))
        if is_low:
            return math.log((math.floor(edge) + 0.5) / (low - 0.5)) / whole
        return math.log((high + 0.5) / (math.ceil(edge) - 0.5)) / whole
    if not parameter.step:
        return EDGE
    steps = round((parameter.high - parameter.low) / parameter.step)
    return (int(EDGE * steps + 1e-9) + 1) / (steps + 1)


def _at_least(hits: int, draws: int, share: float) -> float:
    """Return the probability of `hits` or more of `draws`, each with probability `share`."""
    return sum(
        math.comb(draws, k) * share**k * (1 - share) ** (draws - k) for k in range(hits, draws + 1)
    )


def _beyond(name: str, parameter: Float | Int, *, is_low: bool) -> str | None:
    """Return where a range could go on, `below 0.0001`; None if the field allows nothing there."""
    low, high = parameter.low, parameter.high
    step = parameter.step or (high - low) * EDGE
    if parameter.log:
        value = low / 2 if is_low else high * 2
    else:
        value = low - step if is_low else high + step
    if isinstance(parameter, Int):
        value = math.floor(value) if is_low else math.ceil(value)
    if value_error(name, value) is not None:
        return None
    return f"below {setting(low)}" if is_low else f"above {setting(high)}"


def _rising(status: StudyStatus) -> Iterator[str]:
    """Yield a sentence where the best trials were still getting better in their last epoch."""
    best, noise = status.best, status.noise
    if best is None or not noise.still_rises(best):
        return
    way = "rising" if noise.maximize else "falling"
    next_ones = status.ranked()[1:BEST]
    rising = sum(map(noise.still_rises, next_ones))
    others = f", and {rising} of the next {len(next_ones)}" if rising else ""
    more = ""
    if status.file.tied_to_length is None:
        more = f": hpo extend {status.row.name} --epochs {2 * status.file.max_epochs}"
    yield (
        f"The best trial was still {way} in its last epoch, {len(best.epochs)}{others}: try more "
        f"epochs{more}."
    )


def _tied(status: StudyStatus) -> Iterator[str]:
    """Yield a sentence where other trials may be as good as the best one."""
    if status.ties:
        verify = f"hpo verify {status.row.name}"
        yield f"{verify} trains the best again with other seeds, to tell them apart."


def _coarse(status: StudyStatus) -> Iterator[str]:
    """Yield a sentence where the validation images cannot tell the best trials apart."""
    best, noise = status.best, status.noise
    if not status.ties or best is None or (interval := noise.interval(best)) is None:
        return
    half = (interval.high - interval.low) / 2
    if noise.counted and half > COARSE:
        more = "more images" if noise.folds else (
            "more validation images (data.val_fraction) or a cross-validation (data.folds)"
        )  # fmt: skip
        yield f"{noise.basis} tell an accuracy to ±{half:.3f}: {more} would tell the best apart."


def _untried(status: StudyStatus) -> Iterator[str]:
    """Yield a sentence on choices that no trial had."""
    begun = [trial.params for trial in status.trials if trial.params]
    never = [
        f"{name} = {setting(choice)}"
        for name, parameter in status.file.space.items()
        if isinstance(parameter, Choice)
        for choice in parameter.choices
        if not any(is_same(choice, params[name]) for params in begun if name in params)
    ]
    if begun and never:
        more = f" and {len(never) - MOST_NAMED} more" if len(never) > MOST_NAMED else ""
        yield f"Never tried: {', '.join(never[:MOST_NAMED])}{more}."


def _few(status: StudyStatus) -> Iterator[str]:
    """Yield a sentence where there were few trials for the space."""
    wanted = max(FEW_TRIALS, PER_PARAMETER * len(status.file.space))
    if status.budget is None or status.file.study.sampler.name == "grid":
        return
    if 0 < status.finished < wanted:
        trials, searched = status.finished, plural(len(status.file.space), "parameter")
        few = f"{plural(trials, 'trial')} for {searched} {'is' if trials == 1 else 'are'} few"
        yield f"{few}: {_more_trials(status, wanted)}."


def _more_trials(status: StudyStatus, wanted: int) -> str:
    """Return what brings a study that is over or stopped to `wanted` trials, or why it is over."""
    if status.state == "stopped":
        return f"hpo resume {status.row.name}"
    if status.row.stop_reason:
        return f"it ended early, {status.row.stop_reason}"
    return f"hpo extend {status.row.name} --trials {wanted}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
