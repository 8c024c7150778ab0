"""Mistakes of a trial on the validation images: the figure and the gallery of a report."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from hpo.errors import DataError, StorageError
from hpo.formatting import Cell, Table, text_cell
from hpo.paths import Home
from hpo.reports import figures
from hpo.reports.figures import Figure
from hpo.search import predictions
from hpo.search.predictions import Mistake, Predictions
from hpo.search.status import StudyStatus
from hpo.storage.database import Database
from hpo.storage.records import Trial

MOST_CONFUSED = 10


@dataclass(frozen=True)
class Mistakes:
    """What a trial's kept weights get wrong on the validation images."""

    images: int
    wrong: int
    worst: tuple[tuple[Mistake, str], ...]
    """Those that gave the actual class the least probability, worst first, each with its picture as
    a data URL; empty: without one."""
    confusion: Figure | None
    """None for too many classes."""
    confused: Table
    """The most frequent confusions."""


def mistakes_of(database: Database, status: StudyStatus, trial: Trial) -> Mistakes | str:
    """Return the mistakes of a complete trial, or why they are not known."""
    try:
        found = predictions.find(database, Home.default(), status.row.uuid, trial.attempts[-1])
    except (DataError, StorageError) as error:
        return str(error)
    if found is None:
        return f"no predictions of trial {trial.number} were kept"
    return _of(found)


def _of(found: Predictions) -> Mistakes:
    counts = found.confusion
    return Mistakes(
        len(found.names),
        found.wrong,
        tuple((one, _data_url(one.thumbnail)) for one in found.worst()),
        figures.confusion(found.classes, counts),
        confused_table(found.classes, counts),
    )


def _data_url(jpeg: bytes | None) -> str:
    return "" if jpeg is None else f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def confused_table(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Table:
    """Return the most frequent confusions, by their share of the actual class."""
    pairs = [
        (n / sum(row), n, classes[i], classes[j])
        for i, row in enumerate(counts)
        for j, n in enumerate(row)
        if n and i != j
    ]
    pairs.sort(key=lambda pair: (-pair[0], -pair[1]))
    rows = [
        [text_cell(actual), text_cell(predicted), Cell(f"{n:,}", n, "number"),
         Cell(f"{share:.1%}", share, "number")]
        for share, n, actual, predicted in pairs[:MOST_CONFUSED]
    ]  # fmt: skip
    return Table(("actual", "predicted", "images", "share of the class"), rows)
