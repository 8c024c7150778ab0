"""Learning rates, held against torch's schedulers; optimizers; early stopping."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as reference

from hpo.config.train import EarlyStoppingConfig, OptimizerConfig, TrainConfig
from hpo.errors import TrialFailed
from hpo.training.optim import learning_rates, make_optimizer, should_stop

EPOCHS, STEPS, LR = 8, 5, 0.3


def ours(schedule: dict[str, Any], history: list[dict[str, float]] | None = None) -> list[float]:
    config = TrainConfig.parse({"epochs": EPOCHS, "optimizer": {"lr": LR}, "schedule": schedule})
    past = history or []
    return [
        rate
        for epoch in range(1, EPOCHS + 1)
        for rate in learning_rates(config, epoch=epoch, steps=STEPS, history=past[: epoch - 1])
    ]


def optimizer(lr: float = LR) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)


def theirs(scheduler: Any, *, every: int = 1) -> list[float]:
    """The rates of torch's scheduler, stepped every so many steps."""
    rates = []
    for step in range(1, EPOCHS * STEPS + 1):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        if step % every == 0 and step < EPOCHS * STEPS:
            scheduler.step()
    return rates


def test_constant() -> None:
    assert ours({"name": "constant"}) == [LR] * (EPOCHS * STEPS)


def test_step() -> None:
    mine = ours({"name": "step", "step_size": 3, "gamma": 0.5})
    assert mine == pytest.approx(theirs(reference.StepLR(optimizer(), 3, 0.5), every=STEPS))


def test_cosine() -> None:
    mine = ours({"name": "cosine", "min_lr": 0.01})
    assert mine == pytest.approx(
        theirs(reference.CosineAnnealingLR(optimizer(), EPOCHS * STEPS, 0.01))
    )


@pytest.mark.parametrize("pct_start", [0.05, 0.3, 0.9])
def test_onecycle(pct_start: float) -> None:
    scheduler = reference.OneCycleLR(
        optimizer(), LR, EPOCHS * STEPS, pct_start=pct_start, cycle_momentum=False
    )
    assert ours({"name": "onecycle", "pct_start": pct_start}) == pytest.approx(theirs(scheduler))


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_onecycle_of_few_steps_is_finite(epochs: int) -> None:
    config = TrainConfig.parse({"epochs": epochs, "schedule": {"name": "onecycle"}})
    rates = [
        rate
        for epoch in range(1, epochs + 1)
        for rate in learning_rates(config, epoch=epoch, steps=1)
    ]
    assert all(0 < rate <= config.optimizer.lr for rate in rates)


def test_warm_up_before_cosine() -> None:
    warmup = 10
    sgd = optimizer()
    rise = reference.LinearLR(sgd, 1 / warmup, total_iters=warmup - 1)
    fall = reference.CosineAnnealingLR(sgd, EPOCHS * STEPS - warmup)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")
        expected = theirs(reference.SequentialLR(sgd, [rise, fall], [warmup]))
    mine = ours({"name": "cosine", "warmup_epochs": 2.0})
    assert mine == pytest.approx(expected, rel=1e-6)


def test_warm_up_of_a_fraction_of_an_epoch() -> None:
    mine = ours({"name": "constant", "warmup_epochs": 0.8})
    assert mine[:6] == pytest.approx([LR / 4, LR / 2, LR * 3 / 4, LR, LR, LR])


@pytest.mark.parametrize(("epochs", "warmup", "steps"), [(1, 0.9, 1), (2, 1.9, 3)])
def test_a_warm_up_over_all_steps_never_falls(epochs: int, warmup: float, steps: int) -> None:
    """Rounded to whole steps it leaves none for the cosine."""
    settings = {"epochs": epochs, "schedule": {"name": "cosine", "warmup_epochs": warmup}}
    config = TrainConfig.parse(settings | {"optimizer": {"lr": LR}})
    rates = [
        rate
        for epoch in range(1, epochs + 1)
        for rate in learning_rates(config, epoch=epoch, steps=steps)
    ]
    every = epochs * steps
    assert rates == pytest.approx([LR * (step + 1) / every for step in range(every)])


CURVES = {
    "val_loss": [1.0, 0.9, 0.9, 0.89999, 0.95, 0.5, 0.6, 0.6],
    "val_top1": [0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2],
    "train_loss": [1.0, math.nan, math.nan, 0.5, 0.6, math.nan, 0.4, 0.1],
}


@pytest.mark.parametrize("metric", CURVES)
@pytest.mark.parametrize("patience", [0, 1, 2])
def test_plateau(metric: str, patience: int) -> None:
    sgd = optimizer()
    mode: Any = "min" if metric.endswith("loss") else "max"
    scheduler = reference.ReduceLROnPlateau(
        sgd, mode=mode, factor=0.5, patience=patience, min_lr=0.02
    )
    expected = []
    for value in CURVES[metric]:
        expected += [sgd.param_groups[0]["lr"]] * STEPS
        scheduler.step(value)
    history = [{metric: value} for value in CURVES[metric]]
    schedule = {
        "name": "plateau", "metric": metric, "patience": patience, "factor": 0.5, "min_lr": 0.02
    }  # fmt: skip
    assert ours(schedule, history) == pytest.approx(expected)


def test_plateau_without_a_validation_part_says_what_to_do() -> None:
    with pytest.raises(TrialFailed, match=r"schedule\.metric: val_loss .*replay"):
        ours({"name": "plateau"}, [{"train_loss": 1.0}] * EPOCHS)


def test_replay_repeats_a_plateau_with_its_warm_up() -> None:
    history = [{"val_loss": 1.0}] * EPOCHS
    plateau = ours({"name": "plateau", "patience": 2, "warmup_epochs": 1.4}, history)
    rates = plateau[STEPS - 1 :: STEPS]
    assert ours({"name": "replay", "rates": rates, "warmup_epochs": 1.4}) == pytest.approx(plateau)


OPTIMIZERS: list[tuple[dict[str, Any], type[torch.optim.Optimizer], dict[str, Any]]] = [
    ({"name": "sgd", "nesterov": True}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ({"name": "adam", "betas": [0.8, 0.9]}, torch.optim.Adam, {"betas": (0.8, 0.9)}),
    ({"name": "adamw", "weight_decay": 0.1}, torch.optim.AdamW, {"weight_decay": 0.1}),
    ({"name": "rmsprop", "momentum": 0.5}, torch.optim.RMSprop, {"momentum": 0.5}),
]


@pytest.mark.parametrize(("config", "kind", "expected"), OPTIMIZERS)
def test_optimizers_take_their_options(
    config: dict[str, Any], kind: type, expected: dict[str, Any]
) -> None:
    made = make_optimizer(torch.nn.Linear(2, 2), OptimizerConfig.model_validate(config))
    assert isinstance(made, kind)
    assert type(made).__name__ == kind.__name__
    assert expected.items() <= made.param_groups[0].items()


@pytest.mark.parametrize(("config", "kind", "options"), OPTIMIZERS)
def test_an_optimizer_computes_the_bits_of_torch(
    config: dict[str, Any], kind: Any, options: dict[str, Any]
) -> None:
    """Without torch's decorators, and with its state loaded into another one midway."""

    def trained(make: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
        source = torch.Generator().manual_seed(0)
        model = torch.nn.Linear(3, 2)
        with torch.no_grad():
            for part in model.parameters():
                part.copy_(torch.randn(part.shape, generator=source))
        one = make(model)
        for step in range(6):
            one.zero_grad()
            model(torch.randn(4, 3, generator=source)).square().sum().backward()
            one.step()
            if step == 2:
                state, one = copy.deepcopy(one.state_dict()), make(model)
                one.load_state_dict(state)
        return list(model.parameters()), one.state_dict()

    wanted = OptimizerConfig.model_validate(config)
    own, own_state = trained(lambda model: make_optimizer(model, wanted))
    momentum = {"momentum": 0.9} if config["name"] == "sgd" else {}
    settings = {"lr": wanted.lr, "weight_decay": wanted.weight_decay} | momentum | options
    theirs, state = trained(lambda model: kind(model.parameters(), **settings))
    assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))
    assert str(own_state) == str(state)


def test_an_optimizer_holds_only_what_learns() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    held = make_optimizer(model, OptimizerConfig()).param_groups[0]["params"]
    assert [id(part) for part in held] == [id(part) for part in model[1].parameters()]


@pytest.mark.parametrize(
    ("patience", "min_delta", "losses", "stops"),
    [
        (None, 0.0, [1.0] * 50, False),
        (2, 0.0, [1.0, 0.9, 0.8], False),
        (2, 0.0, [1.0, 1.0, 1.0], True),
        (2, 0.0, [1.0, 1.1, 0.9, 1.0], False),
        (2, 0.0, [1.0, 1.1, 0.9, 1.0, 0.9], True),
        (2, 0.2, [1.0, 0.9, 0.85], True),
        (2, 0.2, [1.0, 0.9, 0.75], False),
        (2, 0.0, [1.0, math.nan, math.nan], True),
        (1, 0.0, [], False),
    ],
)
def test_early_stopping(
    patience: int | None, min_delta: float, losses: list[float], stops: bool
) -> None:
    config = EarlyStoppingConfig(patience=patience, min_delta=min_delta)
    assert should_stop(config, [{"val_loss": loss} for loss in losses]) is stops


def test_early_stopping_on_a_metric_that_should_rise() -> None:
    config = EarlyStoppingConfig(patience=2, metric="val_top1")
    assert should_stop(config, [{"val_top1": value} for value in (0.5, 0.4, 0.3)])
    assert not should_stop(config, [{"val_top1": value} for value in (0.3, 0.4, 0.5)])
