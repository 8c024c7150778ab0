"""The directory of a trained run: begun for one configuration, or found again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from hpo.definition.config import TrainConfig
from hpo.definition.fields import flatten
from hpo.definition.studyfile import dump_config, load_config
from hpo.engine.data_report import DataReport
from hpo.engine.datasets import Data
from hpo.engine.runtime import resolve
from hpo.errors import Conflict, InputError
from hpo.files import same_place
from hpo.results.recipe import Recipe, make_recipe
from hpo.results.retrieval import seeds_needed
from hpo.results.runs import About, RunDir, write_whole

if TYPE_CHECKING:
    import torch


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """One writer at a time. Raises Conflict where there is another, InputError where `out` cannot
    be a directory."""
    lock = FileLock(out / ".lock", timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise Conflict(f"{out}: another hpo train is writing there; wait, or use -o") from None
    except OSError as error:
        raise InputError(f"{out} cannot be a run directory: {error.strerror}; use -o") from error
    try:
        yield
    finally:
        lock.release()


def stored_recipe(files: RunDir, asked: Recipe, keep_validation: bool) -> Recipe | None:
    """The recipe of the run that `files` holds, if it is the one asked for; None if there is no
    run. Raises Conflict where it is another."""
    if not files.exists:
        if files.config.exists():
            raise Conflict(f"{files.config} is not of a run; choose another directory with -o")
        return None
    about = About.read(files.about)
    stored = make_recipe(*load_config(files.config), about.keep_validation)
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
    """A line for each field; what is left to be resolved matches whatever it was resolved to."""
    there, here = flatten(stored.config.to_dict()), flatten(asked.config.to_dict())
    if there["epochs"] == here["epochs"]:
        there["epochs trained"], here["epochs trained"] = stored.epochs, asked.epochs
    for place in ("data.root", "data.labels"):
        if place in here and same_place(there.get(place), here[place]):
            there[place] = here[place]
    open_ = {key for key in here if key.startswith("runtime.") and here[key] in (0, "auto")}
    return [
        f"{key}: {there.get(key)} -> {here.get(key)}"
        for key in sorted(there.keys() | here.keys())
        if key not in open_ and there.get(key) != here.get(key)
    ]


def begin(
    files: RunDir,
    config: TrainConfig,
    provenance: Mapping[str, Any],
    recipe: Recipe,
    data: Data,
    report: DataReport,
    device: torch.device,
    threads: int,
    keep_validation: bool,
) -> Recipe:
    """Resolve what is `auto` and write down what the run is; returns the recipe with that in it."""
    runtime = resolve(config, classes=len(data.classes), device=device, threads=threads)
    about = About(
        classes=data.classes,
        mean=data.mean,
        std=data.std,
        fingerprint=data.fingerprint,
        keep_validation=keep_validation,
        has_test=data.has_test,
        epochs=recipe.epochs,
        notes=(*recipe.notes, *_data_notes(config, provenance, data, report)),
    )
    about.write(files.about)
    settled = config.model_copy(update={"runtime": runtime})
    write_whole(files.config, dump_config(settled, provenance))
    return recipe.with_runtime(runtime)


def begun(files: RunDir, data: Data) -> About:
    """What the run that `files` hold was begun with. Raises Conflict where that is not `data`."""
    about = About.read(files.about)
    if about.fingerprint != data.fingerprint:
        raise Conflict(f"{files.root} was begun with other images; restore them, or use -o")
    return about


def _data_notes(
    config: TrainConfig, provenance: Mapping[str, Any], data: Data, report: DataReport
) -> Iterator[str]:
    if config.data.limit_train is not None:
        yield (
            f"data.limit_train = {config.data.limit_train}: only so many training images were "
            "used, as in the search; --set data.limit_train=1000000000 uses all"
        )
    if config.data.folds is not None:
        yield f"data.folds = {config.data.folds} is of the search: a seed trains one network."
    known = provenance.get("data_fingerprints", [])
    if known and data.fingerprint not in known:
        yield "The images are not those of the search: their contents or their split changed."
    if seeds_needed(config, 2) == 1:
        yield "Nothing learns here: every seed would give the same result, so one is run."
    yield from report.oddities()
    if not data.has_test:
        yield "There is no test split: no number here is a test result."
