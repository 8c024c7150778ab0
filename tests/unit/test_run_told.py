"""What `hpo train` says while it trains and at its end."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from hpo.config.train import TrainConfig
from hpo.paths import Home
from hpo.trained.retrain import EpochTimer
from hpo.trained.run import TrainedRun, load_run, score_line
from tests.harness.trained import pictures, tiny_config, train_run


def test_the_time_left_is_that_of_each_phase() -> None:
    phases = [{"epochs": 2, "trainable_blocks": 0}, {"epochs": 3, "trainable_blocks": "all"}]
    config = TrainConfig.parse({"epochs": 5, "phases": phases})
    ticks = iter([0.0, 9.0, 10.0, 20.0, 30.0])
    pace = EpochTimer(config, 5, clock=lambda: next(ticks))
    assert pace.left(0, 0) is None
    pace.start()
    pace.done(1)
    assert pace.left(1, 0) == 4 * 9.0
    pace.done(2)
    assert pace.left(2, 0) == 3 * 5.0  # nothing is known of the second phase yet
    pace.done(3)
    assert pace.left(3, 0) == 2 * 10.0
    assert pace.left(3, 2) == 2 * 10.0 + 2 * (2 * 5.0 + 3 * 10.0)
    pace.done(4)
    assert pace.left(5, 0) == 0


def test_each_line_says_which_seed_of_how_many(tmp_path: Path, home: Home) -> None:
    lines: list[str] = []
    config = tiny_config(pictures(tmp_path), {"epochs": 2})
    train_run(config, tmp_path / "run", home, seeds=2, progress=lines.append)
    epochs = [line for line in lines if "epoch" in line]
    assert [line.partition(":")[0] for line in epochs] == ["seed 0 (1 of 2)"] * 2 + [
        "seed 1 (2 of 2)"
    ] * 2
    assert all(line.endswith(" left") for line in epochs[:-1])
    assert " left" not in epochs[-1]


def test_validation_stands_beside_the_test(trained_run: TrainedRun) -> None:
    shares = [one.metrics["test"]["top1"] for one in trained_run.seeds]
    trial = {"metric": "val_top1", "value": 0.75, "trial": 4}
    mean = statistics.fmean(shares)
    line = str(score_line(replace(trained_run, provenance=trial)))
    assert f"validation 0.7500 (trial 4) → test {mean:.4f} ± " in line
    assert line.endswith("(top1, 2 seeds)")
    alone = str(score_line(load_run(trained_run.path / "seed-1")))
    assert alone == f"test {shares[1]:.4f} (top1, 1 seed)"
    other = {"metric": "val_macro_f1", "value": 0.5, "trial": 0}
    found = str(score_line(replace(trained_run, provenance=other)))
    assert "validation 0.5000 (trial 0) → test " in found
    assert "(macro_f1, " in found


@pytest.mark.parametrize(("splits", "start"), [
    ({"train": 8, "val": 4}, "validation 0."), ({"train": 8, "val": 4, "test": 5}, "validation 0.")
])  # fmt: skip
def test_kept_validation(tmp_path: Path, home: Home, splits: dict[str, int], start: str) -> None:
    config = tiny_config(pictures(tmp_path, splits), {"epochs": 1})
    run = train_run(config, tmp_path / "run", home, keep_validation=True)
    line = str(score_line(run))
    assert start in line
    assert ("→ test" in line) == ("test" in splits)
