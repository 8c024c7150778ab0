"""Which devices this machine has, and how many threads a worker gets. Does not import torch.

The supervisor must not: it would cost its memory and seconds, and a CUDA context of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess

from hpo.errors import InputError


def visible_gpus() -> list[str]:
    """`cuda:0` ... of the NVIDIA devices that a torch process here would see."""
    limited = os.environ.get("CUDA_VISIBLE_DEVICES")
    if limited is not None:
        named = [name for name in limited.split(",") if name.strip() and name.strip() != "-1"]
        return [f"cuda:{i}" for i in range(len(named))]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True, check=False)
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [f"cuda:{i}" for i in range(count)]


def first_device(device: str | None) -> str:
    """Return `device`, else the first visible GPU, else the CPU."""
    return device or next(iter(visible_gpus()), "cpu")


def require_device(device: str | None) -> None:
    """Raise InputError for a device that this machine does not have. The usual ones are known
    without torch, which a supervisor must not load."""
    gpus = visible_gpus()
    if device in (None, "cpu", *gpus) or (device == "cuda" and gpus):
        return
    from hpo.engine.runtime import torch_device

    torch_device(str(device))


def spread(workers: int | None, per_device: int, device: str | None) -> list[str]:
    """A device for each worker: all visible GPUs in turn, else the CPU.

    `workers` None: `per_device` on each device. Raises InputError for numbers below 1.
    """
    for name, value in (("workers", workers), ("workers_per_device", per_device)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: at least 1")
    devices = [device] if device else visible_gpus() or ["cpu"]
    count = workers if workers is not None else per_device * len(devices)
    return [devices[i % len(devices)] for i in range(count)]


def threads_for(workers: int) -> int:
    """CPU threads of each of `workers` on this machine: its cores, shared; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, workers))
