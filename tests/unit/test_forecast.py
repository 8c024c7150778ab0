"""What a study is expected to spend, by its budgets and by what decides which trials go on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpo.config.study import Proposal, StudyFile, parse_study
from hpo.search.promotion import Rungs
from hpo.trained.forecast import expected_epochs, forecast, promoted_epochs


def study(limits: str, epochs: int = 50, pruner: str = 'pruner = "none"') -> StudyFile:
    return parse_study(
        f'[study]\nname = "x"\n{pruner}\n{limits}\n[train]\nepochs = {epochs}\n'
        "[space]\noptimizer.lr = {low = 0.001, high = 0.1}\n"
    )


@pytest.mark.parametrize(
    ("stops", "eta", "finish", "trials", "longest", "epochs"),
    [
        ((1, 4), 4, 0, 32, 6, 32 * 1 + 8 * 3 + 2 * 2),
        ((1, 4), 4, 5, 32, 6, 32 * 1 + 8 * 3 + 2 * 2 + 3 * 2),  # three more from the last rung
        ((1, 4), 4, 5, 8, 6, 8 + 2 * 3 + 2 * 2 + 3 * 5),  # two of the last, three of the first
        ((1, 3, 9), 3, 1, 30, 15, 30 + 10 * 2 + 3 * 6 + 1 * 6),
        ((1,), 3, 5, 2, 4, 2 * 4),  # fewer trials than are to be complete
        ((), 3, 5, 7, 1, 7),
    ],
)
def test_epochs_of_rungs(
    stops: tuple[int, ...], eta: int, finish: int, trials: int, longest: int, epochs: int
) -> None:
    assert promoted_epochs(Rungs(stops, eta, finish), trials, longest) == epochs


def test_recommended_trials_run_to_their_end() -> None:
    file = study("trials = 30", 15, 'scheduler = "promote"')
    known = replace(
        file, proposals=(Proposal("recommended", {"optimizer.lr": 0.01}, "a page"),) * 4
    )
    rungs = Rungs((1, 3, 9), 3, 0)
    assert expected_epochs(known, 30)[0] == 4 * 15 + promoted_epochs(rungs, 26, 15)
    assert expected_epochs(known, 2) == (30, 30)


FIVE = 'scheduler = {name = "promote", finish = 5}'


@pytest.mark.parametrize(
    ("pruner", "trials", "epochs", "measured"),
    [
        ('pruner = "median"', 20, 51, (11.1 * 51, 12.3 * 51)),
        ('pruner = "median"', 50, 51, (20.1 * 51, 22.4 * 51)),
        ('pruner = "median"', 200, 51, (43.0 * 51, 50.9 * 51)),
        ('pruner = "median"', 32, 6, (127, 136)),
        ('pruner = "hyperband"', 50, 51, (15.1 * 51, 15.3 * 51)),
        ('pruner = "hyperband"', 200, 51, (44.9 * 51, 51.6 * 51)),
        ('pruner = "asha"', 50, 51, (8.0 * 51, 9.4 * 51)),
        ('pruner = "asha"', 30, 15, (111, 112)),
        (FIVE, 50, 51, (11.5 * 51, 14.3 * 51)),
        (FIVE, 32, 6, (73, 80)),
        ('pruner = "none"', 50, 51, (50 * 51, 50 * 51)),
    ],
)
def test_what_replays_spent_is_within_the_range(
    pruner: str, trials: int, epochs: int, measured: tuple[float, float]
) -> None:
    least, most = expected_epochs(study(f"trials = {trials}", epochs, pruner), trials)
    assert least <= measured[0]
    assert measured[1] <= most <= trials * epochs


@pytest.mark.parametrize("pruner", ["median", "hyperband", "asha", "percentile", "none"])
@pytest.mark.parametrize("epochs", [1, 2, 50])
def test_more_trials_take_more_epochs_and_none_takes_more_than_all(
    pruner: str, epochs: int
) -> None:
    option = ', "percentile" = 25' if pruner == "percentile" else ""
    file = study("", epochs, f'pruner = {{name = "{pruner}"{option}}}')
    found = [expected_epochs(file, trials) for trials in (1, 2, 7, 40, 1000)]
    assert found == sorted(found)
    for trials, (least, most) in zip((1, 2, 7, 40, 1000), found, strict=True):
        assert trials <= least <= most <= trials * epochs


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ("trials = 14", "14 trials, 14 full trainings = 700 epochs, about 12 min with 2 workers"),
        ("max_full_trainings = 14",
         "about 14 trials, about 14 full trainings = 700 epochs, about 12 min with 2 workers "
         "(max_full_trainings ends it)"),
        ('trials = 30\nmax_time = "12m"',
         "about 14 trials, about 14 full trainings = 700 epochs, about 12 min with 2 workers "
         "(max_time ends it)"),
        ('trials = 14\nmax_time = "2h"\nmax_full_trainings = 20',
         "14 trials, 14 full trainings = 700 epochs, about 12 min with 2 workers"),
        ("trials = 30\ntimeout_s = 1440",
         "about 14 trials, about 14 full trainings = 700 epochs, about 12 min with 2 workers "
         "(timeout_s ends it)"),
    ],
)  # fmt: skip
def test_the_budget_that_ends_first_is_told(limits: str, words: str) -> None:
    found = forecast(study(limits), workers=2, epoch_s=720 * 2 / 700, once_s=lambda _: 0.0)
    assert str(found) == words


def test_an_estimate_is_a_range() -> None:
    file = study("trials = 50", 50, 'pruner = "median"')
    text = str(forecast(file, workers=2, epoch_s=2.0, once_s=lambda _: 0.0))
    assert text == "50 trials, 17 to 26 full trainings = 830 to 1,300 epochs, 14 min to 22 min " \
        "with 2 workers"  # fmt: skip
    file = study('max_time = "14m"', 50, 'scheduler = "promote"')
    found = forecast(file, workers=2, epoch_s=2.0, once_s=lambda _: 0.0)
    assert found is not None
    assert found.epochs == (840, 840)
    assert found.trials[0] < found.trials[1]
    assert found.seconds == (840, 840)


def test_what_is_computed_once_takes_its_time_of_the_budget() -> None:
    file = study('max_time = "10m"')
    found = forecast(file, workers=2, epoch_s=4.0, once_s=lambda trials: 100.0)
    assert found is not None
    assert found.epochs == (250, 250)
    assert found.seconds == (600, 600)


def test_without_a_timed_epoch() -> None:
    def untimed(limits: str) -> object:
        return forecast(study(limits), workers=2, epoch_s=None, once_s=lambda _: 0.0)

    assert untimed('max_time = "1h"') is None
    assert str(untimed("trials = 4")) == "4 trials, 4 full trainings = 200 epochs"
    assert str(untimed("max_full_trainings = 2.5")) == (
        "about 2 trials, about 2.5 full trainings = 125 epochs (max_full_trainings ends it)"
    )
