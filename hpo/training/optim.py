"""Optimizers, learning rates and early stopping.

A learning rate is a pure function of the configuration, the epoch, the step and the metrics of the
epochs before, so that a resumed training needs no state of a scheduler.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from hpo.config.metrics import direction
from hpo.config.train import (
    EarlyStoppingConfig,
    OptimizerConfig,
    Phase,
    ScheduleConfig,
    TrainConfig,
)
from hpo.errors import TrialFailed

FACTOR = "lr_factor"
"""Key of a parameter group: the multiple of the learning rate that it uses."""

History = Sequence[Mapping[str, float]]
"""Metrics of the epochs so far, in order."""

DECORATED = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
"""Methods that torch.compile must not trace."""


def _bare(kind: type[Optimizer]) -> Callable[..., Optimizer]:
    """Return the optimizer class `kind` without its decorators for torch.compile, which no
    optimizer here needs: the first call of any loads torch._dynamo, which takes a second and 170 MB
    in each worker. The update is the same function."""
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in DECORATED}
    step = torch.no_grad()(inspect.unwrap(kind.step))  # one of them switches autograd off
    return type(kind.__name__, (kind,), methods | {"step": step})


SGD, Adam, AdamW, RMSprop = map(_bare, (optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop))


def make_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    head: nn.Module | None = None,
    *,
    fused: bool = False,
    recorded: torch.device | None = None,
) -> Optimizer:
    """Return an optimizer over the parameters of `model` that require a gradient. If the backbone
    has its own learning rate, there are two groups: the parameters of `head`, and the others (see
    `set_lr`).

    `fused`: update all parameters in one kernel where torch can. `recorded`: the device on which
    its steps are recorded as a CUDA graph, where the learning rate has to be as well; `fused` is
    needed then.
    """
    learning = _groups(model, config.backbone_lr_factor, head)
    lr, decay = config.lr, config.weight_decay
    one_kernel = {"fused": True} if fused else {}
    repeatable = {"capturable": True} if recorded else {}
    optimizer: Optimizer
    if config.name == "sgd":
        optimizer = SGD(learning, lr, config.momentum, weight_decay=decay,
                        nesterov=config.nesterov, **one_kernel)  # fmt: skip
    elif config.name == "rmsprop":
        optimizer = RMSprop(learning, lr, momentum=config.momentum, weight_decay=decay,
                            **repeatable)  # fmt: skip
    else:
        kind = Adam if config.name == "adam" else AdamW
        options = one_kernel | repeatable
        optimizer = kind(learning, lr, config.betas, weight_decay=decay, **options)
    if recorded:
        # torch warns once where a step is not being recorded: the first ones prepare that.
        optimizer._warned_capturable_if_run_uncaptured = True
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(lr, device=recorded)
    return optimizer


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load the `state` of an optimizer of the same configuration, maybe from another device: how
    `optimizer` computes stays."""
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    pairs = zip(state["param_groups"], own, strict=True)
    groups = [{**theirs, **mine} for theirs, mine in pairs]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for group, mine in zip(optimizer.param_groups, own, strict=True):
        group.update(mine)  # the very tensors, which a recording knows


def _groups(model: nn.Module, factor: float, head: nn.Module | None) -> Any:
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if factor == 1 or head is None:
        return learning
    heads = {id(parameter) for parameter in head.parameters()}
    groups = [
        {"params": [one for one in learning if id(one) in heads], FACTOR: 1.0},
        {"params": [one for one in learning if id(one) not in heads], FACTOR: factor},
    ]
    return [group for group in groups if group["params"]]


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of the next step: `lr` for the head, a multiple of it for the
    backbone."""
    for group in optimizer.param_groups:
        rate = lr * group.get(FACTOR, 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rates(
    config: TrainConfig, *, epoch: int, steps: int, history: History = ()
) -> list[float]:
    """Return the learning rate of each of the `steps` steps of `epoch` (from 1).

    `history` holds the metrics of the epochs before this one. A schedule runs within each phase.
    Cosine and onecycle begin after the warm-up; the other schedules count epochs from the start.
    Replay stays below the warm-up of the training that it repeats.
    """
    phase = config.phase_of(epoch)
    warmup = round(config.schedule.warmup_epochs * steps)
    total = phase.epochs * steps
    level = _level(config.schedule, phase, epoch, history)
    before = (epoch - 1 - phase.start) * steps
    return [
        _rate(config.schedule, phase.lr, level, step, warmup, total)
        for step in range(before, before + steps)
    ]


def _rate(
    schedule: ScheduleConfig, highest: float, level: float, step: int, warmup: int, total: int
) -> float:
    """Return the learning rate of one step (from 0) out of `total`; `level` is the rate of its
    epoch."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    done, of = max(0, step - warmup), total - warmup
    if schedule.name == "replay":
        return min(level, rise * highest)
    if schedule.name == "cosine":
        level = _between(highest, schedule.min_lr, done / of if of else 0.0)
    elif schedule.name == "onecycle":
        level = highest * onecycle(done, of, schedule.pct_start)
    return rise * level


def _level(schedule: ScheduleConfig, phase: Phase, epoch: int, history: History) -> float:
    """Return the rate of a schedule that changes only between epochs; otherwise the largest
    rate."""
    if schedule.name == "step":
        drops = (epoch - 1 - phase.start) // schedule.step_size
        return float(phase.lr * schedule.gamma**drops)
    if schedule.name == "plateau":
        values = _values(history[phase.start :], schedule.metric, "schedule.metric")
        return plateau(schedule, phase.lr, values)
    if schedule.name == "replay":
        return schedule.rates[epoch - 1]
    return phase.lr


def _between(start: float, end: float, part: float) -> float:
    """Interpolate from start to end along half a cosine (Loshchilov & Hutter 2017, equation 5)."""
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def onecycle(step: int, steps: int, pct_start: float) -> float:
    """Return the multiple of the largest rate: from 1/25 up to 1, then down to 1/250,000, both
    along a cosine.

    Smith & Topin 2018 with the constants and the rounding of torch's OneCycleLR.
    """
    start, end = 1 / 25, 1 / 25 / 1e4
    top, last = pct_start * steps - 1, steps - 1
    if step < top:
        return _between(start, 1.0, step / top)
    return _between(1.0, end, (step - top) / (last - top)) if last > top else 1.0


def plateau(schedule: ScheduleConfig, lr: float, values: Sequence[float]) -> float:
    """Return the rate after epochs with these values of `schedule.metric`, as torch's
    ReduceLROnPlateau does: a value is better if it beats the best by one part in 10,000."""
    lower = direction(schedule.metric) == "minimize"
    best = math.inf if lower else -math.inf
    bad = 0
    for value in values:
        if value < best * (1 - 1e-4) if lower else value > best * (1 + 1e-4):
            best, bad = value, 0
        else:
            bad += 1
        if bad > schedule.patience:
            lr, bad = max(lr * schedule.factor, schedule.min_lr), 0
    return lr


def should_stop(config: EarlyStoppingConfig, history: History) -> bool:
    """Return whether the last `patience` epochs all failed to improve on the best before them."""
    if config.patience is None:
        return False
    sign = -1.0 if direction(config.metric) == "minimize" else 1.0
    best, since = -math.inf, 0
    for value in _values(history, config.metric, "early_stopping.metric"):
        if sign * value > best + config.min_delta:
            best, since = sign * value, 0
        else:
            since += 1
    return since >= config.patience


def _values(history: History, metric: str, key: str) -> list[float]:
    try:
        return [metrics[metric] for metrics in history]
    except KeyError:
        raise TrialFailed(
            f"{key}: {metric} is not measured without a validation part; watch "
            'train_loss, or use schedule.name = "replay" and no early stopping'
        ) from None
