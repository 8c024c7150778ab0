"""benchmarks/portfolio: regret, greedy choice, random starts, and what may not be learned from."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks import portfolio
from benchmarks.portfolio import Finished, Scale, bootstrap, choose, random_start
from benchmarks.small_sets import PLANS, Cut, study_tables, write_cut
from hpo.config.recommended import parse_entries
from hpo.config.study import StudyFile
from hpo.errors import InputError


@pytest.mark.parametrize(
    ("values", "maximize", "expected"),
    [
        ([0.9, 0.5, 0.7, 0.3], True, [0.0, 4 / 3, 2 / 3, 2.0]),
        ([1.0, 2.0, 5.0], False, [0.0, 1.0, 4.0]),
        ([0.9, None, 0.5, 0.7], True, [0.0, 4 / 3, 4 / 3, 2 / 3]),
    ],
)
def test_regret_is_0_for_the_best_and_1_for_the_median(values, maximize, expected):
    scale = Scale.of(values, maximize=maximize)
    assert [scale.regret(one) for one in values] == pytest.approx(expected)


def test_regret_of_what_is_better_than_the_best_is_negative():
    assert Scale.of([0.9, 0.5, 0.7], maximize=True).regret(1.0) == pytest.approx(-0.5)


@pytest.mark.parametrize("values", [[], [None, None], [0.5, 0.5, 0.5]])
def test_a_study_without_differences_teaches_nothing(values):
    with pytest.raises(InputError):
        Scale.of(values, maximize=True)


def test_the_choice_complements_what_is_chosen():
    table = np.array([[0.0, 0.1, 0.9, 0.5], [0.9, 0.8, 0.0, 0.3]])
    # By itself 3 is best; then 0 helps the first study more than 2 the second; 1 adds nothing.
    assert choose(table, 3) == [3, 0, 2]


def test_where_nothing_helps_the_better_one_is_chosen():
    assert choose(np.array([[0.9, 0.0, 0.4, 0.2]]), 4) == [1, 3, 2, 0]


def test_the_choice_is_no_longer_than_the_table():
    assert choose(np.array([[0.5, 0.2]]), 4) == [1, 0]


@pytest.mark.parametrize("trials", [1, 2, 4, 5])
def test_random_starts_are_the_mean_over_all_draws(trials):
    found = np.array([0.3, 0.0, 2.0, 0.7, 1.0])
    draws = [min(one) for one in itertools.combinations(found, trials)]
    assert random_start(found, trials) == pytest.approx(np.mean(draws))


def test_the_interval_draws_whole_groups():
    arm, other = np.array([1.0, 3.0, 1.0]), np.array([2.0, 2.0, 2.0])
    assert bootstrap(["a", "a", "a"], arm, other) == pytest.approx((5 / 6, 5 / 6))
    low, high = bootstrap(["a", "a", "b"], arm, other)
    assert (low, high) == pytest.approx((0.5, 1.0))


def finished(name: str, data: dict[str, object], costs: dict[float, float]) -> Finished:
    """A study whose trials differ in their learning rate: {rate: regret}."""
    tables = study_tables(name, data, PLANS[0])
    file = StudyFile.from_dict(tables)
    drawn = [{"optimizer.lr": rate} for rate in costs]
    return Finished(name, file, drawn, np.array(list(costs.values())), [])


def folder(root: str) -> dict[str, object]:
    return {"dataset": "folder", "root": root, "image_size": 16}


RATES = [0.001 * (n + 1) for n in range(12)]


def peak(best: int) -> dict[float, float]:
    """Regrets that are least at one rate."""
    return {rate: abs(n - best) / 4 for n, rate in enumerate(RATES)}


def test_sisters_and_the_study_itself_do_not_teach():
    left = finished("left", folder("/images/ten@a"), peak(0))
    sister = finished("sister", folder("/images/ten@b"), peak(0))
    other = finished("other", folder("/images/animals"), peak(8))
    apart = finished("apart", {"dataset": "digits"}, peak(4))
    studies = [left, sister, other, apart]

    def after(arm: str) -> list[float] | None:
        return portfolio.start_regrets(left, studies, portfolio.TEACHERS[arm], 2)

    # Between the peaks of the two others (6) first, or one of them; never that of the sister.
    assert after("portfolio of other data sets") == [1.0, 1.0]
    assert after("portfolio of other sources") == [1.0, 0.75]
    assert after("... with another network") is None


def test_what_a_study_did_not_try_is_predicted():
    study = finished("one", folder("/images/a"), peak(2))
    got = portfolio.regrets_in(study, [{"optimizer.lr": RATES[2]}, {"optimizer.lr": 0.0121}])
    assert got[0] == 0.0
    assert 1.5 < got[1] <= 2.25


def test_the_portfolio_is_printed_as_recommended_configurations():
    study = finished("one", folder("/images/a"), peak(0))
    text = portfolio.entries(
        [study], [{"optimizer.name": "sgd", "optimizer.lr": 0.012345, "batch_size": 16}]
    )
    (entry,) = parse_entries(text)
    assert (entry.architectures, entry.start, entry.images) == (("small_cnn",), "scratch", "small")
    assert entry.values == {"optimizer.name": "sgd", "optimizer.lr": 0.0123, "batch_size": 16}


def test_cuts_of_one_folder_share_no_image(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "all" / label).mkdir(parents=True)
        for number in range(10):
            (tmp_path / "all" / label / f"{number}.jpg").write_bytes(bytes([number]))
    write_cut(tmp_path / "all", Cut("a", 2, 2), tmp_path / "a")
    write_cut(tmp_path / "all", Cut("b", 3, 3, start=4, classes=("dog",)), tmp_path / "b")

    def images(place: str) -> set[str]:
        return {one.name for one in (tmp_path / place).iterdir()}

    assert [len(images(f"a/{part}/cat")) for part in ("train", "val")] == [2, 2]
    assert not images("a/train/dog") & images("a/val/dog")
    assert not (images("a/train/dog") | images("a/val/dog")) & images("b/train/dog")
    assert not (tmp_path / "b" / "train" / "cat").exists()
