"""What retraining runs, decided purely: the trial's schedule without validation images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hpo.definition.config import EarlyStoppingConfig, RuntimeConfig, TrainConfig
from hpo.errors import ConfigError

KEEP = "--keep-validation trains without the validation images and watches them"


@dataclass(frozen=True)
class Recipe:
    """A training and where it ends."""

    config: TrainConfig
    epochs: int
    """Leave after so many: schedules keep the shape that `config.epochs` gives them."""
    metric: str = "val_top1"
    """Which epoch is best, where there is validation."""
    notes: tuple[str, ...] = ()

    def with_runtime(self, runtime: RuntimeConfig) -> Recipe:
        return replace(self, config=self.config.model_copy(update={"runtime": runtime}))


def make_recipe(
    config: TrainConfig, provenance: Mapping[str, Any], keep_validation: bool
) -> Recipe:
    """The full schedule of `config`. Without validation images a plateau replays the rates that
    the trial recorded, and early stopping stops after the epoch in which the trial did; both as
    they are where they watch a training metric and no trial tells more.

    Raises ConfigError where `provenance` does not say what would be needed.
    """
    metric = str(provenance.get("metric", "val_top1"))
    if config.frozen:
        return Recipe(config, config.epochs, metric)
    if keep_validation:
        return Recipe(config, config.epochs, metric)
    recipe = _replayed(Recipe(config, config.epochs, metric), provenance)
    return _stopped(recipe, provenance)


def _replayed(recipe: Recipe, provenance: Mapping[str, Any]) -> Recipe:
    config, rates = recipe.config, tuple(float(rate) for rate in provenance.get("rates", ()))
    if config.schedule.name != "plateau":
        return recipe
    if not provenance and config.schedule.metric.startswith("train_"):
        return recipe
    finished = provenance.get("state") == "complete" and bool(rates)
    same_length = provenance.get("epochs") == config.epochs
    needed = (provenance.get("stopped_epoch") if same_length else None) or config.epochs
    if not finished or len(rates) < needed:
        have = f"{len(rates)} of them are recorded" if rates else "none are recorded"
        if provenance.get("state") == "pruned":
            have += ", because the trial was pruned"
        raise ConfigError(
            f"'plateau': without validation images the rates of the {config.epochs} epochs are "
            f"replayed, and {have}. {KEEP}; or use another schedule, as in --set "
            "schedule.name=cosine",
            key="schedule.name",
        )
    # What stands behind the epoch of early stopping is never reached.
    padded = rates[: config.epochs] + rates[-1:] * (config.epochs - len(rates))
    schedule = config.schedule.model_copy(update={"name": "replay", "rates": padded})
    note = f"Plateau: the rates of trial {provenance.get('trial')} were replayed."
    return replace(
        recipe,
        config=config.model_copy(update={"schedule": schedule}),
        notes=(*recipe.notes, note),
    )


def _stopped(recipe: Recipe, provenance: Mapping[str, Any]) -> Recipe:
    config = recipe.config
    stopping = config.early_stopping
    if stopping.patience is None and not provenance.get("stopped_epoch"):
        return recipe  # neither early stopping nor a pruner that does the same
    if not provenance and stopping.metric.startswith("train_"):
        return recipe
    free = replace(
        recipe, config=config.model_copy(update={"early_stopping": EarlyStoppingConfig()})
    )
    if provenance and provenance.get("epochs") != config.epochs:
        note = f"epochs = {config.epochs} was asked for: all are trained, without early stopping."
        return replace(free, notes=(*recipe.notes, note))
    if provenance.get("state") != "complete":
        raise ConfigError(
            f"{stopping.patience}: without validation images training stops where the trial did, "
            f"and no complete trial is recorded. {KEEP}; or give the epochs, as in --set "
            f"epochs={config.epochs}, and take [early_stopping] out of the file",
            key="early_stopping.patience",
        )
    stopped = provenance.get("stopped_epoch")
    if stopped is None:
        return free
    note = f"Early stopping: after epoch {stopped} of {config.epochs}, where the trial stopped."
    return replace(free, epochs=int(stopped), notes=(*recipe.notes, note))
