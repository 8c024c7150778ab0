"""Options for the limits of a study: trials, time, full trainings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpo.errors import InputError
from hpo.formatting import parse_duration

if TYPE_CHECKING:
    from hpo.api.study import Study

Trials = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Number of trials: study.trials of the file.",
        show_default="the file's",
    ),
]
MaxTime = Annotated[
    str | None,
    typer.Option(
        "--time",
        metavar="T",
        help="Longest time by the clock, such as 90s, 30m, 1h30m: study.max_time of the file.",
        show_default="the file's",
    ),
]
MaxFullTrainings = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Most epochs, in trainings of the largest number of epochs: study.max_full_trainings.",
        show_default="the file's",
    ),
]


def assignments(
    trials: int | None, max_time: str | None, max_full_trainings: float | None
) -> list[str]:
    """Return the limits that are given as `--set` writes them."""
    given = {"trials": trials, "max_time": max_time, "max_full_trainings": max_full_trainings}
    return [f"study.{name}={value}" for name, value in given.items() if value is not None]


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError("a whole number such as 50, or +20 for 20 more")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number such as 12.5, or +5 for 5 more") from None


READ: Mapping[str, Callable[[str], float]] = {
    "epochs": _whole,
    "trials": _whole,
    "max_time": parse_duration,
    "max_full_trainings": _number,
    "timeout_s": parse_duration,
}
"""How each limit is read that `+` adds to."""


def raised(study: Study, texts: Mapping[str, str | None]) -> dict[str, Any]:
    """Return new limits by their names in `[study]`, of texts such as `50`, or `+20` for twenty
    more than now. Raises InputError for a text that is neither."""
    return {name: _raised(study, name, text) for name, text in texts.items() if text is not None}


def _raised(study: Study, name: str, text: str) -> float:
    from hpo.search.scheduling import option
    from hpo.search.study import limit_of

    more = text.removeprefix("+")
    try:
        value = READ[name](more)
    except ValueError as error:
        raise InputError(f"{option(name)} {text!r}: {error}") from None
    if more == text:
        return value
    now = limit_of(study.row, name)
    if now is None:
        raise InputError(f"{option(name)} {text!r}: study {study.name!r} has no such limit yet")
    return now + value  # type: ignore[no-any-return]
