"""The arithmetic of a training on a device: threads, TF32, algorithms, random generators."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from hpo.config.train import RuntimeConfig


def is_fast(runtime: RuntimeConfig, device: torch.device) -> bool:
    """Return whether `runtime` asks for the fastest arithmetic and `device` has any that is faster;
    an unresolved `auto` asks for the same bits."""
    return device.type == "cuda" and runtime.deterministic is False


def set_arithmetic(runtime: RuntimeConfig, device: torch.device) -> None:
    """Set torch's global settings to those of `runtime`, whatever ran before in this process. A GPU
    becomes the current one: what names no device would take memory of the first."""
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    fast = is_fast(runtime, device)
    torch.backends.cudnn.benchmark = fast
    torch.backends.cudnn.deterministic = not fast
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuDNN's own default is TF32 already. Unlike `fp32_precision` alone this sets torch's older
        # and newer settings, which raise where they contradict each other and somebody asks.
        torch.backends.cuda.matmul.allow_tf32 = fast
        _set_deterministic(not fast)


def _set_deterministic(wanted: bool) -> None:
    """Let a GPU take algorithms that give the same bits each time, or whichever is fastest. Where
    there are none that do, torch warns."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its start
    if torch.are_deterministic_algorithms_enabled() != wanted:
        torch.use_deterministic_algorithms(wanted, warn_only=wanted)
        # Nothing here reads memory that was not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Where it only warns, the gradients of fused attention are summed in any order.
    torch.backends.cuda.enable_flash_sdp(not wanted)
    torch.backends.cuda.enable_mem_efficient_sdp(not wanted)
    torch.backends.cuda.enable_cudnn_sdp(not wanted)


@contextmanager
def untimed_algorithms() -> Iterator[None]:
    """Let cuDNN choose its algorithms by rule, the same in each process, not by trying them."""
    backend = torch.backends.cudnn
    before = backend.benchmark, backend.deterministic
    backend.benchmark, backend.deterministic = False, True
    try:
        yield
    finally:
        backend.benchmark, backend.deterministic = before


def seed_generators(seed: int) -> None:
    """Seed torch's random generators, and those of Python and NumPy: a network or loss of the
    user's may draw from any of them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Leave the generators of Python and NumPy as they were found: the caller may draw from
    them."""
    before = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
