"""Recommended configurations: the shipped ones, and how they are cut to a study's space."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpo.config.base import with_values
from hpo.config.model import ARCHITECTURES
from hpo.config.parameters import Choice, Float, Int, Parameter
from hpo.config.recommended import (
    MOST,
    Entry,
    Situation,
    cut,
    entries,
    entries_for,
    nearest,
    parse_entries,
    recommend,
    situation_of,
)
from hpo.config.starter import FolderSummary
from hpo.config.study import Proposal, StudyFile, difference, parse_study
from hpo.config.template import starter_file
from hpo.config.train import TrainConfig, check_path, value_error
from hpo.errors import Conflict
from hpo.reports.progress import first_lines
from hpo.search import study as studies
from hpo.storage import tables
from hpo.storage.database import Database

STARTS = ("scratch", "frozen", "fine-tuned")
SGD = {"optimizer.name": "sgd", "optimizer.lr": 0.1, "batch_size": 128}


def study(space: dict[str, Any], train: dict[str, Any] | None = None, **fields: Any) -> StudyFile:
    return StudyFile.from_dict(
        {
            "study": {"name": "s", "trials": 30, **fields},
            "train": {"data.dataset": "digits", **(train or {})},
            "space": space,
        }
    )


LR = {"low": 1e-4, "high": 1.0, "log": True}
BOTH = {"optimizer.name": ["sgd", "adamw"], "optimizer.lr": LR}


# The shipped file


@pytest.mark.parametrize("entry", entries(), ids=lambda one: one.source[:40])
def test_a_shipped_entry_is_a_valid_training_of_its_situation(entry: Entry) -> None:
    assert entry.start in STARTS
    assert entry.images in ("small", "large", "any")
    assert entry.source
    values = {name: one[0] if isinstance(one, list) and isinstance(one[0], str) else one
              for name, one in entry.values.items()}  # fmt: skip
    for name, value in values.items():
        check_path(name)
        assert value_error(name, value) is None, name
    crops = "augment.crop_padding", "augment.random_resized_crop"
    assert not all(values.get(name) for name in crops)
    base = {"epochs": 100, "data": {"dataset": "cifar10"}}
    TrainConfig.parse(with_values(base, values))
    for name in ("optimizer.name", "optimizer.lr", "optimizer.weight_decay", "batch_size"):
        assert name in values


@pytest.mark.parametrize("images", ["small", "large"])
@pytest.mark.parametrize("start", STARTS)
def test_each_architecture_has_entries_from_every_start(start: Any, images: Any) -> None:
    for architecture in (*ARCHITECTURES, "mine:build", "resnet_mine:build"):
        found = entries_for(Situation(architecture, start, images))
        assert 2 <= len(found) <= MOST
        assert len({one.source for one in found}) == len(found)
        assert ":" not in architecture or all(one.architectures == ("*",) for one in found)


def test_no_shipped_pattern_is_without_an_architecture() -> None:
    for entry in entries():
        if "*" not in entry.architectures:
            for pattern in entry.architectures:
                one = Entry((pattern,), "scratch", "any", "", {})
                assert any(one.names(name) for name in ARCHITECTURES), pattern


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({}, Situation("small_cnn", "scratch", "small")),
        ({"model.architecture": "resnet18", "data.image_size": 65},
         Situation("resnet18", "scratch", "large")),
        ({"model.architecture": "resnet18", "model.weights": "DEFAULT"},
         Situation("resnet18", "fine-tuned", "small")),
        ({"model.architecture": "resnet18", "model.weights": "DEFAULT",
          "model.trainable_blocks": 0}, Situation("resnet18", "frozen", "small")),
        ({"model.architecture": "resnet18", "model.weights": "DEFAULT",
          "phases": [{"epochs": 2, "trainable_blocks": 0}, {"epochs": 2}]},
         Situation("resnet18", "fine-tuned", "small")),
    ],
)  # fmt: skip
def test_the_situation_of_a_training(train: dict[str, Any], expected: Situation) -> None:
    assert situation_of(study(BOTH, train).config({})) == expected


# Cutting


@pytest.mark.parametrize(
    ("parameter", "value", "expected"),
    [
        (Float(low=0.1, high=0.5), 0.2, 0.2),
        (Float(low=0.1, high=0.5), 0.7, 0.5),
        (Float(low=0.1, high=0.5), 0, 0.1),
        (Float(low=1e-4, high=1e-1, log=True), 1.5, 0.1),
        (Float(low=0.0, high=0.5, step=0.1), 0.26, 0.3),
        (Float(low=0.0, high=0.5, step=0.1), 9, 0.5),
        (Float(low=0.1, high=0.5), "sgd", None),
        (Float(low=0.1, high=0.5), True, None),
        (Int(low=16, high=64, step=16), 50, 48),
        (Int(low=16, high=64, step=16), 1024, 64),
        (Int(low=1, high=9), 2.6, 3),
        (Choice(choices=[32, 64, 512]), 128, 64),
        (Choice(choices=[32, 64, 512]), 300, 512),  # by its logarithm
        (Choice(choices=[0.0, 0.1]), 0.2, 0.1),
        (Choice(choices=[0.0, 0.25]), 0.1, 0.0),
        (Choice(choices=["sgd", "adamw"]), "adamw", "adamw"),
        (Choice(choices=["sgd", "adamw"]), "adam", None),
        (Choice(choices=["sgd", "adam"]), ["adamw", "adam"], "adam"),
        (Choice(choices=["sgd"]), ["adamw", "adam"], None),
        (Choice(choices=["none", 0.999]), "none", "none"),
        (Choice(choices=[True, False]), True, True),
        (Choice(choices=[True]), 1, None),
        (Choice(choices=[[0.2], [0.5]]), [0.3], [0.2]),
        (Choice(choices=[[0.5, 1.0], [0.8, 1.0]]), [0.08, 1.0], [0.5, 1.0]),
        (Choice(choices=[[16, 32], [32, 64, 128]]), [32, 64, 128], [32, 64, 128]),
        (Choice(choices=[[16, 32]]), [32, 64, 128], None),
        (Choice(choices=["all", 0, 2]), "all", "all"),
    ],
)  # fmt: skip
def test_the_nearest_allowed_value(parameter: Parameter, value: Any, expected: Any) -> None:
    found = nearest(parameter, value)
    assert found == expected
    assert found is None or parameter.contains(found)


def test_what_is_not_given_has_its_default_cut_to_the_space_else_it_is_sampled() -> None:
    file = study(
        {**BOTH, "epochs": {"low": 20, "high": 40}, "augment.rotation": [5, 15],
         "model.cnn.filters": [[8], [16, 32]], "ema_decay": ["none", 0.99]},
    )  # fmt: skip
    assert cut(file, SGD) == {
        "optimizer.name": "sgd",
        "optimizer.lr": 0.1,
        "epochs": 20,
        "augment.rotation": 5,
        "ema_decay": "none",
    }


def test_conditional_parameters_are_given_only_where_their_condition_holds() -> None:
    space = {**BOTH, "optimizer.momentum": {"low": 0.8, "high": 0.98,
                                            "when": {"optimizer.name": "sgd"}}}  # fmt: skip
    given = {**SGD, "optimizer.momentum": 0.99}
    assert (cut(study(space), given) or {})["optimizer.momentum"] == 0.98
    adam = cut(study(space), {**given, "optimizer.name": "adamw"})
    assert adam == {"optimizer.name": "adamw", "optimizer.lr": 0.1}


@pytest.mark.parametrize(
    ("name", "batch", "expected"),
    [("sgd", 32, 0.025), ("sgd", 512, 0.4), ("adamw", 32, 0.05), ("adam", 512, 0.2)],
)
def test_the_rate_follows_the_batch_size(name: str, batch: int, expected: float) -> None:
    space = {"optimizer.name": ["sgd", "adamw", "adam"], "optimizer.lr": LR}
    given = {**SGD, "optimizer.name": name}
    for file in (study(space, {"batch_size": batch}), study({**space, "batch_size": [batch]})):
        assert (cut(file, given) or {})["optimizer.lr"] == expected


@pytest.mark.parametrize(
    ("space", "train", "given"),
    [
        ({"optimizer.lr": LR}, {"optimizer.name": "adamw"}, SGD),
        ({"optimizer.name": ["adam", "rmsprop"], "optimizer.lr": LR}, {}, SGD),
        ({"augment.policy": ["none", "trivialaugment"], "optimizer.lr": LR}, {},
         {**SGD, "augment.policy": "randaugment"}),
        ({"model.dropout": [0.1, 0.2]}, {}, SGD),  # nothing of it is searched
    ],
)  # fmt: skip
def test_a_configuration_without_a_counterpart_is_none(
    space: dict[str, Any], train: dict[str, Any], given: dict[str, Any]
) -> None:
    assert cut(study(space, train), given) is None


def test_values_that_do_not_go_together_are_none() -> None:
    crops = {"augment.crop_padding": [0, 4], "augment.random_resized_crop": ["none", [0.5, 1.0]]}
    file = study({"optimizer.lr": LR, **crops})
    assert cut(file, {**SGD, "augment.crop_padding": 2}) is not None
    both = {"augment.crop_padding": 4, "augment.random_resized_crop": [0.08, 1.0]}
    assert cut(file, {**SGD, **both}) is None


# A study's own


SHIPPED = parse_entries(
    """
[[recommended]]
architectures = ["*"]
start = "scratch"
images = "any"
source = "first"
values = {optimizer.name = "sgd", optimizer.lr = 0.1, batch_size = 128}
[[recommended]]
architectures = ["*"]
start = "scratch"
images = "any"
source = "second"
values = {optimizer.name = "adamw", optimizer.lr = 0.001, batch_size = 128}
[[recommended]]
architectures = ["resnet*"]
start = "scratch"
images = "small"
source = "residual"
values = {optimizer.name = "sgd", optimizer.lr = 0.2, batch_size = 128}
[[recommended]]
architectures = ["*"]
start = "frozen"
images = "any"
source = "frozen"
values = {optimizer.name = "adamw", optimizer.lr = 0.01, batch_size = 128}
[[recommended]]
architectures = ["*"]
start = "fine-tuned"
images = "any"
source = "fine-tuned"
values = {optimizer.name = "adamw", optimizer.lr = 0.0001, batch_size = 128}
"""
)


def sources(file: StudyFile, before: tuple[Proposal, ...] = ()) -> list[str]:
    return [one.source for one in recommend(file, before, SHIPPED)]


def test_a_study_has_what_is_for_its_situation() -> None:
    assert sources(study(BOTH)) == ["first", "second"]
    assert sources(study(BOTH, {"model.architecture": "resnet18"})) == ["residual"]
    assert sources(study(BOTH, {"model.architecture": "alexnet"})) == ["first", "second"]


def test_searched_situations_have_their_first_entries_first_and_take_turns() -> None:
    several = study({**BOTH, "model.architecture": ["resnet18", "resnet34", "alexnet"]})
    found = recommend(several, known=SHIPPED)
    assert [(one.source, one.values["model.architecture"]) for one in found] == [
        ("residual", "resnet18"),
        ("first", "alexnet"),
        ("second", "alexnet"),
    ]
    blocks = study({**BOTH, "model.trainable_blocks": [0, 2]},
                   {"model.architecture": "resnet18", "model.weights": "DEFAULT"})  # fmt: skip
    found = recommend(blocks, known=SHIPPED)
    assert [(one.source, one.values["model.trainable_blocks"]) for one in found] == [
        ("frozen", 0),
        ("fine-tuned", 2),
    ]


@pytest.mark.parametrize(
    ("trials", "baselines", "count"),
    [(1, 0, 1), (2, 0, 1), (5, 0, 1), (6, 0, 2), (9, 0, 3), (12, 0, 4), (1000, 0, 4), (3, 3, 0),
     (4, 3, 1), (9, 8, 1)],
)  # fmt: skip
def test_at_most_a_third_of_the_trials_and_what_the_baselines_leave(
    trials: int, baselines: int, count: int
) -> None:
    known = parse_entries(
        "\n".join(
            f'[[recommended]]\narchitectures = ["*"]\nstart = "scratch"\nimages = "any"\n'
            f'source = "{i}"\nvalues = {{optimizer.lr = {i / 100}}}'
            for i in range(1, 9)
        )
    )
    own = [{"optimizer.lr": 0.5 + i / 100} for i in range(baselines)]
    file = StudyFile.from_dict(
        {"study": {"name": "s", "trials": trials}, "space": {"optimizer.lr": LR}, "baseline": own}
    )
    assert len(recommend(file, known=known)) == count
    learned = Proposal("learned", {"optimizer.lr": 0.9}, "x")
    assert len(recommend(file, [learned], known)) == (count if trials > 12 else max(0, count - 1))


def test_nothing_is_tried_twice() -> None:
    tables: dict[str, Any] = {"study": {"name": "s", "trials": 30}, "space": BOTH,
                              "train": {"batch_size": 128}}  # fmt: skip
    same = {"optimizer.name": "sgd", "optimizer.lr": 0.1}
    assert sources(StudyFile.from_dict({**tables, "baseline": [same]})) == ["second"]
    assert sources(StudyFile.from_dict({**tables, "baseline": [{"optimizer.name": "sgd"}]})) == [
        "second"
    ]
    learned = Proposal("learned", {"optimizer.name": "adamw", "optimizer.lr": 0.001}, "x")
    assert sources(StudyFile.from_dict(tables), (learned,)) == ["first"]
    narrow = {"optimizer.lr": {"low": 1.0, "high": 2.0}}  # both are cut to the same
    two = [Entry(("*",), "scratch", "any", name, {"optimizer.lr": lr})
           for name, lr in (("a", 0.1), ("b", 0.2))]  # fmt: skip
    assert len(recommend(study(narrow), known=two)) == 1


def test_none_without_defaults_under_a_grid_or_for_a_retrieval() -> None:
    assert sources(study(BOTH, defaults=False)) == []
    grid = {"optimizer.name": ["sgd", "adamw"], "optimizer.lr": [0.1, 0.01]}
    assert sources(study(grid, trials=4, sampler="grid")) == []
    retrieval = {"task": "retrieval", "model.trainable_blocks": 0}
    assert sources(study({"retrieval.k": [1, 5]}, retrieval)) == []


# Stored with the study


def test_a_definition_keeps_what_was_chosen_and_a_file_s_has_none() -> None:
    file = study(BOTH)
    proposals = (Proposal("recommended", {"optimizer.lr": 0.1}, "a paper"),)
    stored = replace(file, proposals=proposals)
    definition = json.loads(json.dumps(stored.definition()))
    again = StudyFile.from_definition(definition)
    assert again.proposals == proposals
    assert difference(definition, file.definition()) == []
    assert "proposals" not in file.definition()
    assert StudyFile.from_definition(file.definition()).proposals == ()


def test_a_study_keeps_what_it_tries_first_whatever_is_recommended_later(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = study(BOTH)
    made, _ = studies.create(database, file)
    assert len(made.file.proposals) == MOST
    later = (Proposal("recommended", {"optimizer.lr": 0.05}, "a later recipe"),)
    monkeypatch.setattr(studies, "recommend", lambda file: later)
    again, is_new = studies.create(database, file)
    assert (is_new, again.file.proposals) == (False, made.file.proposals)
    assert studies.load(database, "s").file.proposals == made.file.proposals


@pytest.mark.parametrize("defaults", [True, False])
def test_a_study_of_an_earlier_version_has_none_and_goes_on_with_either_setting(
    database: Database, defaults: bool
) -> None:
    studies.create(database, study(BOTH, defaults=False))
    definition = studies.load(database, "s").row.definition
    del definition["study"]["defaults"]
    with database.write() as c:
        c.execute(tables.studies.update().values(definition=json.dumps(definition)))
    again, is_new = studies.create(database, study(BOTH, defaults=defaults))
    assert (is_new, again.file.proposals) == (False, ())


def test_another_setting_than_that_of_the_study_is_a_conflict(database: Database) -> None:
    studies.create(database, study(BOTH))
    with pytest.raises(Conflict, match=r"study\.defaults: true -> false"):
        studies.create(database, study(BOTH, defaults=False))


def test_a_starter_file_says_what_is_tried_and_where_it_comes_from(tmp_path: Path) -> None:
    folder = FolderSummary(classes=2, images=900, side=32, parts=())
    text = starter_file(tmp_path, folder)
    file = parse_study(text)
    assert len(recommend(file)) == MOST
    for one in recommend(file):
        assert f"#   {one.source}\n#     optimizer.name = " in text
    assert max(map(len, text.partition("# Tried next")[2].splitlines())) <= 100


def test_what_a_new_study_tries_first_in_words() -> None:
    learned = Proposal("learned", {"optimizer.lr": 0.1}, "study old, trial 3: val_top1 0.9")
    shipped = Proposal("recommended", {"optimizer.lr": 0.2}, "a paper")
    file = replace(study(BOTH), proposals=(learned, shipped))
    lines = ["  learned from study old, trial 3: val_top1 0.9", "  recommended: a paper"]
    assert first_lines(file) == ["tried first:", *lines]
    own = replace(file, baselines=({"optimizer.lr": 0.3},))
    assert first_lines(own) == ["tried first after 1 baseline:", *lines]
    assert first_lines(study(BOTH)) == []
