"""Names of data sets, known without torch."""

from __future__ import annotations

from typing import Any

from hpo.definition.fields import OWN, is_own
from hpo.errors import nearest

TORCHVISION: dict[str, int | None] = {
    "cifar10": 32,
    "cifar100": 32,
    "country211": None,
    "dtd": None,
    "emnist": 28,
    "fashion_mnist": 28,
    "fer2013": 48,
    "fgvc_aircraft": None,
    "flowers102": None,
    "food101": None,
    "gtsrb": None,
    "kmnist": 28,
    "mnist": 28,
    "oxford_iiit_pet": None,
    "qmnist": 28,
    "rendered_sst2": None,
    "stl10": 96,
    "svhn": 32,
    "usps": 16,
}
"""torchvision's classification data sets with a test part, and the side of their pictures in
pixels; None for photographs of many sizes. How each is opened: `hpo.engine.torchvision_sets`."""

BUILT_IN = ("digits", "folder", "csv", "stanford_cars", *TORCHVISION)

FOLDERS = ("folder", "csv")
"""Those whose images are files in folders of the user's."""

NATIVE = {"digits": 8} | {name: side for name, side in TORCHVISION.items() if side}
"""Side of the pictures, in pixels, where all have the same."""

DEFAULT_ROOT = "data"
"""Where named data sets lie unless `data.root` says otherwise."""

SCHEMA = {"anyOf": [{"enum": list(BUILT_IN)}, OWN]}


def known_data(value: Any) -> Any:
    """Refuse a name that is neither built in nor of the form `module:function`."""
    if isinstance(value, str) and value not in BUILT_IN and not is_own(value):
        own = "your own is named module:function"
        raise ValueError(f"unknown data set; {own if ':' in value else nearest(value, BUILT_IN)}")
    return value
