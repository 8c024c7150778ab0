"""None in TOML, which has no null: written "none", wherever a field may be None."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel

from hpo.config.base import field_type, flatten, is_model, may_be_none, type_at, with_values
from hpo.config.schema import json_schema
from hpo.config.strategies import StudyConfig
from hpo.config.study import StudyFile, dump_config, load_config, parse_study
from hpo.config.train import TrainConfig, field_paths
from hpo.errors import ConfigError
from hpo.paths import Home
from hpo.search import study as studies
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage
from hpo.trained.export import export
from tests.harness.fakes import study_file
from tests.unit.test_objective import TRAIN, search


def optional(model: type[BaseModel] = TrainConfig, prefix: str = "") -> Iterator[str]:
    """Every field that may be None, those in lists apart."""
    for name in model.model_fields:
        part = field_type(model, name)
        if may_be_none(model, name):
            yield prefix + name
        if is_model(part):
            yield from optional(part, f"{prefix}{name}.")


OPTIONAL = list(optional())


def test_every_field_that_may_be_none_is_so_by_default() -> None:
    """An export leaves None out, and so it must come back."""
    assert {"clip_grad_norm", "ema_decay", "model.weights", "augment.scale"} < set(OPTIONAL)
    for path in OPTIONAL:
        parents, _, name = path.rpartition(".")
        part = type_at(TrainConfig, parents) if parents else TrainConfig
        assert part.model_fields[name].default is None
        assert not (part.model_fields[name].annotation == str | None and name == "name")


@pytest.mark.parametrize("path", OPTIONAL)
def test_none_can_be_written_for_every_such_field(path: str) -> None:
    config = TrainConfig.parse(with_values({}, {path: "none"}))
    assert config == TrainConfig.parse({})
    whole = {"train": with_values({}, {path: "none"}), "space": {"seed": [1]}}
    jsonschema.validate(whole, json_schema())


SEARCHED = [path for path in field_paths() if path in OPTIONAL and not path.startswith("data.")]
OTHER = {
    "model.weights": "DEFAULT",
    "model.dropout": 0.2,
    "augment.random_resized_crop": [0.5, 1.0],
    "augment.scale": [0.9, 1.1],
    "augment.policy_magnitude": 5,
    "early_stopping.patience": 3,
    "ema_decay": 0.9,
    "clip_grad_norm": 1.0,
    "retrieval.pca": 4,
}


@pytest.mark.parametrize("path", SEARCHED)
def test_none_among_the_choices(path: str, tmp_path: Path) -> None:
    choices = ["none", OTHER[path]]
    file = study_file(space=f"{path} = {json.dumps(choices)}")
    off, on = (file.config({path: one}) for one in choices)
    assert flatten(off.to_dict()).get(path) is None
    assert flatten(on.to_dict())[path] == OTHER[path]
    jsonschema.validate({"space": {path: choices}}, json_schema())
    for one in choices:
        assert file.space.decode(file.space.encode({path: one})) == {path: one}
    stored = StudyFile.from_definition(json.loads(json.dumps(file.definition())))
    assert stored.definition() == file.definition()
    for config in (off, on):
        (tmp_path / "best.toml").write_text(dump_config(config))
        assert load_config(tmp_path / "best.toml")[0] == config


@pytest.mark.parametrize(
    ("fields", "path", "expected"),
    [
        ({"augment": {"policy": "none"}}, "augment.policy", "none"),
        ({"augment": {"preset": "none"}}, "augment.preset", "none"),
        ({"data": {"balance": "none"}}, "data.balance", "none"),
    ],
)
def test_a_word_of_its_own_stays_one(fields: dict[str, Any], path: str, expected: str) -> None:
    assert flatten(TrainConfig.parse(fields).to_dict())[path] == expected


def test_none_beats_a_preset_also_when_it_is_read_back() -> None:
    train = 'augment = {preset = "heavy", scale = "none"}'
    space = "augment.crop_padding = [0, 2]"
    file = study_file(train=train, space=space)
    for one in (file, StudyFile.from_definition(file.definition())):
        config = one.config({"augment.crop_padding": 0})
        assert config.augment.scale is None
        assert config.augment.rotation == 15
        assert config.augment.random_resized_crop == (0.6, 1.0)


def test_a_study_takes_it_too() -> None:
    study = StudyConfig.parse({
        "name": "x", "target": "none", "timeout_s": "none", "metrics": "none", "pruner": "none",
        "sampler": {"name": "cmaes", "popsize": "none"},
    })  # fmt: skip
    assert (study.target, study.timeout_s, study.pruner.name) == (None, None, "none")
    assert study.sampler.options()["popsize"] is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip_grad_norm": "None"}, 'clip_grad_norm: "None": allowed: a number or "none"'),
        ({"batch_size": "none"}, 'batch_size: "none": allowed: a whole number'),
        ({"augment": {"random_resized_crop": "x"}},
         'augment.random_resized_crop: "x": allowed: an array of 2 numbers or "none"'),
        ({"augment": {"scale": [1.0]}},
         "augment.scale: [1.0]: allowed: an array of 2 numbers or \"none\""),
        ({"optimizer": {"betas": [0.9, 0.9, 0.9]}},
         "optimizer.betas: [0.9, 0.9, 0.9]: allowed: an array of 2 numbers"),
        ({"model": {"head": 3}}, "model.head: 3: allowed: a table or \"none\""),
        ({"model": {"head": {"hidden": ["a"]}}},
         'model.head.hidden.0: "a": allowed: a whole number'),
        ({"phases": [3]}, "phases.0: 3: allowed: a table"),
        ({"optimizer": 3}, "optimizer: 3: allowed: a table"),
        ({"optimizer": {"nesterov": 1}}, "optimizer.nesterov: 1: allowed: true or false"),
        ({"model": {"weights": True}}, "model.weights: true: allowed: a text or \"none\""),
    ],
)  # fmt: skip
def test_kinds_are_told_in_the_words_of_toml(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig.parse(fields)
    assert str(error.value) == message


def test_a_search_with_none_from_its_file_to_the_export(
    database: Database, home: Home, tmp_path: Path
) -> None:
    space = (
        'clip_grad_norm = ["none", 1.0]\n'
        'ema_decay = {choices = ["none", 0.9], when = {clip_grad_norm = "none"}}\n'
        '[[baseline]]\nclip_grad_norm = "none"\nema_decay = 0.9\n'
        "[[baseline]]\nclip_grad_norm = 1.0"
    )
    file = study_file(trials=3, train=TRAIN, space=space)
    study, _ = studies.create(database, file)
    studies.enqueue(study, {"clip_grad_norm": "none", "ema_decay": "none"})
    status = search(database, home, file)
    params = [trial.params for trial in status.trials]
    assert params == [
        {"clip_grad_norm": "none", "ema_decay": "none"},
        {"clip_grad_norm": "none", "ema_decay": 0.9},
        {"clip_grad_norm": 1.0},
    ]
    view = study.optuna_study(FencedStorage(database))
    assert [trial.params for trial in view.trials] == params
    expected = [(None, None), (None, 0.9), (1.0, None)]
    for number, (clip, ema) in enumerate(expected):
        config, provenance = export(database, "toy", number=number)
        assert (config.clip_grad_norm, config.ema_decay) == (clip, ema)
        path = tmp_path / f"{number}.toml"
        path.write_text(dump_config(config, provenance))
        assert load_config(path)[0] == config


def test_none_on_the_command_line(tmp_path: Path) -> None:
    text = study_file(train="clip_grad_norm = 1.0").text
    assert parse_study(text, overrides={"clip_grad_norm": "none"}).config({}).clip_grad_norm is None
    (tmp_path / "c.toml").write_text("clip_grad_norm = 1.0")
    assert load_config(tmp_path / "c.toml", {"clip_grad_norm": "none"})[0].clip_grad_norm is None
