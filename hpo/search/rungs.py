"""The rungs of a study as people see them: where they are, who stands where, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable

from hpo.config.study import StudyFile
from hpo.search.promotion import Rungs, Standing, State, geometric
from hpo.storage.records import Trial

CHANCE = "chance"
"""Key of what guessing reaches, which the first worker that sees the images resolves."""

STATES: dict[str, State] = {
    "running": "running",
    "interrupted": "running",
    "paused": "paused",
    "complete": "complete",
    "pruned": "over",
}
"""How trials stand by their states; the others have no place at a rung."""


def rungs_of(file: StudyFile, chance: float | None = None) -> Rungs:
    """Return the rungs of a study, whose guesses reach `chance`."""
    scheduler = file.study.scheduler
    return Rungs(
        epochs=geometric(file.first_rung, file.reduction_factor, file.max_epochs),
        reduction_factor=file.reduction_factor,
        finish=0 if scheduler is None else scheduler.finish,
        maximize=file.direction == "maximize",
        chance=chance,
    )


def standings_of(rungs: Rungs, metric: str, trials: Iterable[Trial]) -> list[Standing]:
    """Return how `trials` stand at the rungs, by the values of `metric`."""
    return [
        rungs.standing(
            trial.number,
            STATES[trial.state],
            [row.metrics.get(metric, math.nan) for row in trial.epochs],
        )
        for trial in trials
        if trial.state in STATES
    ]


def what_decides(file: StudyFile) -> str:
    """Say in a line what decides which trials go on, and why that where hpo chose it."""
    study, why = file.study, file.why_decided
    reason = f" ({why})" if why else ""
    if study.scheduler is None:
        to_end = ": every trial runs to its end" if study.pruner.name == "none" else ""
        return f"pruner {study.pruner.name}{reason}{to_end}"
    rungs, last = rungs_of(file), file.max_epochs
    name = f"scheduler {study.scheduler.name}{reason}"
    if not rungs.epochs:
        return f"{name}: no rung below epoch {last}, so every trial runs to its end"
    first, *later = rungs.epochs
    then = f", then {', '.join(map(str, later))}" if later else ""
    where = f"first rung after epoch {first}{then} of {last}"
    finish = f"; the best {rungs.finish} are finished" if rungs.finish else ""
    return f"{name}: {where}; one in {rungs.reduction_factor} goes on{finish}"


def study_note(file: StudyFile) -> str:
    """Return a note on a study for the dashboard, as Markdown."""
    decides = what_decides(file)
    text = (
        f"{decides[0].upper()}{decides[1:]}.\n\nThe parameter importance in this dashboard is "
        "Optuna's: its shares add up even where no parameter has an effect. What stands out from "
        f"chance is in `hpo report {file.name}`.\n"
    )
    if file.study.scheduler is not None:
        text += (
            "\nA trial that is Running and has no worker is paused at a rung: it goes on if it is "
            "among the best there, and is Pruned at the end of the study otherwise. "
            f"`hpo status {file.name}` counts them, `hpo trial {file.name} N` says where one "
            "stands.\n"
        )
    return text
