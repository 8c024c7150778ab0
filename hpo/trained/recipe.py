"""Recipe of a retraining: a configuration, how it is trained without validation images, and when it
stops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hpo.config.base import flatten
from hpo.config.study import load_config
from hpo.config.train import EarlyStoppingConfig, RuntimeConfig, TrainConfig
from hpo.errors import ConfigError, Conflict
from hpo.io import same_place
from hpo.trained.run import RunDir, RunMetadata

KEEP = "--keep-validation trains without the validation images and watches them"


@dataclass(frozen=True)
class Recipe:
    """A configuration to train, and when to stop."""

    config: TrainConfig
    epochs: int
    """Epochs after which training stops; schedules keep the shape of `config.epochs`."""
    metric: str = "val_top1"
    """Metric that decides which epoch is best, if there is validation."""
    notes: tuple[str, ...] = ()

    def with_runtime(self, runtime: RuntimeConfig) -> Recipe:
        """Return it with another runtime."""
        return replace(self, config=self.config.model_copy(update={"runtime": runtime}))


def make_recipe(
    config: TrainConfig, provenance: Mapping[str, Any], keep_validation: bool
) -> Recipe:
    """Return the full schedule of `config`. Without validation images a plateau schedule replays
    the rates that the trial recorded, and early stopping stops after the epoch in which the trial
    stopped; without a trial, both are kept if they watch a training metric.

    Raises ConfigError if `provenance` lacks what is needed.
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
    # Rates after the epoch of early stopping are never used.
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


def stored_recipe(files: RunDir, asked: Recipe, keep_validation: bool) -> Recipe | None:
    """Return the recipe of the run in `files`; None if there is no run. Raises Conflict if it is
    not the one asked for."""
    if not files.exists:
        if files.config.exists():
            raise Conflict(f"{files.config} is not of a run; choose another directory with -o")
        return None
    about = RunMetadata.read(files.about)
    stored = make_recipe(*load_config(files.config, recorded=True), about.keep_validation)
    changed = _differences(stored, asked)
    if about.keep_validation != keep_validation:
        changed.append(f"keep_validation: {about.keep_validation} -> {keep_validation}")
    if changed:
        lines = "".join(f"\n  {line}" for line in changed)
        raise Conflict(
            f"{files.root} holds the run of another configuration (there -> asked for):{lines}\n"
            "Choose another directory with -o, or remove this one"
        )
    return stored


def _differences(stored: Recipe, asked: Recipe) -> list[str]:
    """Return a line for each field that differs; an `auto` matches what it was resolved to."""
    there, here = flatten(stored.config.to_dict()), flatten(asked.config.to_dict())
    if there["epochs"] == here["epochs"]:
        there["epochs trained"], here["epochs trained"] = stored.epochs, asked.epochs
    for place in ("data.root", "data.labels"):
        if place in here and same_place(there.get(place), here[place]):
            there[place] = here[place]
    open_ = {key for key in here if key.startswith("runtime.") and _is_open(here[key])}
    return [
        f"{key}: {there.get(key)} -> {here.get(key)}"
        for key in sorted(there.keys() | here.keys())
        if key not in open_ and there.get(key) != here.get(key)
    ]


def _is_open(value: Any) -> bool:
    """Return whether a field of the runtime is to be resolved."""
    return value == "auto" or (value == 0 and value is not False)


def seeds_needed(config: TrainConfig, seeds: int) -> int:
    """Return 1 if nothing is trained and the weights come from a file, since every seed would give
    the same; else `seeds`."""
    return 1 if config.frozen and config.model.weights is not None else seeds
