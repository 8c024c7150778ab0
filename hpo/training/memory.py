"""Memory of a device: what a training may take, and what one that is over gives back."""

from __future__ import annotations

import gc

import torch

LACKING = ("out of memory", "_STATUS_ALLOC_FAILED")
"""Parts of messages: of MPS, of the CUDA driver, and of cuBLAS and cuDNN, whose errors are no
torch.OutOfMemoryError."""


def is_lack(error: RuntimeError) -> bool:
    """Return whether a device had too little memory, which less at once may need."""
    return isinstance(error, torch.OutOfMemoryError) or any(one in str(error) for one in LACKING)


def is_scarce(device: torch.device) -> bool:
    """Return whether it is worth a tenth of a second to have memory back at once."""
    return device.type != "cpu"


def release(device: torch.device) -> None:
    """Give back what networks took that nobody uses any more. They refer to themselves, as a
    network and its recorded step do, so that Python frees them at some later time, and torch keeps
    a GPU's memory for itself."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def available_bytes(device: torch.device) -> int:
    """Return how much of a GPU is free, without what torch keeps of tensors that are gone."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free
