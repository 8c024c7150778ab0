"""One search as every peer is asked for it, and what it leaves."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Config = dict[str, Any]
"""optimizer (sgd or adamw), lr, weight_decay, momentum (of sgd), batch_size, flip, crop."""


@dataclass(frozen=True)
class Search:
    """What a peer is asked to do, and where it leaves what it found."""

    data: Path
    """Folder with train/ and val/, in each a folder for each class."""
    out: Path
    """Folder for `epochs.jsonl`, `winner.json` and whatever else the peer writes."""
    trials: int
    epochs: int
    workers: int
    seed: int

    def log(self, trial: object, epoch: int, accuracy: float, at: float | None = None) -> None:
        """Append one epoch, finished now or `at` a time; lines of several processes do not mix."""
        row = {"trial": str(trial), "epoch": epoch, "accuracy": accuracy, "time": at or time.time()}
        with (self.out / "epochs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def won(self, config: Config, accuracy: float) -> None:
        """Leave the configuration that this search would be ended with."""
        text = json.dumps({"config": config, "accuracy": accuracy})
        (self.out / "winner.json").write_text(text, encoding="utf-8")


def searched(run: Callable[[Search], None]) -> None:
    """Run one peer's search as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    for name in ("trials", "epochs", "workers", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    run(Search(**vars(parser.parse_args())))
