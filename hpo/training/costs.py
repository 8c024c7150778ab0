"""Parameters and multiply-adds of networks, each counted once per host.

To count them a network is built, which takes torch and seconds; what was counted stays in the
cache. Imports no torch.
"""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from hpo import __version__
from hpo.config.base import is_function_name, is_timm
from hpo.config.train import TrainConfig
from hpo.errors import DiskFull
from hpo.io import atomic_write, short_hash

COUNTED = ("parameters", "flops")
"""What is counted; see `hpo.training.profiling`."""
FOLDER = "costs"


def count(config: TrainConfig, classes: int, cache: Path) -> dict[str, float]:
    """Return COUNTED of the network of `config`: as `cache` knows them, else by building it. Raises
    what `models.build` raises."""
    path = _path(config, classes, cache)
    found = None if path is None else _read(path)
    if found is None:
        found = _count(config, classes)
        if path is not None:
            content = json.dumps(found).encode()
            with suppress(DiskFull):  # it is counted again
                atomic_write(path, lambda file: file.write(content))
    return found


def _path(config: TrainConfig, classes: int, cache: Path) -> Path | None:
    """Return the file of a network's counts; None for one of the user's, which may change."""
    if is_function_name(config.model.architecture):
        return None
    versions = [__version__, version("torch"), version("torchvision")]
    versions += [version("timm")] if is_timm(config.model.architecture) else []
    model = config.model.model_dump(mode="json", exclude={"weights"})
    key = short_hash([model, config.data.image_size, classes, versions])
    return cache / FOLDER / f"{key}.json"


def _read(path: Path) -> dict[str, float] | None:
    try:
        found = json.loads(path.read_bytes())
        return {name: float(found[name]) for name in COUNTED}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _count(config: TrainConfig, classes: int) -> dict[str, float]:
    import torch

    from hpo.training.profiling import network_costs

    return network_costs(config, COUNTED, classes=classes, device=torch.device("cpu"))
