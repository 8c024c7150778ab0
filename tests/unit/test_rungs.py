"""What people are told of a scheduler: which and why, where its rungs are, and who stands where."""

from __future__ import annotations

import math

import pytest

from hpo.config.study import StudyFile, parse_study
from hpo.formatting import ordinal
from hpo.search import study as studies
from hpo.search.promotion import (
    Place,
    RungCount,
    Rungs,
    State,
    count_rungs,
    expected_epochs,
    place,
    what_decides,
)
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage, keep_note

RUNGS = Rungs(epochs=(1, 3), reduction_factor=3, finish=2)


def parsed(study: str = "", epochs: int = 15, train: str = "") -> StudyFile:
    space = "optimizer.lr = {low = 1e-4, high = 0.1, log = true}"
    text = f"[study]\nname = 'toy'\n{study}\n[train]\nepochs = {epochs}\n{train}\n[space]\n{space}"
    return parse_study(text)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (
            parsed("trials = 50"),
            "scheduler promote (default below 300 trials of one metric): first rung after epoch 1, "
            "then 3, 9 of 15; one in 3 goes on; the best 3 are finished",
        ),
        (
            parsed("scheduler = {name = 'promote', finish = 0, first_epochs = 2}", epochs=5),
            "scheduler promote: first rung after epoch 2 of 5; one in 4 goes on",
        ),
        (
            parsed("scheduler = 'promote'", epochs=1),
            "scheduler promote: no rung below epoch 1, so every trial runs to its end",
        ),
        (parsed("trials = 300"), "pruner hyperband (default from 300 trials on)"),
        (
            parsed("trials = 39\nmetrics = ['val_top1', 'flops']"),
            "pruner median (default below 40 trials of several metrics)",
        ),
        (
            parsed("sampler = 'gp'"),
            "pruner hyperband (default with gp, which learns from complete trials alone)",
        ),
        (
            parsed("trials = 30\npatience_trials = 9"),
            "pruner median (default below 40 trials with patience_trials, which counts trials as "
            "they finish)",
        ),
        (
            parsed(train="schedule.name = 'onecycle'"),
            "pruner hyperband (default with a one-cycle schedule, whose first epochs tell little)",
        ),
        (parsed("pruner = 'none'"), "pruner none: every trial runs to its end"),
        (parsed("pruner = 'asha'"), "pruner asha"),
    ],
)
def test_which_and_why(file: StudyFile, said: str) -> None:
    assert what_decides(file) == said


def test_a_stored_study_says_which_and_no_more() -> None:
    stored = StudyFile.from_definition(parsed().definition())
    assert what_decides(stored).startswith("scheduler promote: first rung after epoch 1, then 3, 9")


NINE: list[tuple[State, list[float]]] = [
    ("complete", [0.9] * 9),
    ("paused", [0.5, 0.6, 0.7]),
    ("running", [0.8, 0.8]),
    *(("paused", [value]) for value in (0.4, 0.3, 0.2)),
    *(("over", [value]) for value in (0.1, 0.0)),
    ("running", []),
]


def test_rungs_are_counted() -> None:
    standings = [RUNGS.standing(n, state, values) for n, (state, values) in enumerate(NINE)]
    assert count_rungs(RUNGS, standings) == [
        RungCount(epoch=1, reached=8, went_on=3, paused=3, threshold=0.8),
        RungCount(epoch=3, reached=2, went_on=1, paused=1, threshold=None),
    ]
    losses = Rungs(epochs=(1,), reduction_factor=2, finish=0, maximize=False)
    pair = [losses.standing(n, "paused", [value]) for n, value in enumerate((0.5, 0.25))]
    assert count_rungs(losses, pair) == [RungCount(1, 2, 0, 2, 0.25)]


def test_who_asks_at_a_rung_and_goes_on_has_gone_on() -> None:
    asks = RUNGS.standing(0, "running", [0.9])
    assert count_rungs(RUNGS, [asks])[0].went_on == 1


@pytest.mark.parametrize(
    ("number", "found", "said"),
    [
        (1, Place(3, 2, 2, 0), "2nd of 2 after epoch 3, too few yet for one to go on"),
        (3, Place(1, 4, 8, 2), "4th of 8 after epoch 1; the best 2 go on"),
        (8, None, "None"),
        (99, None, "None"),
    ],
)
def test_where_a_trial_stands(number: int, found: Place | None, said: str) -> None:
    standings = [RUNGS.standing(n, state, values) for n, (state, values) in enumerate(NINE)]
    assert place(RUNGS, standings, number) == found
    assert str(place(RUNGS, standings, number)) == said
    assert str(Place(1, 3, 3, 1)) == "3rd of 3 after epoch 1; the best one goes on"


def test_ordinals() -> None:
    shown = [ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 102, 111)]
    assert shown == ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "111th"]


@pytest.mark.parametrize(
    ("trials", "seen", "epochs"),
    [
        (9, [], 9 * 1 + (3 + 1.5) * 2 + 2.5606601717798214 * 6),
        (2, [], 2 * 1 + 2 * 2 + 2 * 6),  # both are finished
        (3, [("complete", [0.5] * 9)] * 3, 27),  # as many as there are
        (9, [("paused", [0.5] * 3)] * 3, 9 + 9 * 2 + 4.5 * 6),  # all of the first went on
    ],
)
def test_epochs_that_a_study_will_have(
    trials: int, seen: list[tuple[State, list[float]]], epochs: float
) -> None:
    standings = [RUNGS.standing(n, state, values) for n, (state, values) in enumerate(seen)]
    assert math.isclose(expected_epochs(RUNGS, 9, trials, standings), epochs)


def test_the_note_says_it_and_is_the_users(database: Database) -> None:
    import optuna_dashboard

    file = parsed("trials = 9")
    study, _ = studies.create(database, file)
    storage = FencedStorage(database)
    view = study.optuna_study(storage)
    note = optuna_dashboard.get_note(view)
    assert note.startswith("Scheduler promote (default below 300 trials of one metric): first rung")
    assert "paused at a rung" in note
    optuna_dashboard.save_note(view, "my own words")
    keep_note(storage, study.row.study_id, note)
    assert optuna_dashboard.get_note(view) == "my own words"


def test_a_long_note_is_whole(database: Database) -> None:
    import optuna_dashboard

    storage = FencedStorage(database)
    study, _ = studies.create(database, parsed("pruner = 'none'"))
    other = storage.create_new_study(study.optuna_study(storage).directions, "other")
    keep_note(storage, other, "word " * 1000)
    attributes = storage.get_study_system_attrs(other)
    assert optuna_dashboard._note.get_note_from_system_attrs(attributes, None) == {
        "version": 1,
        "body": "word " * 1000,
    }
    assert "paused" not in optuna_dashboard.get_note(study.optuna_study(storage))
