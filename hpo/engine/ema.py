"""An exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """A copy of a network, in eval mode, that follows it: after every step each of its tensors
    moves by 1 - decay towards the network's (Polyak & Juditsky 1992), batch norm's statistics too.

    The first steps average over a tenth of what was so far, so that the random start is forgotten:
    decay is at most (1 + n) / (10 + n) in step n, as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    def update(self, model: nn.Module) -> None:
        """Follow `model` after one of its steps."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        moving = [pair for pair in pairs if pair[0].is_floating_point()]
        with torch.no_grad():
            follow = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            follow([mine for mine, _ in moving], [theirs for _, theirs in moving], 0)
            for mine, theirs in pairs:
                if not mine.is_floating_point():
                    mine.copy_(theirs)

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Go on from where another average was."""
        self.model.load_state_dict(state)
        self.updates = updates


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers; what is shared comes once."""
    return [*model.parameters(), *model.buffers()]
