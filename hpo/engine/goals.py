"""Which metrics are measured where they are asked for alone, and what they need.

Imports no torch: a supervisor judges a study, too.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

from hpo.definition.config import TrainConfig
from hpo.definition.goals import AUC, TOP5, own_function, recalled
from hpo.errors import ConfigError

KEY = "metric"
"""Of the field at fault, for messages: of a study, a schedule or early stopping."""
MOST_NAMED = 20
"""Classes that a message names."""


def asked(config: TrainConfig, *metrics: str) -> tuple[str, ...]:
    """Those of `metrics`, and of what `config` watches, that are more than counts of every epoch,
    or cannot be measured on all data."""
    watched = [*metrics]
    if config.schedule.name == "plateau":
        watched.append(config.schedule.metric)
    if config.early_stopping.patience is not None:
        watched.append(config.early_stopping.metric)
    if config.task != "classification":
        return ()
    return tuple(dict.fromkeys(name for name in watched if _is_special(name)))


def _is_special(name: str) -> bool:
    return name in (AUC, TOP5) or recalled(name) is not None or own_function(name) is not None


def require_supported(asked: Sequence[str], validation: Mapping[str, int]) -> None:
    """Raise ConfigError where `validation`, {class: images}, cannot measure what is `asked`."""
    for name in asked:
        if name == TOP5 and len(validation) <= 5:
            raise ConfigError(
                f"{name!r}: of {len(validation)} classes the right one is always among five; use "
                "val_top1",
                key=KEY,
            )
        if name == AUC and sum(count > 0 for count in validation.values()) < 2:
            raise ConfigError(f"{name!r}: needs validation images of two classes at least", key=KEY)
        if (one := recalled(name)) is not None:
            classes = list(validation)
            if not validation[classes[class_named(one, classes, name)]]:
                raise ConfigError(f"{name!r}: no validation image is of this class", key=KEY)


def class_named(name: str, classes: Sequence[str], metric: str) -> int:
    """The place of the class `name`; the Unicode forms of a name are alike."""
    for form in (str, _composed):
        places = [i for i, one in enumerate(classes) if form(one) == form(name)]
        if len(places) == 1:
            return places[0]
    shown = ", ".join(classes[:MOST_NAMED])
    more = f", ... ({len(classes)} in all)" if len(classes) > MOST_NAMED else ""
    raise ConfigError(f"{metric!r}: no class is called {name!r}; there are {shown}{more}", key=KEY)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
