"""Costs of a trained network: parameters, multiply-adds, and latency for one image."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from hpo.config.train import TrainConfig
from hpo.training import models
from hpo.training.checkpoint import Checkpoint
from hpo.training.device import seconds_of
from hpo.training.learner import autocast, memory_format

WARM_UP, REPEATS, ENOUGH_S = 10, 50, 10.0
"""Calls before the timed ones; timed calls; seconds after which fewer are enough."""
LEAST_REPEATS = 5
MEASURED = ("parameters", "flops", "latency_ms")


def network_costs(
    config: TrainConfig,
    wanted: Collection[str] = MEASURED,
    *,
    classes: int,
    device: torch.device,
    checkpoint: Path | None = None,
) -> dict[str, float]:
    """Return the costs among MEASURED that are `wanted`, of the network of `config` in eval mode on
    `device`.

    `parameters` includes frozen ones; `flops` are the multiply-adds for one image in convolutions,
    matrix products and attention; `latency_ms` is the median over REPEATS calls with one random
    image already on the device, in the precision and layout of `config.runtime`. `checkpoint` holds
    the trained weights, of the first fold in a cross-validation; None: random ones, which cost the
    same.
    """
    if not set(wanted) & set(MEASURED):
        return {}
    side = config.data.image_size
    model = models.build(config.model, classes=classes, image_size=side, pretrained=False)
    if checkpoint is not None:
        model.load_state_dict(Checkpoint.load(checkpoint).best_states[0])
    layout = memory_format(config.runtime.memory_format)
    model = model.to(device, memory_format=layout).eval()  # type: ignore[call-overload]
    image = torch.randn(1, 3, side, side, device=device).contiguous(memory_format=layout)
    costs: dict[str, float] = {}
    if "parameters" in wanted:
        costs["parameters"] = float(sum(part.numel() for part in model.parameters()))
    if "flops" in wanted:
        costs["flops"] = float(multiply_adds(model, image))
    if "latency_ms" in wanted:
        costs["latency_ms"] = latency_ms(model, image, config.runtime.precision)
    return costs


def multiply_adds(model: nn.Module, image: Tensor) -> int:
    """Return the multiply-adds of one forward pass of `image` (1, 3, S, S): half of torch's FLOP
    count."""
    from torch.utils.flop_counter import FlopCounterMode  # brings triton

    with torch.no_grad(), _plain_attention(), FlopCounterMode(display=False) as counter:
        model(image)
    return int(counter.get_total_flops()) // 2


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Disable the fused attention of eval mode, a single operation that the counter does not
    know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def latency_ms(model: nn.Module, image: Tensor, precision: str) -> float:
    """Return the median milliseconds of one pass of `image` (1, 3, S, S), synchronised with the
    device."""
    times: list[float] = []
    with torch.inference_mode(), autocast(image.device, precision):
        began = time.perf_counter()
        for call in range(WARM_UP + REPEATS):
            spent = seconds_of(partial(model, image), image.device)
            if call >= WARM_UP or time.perf_counter() - began > ENOUGH_S:
                times.append(spent)
            if len(times) >= LEAST_REPEATS and time.perf_counter() - began > ENOUGH_S:
                break
    return 1000 * statistics.median(times)
