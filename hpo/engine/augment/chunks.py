"""How many pictures to change at once."""

from __future__ import annotations

from torch import Tensor

_CACHED = 200_000  # floats


def at_once(batch: Tensor) -> int:
    """A CPU is quickest with what fits its cache, a GPU with everything at once."""
    return len(batch) if batch.is_cuda else max(1, _CACHED // batch[0].numel())
