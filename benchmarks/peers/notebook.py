"""A grid as in a notebook: nested loops, one training after another, all of it to the end."""

from __future__ import annotations

import itertools
from typing import Any

from benchmarks.peers.search import Config, Search, searched
from benchmarks.peers.training import epochs

AXES: dict[str, list[Any]] = {
    "lr": [0.001, 0.003, 0.01, 0.1],
    "optimizer": ["sgd", "adamw"],
    "augment": [False, True],
    "batch_size": [64, 128],
    "weight_decay": [1e-4, 1e-3],
    "momentum": [0.9, 0.95],
}
"""In the order in which people add them."""
LOADER_WORKERS = 2


def grid(trials: int) -> list[Config]:
    """The largest grid of at most `trials` points: as many axes as fit, the rest at their first
    value."""
    points = 1
    axes: dict[str, list[Any]] = {}
    for name, values in AXES.items():
        fits = points * len(values) <= trials
        points *= len(values) if fits else 1
        axes[name] = values if fits else values[:1]
    return [
        {**dict(zip(axes, point, strict=True)), "flip": (on := point[2]), "crop": on}
        for point in itertools.product(*axes.values())
    ]


def run(search: Search) -> None:
    best: tuple[float, Config] = (-1.0, {})
    for trial, config in enumerate(grid(search.trials)):
        training = epochs(
            search.data,
            config,
            search.epochs,
            seed=search.seed,
            loader_workers=LOADER_WORKERS,
        )
        for epoch, accuracy in enumerate(training, 1):
            search.log(trial, epoch, accuracy)
        if accuracy > best[0]:
            best = (accuracy, config)
    search.won(best[1], best[0])


if __name__ == "__main__":
    searched(run)
