"""The replay of searches over learning curves: tables, the simulated study, its figures."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

from benchmarks import curves, replay
from benchmarks.curves import Table
from benchmarks.replay import Arm, Search, Setup

SETTINGS, EPOCHS = 30, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of 30 settings whose curves rise to 1 - (distance to a point of the task)."""
    made = tmp_path_factory.mktemp("curves")
    rng = np.random.default_rng(0)
    x = rng.random((SETTINGS, 2)).astype(np.float32)
    ends = np.stack([1 - np.abs(x - goal).mean(1) for goal in (0.3, 0.35)])
    values = ends[..., None] * (1 - 0.5 ** np.arange(1, EPOCHS + 1))
    np.savez(made / "curves-lcbench.npz", X=x, val_accuracy=values, names=["a", "b"])
    losses = 2 - values
    np.savez(
        made / "curves-taskset.npz",
        taskset_X=x,
        taskset_valid_loss=losses,
        taskset_names=["c", "d"],
    )
    baseline = tomllib.loads(curves.DIGITS.read_text(encoding="utf-8"))["baseline"][0]
    params = {
        "optimizer.name": "adamw",
        "optimizer.lr": baseline["optimizer"]["lr"],
        "optimizer.weight_decay": 1e-4,
        "batch_size": 64,
        "model.cnn.filters": "[32,64]",
        "model.dropout": 0.1,
        "augment.crop_padding": 0,
    }
    lines = [
        {
            "params": params | {"optimizer.lr": lr},
            "epochs": [{"val_top1": lr}, {"val_top1": 2 * lr}],
        }
        for lr in (1e-3, 1e-2, 1e-1)
    ]
    (made / "curves-digits.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return made


@pytest.fixture(scope="module")
def table(folder: Path) -> Table:
    return curves.load(folder, ["lcbench"])["lcbench"][0]


def search(table: Table, arm: str, setup: str = "20", first: tuple[int, ...] = ()) -> Search:
    made = Search(table, Setup.parse(setup), Arm.parse(arm), 0, first)
    made.run()
    return made


def test_tables_are_read(folder: Path) -> None:
    found = curves.load(folder)
    assert [len(found[kind]) for kind in curves.KINDS] == [2, 2, 1]
    lcbench, taskset, digits = (found[kind][0] for kind in curves.KINDS)
    assert lcbench.values.shape == (SETTINGS, EPOCHS)
    assert lcbench.epochs == EPOCHS
    # Of losses less is better.
    assert lcbench.bests.argmax() == taskset.bests.argmax()
    assert taskset.chance == pytest.approx(-np.log(2))
    assert digits.values.tolist() == [[1e-3, 2e-3], [1e-2, 2e-2], [1e-1, 2e-1]]


def test_a_folder_without_curves_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"curves-lcbench\.npz, curves-taskset\.npz"):
        curves.load(tmp_path, ["lcbench", "taskset"])


def test_regret_is_0_for_the_best_and_1_for_the_median(table: Table) -> None:
    assert table.regret(table.bests.max()) == 0
    assert table.regret(np.median(table.bests)) == 1


def test_the_nearest_configuration_that_is_free(folder: Path, table: Table) -> None:
    assert [table.nearest(one, set()) for one in table.params] == list(range(SETTINGS))
    taken = {0}
    other = table.nearest(table.params[0], taken)
    distances = ((table.points - table.points[0]) ** 2).sum(1)
    assert other == np.argsort(distances)[1]
    digits = curves.load(folder, ["digits"])["digits"][0]
    sgd = {**digits.params[1], "optimizer.name": "sgd", "optimizer.momentum": 0.9}
    assert digits.nearest(sgd, set()) == 1  # by its learning rate, in decades


def test_shortened_keeps_the_last_epoch(table: Table) -> None:
    short = table.shortened(4)
    assert short.values.tolist() == table.values[:, [2, 5, 8, 11]].tolist()


def test_stress_puts_an_epoch_first_that_tells_nothing(table: Table) -> None:
    stressed = table.stressed()
    assert stressed.epochs == EPOCHS + 1
    assert stressed.chance == table.values.min()
    assert (stressed.values[:, 0] <= stressed.chance).all()
    assert abs(np.corrcoef(stressed.values[:, 0], table.bests)[0, 1]) < 0.4
    assert (stressed.bests == table.bests).all()


def test_recommended_configurations_complement_each_other(table: Table) -> None:
    """The best of one task and of the other, where one alone is bad."""
    ends = np.array([[1, 0, 0.8, 0], [0, 1, 0.7, 0]])
    others = [
        Table("t", "t", table.space, [{}] * 4, np.zeros((4, 2)), one[:, None]) for one in ends
    ]
    assert curves.recommend(others, 3)[0] == 2
    assert set(curves.recommend(others, 3)) == {0, 1, 2}


@pytest.mark.parametrize("arm", ["random+none", "tpe+median", "tpe+hyperband", "tpe+asha"])
def test_a_study_has_its_trials_and_counts_its_epochs(table: Table, arm: str) -> None:
    done = search(table, arm)
    assert len(done.trials) == 20 == len(done.taken)
    assert {one.state for one in done.trials} <= {"complete", "over"}
    assert done.spent == sum(one.epochs for one in done.trials)
    result = done.result()
    assert result["full"] == done.spent / EPOCHS
    assert (result["complete"] == 20) == (arm == "random+none")
    best = max(max(one.curve) for one in done.trials if one.state == "complete")
    assert result["regret"] == table.regret(best)
    costs, regrets = zip(*result["seen"], strict=True)
    assert list(costs) == sorted(costs)
    assert list(regrets) == sorted(regrets, reverse=True)


@pytest.mark.parametrize("workers", [1, 3])
def test_promotion_pauses_and_completes_some(table: Table, workers: int) -> None:
    done = search(table, "tpe+promote:finish=4", f"20@{workers}")
    assert len(done.trials) == 20
    complete = [one for one in done.trials if one.state == "complete"]
    assert len(complete) >= 4
    assert all(one.epochs == EPOCHS for one in complete)
    assert done.rungs is not None
    assert done.rungs.epochs == (1, 3, 9)
    assert {one.epochs for one in done.trials if one.state == "paused"} <= set(done.rungs.epochs)
    assert done.spent < search(table, "tpe+median", f"20@{workers}").spent


@pytest.mark.parametrize("rule", ["promote", "asha"])
def test_what_is_recommended_goes_on_at_first(table: Table, rule: str) -> None:
    worst = tuple(np.argsort(table.bests)[2::-1].tolist())
    done = search(table, f"3+tpe+{rule}", first=worst)
    assert [one.epochs for one in done.trials[:3]] == [EPOCHS] * 3
    done = search(table, f"3+tpe+{rule}:protect=0", first=worst)
    assert min(one.epochs for one in done.trials[:3]) < EPOCHS


def test_a_budget_of_epochs_is_kept_and_its_last_third_finishes_trials(table: Table) -> None:
    done = search(table, "random+promote:finish=2", "6full@2")
    assert done.spent == 6 * EPOCHS
    assert len(done.trials) > 6
    assert sum(one.state == "complete" for one in done.trials) >= 2


def test_auto_is_what_the_product_takes(table: Table) -> None:
    small, large = search(table, "tpe+auto", "10"), search(table, "tpe+auto", "300")
    assert small.file.study.scheduler is not None
    assert large.file.study.pruner.name == "hyperband"
    assert len(large.trials) == SETTINGS  # there are no more


def test_a_study_repeats(table: Table) -> None:
    one, other = (search(table, "tpe+promote", "20@2").result() for _ in range(2))
    assert one == other


def run(task: int, epochs: int, regret: float, arm: str = "tpe+promote") -> replay.Run:
    seen = [[0.5, regret + 1], [epochs / 10, regret]]
    key = {"setup": "20", "arm": arm, "kind": "lcbench", "task": task, "seed": 0, "stress": False}
    result = {"epochs": epochs, "full": epochs / 10, "begun": 20, "complete": 5}
    return {**key, **result, "regret": regret, "seen": seen}


def test_an_arm_against_the_reference() -> None:
    ours = [run(task, 50, 0.2) for task in range(4)]
    base = [run(task, 100, 0.1 * task, replay.REFERENCE) for task in range(5)]
    found = replay.against(*replay.paired(ours, base))
    assert found["ratio"] == 2
    assert found["ratio_in"] == (2, 2)
    assert found["difference"] == pytest.approx(0.05)
    low, high = found["difference_in"]
    assert -0.1 <= low < 0.05 < high <= 0.2
    arms = {"tpe+promote": ours, replay.REFERENCE: base}
    lines = replay.equal_trials(arms, replay.REFERENCE)
    line = next(line for line in lines if line.startswith("| tpe+promote"))
    assert "2.00 [2.00, 2.00]" in line
    assert "+0.050 [" in line


def test_regret_after_some_full_trainings() -> None:
    one = run(0, 50, 0.2)
    assert [replay.seen_after(one, at) for at in (0.4, 0.5, 4.9, 5)] == [2, 1.2, 1.2, 0.2]


def test_runs_are_kept_and_not_run_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.jsonl"
    arguments = ["--curves", f"{folder}", "--out", f"{out}", "--kinds", "lcbench,taskset"]
    arguments += ["--trials", "8x4,3full", "--seeds", "1", "--jobs", "1", "--only"]
    replay.main([*arguments, "tpe+median"])
    before = out.read_text()
    assert len(before.splitlines()) == 8
    capsys.readouterr()
    replay.main([*arguments, "tpe+median", "3+tpe+promote"])
    printed = capsys.readouterr().out
    assert out.read_text().startswith(before)
    assert len(out.read_text().splitlines()) == 16
    replay.main(["--out", f"{out}", "--tables"])
    assert capsys.readouterr().out == printed
    assert printed.count("\n### ") == 6  # two setups of two kinds, and both together


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--curves"),
        (["--curves", ".", "--trials", "many"], "'many': allowed: N, NxE, Ffull"),
        (["--curves", ".", "--only", "tpe"], "'tpe': allowed: [N+]SAMPLER+RULE"),
        (["--curves", ".", "--kinds", "mnist"], "--kinds mnist: allowed: lcbench, taskset, digits"),
    ],
)
def test_wrong_options_say_what_is_allowed(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        replay.main(arguments)
    assert message in capsys.readouterr().err
