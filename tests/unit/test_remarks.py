"""What a study file allows although it cannot work: told by check, run and workers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from hpo.config.base import descriptions, field_type, is_model
from hpo.config.remarks import EFFECTIVE_WITH, remarks
from hpo.config.study import StudyFile, parse_study
from hpo.config.train import TrainConfig, check_path
from hpo.errors import ConfigError
from hpo.paths import Home
from hpo.trained.dry_run import check
from tests.harness.commands import calls
from tests.harness.fakes import study_file

LR = "optimizer.lr = {low = 1e-3, high = 1e-1, log = true}\n"
BETAS = "optimizer.betas = [[0.9, 0.999], [0.95, 0.99]]"


def told(space: str, *, train: str = "", **options: object) -> list[str]:
    return remarks(study_file(space=LR + space, train=f"epochs = 3\n{train}", **options))  # type: ignore[arg-type]


def fields(model: type[BaseModel] = TrainConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every field with its description."""
    texts = descriptions(model)
    for name in model.model_fields:
        part = field_type(model, name)
        if is_model(part):
            yield from fields(part, f"{prefix}{name}.")
        else:
            yield prefix + name, texts.get(name, "")


def test_what_a_description_restricts_the_table_knows() -> None:
    for path, text in fields():
        if re.match(r"[\w, ]+ only\b", text) and not path.startswith("data."):  # refused there
            assert path in EFFECTIVE_WITH, path
    for path, needs in EFFECTIVE_WITH.items():
        for one in (path, *needs):
            check_path(one)


@pytest.mark.parametrize(
    ("space", "train", "expected"),
    [
        (BETAS, 'optimizer.name = "sgd"',
         "optimizer.betas has no effect: it is used only with optimizer.name = adam or adamw, "
         "never with sgd"),
        (BETAS, "", "optimizer.betas has no effect: it is used only with optimizer.name = adam or "
         "adamw, never with sgd"),
        ("optimizer.momentum = [0.8, 0.9]", 'optimizer.name = "adam"',
         "optimizer.momentum has no effect: it is used only with optimizer.name = sgd or rmsprop, "
         "never with adam"),
        ("focal_gamma = [1.0, 2.0]", "",
         "focal_gamma has no effect: it is used only with loss = focal, never with cross_entropy"),
        ("schedule.gamma = [0.1, 0.5]", "",
         "schedule.gamma has no effect: it is used only with schedule.name = step, never with "
         "cosine"),
        ("augment.policy_magnitude = [3, 9]", "",
         "augment.policy_magnitude has no effect: it is used only with augment.policy = "
         "randaugment or trivialaugment, never with none"),
        ("augment.perspective_probability = [0.1, 0.9]", "",
         "augment.perspective_probability has no effect: it is used only with "
         "augment.perspective = on, never with 0.0"),
        ('early_stopping.metric = ["val_loss", "val_top1"]', "",
         "early_stopping.metric has no effect: it is used only with early_stopping.patience = on, "
         "never with none"),
        ("retrieval.k = [3, 5]", "",
         "retrieval.k has no effect: it is used only with task = retrieval, never with "
         "classification"),
        ("model.cnn.filters = [[4], [8]]", 'model.architecture = "resnet18"',
         "model.cnn.filters has no effect: it is used only with model.architecture = small_cnn, "
         "never with resnet18"),
        (BETAS + "\noptimizer.name = ['sgd', 'adamw']", "",
         "optimizer.betas has no effect in trials with optimizer.name = sgd; add to it: "
         'when = {"optimizer.name" = "adamw"}'),
        (BETAS + "\noptimizer.name = ['sgd', 'adam', 'adamw']", "",
         "optimizer.betas has no effect in trials with optimizer.name = sgd; add to it: "
         'when = {"optimizer.name" = ["adam", "adamw"]}'),
        ("early_stopping.min_delta = [0.0, 0.1]\nearly_stopping.patience = ['none', 2]", "",
         "early_stopping.min_delta has no effect in trials with early_stopping.patience = none; "
         'add to it: when = {"early_stopping.patience" = 2}'),
        ("seed = [1, 2]", "optimizer.betas = [0.8, 0.9]",
         "optimizer.betas has no effect: it is used only with optimizer.name = adam or adamw, "
         "never with sgd"),
    ],
)  # fmt: skip
def test_parameters_without_effect(space: str, train: str, expected: str) -> None:
    assert told(space, train=train) == [expected]


@pytest.mark.parametrize(
    ("space", "train"),
    [
        (BETAS, 'optimizer.name = "adam"'),
        ("optimizer.betas = {choices = [[0.9, 0.999], [0.95, 0.99]], "
         "when = {'optimizer.name' = 'adamw'}}\noptimizer.name = ['sgd', 'adamw']", ""),
        ("optimizer.momentum = [0.8, 0.9]\noptimizer.name = ['sgd', 'rmsprop']", ""),
        ("augment.perspective_probability = [0.1, 0.9]", "augment.perspective = 0.2"),
        ("seed = [1, 2]", "optimizer.betas = [0.8, 0.9]\noptimizer.name = 'adam'"),
    ],
)  # fmt: skip
def test_parameters_with_an_effect_are_not_told(space: str, train: str) -> None:
    assert told(space, train=train) == []


WHEN = "optimizer.name = ['sgd', 'adam']\noptimizer.momentum = {low = 0.5, high = 0.9, when = "
WHEN += "{'optimizer.name' = 'sgd'}}"


@pytest.mark.parametrize(
    ("sampler", "space", "trials", "expected"),
    [
        ("cmaes", "batch_size = [16, 32]\nseed = {low = 0, high = 9}", 30,
         ["cmaes draws at random: batch_size (choices, not a range)"]),
        ("cmaes", "batch_size = [16, 32]", 30,
         ["cmaes draws at random: batch_size (choices, not a range); optimizer.lr (the only range, "
          "and it needs two)"]),
        ("cmaes", WHEN + "\nseed = {low = 0, high = 9}", 30,
         ["cmaes draws at random: optimizer.name (choices, not a range); optimizer.momentum (not "
          "every trial has it)"]),
        ("gp", WHEN, 30, ["gp draws at random: optimizer.momentum (not every trial has it)"]),
        ("gp", "seed = [1, 2]", 30, []),
        ("gp", "seed = [1, 2]", 2000,
         ["gp grows slow beyond some 500 trials (of 2000): a minute for each at 5,000; tpe does "
          "not"]),
        ("qmc", "seed = [1, 2]", 30, ["qmc draws at random: seed (choices, not a range)"]),
        ("tpe", WHEN, 30, []),
        ("tpe", "", 10,
         ["tpe draws all 10 trials at random: it learns from the first 10 (n_startup_trials)"]),
        ("tpe", "", 11, []),
        ("nsga2", "", 50,
         ["nsga2 draws all 50 trials at random: it learns from the first 50 (population_size)"]),
        ("nsga2", "", 51, []),
        ("random", WHEN, 3, []),
    ],
)  # fmt: skip
def test_samplers_that_draw_at_random(
    sampler: str, space: str, trials: int, expected: list[str]
) -> None:
    assert told(space, sampler=sampler, trials=trials) == expected


def test_cmaes_without_a_range_is_refused_but_old_studies_open() -> None:
    space = "batch_size = [16, 32]\noptimizer.nesterov = [true, false]"
    text = study_file(space=space).text.replace('sampler = "random"', 'sampler = "cmaes"')
    with pytest.raises(ConfigError, match=r"study\.sampler: 'cmaes': it searches ranges"):
        parse_study(text, "toy.toml")
    old = study_file(space=space).definition()
    old["study"]["sampler"] = {"name": "cmaes"}
    assert StudyFile.from_definition(old).study.sampler.name == "cmaes"


@pytest.mark.parametrize(
    ("pruner", "expected"),
    [
        ('{name = "asha", min_resource = 10}',
         "asha never ends a trial: min_resource = 10, and its first question comes after epoch 10; "
         "no trial has more than 3 epochs"),
        ('{name = "asha", min_early_stopping_rate = 1}',
         "asha never ends a trial: min_early_stopping_rate = 1, and its first question comes after "
         "epoch 4; no trial has more than 3 epochs"),
        ('{name = "hyperband", min_resource = 3}',
         "hyperband never ends a trial: min_resource = 3, and no trial has more than 3 epochs"),
        ('{name = "hyperband", bootstrap_count = 20}',
         "hyperband never ends a trial: bootstrap_count = 20, and there are 12 trials"),
        ('{name = "median", n_warmup_steps = 10}',
         "median never ends a trial: n_warmup_steps = 10, and no trial has more than 3 epochs"),
        ('{name = "median", n_min_trials = 100}',
         "median never ends a trial: n_min_trials = 100, and there are 12 trials"),
        ('{name = "percentile", n_startup_trials = 12}',
         "percentile never ends a trial: n_startup_trials = 12, and there are 12 trials"),
        ('{name = "percentile", percentile = 100.0}',
         "percentile never ends a trial: percentile = 100.0, and no trial is outside of that"),
        ('{name = "threshold", lower = 0.1, n_warmup_steps = 3}',
         "threshold never ends a trial: n_warmup_steps = 3, and no trial has more than 3 epochs"),
        ('{name = "patient", patience = 5}',
         "patient never ends a trial: patience = 5, and no trial has more than 3 epochs"),
        ('{name = "patient", patience = 1, wrapped_pruner = {name = "median", n_min_trials = 50}}',
         "patient never ends a trial: wrapped_pruner.n_min_trials = 50, and there are 12 trials"),
    ],
)  # fmt: skip
def test_pruners_that_can_never_act(pruner: str, expected: str) -> None:
    assert told("", pruner=pruner, trials=12) == [expected]


@pytest.mark.parametrize("pruner", ["median", "hyperband", "asha", "percentile", "patient", "none"])
def test_pruners_as_they_are_by_default_are_not_told(pruner: str) -> None:
    assert told("", pruner=pruner, trials=12, study="") == []


def test_check_run_and_workers_tell_it(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = study_file(trials=1, space=LR + BETAS)
    line = "optimizer.betas has no effect: it is used only with optimizer.name = adam or adamw"
    assert line in str(check(file, home=home, device="cpu", workers=1, threads=1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hpo.workers.supervisor.Supervisor.run", lambda *_: None)
    Path("toy.toml").write_text(file.text)
    hpo = calls(monkeypatch, capsys)
    assert line in hpo("run", "toy.toml")[1]
    assert line not in hpo("run", "toy.toml", "--quiet")[1]
