"""Hyperparameter search for image classifiers; `docs/python.md` walks through this interface.

Importing hpo loads nothing but this module: each name is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.definition.config import TrainConfig
    from hpo.definition.space import Space
    from hpo.definition.studyfile import StudyFile

__version__ = "0.1.0"
__all__ = ["Space", "StudyFile", "TrainConfig", "__version__"]

_MODULES = {
    "Space": "hpo.definition.space",
    "StudyFile": "hpo.definition.studyfile",
    "TrainConfig": "hpo.definition.config",
}


def __getattr__(name: str) -> Any:
    """Import the public object `name` (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'hpo' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
