"""Small data sets, and one random sample of configurations trained on each: studies to learn from.

Called by `python -m benchmarks.portfolio --collect`.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hpo
from hpo.config.recommended import recommend


@dataclass(frozen=True)
class Cut:
    """A small data set out of a folder of images by class: of each class `train` images, then
    `val`, after the first `start` in a random order that is always the same. Cuts of one folder
    share no image where their ranges differ. Beyond an @, a name tells cuts of one data set apart.
    """

    name: str = "all"
    train: int = 80
    val: int = 80
    start: int = 0
    classes: tuple[str, ...] = ()
    """All where empty."""


CUTS = {
    "cifar10": (
        Cut("animals", 134, 134, 0, ("bird", "cat", "deer", "dog", "frog", "horse")),
        Cut("vehicles", 200, 200, 0, ("airplane", "automobile", "ship", "truck")),
        Cut("ten@a", 80, 80, start=400),
        Cut("ten@b", 40, 80, start=600),
        Cut("ten@c", 160, 80, start=800),
        Cut("ten@long", 400, 80, start=1040),
    )
}
"""Cuts by the name of their source; of any other source one with 80 + 80 images a class."""
IMAGE_SIZE = 16
PLAIN = {"architecture": "small_cnn", "cnn": {"filters": [32, 64, 128]}}
RESNET = {"architecture": "benchmarks.networks:narrow_resnet18"}


@dataclass(frozen=True)
class Plan:
    """Which network is trained for how long with how many configurations of the sample."""

    name: str
    model: dict[str, Any]
    trials: int
    epochs: int
    data: frozenset[str]
    """Names of the data: digits, and those of cuts."""


PLANS = (
    Plan("plain", PLAIN, 40, 6,
         frozenset({"digits", "all", "animals", "vehicles", "ten@a", "ten@b", "ten@c"})),
    Plan("resnet18", RESNET, 24, 6, frozenset({"digits", "all", "animals"})),
    Plan("plain", PLAIN, 16, 8, frozenset({"ten@long"})),
)  # fmt: skip
"""The last one has seven times as many steps: does what few images teach hold there?"""
SPACE: dict[str, Any] = {
    "optimizer.name": ["sgd", "adamw"],
    "optimizer.lr": {"low": 1e-4, "high": 0.3, "log": True},
    "optimizer.momentum": {"low": 0.8, "high": 0.98, "when": {"optimizer.name": "sgd"}},
    "optimizer.weight_decay": {"low": 1e-6, "high": 1e-1, "log": True},
    "batch_size": [16, 32, 64, 128],
    "schedule.name": ["cosine", "onecycle"],
    "label_smoothing": [0.0, 0.1],
    "model.dropout": {"low": 0.0, "high": 0.4, "step": 0.1},
    "augment.crop_padding": [0, 1, 2],
    "augment.erasing": [0.0, 0.25],
}


def collect(folder: Path, sources: Mapping[str, Path], workers: int) -> str:
    """Train the sample, then what hpo recommends, on every data set with every network; goes on
    where it was stopped. Returns the URL of the database in `folder`."""
    os.environ["HPO_HOME"] = str(folder / "hpo_runs")
    folder.mkdir(parents=True, exist_ok=True)
    url = f"sqlite:///{folder / 'studies.db'}"
    for plan in PLANS:
        for data in data_sets(folder, sources, plan.data):
            tables = study_tables(f"{data_name(data)}-{plan.name}", data, plan)
            study = hpo.Study.create(tables, storage=url)
            study.run(workers=workers, device="cpu")
            add_recommended(study)
            study.run(workers=workers, device="cpu")
    return url


def data_sets(
    folder: Path, sources: Mapping[str, Path], names: frozenset[str]
) -> Iterator[dict[str, Any]]:
    """Tables [train.data] of those of `names` among the digits and the cuts of `sources`, which are
    written first."""
    if "digits" in names:
        yield {"dataset": "digits", "limit_train": 800}
    for name, source in sources.items():
        for cut in CUTS.get(name, (Cut(),)):
            if cut.name in names:
                root = folder / "data" / name / cut.name
                write_cut(source, cut, root)
                yield {"dataset": "folder", "root": str(root), "image_size": IMAGE_SIZE}


def data_name(data: Mapping[str, Any]) -> str:
    """The data's part of a study's name."""
    place = Path(data["root"]).parts[-2:] if "root" in data else (data["dataset"],)
    return "-".join(place).replace("@", "-")


def study_tables(name: str, data: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """A study of random trials, whose configurations are the same for all data: what trial n draws
    depends on the seed, n and the space."""
    return {
        "study": {"name": name, "trials": plan.trials, "sampler": "random", "pruner": "none",
                  "defaults": False},
        "train": {
            "epochs": plan.epochs,
            "data": dict(data),
            "model": plan.model,
            "runtime": {"precision": "float32", "memory_format": "channels_last", "threads": 1},
        },
        "space": SPACE,
    }  # fmt: skip


def add_recommended(study: hpo.Study) -> None:
    """Enqueue what hpo recommends for the study, unless it is there."""
    known = [trial.params for trial in study.trials]
    new = [values for values in recommended(study.file) if values not in known]
    if new:
        study.extend(trials=study.row.trials + len(new))
    for values in new:
        study.enqueue(values)


def recommended(file: hpo.StudyFile) -> list[dict[str, Any]]:
    """What hpo recommends for a study of `file`, cut to its space."""
    asked = file.study.model_copy(update={"defaults": True})
    with_them = hpo.StudyFile(asked, file.train, file.space)
    return [dict(one.values) for one in recommend(with_them)]


def write_cut(source: Path, cut: Cut, out: Path) -> None:
    """Copy the images of `cut` to `out`/train and `out`/val, unless they are there."""
    if out.is_dir():
        return
    base = source / "train" if (source / "train").is_dir() else source
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for label in cut.classes or sorted(one.name for one in base.iterdir() if one.is_dir()):
        files = sorted((base / label).iterdir())
        random.Random(label).shuffle(files)
        for number, file in enumerate(files[cut.start : cut.start + cut.train + cut.val]):
            folder = part / ("train" if number < cut.train else "val") / label
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder)
    part.rename(out)
