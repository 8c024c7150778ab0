"""Hyperparameter search for image classifiers; `docs/python.md` walks through this interface.

Importing hpo loads this module and its errors: each name is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hpo import errors

if TYPE_CHECKING:
    from hpo.api.study import Study, load_study
    from hpo.api.trained import train
    from hpo.config.space import Space
    from hpo.config.study import StudyFile
    from hpo.config.train import TrainConfig
    from hpo.trained.inference import TrainedModel

__version__ = "0.1.0"
__all__ = [
    "Space",
    "Study",
    "StudyFile",
    "TrainConfig",
    "TrainedModel",
    "__version__",
    "errors",
    "load_study",
    "train",
]

_MODULES = {
    "Space": "hpo.config.space",
    "Study": "hpo.api.study",
    "StudyFile": "hpo.config.study",
    "TrainConfig": "hpo.config.train",
    "TrainedModel": "hpo.trained.inference",
    "load_study": "hpo.api.study",
    "train": "hpo.api.trained",
}


def __getattr__(name: str) -> Any:
    """Import the public object `name` (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'hpo' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
