"""Decisions by table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpo.config.study import Proposal
from hpo.search import scheduling
from hpo.storage.leases import ClaimableTrial
from hpo.storage.snapshot import StudySnapshot
from hpo.storage.tables import OPEN_ENDED
from tests.harness.fakes import study_file

FACTS = StudySnapshot(
    uuid="u",
    trials=10,
    timeout_s=None,
    target=None,
    patience_trials=None,
    stop=None,
    stop_reason=None,
    created=5,
    finished=3,
    running=1,
    waiting=1,
    free=(ClaimableTrial(7, 4, False),),
    active_s=12.0,
    best=0.8,
    since_best=2,
    failures=(),
)
ORPHAN = ClaimableTrial(6, 3, True)


@pytest.mark.parametrize(
    ("changes", "rule", "expected"),
    [
        ({}, None, scheduling.Run(FACTS.free)),
        ({"free": ()}, None, scheduling.Wait()),
        ({"finished": 10, "free": ()}, None, scheduling.Over("all 10 trials are finished")),
        ({"stop": "user", "stop_reason": "by hand"}, None, scheduling.Over("by hand")),
        ({"running": 0}, "enough", scheduling.Over("enough")),
        ({"running": 1}, "enough", scheduling.Wait()),
        ({"free": (ORPHAN, *FACTS.free)}, "enough", scheduling.Drain((ORPHAN,), "enough")),
    ],
)
def test_decide(changes: dict[str, object], rule: str | None, expected: object) -> None:
    assert scheduling.decide(replace(FACTS, **changes), rule) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "maximize", "part"),
    [
        ({}, True, None),
        ({"target": 0.9}, True, None),
        ({"target": 0.8}, True, "target 0.8 was reached: 0.8"),
        ({"target": 0.9}, False, "target 0.9 was reached: 0.8"),
        ({"target": 0.9, "best": None}, True, None),
        ({"timeout_s": 12.5}, True, None),
        ({"timeout_s": 12.0}, True, "timeout_s = 12"),
        ({"max_time_s": 90.0, "elapsed_s": 89.9}, True, None),
        ({"max_time_s": 90.0, "elapsed_s": 90.0}, True, "max_time = 1m30s is over"),
        ({"max_full_trainings": 2.5, "max_epochs": 10, "spent_epochs": 24}, True, None),
        (
            {"max_full_trainings": 2.5, "max_epochs": 10, "spent_epochs": 25},
            True,
            "max_full_trainings = 2.5: 25 epochs were spent",
        ),
        ({"patience_trials": 3}, True, None),
        ({"patience_trials": 2}, True, "2 trials in a row brought nothing better than 0.8"),
        ({"failures": ("a", "a")}, True, None),
        ({"failures": ("a", "a", "b")}, True, None),
        ({"failures": ("a", "a", "a", "b")}, True, "3 trials in a row failed"),
    ],
)
def test_stop_rules(changes: dict[str, object], maximize: bool, part: str | None) -> None:
    found = scheduling.stop_rule(replace(FACTS, **changes), maximize=maximize, max_failures=3)  # type: ignore[arg-type]
    assert (found is None) if part is None else (found is not None and part in found.reason)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"target": 0.8}, "--target"),
        ({"timeout_s": 12.0}, "--timeout-s"),
        ({"max_time_s": 1.0, "elapsed_s": 1.0}, "--max-time"),
        ({"max_full_trainings": 1.0, "spent_epochs": 1}, "--max-full-trainings"),
        ({"patience_trials": 2}, "--patience-trials"),
        ({"max_full_trainings": 1.0, "spent_epochs": 1, "timeout_s": 1.0}, "--max-full-trainings"),
    ],
)
def test_a_stop_rule_names_the_option_that_raises_its_limit(
    changes: dict[str, object], option: str
) -> None:
    fired = scheduling.stop_rule(replace(FACTS, **changes), maximize=True, max_failures=3)  # type: ignore[arg-type]
    assert fired is not None
    assert fired.option == option


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"trials": 4}, False),  # nine of ten trials are no budget of time
        ({"timeout_s": 18.1}, False),
        ({"timeout_s": 18.0}, True),
        ({"max_time_s": 3.0, "elapsed_s": 1.9}, False),
        ({"max_time_s": 3.0, "elapsed_s": 2.0}, True),
        ({"max_full_trainings": 3.0, "max_epochs": 10, "spent_epochs": 19}, False),
        ({"max_full_trainings": 3.0, "max_epochs": 10, "spent_epochs": 20}, True),
        ({"max_time_s": 9.0, "elapsed_s": 1.0, "timeout_s": 13.0}, True),  # the first of them
    ],
)
def test_a_study_closes_after_two_thirds_of_a_budget(
    changes: dict[str, object], expected: bool
) -> None:
    assert scheduling.closing(replace(FACTS, **changes)) is expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trials": OPEN_ENDED}, 2),
        ({"trials": OPEN_ENDED, "created": 5_000_000, "running": 8, "waiting": 0}, 10),
        ({"created": 0, "running": 0, "waiting": 0}, 2),
        ({}, 2),
        ({"waiting": 3}, 0),
        ({"created": 9, "waiting": 0}, 1),
        ({"created": 10, "waiting": 0}, 0),
        ({"created": 14, "waiting": 0}, 0),
        ({"created": 0, "running": 0, "waiting": 0, "trials": 1}, 1),
    ],
)
def test_missing_is_a_few_ahead_and_never_past_the_budget(
    changes: dict[str, object], expected: int
) -> None:
    assert scheduling.missing(replace(FACTS, **changes)) == expected  # type: ignore[arg-type]


def test_workers_begin_with_different_trials() -> None:
    free = tuple(ClaimableTrial(i, i, False) for i in range(5))
    asked: list[int] = []

    def last(n: int) -> int:
        asked.append(n)
        return n - 1

    assert scheduling.claim_order(free, 0, last) == free  # alone: in their order
    assert scheduling.claim_order(free, 2, last) == (*free[2:], *free[:2])
    assert scheduling.claim_order(free, 99, last) == (*free[4:], *free[:4])
    assert asked == [1, 3, 5]
    assert scheduling.claim_order((*free[:2], ORPHAN), 9, last) == (ORPHAN, free[1], free[0])
    assert scheduling.claim_order((ORPHAN,), 9, last) == (ORPHAN,)


LEARNED = Proposal("learned", {"x": 4}, "study old, trial 3: val_top1 0.9")
SHIPPED = Proposal("recommended", {"x": 5}, "a paper")


def test_planned_is_baselines_then_grid_then_sampled() -> None:
    a, b, c = {"x": 1}, {"x": 2}, {"x": 3}
    tried = [scheduling.planned(n, scheduling.first_plans([b]), [a, b, c], None, 0)
             for n in range(4)]  # fmt: skip
    assert [one.values for one in tried] == [b, a, c, {}]
    assert [one.origin for one in tried] == ["baseline 1", "grid", "grid", "sampled"]


def test_planned_is_baselines_then_what_was_learned_then_recommended() -> None:
    first = scheduling.first_plans([{"x": 1}], [LEARNED, SHIPPED])
    tried = [scheduling.planned(n, first, (), None, 0) for n in range(4)]
    assert [one.values for one in tried] == [{"x": 1}, {"x": 4}, {"x": 5}, {}]
    assert [one.origin for one in tried] == [
        "baseline 1",
        "learned from study old, trial 3: val_top1 0.9",
        "recommended: a paper",
        "sampled",
    ]
    assert [one.is_protected for one in tried] == [False, True, True, False]


def test_planned_shifts_by_what_was_enqueued() -> None:
    a, b = {"x": 1}, {"x": 2}
    first = scheduling.first_plans([], [SHIPPED])
    assert scheduling.planned(0, [], [a, b], None, 0).values == a
    assert scheduling.planned(1, [], [a, b], {"x": 9}, 0) == scheduling.Plan({"x": 9}, "enqueued")
    assert scheduling.planned(2, [], [a, b], None, 1).values == b
    assert scheduling.planned(0, first, [], {"x": 9}, 0).values == {"x": 9}
    assert scheduling.planned(1, first, [], None, 1).values == {"x": 5}


@pytest.mark.parametrize(
    ("epoch", "lengths", "protected"),
    [
        (1, {}, True),
        (1, {0: 1, 1: 9}, True),  # trials 0 and 1 come before the search: they do not count
        (1, {0: 1, 2: 1}, False),
        (2, {0: 2, 2: 1, 3: 2}, True),  # the median is 1.5
        (2, {0: 2, 2: 1, 3: 2, 4: 9}, False),
        (3, {0: 3, 2: 2, 3: 2, 4: 9}, True),
        (9, {0: 9, 2: 9}, False),
    ],
)
def test_a_recommended_trial_goes_on_until_the_median_of_the_searched_ones_reaches_its_epoch(
    epoch: int, lengths: dict[int, int], protected: bool
) -> None:
    assert scheduling.is_protected(epoch, lengths, {0, 1}) is protected


def test_the_numbers_of_the_first_trials_shift_by_what_was_enqueued() -> None:
    file = replace(study_file(trials=9), proposals=(LEARNED, SHIPPED))
    plans = scheduling.first_plans((), (LEARNED, SHIPPED))
    assert dict(scheduling.first_trials(file, [])) == dict(enumerate(plans))
    assert dict(scheduling.first_trials(file, [0, None, 2])) == {1: plans[0], 3: plans[1]}
