"""What `python -m benchmarks.peers` makes of runs: times to an accuracy, ratios, intervals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.peers.__main__ import ARMS, HPO, OURS, PEERS, Results, subset
from benchmarks.peers.figures import HEADINGS, Run, difference, ratio, rows, spread
from benchmarks.peers.notebook import AXES, grid
from benchmarks.peers.ours import plain, study_file
from benchmarks.peers.search import Search
from hpo.config.study import StudyFile, parse_study
from hpo.config.toml import parse_assignments

CURVE = [(2.0, 0.2), (3.0, 0.35), (5.0, 0.3), (6.0, 0.4)]


def run(arm: str = HPO, seed: int = 0, seconds: float = 10.0, **fields: object) -> Run:
    return Run(arm, seed, seconds, CURVE, {"optimizer": "adamw"}, 0.4, **fields)  # type: ignore[arg-type]


def test_a_target_is_reached_with_the_first_epoch_that_has_it() -> None:
    assert run().reached(0.35) == (3.0, 2)
    assert run().reached(0.4) == (6.0, 4)
    assert run().reached(0.41) == (math.inf, 4)
    assert run().best == 0.4


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "–"),
        ([4.0], "4"),
        ([9.0, 1.0, 2.0], "2 (1 to 9)"),
        ([1.0, math.inf, math.inf], "never (1 to never)"),
    ],
)
def test_a_spread_is_median_least_and_most(values: list[float], text: str) -> None:
    assert spread(values) == text


def test_a_ratio_is_of_the_same_seeds_with_students_interval() -> None:
    # Logarithms of 2 and 8: mean log 4, deviation log(4)/sqrt(2); t(1, 97.5 %) = 12.7062.
    mean, low, high = ratio({0: 20.0, 1: 80.0, 2: 1.0}, {0: 10.0, 1: 10.0})
    half = 12.7062 * math.log(4) / 2
    assert mean == pytest.approx(4)
    assert (low, high) == pytest.approx((4 * math.exp(-half), 4 * math.exp(half)), rel=1e-3)


def test_one_seed_has_no_interval_and_none_no_ratio() -> None:
    mean, low, high = ratio({0: 20.0}, {0: 10.0, 1: 10.0})
    assert mean == pytest.approx(2)
    assert math.isnan(low)
    assert math.isnan(high)
    assert math.isnan(ratio({0: 20.0}, {1: 10.0})[0])


def test_a_difference_has_welchs_interval() -> None:
    stats = pytest.importorskip("scipy.stats")
    theirs, ours = [44.0, 46.0, 45.5, 43.0], [47.0, 47.5, 46.0]
    found = stats.ttest_ind(theirs, ours, equal_var=False).confidence_interval(0.95)
    gap, half = difference(theirs, ours)
    assert (gap - half, gap + half) == pytest.approx((found.low, found.high))
    assert difference([1.0, 1.0], [2.0, 2.0]) == (-1.0, 0.0)
    assert math.isnan(difference([1.0], [2.0, 3.0])[1])


def test_the_table_has_a_row_for_each_arm_that_ran() -> None:
    peer = next(iter(PEERS))
    runs = [run(seed=0, tests={"0": 0.4, "1": 0.5}), run(seed=1), run(peer, 0, 30.0)]
    first, second = rows(runs, ARMS, HPO, target=0.35)
    assert first[:3] == [HPO, "2", "10 (10 to 10)"]
    assert first[HEADINGS.index("retrained test, %")] == "45.0"
    assert second[:4] == [peer, "1", "30", "3.00"]
    assert second[HEADINGS.index("s to target")] == "3"
    assert second[HEADINGS.index("retrained test, %")] == "–"
    assert len(first) == len(HEADINGS)


def test_results_go_on_where_they_were_and_refuse_another_setting(tmp_path: Path) -> None:
    path, setting = tmp_path / "results.json", {"trials": 32}
    results = Results(path, setting)
    results.runs.append(run(tests={"0": 0.4}))
    results.save()
    again = Results(path, setting)
    assert (again.has(HPO, 0), again.has(HPO, 1)) == (True, False)
    assert again.runs[0].reached(0.4) == (6.0, 4)
    assert json.loads(path.read_text())["setting"] == setting
    with pytest.raises(SystemExit, match=r"asked for: \{'trials': 16\}"):
        Results(path, {"trials": 16})


@pytest.mark.parametrize(("trials", "points"), [(3, 2), (8, 8), (24, 16), (32, 32), (1000, 128)])
def test_the_notebooks_grid_has_no_more_points_than_asked_for(trials: int, points: int) -> None:
    found = grid(trials)
    assert len(found) == points
    assert len({json.dumps(one, sort_keys=True) for one in found}) == points
    assert found[0]["lr"] == AXES["lr"][0]


def test_the_parts_share_no_image(tmp_path: Path) -> None:
    for part, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "all" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{part}{number}.jpg").write_bytes(b"")
    parts = subset(tmp_path / "all", tmp_path / "some", train=8, val=4)
    files = {
        part: sorted(one.name for one in (parts / part / "cat").iterdir())
        for part in ("train", "val", "test")
    }
    assert [len(names) for names in files.values()] == [4, 2, 2]
    assert not set(files["train"]) & set(files["val"])
    with pytest.raises(SystemExit, match="6 images are too few"):
        subset(tmp_path / "all", tmp_path / "more", train=10, val=4)


def asked(folder: Path) -> Search:
    return Search(folder, folder, trials=6, epochs=2, workers=2, seed=1)


def test_the_study_file_of_each_arm_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "peer.toml"
    path.write_text(study_file(asked(tmp_path)), encoding="utf-8")
    for settings in OURS.values():
        overrides = parse_assignments(settings)
        study = StudyFile.load(path, overrides).study
        assert study.trials == 6
        assert (study.pruner.name == "median") == ("study.pruner" in overrides)
        assert study.defaults == ("study.defaults" not in overrides)


def test_a_trial_of_hpo_is_told_in_the_peers_words(tmp_path: Path) -> None:
    file = parse_study(study_file(asked(tmp_path)), "peer.toml")
    assert set(file.space) >= {"optimizer.lr", "augment.crop_padding"}
    params = {
        "optimizer.name": "sgd",
        "optimizer.lr": 0.1,
        "optimizer.momentum": 0.9,
        "augment.horizontal_flip": 0.5,
        "augment.crop_padding": 0,
    }
    told = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "flip": True, "crop": False}
    assert plain(params) == told
