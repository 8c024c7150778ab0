"""Study files: what a good one means, and one message for each bad one."""

import json
import math
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpo.config import toml
from hpo.config.parameters import Choice, Float, Int
from hpo.config.schema import json_schema
from hpo.config.starter import FolderSummary, Wish, choose
from hpo.config.strategies import (
    PRUNERS,
    SAMPLERS,
    Grid,
    Hyperband,
    Median,
    NoPruner,
    Patient,
    Promote,
    Strategy,
)
from hpo.config.study import StudyFile, difference, dump_config, load_config, parse_study
from hpo.config.template import starter_file
from hpo.config.train import TrainConfig
from hpo.data.folders import summarize_folder
from hpo.errors import ConfigError, DataError

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))

GOOD = """
[study]
name = "s"
trials = 20
[train]
epochs = 12
model.head.hidden = [64, 32]
[space]
optimizer.name = ["sgd", "adamw"]
"optimizer.lr" = {low = 1e-4, high = 0.1, log = true}
optimizer.momentum = {low = 0.5, high = 0.9, when = {"optimizer.name" = "sgd"}}
model.cnn.filters = [[16, 32], [32, 64]]
model.head.hidden.0 = [32, 64]
[[baseline]]
optimizer.name = "sgd"
"optimizer.momentum" = 0.9
"""


def parse(text: str, overrides: dict[str, Any] | None = None) -> StudyFile:
    return parse_study(text, "s.toml", overrides, {"name": "s"})


def message(text: str, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, overrides)
    return str(caught.value)


def test_a_part_of_a_range_that_is_a_single_value_in_the_file() -> None:
    found = message("[space]\noptimizer.lr = 0.1", {"space.optimizer.lr.low": 0.01})
    assert found == "s.toml: space.optimizer.lr.high: missing: give low and high, or choices"


def test_a_partial_baseline_is_not_judged_by_defaults_of_what_is_searched() -> None:
    space = "[space]\nepochs = {low = 15, high = 30}\nschedule.warmup_epochs = [0.0, 12.0]\n"
    file = parse(f'[study]\nname = "s"\n{space}[[baseline]]\nschedule.warmup_epochs = 12.0\n')
    assert file.baselines == ({"schedule.warmup_epochs": 12.0},)  # the default of epochs is 10


def test_a_good_file() -> None:
    file = parse(GOOD)
    assert (file.name, file.metric, file.direction, file.study.trials) == (
        "s", "val_top1", "maximize", 20,
    )  # fmt: skip
    assert file.max_epochs == 12
    assert dict(file.space) == {
        "optimizer.name": Choice(choices=("sgd", "adamw")),
        "optimizer.lr": Float(low=1e-4, high=0.1, log=True),
        "optimizer.momentum": Float(low=0.5, high=0.9, when={"optimizer.name": ("sgd",)}),
        "model.cnn.filters": Choice(choices=([16, 32], [32, 64])),
        "model.head.hidden.0": Choice(choices=(32, 64)),
    }
    assert file.baselines == ({"optimizer.name": "sgd", "optimizer.momentum": 0.9},)
    config = file.config({"optimizer.lr": 0.01, "model.head.hidden.0": 32})
    assert (config.optimizer.lr, config.model.head and config.model.head.hidden) == (0.01, (32, 32))


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ("epoch = [1, 2]", "space.epoch: unknown field; did you mean 'epochs'?"),
        ("optimiser.lr = {low = 0.1, high = 0.2}",
         "space.optimiser.lr: unknown field; did you mean 'optimizer.lr' or 'optimizer.name' or "
         "'optimizer.nesterov'?"),
        ("optimizer.lr = 0.1", "space.optimizer.lr: 0.1: a single value is not searched: put it "
         "under [train], or give {low = ..., high = ...} or a list of choices"),
        ("optimizer.lr = {lo = 0.1, high = 0.2}",
         "space.optimizer.lr.lo: unknown key; did you mean 'low' or 'log'?"),
        ("optimizer.lr = {low = 0.1}",
         "space.optimizer.lr.high: missing: give low and high, or choices"),
        ("optimizer.lr = {low = 0.1, high = '1'}",
         'space.optimizer.lr.high: "1": allowed: a number'),
        ("optimizer.lr = {low = 0.1, high = inf}",
         "space.optimizer.lr.high: inf: input should be a finite number"),
        ("optimizer.lr = {low = 0.1, high = 1.0, log = 1}",
         "space.optimizer.lr.log: 1: allowed: true or false"),
        ("optimizer.lr = {low = 0.2, high = 0.1}",
         "space.optimizer.lr.low: 0.2: above high = 0.1: allowed: low <= high"),
        ("optimizer.weight_decay = {low = 0, high = 0.1, log = true}",
         "space.optimizer.weight_decay.low: 0.0: with log = true allowed: above 0"),
        ("epochs = {low = 1, high = 6, step = 2}",
         "space.epochs.step: 2: does not fit: high - low = 5 must be a multiple of it"),
        ("optimizer.lr = {low = 0.1, high = 0.3, step = 1e-30}",
         "space.optimizer.lr.step: 1e-30: more "
         "than 1,000,000,000 steps from low to high; leave step out"),
        ("seed = [2024-01-01]",
         "space.seed: \"2024-01-01\": allowed: a whole number"),
        ("epochs = {low = 1, high = 6, when = {seed = 1}}",
         "space.epochs.when: 'seed' is not searched; nothing else is"),
        ("epochs = {low = 1, high = 6, step = 0}",
         "space.epochs.step: 0: input should be greater than 0"),
        ("epochs = {low = 1, high = 6, step = 5, log = true}",
         "space.epochs.step: 5: not with log = true; remove one of them, or list choices"),
        ("epochs = {low = 0, high = 6}",
         "space.epochs: 0: input should be greater than or equal to 1"),
        ("epochs = {low = 1, high = 6.5}", "space.epochs.high: 6.5: allowed: a whole number"),
        ("epochs = {low = 1, high = 6, choices = [2]}",
         "space.epochs.low: not beside choices: give a range or choices"),
        ("optimizer.name = {low = 1, high = 2}",
         "space.optimizer.name: 1: allowed: sgd, adam, adamw, rmsprop"),
        ("epochs = []",
         "space.epochs.choices: []: allowed: an array of values with 1 or more of them"),
        ("epochs = {choices = 3}",
         "space.epochs.choices: 3: allowed: an array of values"),
        ("epochs = [3, 4, 3]", "space.epochs.choices: 3: given twice"),
        ("model.options.x = [1, true]", "space.model.options.x.choices: true: given twice"),
        ("model.cnn.filters = [[8], [8]]", "space.model.cnn.filters.choices: [8]: given twice"),
        ("epochs = [3, '4']", 'space.epochs: "4": allowed: a whole number'),
        ("optimizer.name = ['sgd', 'sgdd']", 'space.optimizer.name: "sgdd": did you mean \'sgd\'?'),
        ("schedule.name = ['cosine', 'onecycel']",
         'space.schedule.name: "onecycel": did you mean \'onecycle\'?'),
        ("model.architecture = ['mobilenetv2']", 'space.model.architecture: "mobilenetv2": unknown '
         "architecture (your own is named module:function); did you mean 'mobilenet_v2' "
         "or 'mobilenet_v3_small' or 'mobilenet_v3_large'?"),
        ("model.cnn.filters = [[8, 0]]",
         "space.model.cnn.filters.1: 0: input should be greater than or equal to 1"),
        ("model.cnn.filters.0 = [8, 16]",
         "space.model.cnn.filters.0: items are searched only of a list in [train]: write "
         "model.cnn.filters = [...] there"),
        ("batch_size = [32]", "space.batch_size: also fixed at 64 in [train]: remove it there, or "
         "from [space]"),
        ("data.split_seed = [0, 1]", "space.data.split_seed: cannot be searched: it changes which "
         "images a trial is measured on, or how, or nothing at all; fix it under [train]"),
        ("epochs = {low = 1, high = 6, when = 'sgd'}", 'space.epochs.when: "sgd": a table, for '
         'example when = {"optimizer.name" = "sgd"}'),
        ("epochs = {low = 1, high = 6, when = {seed = []}}",
         'space.epochs.when: {"seed": []}: seed: no values given'),
        ("optimizer.name = ['sgd', 'adam']\n"
         "epochs = {low = 1, high = 6, when = {'optimizer.nam' = 'sgd'}}",
         "space.epochs.when: 'optimizer.nam' is not searched; did you mean 'optimizer.name'?"),
        ("optimizer.name = ['sgd', 'adam']\n"
         "epochs = {low = 1, high = 6, when = {'optimizer.name' = 'adamw'}}",
         'space.epochs.when: optimizer.name is never "adamw": allowed: one of "sgd", "adam"'),
        ("epochs = {low = 1, high = 6, when = {seed = 1}}\nseed = {choices = [1], when = "
         "{epochs = 1}}",
         "space.epochs.when: conditions lead back to themselves: epochs -> seed -> epochs"),
        ("epochs = {low = 1, high = 6, when = {epochs = 1}}",
         "space.epochs.when: conditions lead back to themselves: epochs -> epochs"),
        ("'optimizer.lr' = [0.1]\noptimizer.lr = [0.2]", "space.optimizer.lr: given twice"),
        ("", "space: nothing is searched: give at least one range or list of choices, for example "
         "optimizer.lr = {low = 1e-4, high = 0.1, log = true}; `hpo train` trains a single "
         "configuration"),
        ("schedule.warmup_epochs = [0.0, 12.0]", "space.schedule.warmup_epochs: 12.0: less than "
         "epochs = 10 (with schedule.warmup_epochs = 12.0, which [space] or a baseline allows)"),
    ],
)  # fmt: skip
def test_a_wrong_space(space: str, expected: str) -> None:
    assert message(f"[train]\nbatch_size = 64\n[space]\n{space}\n") == f"s.toml: {expected}"


SPACE = '[space]\noptimizer.lr = {low = 0.1, high = 0.5}\noptimizer.name = ["sgd", "adamw"]\n'


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ("[studdy]\n", "studdy: unknown table; did you mean 'study'?"),
        ("epochs = 3\n", "epochs: a field of the training: write it under [train] in a study file"),
        ("study = 3\n", "study: 3: a table: write [study]"),
        ("baseline = 3\n", "baseline: 3: a list of tables: write [[baseline]] above each"),
        ("[study]\ntrails = 3\n", "study.trails: unknown key; did you mean 'trials' or 'metrics'?"),
        ("[study]\ntrials = 0\n", "study.trials: 0: input should be greater than or equal to 1"),
        ("[study]\ntrials = '5'\n", 'study.trials: "5": allowed: a whole number or "none"'),
        ("[study]\nname = '.hidden'\n", 'study.name: ".hidden": allowed: 1 to 64 letters, '
         "digits, '.', '_' and '-', not starting with '.' or '-'"),
        ("[study]\nmetric = 'val_top2'\n",
         'study.metric: "val_top2": did you mean \'val_top5\' or \'val_top1\' or \'val_loss\'?'),
        ("[study]\nsampler = 'tpee'\n",
         'study.sampler: "tpee": did you mean \'tpe\'?'),
        ("[study]\nsampler = {n_startup_trials = 2}\n",
         "study.sampler.name: missing; allowed: tpe, "
         "random, grid, gp, cmaes, qmc, nsga2"),
        ("[study]\nsampler = 3\n", 'study.sampler: 3: allowed: a name, or a table {name = "tpe"}'),
        ("[study]\nsampler = {name = 'tpe', n_startup_trails = 2}\n",
         "study.sampler.n_startup_trails: unknown key; did you mean 'n_startup_trials'?"),
        ("[study]\nsampler = {name = 'tpe', group = true, multivariate = false}\n",
         "study.sampler.group: true: needs multivariate = true"),
        ("[study]\npruner = 'hyperbnd'\n",
         'study.pruner: "hyperbnd": did you mean \'hyperband\'?'),
        ("[study]\npruner = {name = 'patient', wrapped_pruner = 'medain'}\n",
         'study.pruner.wrapped_pruner: "medain": did you mean \'median\'?'),
        ("[study]\npruner = {name = 'patient', wrapped_pruner = {name = 'median', n_mim_trials "
         "= 2}}\n",
         "study.pruner.wrapped_pruner.n_mim_trials: unknown key; did you mean 'n_min_trials' or "
         "'n_startup_trials'?"),
        ("[study]\npruner = 'threshold'\n",
         "study.pruner.lower: none: threshold needs lower, upper or both"),
        ("[study]\npruner = {name = 'hyperband', min_resource = 11}\n",
         "study.pruner.min_resource: 11: allowed: 1 to 10, the largest number of epochs"),
        ("[study]\nsampler = 'grid'\n",
         "space.optimizer.lr: continuous range 0.1 to 0.5; a grid needs "
         "step or choices; or use another study.sampler"),
        ("[train]\nepoch = 3\n", "train.epoch: unknown key; did you mean 'epochs'?"),
        ("[train]\nepochs = '3'\n", 'train.epochs: "3": allowed: a whole number'),
        ("[train.model]\narchitecture = 'resnet19'\n",
         'train.model.architecture: "resnet19": unknown '
         "architecture (your own is named module:function); did you mean 'resnet18' or "
         "'resnet152' or 'resnet101'?"),
        ("[train.data]\ndataset = 'folder'\n",
         'train.data.root: none: dataset = "folder" needs the '
         "folder of the images (with optimizer.lr = 0.1, optimizer.name = \"sgd\", which "
         "[space] or a "
         "baseline allows)"),
        ("[[baseline]]\n", "baseline 1: empty: give at least one searched parameter"),
        ("[[baseline]]\noptimizer.lr = 1.0\n",
         "baseline 1: optimizer.lr: 1.0: allowed: 0.1 to 0.5"),
        ("[[baseline]]\noptimizer.lrr = 0.1\n",
         "baseline 1: optimizer.lrr: unknown field; did you mean 'optimizer.lr' or "
         "'optimizer.name' or 'optimizer.betas'?"),
        ("[[baseline]]\nepochs = 3\n",
         "baseline 1: epochs: not searched: put it under [space], or under [train] to fix it"),
        ("[train]\nepochs = 3\n[[baseline]]\nepochs = 3\n",
         "baseline 1: epochs: fixed at 3 in [train]: remove it here"),
        ("[[baseline]]\noptimizer.lr = 0.2\n[[baseline]]\noptimizer = {lr = 0.2}\n",
         "baseline 2: the same as baseline 1: remove one"),
    ],
)  # fmt: skip
def test_a_wrong_table(tables: str, expected: str) -> None:
    assert message(tables + SPACE) == f"s.toml: {expected}"


GRID = "[study]\nsampler = 'grid'\n{}[space]\nepochs = [1, 2, 3]\nseed = {{low = 0, high = 1}}\n"


def test_a_grid_runs_its_points_and_no_more() -> None:
    file = parse(GRID.format(""))
    assert (file.study.sampler, file.study.trials) == (Grid(), 6)
    assert parse(GRID.format("trials = 4\n")).study.trials == 4
    assert message(GRID.format("trials = 7\n")) == (
        "s.toml: study.trials: 7: the grid has 6 points; allowed: 1 to 6"
    )
    assert message(GRID.format("") + "[[baseline]]\nepochs = 2\n") == (
        "s.toml: baseline 1: seed: missing; allowed: 0 to 1; under grid a baseline is complete"
    )


@pytest.mark.parametrize(
    ("fields", "scheduler", "pruner"),
    [
        ("trials = 299", Promote(), NoPruner()),
        ("", Promote(), NoPruner()),
        ("scheduler = 'auto'", Promote(), NoPruner()),
        ("scheduler = {name = 'promote', finish = 2}", Promote(finish=2), NoPruner()),
        ("trials = 300", None, Hyperband()),
        ("trials = 300\nscheduler = 'promote'", Promote(), NoPruner()),
        ("trials = 39\nscheduler = 'none'", None, Median()),
        ("trials = 40\nscheduler = 'none'", None, Hyperband()),
        ("pruner = 'median'", None, Median()),
        ("pruner = 'none'", None, NoPruner()),
        ("trials = 39\npatience_trials = 5", None, Median()),
        ("sampler = 'gp'", None, Hyperband()),
        ("metrics = ['val_top1', 'parameters']", None, Hyperband()),
    ],
)
def test_what_decides_which_trials_go_on(
    fields: str, scheduler: Promote | None, pruner: Strategy
) -> None:
    study = parse(f"[study]\n{fields}\n{SPACE}").study
    assert (study.scheduler, study.pruner) == (scheduler, pruner)


def test_a_one_cycle_schedule_is_not_promoted() -> None:
    text = f"{SPACE}\n[train.schedule]\nname = 'onecycle'\n"
    assert parse(text).study.scheduler is None
    assert parse(f"{SPACE}\nschedule.name = ['cosine', 'onecycle']\n").study.scheduler is None
    assert parse(f"[study]\nscheduler = 'promote'\n{text}").study.scheduler == Promote()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("scheduler = 'promote'\npruner = 'median'", "give either scheduler or pruner"),
        ("scheduler = 'asha'", "allowed: promote"),
        ("scheduler = 'promote'\npatience_trials = 3", "study.patience_trials: 3: under promote"),
        ("scheduler = 'promote'\nmetrics = ['val_top1', 'flops']", "it ranks by one metric"),
        ("scheduler = {name = 'promote', first_epochs = 99}", "first_epochs: 99: allowed: 1 to"),
        ("scheduler = {name = 'promote', first_epochs = 0}", "allowed: 1 and more, or"),
        ("scheduler = {name = 'promote', reduction_factor = 1}", "allowed: 2 and more, or"),
    ],
)
def test_errors_of_a_scheduler(fields: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(f"[study]\n{fields}\n{SPACE}")


@pytest.mark.parametrize(
    ("epochs", "train", "first", "factor"),
    [
        (6, "", 1, 4),
        (15, "", 1, 3),
        (50, "", 3, 3),
        (50, "schedule.warmup_epochs = 4.5\n", 6, 3),
        (100, "", 6, 3),
    ],
)
def test_rungs_follow_the_epochs(epochs: int, train: str, first: int, factor: int) -> None:
    file = parse(f"{train and '[train]'}\n{train}[space]\nepochs = [{epochs - 2}, {epochs}]\n")
    assert (file.first_rung, file.reduction_factor) == (first, factor)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_by_name_and_table(name: str) -> None:
    text = f"[space]\nepochs = {{low = 1, high = 2}}\n[study]\nsampler = '{name}'\n"
    assert type(parse(text).study.sampler) is SAMPLERS[name]
    assert parse(text.replace(f"'{name}'", f"{{name = '{name}'}}")) == parse(text)


@pytest.mark.parametrize("name", sorted(set(PRUNERS) - {"threshold"}))
def test_every_pruner_by_name(name: str) -> None:
    assert type(parse(f"{SPACE}[study]\npruner = '{name}'\n").study.pruner) is PRUNERS[name]


def test_options_are_optunas() -> None:
    """Optuna takes what `options` gives; what wraps and what it lacks is built by the search."""
    classes = {
        "tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler,
        "gp": optuna.samplers.GPSampler, "cmaes": optuna.samplers.CmaEsSampler,
        "qmc": optuna.samplers.QMCSampler, "nsga2": optuna.samplers.NSGAIISampler,
        "hyperband": optuna.pruners.HyperbandPruner, "median": optuna.pruners.MedianPruner,
        "asha": optuna.pruners.SuccessiveHalvingPruner, "none": optuna.pruners.NopPruner,
        "percentile": optuna.pruners.PercentilePruner,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for name, kind in classes.items():
            options = {**SAMPLERS, **PRUNERS}[name]().options()
            assert isinstance(kind(**options), kind)
    patient = parse(f"{SPACE}[study]\npruner = {{name = 'patient', wrapped_pruner = 'asha'}}\n")
    assert isinstance(patient.study.pruner, Patient)
    assert patient.study.pruner.wrapped_pruner == PRUNERS["asha"]()


def test_definition_round_trips_and_resolves_defaults() -> None:
    definition = parse(GOOD).definition()
    again = StudyFile.from_definition(json.loads(json.dumps(definition, sort_keys=True)))
    assert again.definition() == definition
    assert again.space == parse(GOOD).space
    assert list(again.space) == list(parse(GOOD).space)
    assert definition["train"]["batch_size"] == 128
    assert "momentum" not in definition["train"]["optimizer"]
    assert difference(definition, definition) == []


@given(
    trials=st.integers(1, 100),
    epochs=st.integers(1, 50),
    low=st.floats(1e-6, 1e-2),
    log=st.booleans(),
    names=st.sets(st.sampled_from(["sgd", "adam", "adamw"]), min_size=1),
)
@settings(max_examples=30, deadline=None)
def test_any_definition_round_trips(
    trials: int, epochs: int, low: float, log: bool, names: set[str]
) -> None:
    text = f"[study]\ntrials = {trials}\n[train]\nepochs = {epochs}\n[space]\n"
    text += f"optimizer.lr = {{low = {low}, high = 1.0, log = {str(log).lower()}}}\n"
    text += f"optimizer.name = {json.dumps(sorted(names))}\n"
    definition = parse(text).definition()
    assert StudyFile.from_definition(definition).definition() == definition


def test_difference_names_what_changed() -> None:
    old = parse(SPACE).definition()
    new = parse(SPACE.replace("0.5", "0.6"), {"study.trials": 60, "epochs": 3}).definition()
    assert difference(old, new) == [
        "study.trials: 50 -> 60",
        "train.epochs: 10 -> 3",
        "space.optimizer.lr.high: 0.5 -> 0.6",
    ]


def test_a_searched_image_size_keeps_its_own_resize_size() -> None:
    text = "[train.data]\ndataset = 'folder'\nroot = 'x'\n[space]\ndata.image_size = [32, 224]\n"
    again = StudyFile.from_definition(parse(text).definition())
    assert again.config({"data.image_size": 224}).data.resize_size == 256
    assert again.config({"data.image_size": 32}).data.resize_size == 32


class TestOverrides:
    def test_values_are_toml_or_bare_words(self) -> None:
        items = ["a.b=1e-3", "c = true", "d=adamw", "e=[1, 2]", "f={low = 1}", "g=/my data/x=1"]
        assert toml.parse_assignments([*items, "h=2024-01-01"]) == {
            "a.b": 1e-3, "c": True, "d": "adamw", "e": [1, 2], "f": {"low": 1}, "g": "/my data/x=1",
            "h": "2024-01-01",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("items", "expected"),
        [
            (["a"], "'a': write KEY=VALUE, for example optimizer.lr=0.1"),
            (["a=1", "a=2"], "a: given twice on the command line"),
            (["a=[1"], "a: '[1' is not a TOML value: for example 3, 0.1, true, \"text\" or [1, 2]"),
        ],
    )
    def test_what_is_no_assignment(self, items: list[str], expected: str) -> None:
        with pytest.raises(ConfigError) as caught:
            toml.parse_assignments(items)
        assert str(caught.value) == expected

    def test_any_field(self) -> None:
        file = parse(
            GOOD,
            {"study.trials": 5, "train.epochs": 3, "batch_size": 8, "study.sampler.name": "random",
             "space.optimizer.lr.high": 0.5, "space.label_smoothing": [0.0, 0.1]},
        )  # fmt: skip
        assert (file.study.trials, file.study.sampler.name) == (5, "random")
        assert file.train["epochs"] == 3
        assert file.train["batch_size"] == 8
        assert file.space["optimizer.lr"] == Float(low=1e-4, high=0.5, log=True)
        assert file.space["label_smoothing"] == Choice(choices=(0.0, 0.1))

    def test_a_fixed_field_leaves_the_space_with_what_hangs_on_it(self) -> None:
        file = parse(GOOD, {"optimizer.name": "adamw"})
        assert list(file.space) == ["optimizer.lr", "model.cnn.filters", "model.head.hidden.0"]
        assert file.baselines == ()
        file = parse(GOOD, {"optimizer.name": "sgd"})
        assert file.space["optimizer.momentum"] == Float(low=0.5, high=0.9)
        assert file.baselines == ({"optimizer.momentum": 0.9},)

    def test_a_searched_field_leaves_train(self) -> None:
        file = parse(GOOD, {"space.epochs": {"low": 2, "high": 30}})
        assert file.space["epochs"] == Int(low=2, high=30)
        assert (file.max_epochs, "epochs" in file.train) == (30, False)

    def test_an_unknown_key_names_the_nearest(self) -> None:
        assert message(GOOD, {"optimizer.lrr": 1}).startswith(
            "--set: optimizer.lrr: unknown field; did you mean 'optimizer.lr'"
        )
        assert message(GOOD, {"study.trails": 1}) == (
            "s.toml: study.trails: unknown key; did you mean 'trials' or 'metrics'?"
        )


class TestFiles:
    def test_the_name_defaults_to_the_files(self, tmp_path: Path) -> None:
        path = tmp_path / "my.toml"
        path.write_text(SPACE)
        file = StudyFile.load(path)
        assert (file.name, file.text) == ("my", SPACE)

    def test_a_relative_root_becomes_absolute(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        file = parse(f"[train.data]\ndataset = 'folder'\nroot = 'photos'\n{SPACE}")
        assert file.train["data"]["root"] == str(tmp_path / "photos")

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"a = 1\nb = = 2\n", "not a TOML file: Invalid value (at line 2, column 5)"),
            (b"a = '\xff'\n", "not a text file: byte 5 is not UTF-8; save it as UTF-8"),
            (b"#" * 1_000_001, "larger than 1,000,000 bytes: not a study file"),
            (b"a = " + b"[" * 5000, "not a study file: nested more than 32 deep"),
        ],
    )
    def test_not_toml(self, tmp_path: Path, content: bytes, expected: str) -> None:
        path = tmp_path / "x.toml"
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            StudyFile.load(path)
        assert str(caught.value) == f"{path}: {expected}"

    def test_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "digits.toml").touch()
        with pytest.raises(ConfigError) as caught:
            StudyFile.load(tmp_path / "digit.toml")
        assert str(caught.value) == (
            f"{tmp_path / 'digit.toml'}: no such file; did you mean 'digits.toml'?"
        )
        with pytest.raises(ConfigError) as caught:
            StudyFile.load(tmp_path)
        assert str(caught.value) == f"{tmp_path}: not a file: give the path of a TOML or YAML file"

    def test_a_configuration_round_trips(self, tmp_path: Path) -> None:
        config = TrainConfig.parse(
            {"epochs": 3, "model": {"trainable_blocks": {"first": 2}, "cnn": {"filters": [8, 16]}}}
        )
        path = tmp_path / "best.toml"
        path.write_text(dump_config(config, {"study": "s", "commit": None}, ["two\nlines\x07"]))
        assert path.read_text().startswith("# two\n# lines\n\n")
        assert load_config(path) == (config, {"study": "s"})
        changed, _ = load_config(path, {"train.epochs": 5, "optimizer.lr": 0.5})
        assert (changed.epochs, changed.optimizer.lr) == (5, 0.5)
        with pytest.raises(ConfigError) as caught:
            load_config(path, {"epoch": 5})
        assert str(caught.value) == "--set: epoch: unknown field; did you mean 'epochs'?"

    def test_a_study_file_is_no_configuration(self, tmp_path: Path) -> None:
        path = tmp_path / "s.toml"
        path.write_text(SPACE)
        with pytest.raises(ConfigError, match="a study file, not a configuration: `hpo run`"):
            load_config(path)


class TestSchema:
    VALIDATOR = jsonschema.Draft7Validator(json_schema())

    def test_is_a_schema(self) -> None:
        jsonschema.Draft7Validator.check_schema(json_schema())

    @pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
    def test_accepts_our_studies(self, path: Path) -> None:
        self.VALIDATOR.validate(tomllib.loads(path.read_text()))
        assert StudyFile.load(path).name == path.stem

    @pytest.mark.parametrize(
        ("text", "valid"),
        [
            (GOOD, True),
            ("[space]\n'model.head.hidden.0' = [1, 2]\n", True),
            ("[space]\nmodel.head.hidden.0 = {low = 1, high = 2}\n", True),
            ("[study]\npruner = {name = 'patient', wrapped_pruner = 'asha'}\n" + SPACE, True),
            ("[train]\n'model.options.depth' = 3\n" + SPACE, True),
            ("[train]\n'model.options.depth' = [3]\n" + SPACE, False),
            ("[space]\nphases.0.lr = [0.1]\nmodel.options.depth = {low = 1, high = 3}\n", True),
            ("[space]\nphases.0.lr = [0]\n", False),
            ("[space]\nepochs = {low = 1, high = 3, step = 0}\n", False),
            ("[study]\nsampler = {name = 'tpe', n_startup_trails = 1}\n" + SPACE, False),
            ("[study]\nmetric = 'top1'\n" + SPACE, False),
            ("[train]\nepochs = 0\n" + SPACE, False),
            ("[space]\noptimizer.lrr = [0.1]\n", False),
            ("[space]\noptimizer.name = ['sgdd']\n", False),
            ("[space]\noptimizer.name = {low = 1, high = 2}\n", False),
            ("[space]\nepochs = {low = 1.5, high = 2}\n", False),
            ("[space]\ndata.split_seed = [1, 2]\n", False),
            ("[space]\n", False),
        ],
    )
    def test_judges(self, text: str, valid: bool) -> None:
        assert self.VALIDATOR.is_valid(tomllib.loads(text)) == valid

    def test_every_field_of_a_study_is_documented(self) -> None:
        fields = json_schema()["properties"]["study"]["properties"]
        assert [name for name, field in fields.items() if not field.get("description")] == []


class TestStarter:
    @pytest.mark.parametrize("side", [32, 160])
    @pytest.mark.parametrize("layout", [(), ("train", "test"), ("train", "val")])
    def test_works_as_it_is(self, tmp_path: Path, side: int, layout: tuple[str, ...]) -> None:
        root = tmp_path / 'my "photos"'
        for part in layout or (".",):
            for label in ("cat", "dog"):
                (root / part / label).mkdir(parents=True)
                for i in range(3):
                    Image.new("RGB", (side, side + 9)).save(root / part / label / f"{i}.png")
        text = starter_file(root, summarize_folder(root))
        file = parse_study(text)
        assert file.name == "my-photos"
        assert file.train["data"]["root"] == str(root)
        [baseline] = file.baselines
        assert [name for name in file.space if file.space.is_active(name, baseline)] == [*baseline]
        config = file.config(baseline)
        assert config.data.dataset == "folder"
        assert config.data.test_from_train == (layout == ("train", "val"))
        assert (config.model.architecture, config.model.weights, config.data.image_size) == (
            ("resnet18", None, 32) if side == 32 else ("mobilenet_v2", "DEFAULT", 160)
        )
        assert f"6 images {'for training ' if layout else ''}in 2 classes" in text
        TestSchema.VALIDATOR.validate(tomllib.loads(text))

    @pytest.mark.parametrize(
        ("images", "wish", "said"),
        [
            (400, Wish(cores=2), "mobilenet_v2 or mobilenet_v3_large at 224 px from pretrained"),
            (400, Wish(cores=2), "3 epochs of the head, then 9 of the last blocks"),
            (400, Wish(gpu=True), "resnet50 or convnext_tiny at 224 px"),
            (400, Wish(cores=2).within("10m", 600), "mobilenet_v2 at 128 px"),
            (400, Wish(quick=True), "mobilenet_v2 at 96 px from pretrained weights, 1 epoch of"),
            (400, Wish(from_scratch=True), "mobilenet_v2 at 128 px from random weights, 30 epochs"),
            (9_000, Wish(cores=2), "pretrained weights, 12 epochs"),
            (
                50_000,
                Wish().within("1h", 3600),
                "mobilenet_v2 at 96 px from pretrained weights, 3 epochs, ",
            ),
            (9_000, Wish(quick=True), "500 training images"),
        ],
    )
    def test_what_is_chosen_fits_the_images_and_the_wish(
        self, tmp_path: Path, images: int, wish: Wish, said: str
    ) -> None:
        folder = FolderSummary(classes=2, images=images, side=300, parts=())
        assert said in choose(folder, wish).said
        file = parse_study(starter_file(tmp_path, folder, wish=wish))
        chosen = choose(folder, wish)
        assert file.max_epochs == sum(chosen.epochs)
        assert file.study.max_time == (None if wish.seconds == math.inf else wish.seconds)
        assert file.config(file.baselines[0]).data.limit_train == chosen.limit_train

    def test_nothing_to_learn_from(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no such folder; set data\.root"):
            summarize_folder(tmp_path / "none")
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat" / "x.jpg").touch()
        with pytest.raises(DataError, match="only one class, 'cat'; at least two folders are"):
            summarize_folder(tmp_path)
        (tmp_path / "dog").mkdir()
        (tmp_path / "dog" / "x.jpg").touch()
        with pytest.raises(DataError, match="none of the images that were tried can be read"):
            summarize_folder(tmp_path)


def test_no_heavy_import() -> None:
    code = (
        "import sys, hpo.config.study, hpo.config.schema, hpo.config.template\n"
        "heavy = {'torch', 'torchvision', 'optuna', 'plotly', 'sklearn', 'sqlalchemy', 'ray'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_dict_is_a_study_file() -> None:
    file = StudyFile.from_dict({
        "study": {"name": "made", "trials": 3},
        "train": {"epochs": 2, "data": {"dataset": "folder", "root": Path("/images")}},
        "space": {"optimizer.lr": {"low": 1e-3, "high": 0.1}, "batch_size": (32, 64)},
        "baseline": [{"optimizer.lr": 0.01}],
    })  # fmt: skip
    assert file.config({"optimizer.lr": 0.01, "batch_size": 64}).data.root == "/images"
    assert parse(file.text) == file
    longer = {"study": {"name": "x"}, "space": {"epochs": [1, 2]}}
    assert StudyFile.from_dict(longer, {"study.trials": 7}).study.trials == 7


@pytest.mark.parametrize(
    "tables",
    [{"study": {"name": None}}, {"study": {"name": object()}}, {3: {}}, {"study": "digits"}],
)
def test_a_dict_that_is_no_study_file_is_refused(tables: dict[Any, Any]) -> None:
    with pytest.raises(ConfigError):
        StudyFile.from_dict(tables)
