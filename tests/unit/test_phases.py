"""Phases: their fields, their learning rates, what learns in them, and resuming across a border."""

import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from hpo.config.base import flatten, with_values
from hpo.config.schema import json_schema
from hpo.config.study import StudyFile, difference, dump_config, load_config, parse_study
from hpo.config.toml import parse as parse_toml
from hpo.config.train import Phase, TrainConfig, check_path
from hpo.errors import ConfigError
from hpo.training.checkpoint import Checkpoint
from hpo.training.learner import Learner
from hpo.training.optim import learning_rates
from tests.harness.training import CPU, assert_resumes, config, files, run

TWO: list[dict[str, Any]] = [
    {"epochs": 2, "trainable_blocks": 0, "lr": 0.1},
    {"epochs": 3, "trainable_blocks": 1},
]

STUDY = """
[study]
name = "two"
trials = 4
[[train.phases]]
epochs = 5
trainable_blocks = 0
[[train.phases]]
epochs = 5
[space]
phases.1.trainable_blocks = [2, {first = 10}]
phases.1.lr = {low = 1e-4, high = 1e-2, log = true}
[[baseline]]
phases.1.lr = 1e-3
"""


def test_epochs_are_the_sum_unless_given() -> None:
    made = config(phases=TWO)
    assert made.epochs == 5
    assert TrainConfig.parse({"epochs": 5, "phases": TWO}).epochs == 5
    assert TrainConfig.parse(made.to_dict()) == made
    assert TrainConfig.parse(with_values({}, flatten(made.to_dict()))) == made


def test_the_rest_has_the_trainings_own_values() -> None:
    assert config(phases=TWO).all_phases() == [Phase(0, 0, 2, 0, 0.1), Phase(1, 2, 3, 1, 0.05)]
    assert config(phases=[{"epochs": 3}]).all_phases() == [Phase(0, 0, 3, "all", 0.05)]
    assert config().all_phases() == [Phase(0, 0, 4, "all", 0.05)]
    assert [config(phases=TWO).phase_of(epoch).number for epoch in range(6)] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 9, "phases": TWO}, 'phases: "2 + 3": phases do not add up to epochs = 9; '
         "correct one of them, or leave epochs out"),
        ({"phases": [{"lr": 0.1}]}, "phases.0.epochs: missing"),
        ({"phases": [{"epochs": 0}]},
         "phases.0.epochs: 0: input should be greater than or equal to 1"),
        ({"phases": [{"epochs": 1, "lr": 0.0}]},
         "phases.0.lr: 0.0: input should be greater than 0"),
        ({"phases": [{"epochs": 1, "block": 1}]},
         "phases.0.block: unknown key; allowed: epochs, trainable_blocks, lr"),
        ({"phases": [{"epochs": 1, "trainable_blocks": -1}]},
         "phases.0.trainable_blocks: -1: allowed: 'all', 0 or more (the last k blocks), "
         "{first = k}, or {start = i, stop = j}"),
        ({"phases": {"epochs": 1}}, "phases: {\"epochs\": 1}: allowed: an array of tables"),
        ({"phases": TWO, "schedule": {"warmup_epochs": 2.0}},
         "schedule.warmup_epochs: 2.0: less than epochs = 2 of phase 0"),
        ({"phases": TWO, "schedule": {"min_lr": 0.08}},
         "schedule.min_lr: 0.08: at most lr = 0.05 of phase 1"),
        ({"phases": TWO, "schedule": {"name": "replay", "rates": [0.1] * 4}},
         'schedule.rates: "4 rates": one for each of 5 epochs'),
    ],
)  # fmt: skip
def test_phases_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**fields)
    assert str(caught.value) == message


class TestStudyFile:
    def test_items_are_searched_by_number(self) -> None:
        file = parse_study(STUDY)
        assert list(file.space) == ["phases.1.trainable_blocks", "phases.1.lr"]
        made = file.config(
            {"phases.1.trainable_blocks": {"first": 10}, **file.baselines[0]}
        ).all_phases()
        assert made == [Phase(0, 0, 5, 0, 0.1), Phase(1, 5, 5, {"first": 10}, 0.001)]
        assert file.max_epochs == 10
        jsonschema.Draft7Validator(json_schema()).validate(parse_toml(STUDY))

    def test_a_stored_study_comes_back(self) -> None:
        text = STUDY.replace("[[baseline]]", "phases.0.epochs = [5, 6]\n[[baseline]]")
        file = parse_study(text)
        assert file.max_epochs == 11
        again = StudyFile.from_definition(file.definition())
        assert difference(file.definition(), again.definition()) == []
        assert again.max_epochs == 11

    def test_set_fixes_an_item(self) -> None:
        file = parse_study(STUDY, overrides={"phases.1.lr": 0.5})
        assert list(file.space) == ["phases.1.trainable_blocks"]
        assert file.train["phases"][1] == {"epochs": 5, "lr": 0.5}

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("phases.2.lr = [0.1]",
             "space.phases.2.lr: no item 2: the list has 2 (counted from 0)"),
            ("phases.1.rate = [0.1]",
             "space.phases.1.rate: unknown field; allowed: epochs, trainable_blocks, lr"),
            ("phases.0.lr = [-1.0]", "space.phases.0.lr: -1.0: input should be greater than 0"),
            ("epochs = [10, 12]",
             'train.phases: "5 + 5": phases do not add up to epochs = 12; correct one of them, or '
             "leave epochs out (with phases.1.trainable_blocks = 2, phases.1.lr = 0.0001, epochs = "
             "12, which [space] or a baseline allows)"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_searched(self, line: str, message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_study(STUDY.replace("[[baseline]]", f"{line}\n[[baseline]]"))
        assert str(caught.value) == message

    def test_an_export_comes_back(self, tmp_path: Path) -> None:
        path = tmp_path / "best.toml"
        path.write_text(dump_config(config(phases=TWO)))
        assert load_config(path)[0] == config(phases=TWO)
        with pytest.raises(ConfigError, match="phases do not add up to epochs = 6"):
            load_config(path, {"epochs": 6})

    def test_paths(self) -> None:
        for path in ("phases", "phases.0", "phases.0.lr", "model.cnn.filters.0"):
            check_path(path)
        for path in ("phases.lr", "phases.0.lr.0", "optimizer.lr.0.x", "epochs.0.lr"):
            with pytest.raises(ConfigError, match="unknown field"):
                check_path(path)


def rates(schedule: dict[str, Any], history: list[dict[str, float]] | None = None) -> list[float]:
    made, past = config(phases=TWO, schedule=schedule), history or []
    return [
        rate
        for epoch in range(1, 6)
        for rate in learning_rates(made, epoch=epoch, steps=2, history=past[: epoch - 1])
    ]


def test_a_schedule_runs_within_each_phase() -> None:
    assert rates({"name": "constant"}) == [0.1] * 4 + [0.05] * 6
    first = [0.05 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    second = [0.025 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates({"name": "cosine"}) == pytest.approx(first + second)
    assert rates({"name": "step", "step_size": 1, "gamma": 0.5}) == pytest.approx(
        [0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125]
    )
    warm = rates({"name": "constant", "warmup_epochs": 1.0})
    assert warm == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.025, 0.05, 0.05, 0.05, 0.05, 0.05])


def test_a_plateau_watches_its_own_phase_and_is_replayed() -> None:
    history = [{"val_loss": 1.0}, *[{"val_loss": 2.0}] * 4]
    plateau = rates({"name": "plateau", "patience": 0, "factor": 0.5}, history)
    assert plateau[::2] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])
    again = rates({"name": "replay", "rates": plateau[1::2]})
    assert again == pytest.approx(plateau)


@pytest.mark.parametrize("after", [1, 2, 3, 4])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resumed_equals_uninterrupted(tmp_path: Path, optimizer: str, after: int) -> None:
    """Before, at, and behind the border."""
    settings = config(phases=TWO, optimizer={"name": optimizer, "lr": 0.05})
    whole = assert_resumes(settings, tmp_path, after)
    assert [one.last for one in whole] == [False] * 4 + [True]


def changed(before: Path, after: Path) -> set[str]:
    """Outermost two names of what differs between two checkpoints."""
    one, other = Checkpoint.load(before).model, Checkpoint.load(after).model
    return {".".join(key.split(".")[:2]) for key in one if not torch.equal(one[key], other[key])}


def test_each_phase_trains_its_own_blocks(tmp_path: Path) -> None:
    at = files(tmp_path)
    run(config(phases=[*TWO, {"epochs": 1, "trainable_blocks": {"first": 1}}]), checkpoint=at)
    assert changed(at(1), at(2)) == {"classifier.1"}
    assert changed(at(2), at(5)) == {"classifier.1", "features.1"}
    assert changed(at(5), at(6)) == {"classifier.1", "features.0"}


def test_a_phase_starts_with_a_new_optimizer(tmp_path: Path) -> None:
    at = files(tmp_path)
    phases = [{"epochs": 1, "lr": 0.1}, {"epochs": 1, "lr": 0.01}]
    run(config(phases=phases, optimizer={"name": "adam"}), checkpoint=at)
    steps = [Checkpoint.load(at(epoch)).optimizer["state"][0]["step"] for epoch in (1, 2)]
    assert steps == [5, 5]


def test_early_stopping_counts_in_the_last_phase() -> None:
    phases = [{"epochs": 5, "trainable_blocks": 0}, {"epochs": 9}]
    results = run(
        config(
            phases=phases,
            optimizer={"lr": 1e-9},
            early_stopping={"patience": 3, "metric": "val_top1"},
            schedule={"name": "constant"},
        )
    )
    assert 8 <= len(results) < 14
    assert [one.last for one in results] == [False] * (len(results) - 1) + [True]


def test_too_many_blocks_in_a_later_phase_are_found_at_once() -> None:
    phases = [{"epochs": 1}, {"epochs": 1, "trainable_blocks": 3}]
    with pytest.raises(ConfigError, match=r"3: this network has 2 blocks; at most 2, or 'all'"):
        Learner(config(phases=phases), classes=3, device=CPU)


def test_features_frozen_then_the_first_ten_blocks_of_mobilenet() -> None:
    made = Learner(
        config(
            model={"architecture": "mobilenet_v2", "head": {"hidden": [128], "dropout": [0.2]}},
            data={"image_size": 32},
            phases=[
                {"epochs": 5, "trainable_blocks": 0},
                {"epochs": 5, "trainable_blocks": {"first": 10}},
            ],
        ),
        classes=10,
        device=CPU,
    )

    def learning() -> set[str]:
        return {
            ".".join(name.split(".")[:2])
            for name, part in made.model.named_parameters()
            if part.requires_grad
        }

    assert {name.split(".")[0] for name in learning()} == {"classifier"}
    made.start_phase(made.config.phase_of(6))
    features = {name for name in learning() if name.startswith("features")}
    assert features == {f"features.{number}" for number in range(10)}
    made.train_mode()
    modes = [block.training for block in made.model.features]
    assert modes == [True] * 10 + [False] * 9
