"""The arithmetic of a training on a device: threads, TF32, cuDNN's choice of algorithms."""

from __future__ import annotations

import torch

from hpo.config.train import RuntimeConfig


def is_fast(runtime: RuntimeConfig, device: torch.device) -> bool:
    """Return whether `runtime` asks for the fastest arithmetic and `device` has any that is faster;
    an unresolved `auto` asks for the same bits."""
    return device.type == "cuda" and runtime.deterministic is False


def set_arithmetic(runtime: RuntimeConfig, device: torch.device) -> None:
    """Set torch's global settings to those of `runtime`, whatever ran before in this process."""
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    fast = is_fast(runtime, device)
    torch.backends.cudnn.benchmark = fast
    torch.backends.cudnn.deterministic = not fast
    if device.type == "cuda":
        # cuDNN's own default is TF32 already. torch's older names for this warn in some versions.
        torch.backends.cuda.matmul.fp32_precision = "tf32" if fast else "ieee"
