"""Ranges, choices and conditions; checked against Optuna itself."""

import json
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo.config.parameters import Choice, Float, Int, Parameter
from hpo.config.space import Space, parse_space, split_space
from hpo.errors import ConfigError

SPACE = Space(
    {
        "optimizer.momentum": Float(low=0.5, high=0.9, step=0.1, when={"optimizer.name": ("sgd",)}),
        "optimizer.name": Choice(choices=("sgd", "adamw")),
        "model.cnn.filters": Choice(choices=([16, 32], [32, 64], {"first": 2})),
        "epochs": Int(low=2, high=10, step=4),
    }
)


def ask(seed: int) -> optuna.Trial:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()


floats = st.floats(-1e6, 1e6, allow_nan=False)


@st.composite
def parameters(draw: st.DrawFn) -> Parameter:
    kind = draw(st.sampled_from(["float", "log", "stepped", "int", "choice"]))
    if kind == "choice":
        lists = st.lists(st.integers(0, 9), max_size=3)
        values = st.one_of(st.text("abc", max_size=3), st.integers(2, 50), lists)
        unique = st.lists(values, min_size=1, max_size=5, unique_by=lambda one: json.dumps(one))
        return Choice(choices=tuple(draw(unique)))
    if kind == "int":
        low, step = draw(st.integers(-50, 50)), draw(st.integers(1, 7))
        return Int(low=low, high=low + step * draw(st.integers(0, 9)), step=step)
    if kind == "stepped":
        step = draw(st.sampled_from([0.1, 0.25, 2.0]))
        return Float(low=0.5, high=round(0.5 + step * draw(st.integers(1, 20)), 2), step=step)
    low, width = draw(st.floats(1e-6, 10)), draw(st.floats(0, 100))
    return Float(low=low, high=low + width, log=kind == "log")


@given(parameters(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_what_optuna_suggests_is_in_the_space_and_round_trips(one: Parameter, seed: int) -> None:
    space = Space({"x": one})
    trial = ask(seed)
    values = space.suggest(trial)
    space.check(values, complete=True)
    assert space.encode(values) == trial.params
    assert space.decode(trial.params) == values
    assert trial.distributions == space.distributions()


def test_suggest_asks_parents_first_and_skips_what_is_inactive() -> None:
    assert list(SPACE) == ["optimizer.name", "optimizer.momentum", "model.cnn.filters", "epochs"]
    common = {"optimizer.momentum": 0.7, "model.cnn.filters": "[32,64]", "epochs": 6}
    for name in ("sgd", "adamw"):
        values = SPACE.suggest(optuna.trial.FixedTrial({"optimizer.name": name, **common}))
        expected = {"optimizer.name": name, "model.cnn.filters": [32, 64], "epochs": 6}
        assert values == expected | ({"optimizer.momentum": 0.7} if name == "sgd" else {})


def test_lists_and_tables_are_canonical_json_in_optuna() -> None:
    space = Space({"x": Choice(choices=([16, 32], {"stop": 2, "start": 1}, "all"))})
    assert space.distributions()["x"].choices == ("[16,32]", '{"start":1,"stop":2}', "all")
    assert space.encode({"x": {"start": 1, "stop": 2}}) == {"x": '{"start":1,"stop":2}'}
    assert space.decode({"x": "[16,32]"}) == {"x": [16, 32]}
    for stranger in ({"x": "[1]"}, {"y": "all"}):
        with pytest.raises(ConfigError, match="not of this space"):
            space.decode(stranger)


def test_grid_has_every_point_once() -> None:
    space = Space(
        {
            "momentum": Float(low=0.1, high=0.3, step=0.1, when={"name": ("sgd",)}),
            "name": Choice(choices=("sgd", "adamw")),
            "epochs": Int(low=1, high=3, step=2),
        }
    )
    grid = space.grid()
    assert grid == [
        {"name": "sgd", "momentum": m, "epochs": e} for m in (0.1, 0.2, 0.3) for e in (1, 3)
    ] + [{"name": "adamw", "epochs": 1}, {"name": "adamw", "epochs": 3}]
    for point in grid:
        space.check(point, complete=True)


def test_corners_show_every_end_under_its_condition() -> None:
    space = Space(
        {
            "name": Choice(choices=("sgd", "adamw")),
            "beta": Float(low=0.1, high=0.2, when={"name": ("adamw",)}),
            "epochs": Int(low=1, high=9),
        }
    )
    assert space.corners() == [
        {"name": "sgd", "epochs": 1},
        {"name": "adamw", "beta": 0.1, "epochs": 1},
        {"name": "adamw", "beta": 0.2, "epochs": 1},
        {"name": "sgd", "epochs": 9},
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 11}, "epochs: 11: allowed: 2 to 10 in steps of 4"),
        ({"epochs": 3}, "epochs: 3: allowed: 2 to 10 in steps of 4"),
        ({"epochs": 6.0}, "epochs: 6.0: allowed: 2 to 10 in steps of 4"),
        ({"epochs": True}, "epochs: true: allowed: 2 to 10 in steps of 4"),
        ({"epoch": 2}, "epoch: not a searched parameter; did you mean 'epochs'?"),
        ({"optimizer.name": "adam"}, 'optimizer.name: "adam": allowed: one of "sgd", "adamw"'),
        (
            {"optimizer.name": "sgd", "optimizer.momentum": 0.55},
            "optimizer.momentum: 0.55: allowed: 0.5 to 0.9 in steps of 0.1",
        ),
        (
            {"optimizer.name": "adamw", "optimizer.momentum": 0.5},
            'optimizer.momentum: 0.5: used only with optimizer.name = "sgd"',
        ),
        ({"optimizer.momentum": 0.5},
         'optimizer.momentum: 0.5: used only with optimizer.name = "sgd"'),
    ],
)  # fmt: skip
def test_check_names_key_value_and_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SPACE.check(values)
    assert str(caught.value) == message


def test_check_complete_asks_for_what_is_active_and_no_more() -> None:
    values = {"optimizer.name": "adamw", "model.cnn.filters": [32, 64], "epochs": 6}
    SPACE.check(values, complete=True)
    with pytest.raises(ConfigError, match=r"^optimizer.momentum: missing; allowed: 0.5 to 0.9"):
        SPACE.check({**values, "optimizer.name": "sgd"}, complete=True)


@pytest.mark.parametrize(
    ("high", "message"),
    [
        (0.2, "x: continuous range 0.1 to 0.2; a grid needs step or choices"),
        (200_000, "x: the grid has more than 100,000 points"),
    ],
)
def test_grid_refuses(high: float, message: str) -> None:
    one = Int(low=1, high=int(high)) if high > 1 else Float(low=0.1, high=high)
    with pytest.raises(ConfigError) as caught:
        Space({"x": one}).grid()
    assert str(caught.value) == message


def parsed(table: dict[str, Any], fixed: dict[str, Any] | None = None) -> Space:
    return parse_space(split_space(table), fixed or {})


def test_parse_takes_the_type_from_the_field() -> None:
    space = parsed(
        {
            "epochs": {"low": 5, "high": 20},
            "optimizer": {"lr": {"low": 1, "high": 2}, "weight_decay": [0, 1e-4]},
            "model.trainable_blocks": {"low": 0, "high": 3},
            "model": {"head": {"hidden": {"0": [8, 16]}}},
        },
        {"model": {"head": {"hidden": [4, 4]}}},
    )
    assert dict(space) == {
        "epochs": Int(low=5, high=20),
        "optimizer.lr": Float(low=1.0, high=2.0),
        "optimizer.weight_decay": Choice(choices=(0, 1e-4)),
        "model.trainable_blocks": Int(low=0, high=3),
        "model.head.hidden.0": Choice(choices=(8, 16)),
    }
    assert parsed(space.to_dict(), {"model": {"head": {"hidden": [4, 4]}}}) == space


def test_to_dict_round_trips_conditions() -> None:
    table = {
        "optimizer.name": {"choices": ["sgd", "adamw"]},
        "optimizer.momentum": {"low": 0.5, "high": 0.9, "log": True,
                               "when": {"optimizer.name": ["sgd"]}},
        "batch_size": {"low": 8, "high": 64, "log": False, "step": 8},
    }  # fmt: skip
    assert parsed(table).to_dict() == table
