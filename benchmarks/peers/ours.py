"""hpo as its users call it: a study file, `hpo run`, and what the database holds afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tomli_w

import hpo
from benchmarks.peers.search import Config, Search

SPACE = {
    "optimizer.name": ["sgd", "adamw"],
    "optimizer.lr": {"low": 1e-4, "high": 0.3, "log": True},
    "optimizer.weight_decay": {"low": 1e-6, "high": 1e-2, "log": True},
    "optimizer.momentum": {"low": 0.8, "high": 0.98, "when": {"optimizer.name": "sgd"}},
    "batch_size": [32, 64, 128],
    "augment.horizontal_flip": [0.0, 0.5],
    "augment.crop_padding": [0, 4],
}


def study_file(search: Search) -> str:
    """The network of `training.network`, its cosine annealing, and the space of the others."""
    data = {"dataset": "folder", "root": str(search.data), "image_size": 32}
    return tomli_w.dumps(
        {
            "study": {"name": "peer", "trials": search.trials, "seed": search.seed},
            "train": {
                "epochs": search.epochs,
                "seed": search.seed,
                "data": data,
                "model": {"architecture": "small_cnn"},
            },
            "space": SPACE,
        }
    )


def command(search: Search, settings: list[str]) -> list[str]:
    """Write the study file; return the command line that runs it."""
    path = search.out / "peer.toml"
    path.write_text(study_file(search), encoding="utf-8")
    run = [sys.executable, "-m", "hpo", "run", str(path), "--workers", str(search.workers)]
    return [*run, "--plain", *(word for one in settings for word in ("--set", one))]


def environment(search: Search) -> dict[str, str]:
    """Of the command: a home of its own, so that nothing is decoded or measured yet."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HPO_")}
    return kept | {"HPO_HOME": str(search.out / "home")}


def collect(search: Search) -> None:
    """Leave what the peers leave."""
    study = hpo.load_study("peer", storage=f"sqlite:///{search.out / 'home' / 'hpo.db'}")
    rows = [(one.finished, trial.number, one) for trial in study.trials for one in trial.epochs]
    for finished, number, epoch in sorted(rows, key=lambda row: row[0]):
        search.log(number, epoch.epoch, epoch.metrics["val_top1"], at=finished)
    best = study.best_trial
    search.won(plain(best.params), best.value)


def plain(params: dict[str, object]) -> Config:
    """A configuration in the peers' words."""
    words = {name.rpartition(".")[2]: value for name, value in params.items()}
    config = {"optimizer": words.pop("name"), **words}
    config["flip"] = bool(config.pop("horizontal_flip"))
    config["crop"] = bool(config.pop("crop_padding"))
    return config


def run(search: Search, settings: list[str], log: Path) -> int:
    """Search; return the exit code. What is printed goes to `log`."""
    with log.open("w", encoding="utf-8") as file:
        return subprocess.run(
            command(search, settings), env=environment(search), stdout=file, stderr=file
        ).returncode
