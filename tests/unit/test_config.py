"""TrainConfig: defaults, rules, messages, paths."""

import json
from typing import Any

import pytest
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from hpo.config.base import flatten, with_values
from hpo.config.metrics import direction
from hpo.config.model import TORCHVISION_ARCHITECTURES
from hpo.config.train import TrainConfig, check_path, field_errors, field_paths
from hpo.errors import ConfigError


def test_architectures_are_torchvisions() -> None:
    models = torchvision.models
    assert tuple(models.list_models(module=models)) == TORCHVISION_ARCHITECTURES


def test_every_field_has_a_default_and_a_doc() -> None:
    def undocumented(schema: Any) -> list[str]:
        if isinstance(schema, list):
            return [name for one in schema for name in undocumented(one)]
        if not isinstance(schema, dict):
            return []
        fields = schema.get("properties", {}) if "title" in schema else {}
        missing = [name for name, field in fields.items() if "description" not in field]
        return missing + undocumented(list(schema.values()))

    schema = TrainConfig.model_json_schema()
    assert undocumented(schema) == []
    assert len(json.dumps(schema)) > 10_000
    assert TrainConfig() == TrainConfig.parse({})


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "epochs": st.integers(1, 10_000),
            "label_smoothing": st.floats(0, 0.99),
            "optimizer": st.fixed_dictionaries({"lr": st.floats(1e-9, 100)}),
            "model": st.fixed_dictionaries(
                {
                    "cnn": st.fixed_dictionaries(
                        {"filters": st.lists(st.integers(1, 512), min_size=1)}
                    )
                },
                optional={
                    "trainable_blocks": st.one_of(
                        st.just("all"), st.integers(0, 5), st.just({"first": 2})
                    ),
                    "head": st.just({"hidden": [64, 32], "dropout": [0.5]}),
                },
            ),
        },
    )
)
def test_plain_data_round_trips(data: dict[str, Any]) -> None:
    config = TrainConfig.parse(data)
    assert TrainConfig.parse(config.to_dict()) == config
    assert TrainConfig.parse(with_values({}, flatten(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        ({}, (8, 8)),
        ({"dataset": "folder", "root": "x"}, (224, 256)),
        ({"dataset": "folder", "root": "x", "image_size": 32}, (32, 32)),
        ({"dataset": "folder", "root": "x", "image_size": 128}, (128, 146)),
    ],
)
def test_sizes_follow_the_data(data: dict[str, Any], sizes: tuple[int, int]) -> None:
    config = TrainConfig.parse({"data": data}).data
    assert (config.image_size, config.resize_size) == sizes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "epoch: unknown key; did you mean 'epochs'?"),
        ({"epochs": "3"}, 'epochs: "3": allowed: a whole number'),
        ({"epochs": 0}, "epochs: 0: input should be greater than or equal to 1"),
        ({"optimizer.learning_rate": 1}, "optimizer.learning_rate: unknown key; allowed: name, lr, "
         "momentum, nesterov, weight_decay, betas, backbone_lr_factor"),
        ({"optimizer.name": "adamx"},
         'optimizer.name: "adamx": did you mean \'adam\' or \'adamw\'?'),
        ({"schedule.name": "cosin"}, 'schedule.name: "cosin": did you mean \'cosine\'?'),
        ({"model.architecture": "resnet81"},
         'model.architecture: "resnet81": unknown architecture (your own is '
         "named module:function); did you mean 'resnet18' or 'resnet152' or 'resnet101'?"),
        ({"model.trainable_blocks": -1},
         "model.trainable_blocks: -1: allowed: 'all', 0 or more (the "
         "last k blocks), {first = k}, or {start = i, stop = j}"),
        ({"early_stopping.metric": "val_top2"},
         'early_stopping.metric: "val_top2": did you mean '
         "'val_top5' or 'val_top1' or 'val_loss'?"),
        ({"data.dataset": "folder"}, 'data.root: none: dataset = "folder" needs the folder of the '
         "images"),
        ({"schedule.warmup_epochs": 10.0}, "schedule.warmup_epochs: 10.0: less than epochs = 10"),
        ({"schedule.min_lr": 1.0}, "schedule.min_lr: 1.0: at most optimizer.lr = 0.1"),
        ({"model.head.dropout": [0.1, 0.2]},
         "model.head.dropout: [0.1, 0.2]: 1 to 1 items, one per hidden layer"),
        ({"data.val_fraction": 0.9}, "data.val_fraction: 0.9: with test_fraction = 0.15 nothing is "
         "left for training"),
    ],
)  # fmt: skip
def test_a_message_names_key_value_and_what_is_allowed(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.parse(with_values({}, values), where="x.toml")
    assert str(caught.value) == f"x.toml: {message}"


def test_several_errors_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.parse({"epochs": 0, "batch_size": 0}, where="x.toml", prefix="train.")
    assert str(caught.value).splitlines() == [
        "x.toml: 2 fields are wrong:",
        "  train.epochs: 0: input should be greater than or equal to 1",
        "  train.batch_size: 0: input should be greater than or equal to 1",
    ]


def test_field_errors_leave_rules_between_fields_aside() -> None:
    data = {"data": {"dataset": "folder"}, "schedule": {"name": "cosin", "min_lr": 5.0}}
    errors = field_errors(data, "train.")
    assert [str(one) for one in errors] == [
        "train.schedule.name: \"cosin\": did you mean 'cosine'?"
    ]


def test_paths() -> None:
    paths = list(field_paths())
    assert len(paths) == len(set(paths))
    assert {"epochs", "optimizer.lr", "model.head.hidden", "model.trainable_blocks"} <= set(paths)
    check_path("model.head.hidden.0")
    with pytest.raises(ConfigError) as caught:
        check_path("optimiser.lr")
    assert str(caught.value).startswith("optimiser.lr: unknown field; did you mean 'optimizer.lr'")


def test_with_values_copies_and_reaches_into_lists() -> None:
    data = {"model": {"cnn": {"filters": [1, 2]}}}
    assert with_values(data, {"model.cnn.filters.1": 9, "optimizer.lr": 1.0}) == {
        "model": {"cnn": {"filters": [1, 9]}},
        "optimizer": {"lr": 1.0},
    }
    assert data == {"model": {"cnn": {"filters": [1, 2]}}}
    with pytest.raises(ConfigError) as caught:
        with_values(data, {"model.cnn.filters.2": 9})
    assert str(caught.value) == "model.cnn.filters.2: no item 2: the list has 2 (counted from 0)"


def test_direction() -> None:
    assert (direction("val_loss"), direction("val_top1")) == ("minimize", "maximize")
