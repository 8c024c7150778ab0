"""What decides the bits of a training beside its configuration, seed and images."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version

import hpo
from hpo.config.base import flatten, is_timm
from hpo.config.metrics import user_function
from hpo.config.train import TrainConfig

CODE = "code"
"""How the parts begin that are code of hpo or of the user."""
LIBRARIES = ("torch", "torchvision", "numpy", "pillow")


def environment_of(config: TrainConfig, device: str, processor: str) -> dict[str, str]:
    """Return versions, digests of the code, and the kind and name of the device, each by its name
    in words."""
    from hpo.search.fingerprints import DECISIVE, code_parts
    from hpo.search.fingerprints import LIBRARIES as COUNTED

    named = flatten(config.to_dict())
    own = {user_function(str(named.get(field))) for field in (*DECISIVE, "data.dataset")}
    more = ["timm"] if is_timm(config.model.architecture) else []
    parts = code_parts(sorted({one.partition(":")[0] for one in own if one}))
    return {
        "hpo": hpo.__version__,
        **{f"{CODE} {name}": digest for name, digest in parts.items() if name not in COUNTED},
        "python": platform.python_version(),
        **{name: version(name) for name in (*LIBRARIES, *more)},
        "device": device,
        "processor": processor,
    }


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Return what differs, by name: `2.14.0 -> 2.15.1`."""
    return {
        name: f"{before.get(name, '(none)')} -> {now.get(name, '(none)')}"
        for name in dict.fromkeys((*before, *now))
        if before.get(name) != now.get(name)
    }
