"""The only module that knows file names under a run directory.

    hpo_runs/                     HPO_HOME, default under the working directory
    ├── hpo.db                    the default storage
    ├── cache/                    decoded images, and features/ of frozen layers, shared by all
    │                             studies and workers of this host
    ├── studies/<uuid>/
    │   ├── logs/<worker>.log
    │   ├── workers/<worker>.alive   touched at every step; the supervisor's watchdog reads its age
    │   └── trials/<number>/
    │       ├── weights.safetensors  best epoch's, for the best three trials
    │       └── attempt-<k>/epoch-<n>.ckpt
    └── trained/<name>/           what `hpo train` writes, unless told otherwise with -o

Ids of the database are not used in paths: SQLite gives an id out again after a delete.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """The run directory."""

    root: Path

    @classmethod
    def default(cls) -> Home:
        """HPO_HOME, or hpo_runs under the working directory."""
        return cls(Path(os.environ.get("HPO_HOME", "hpo_runs")).absolute())

    @property
    def database(self) -> Path:
        return self.root / "hpo.db"

    @property
    def storage(self) -> str:
        """URL of the default storage."""
        return f"sqlite:///{self.database}"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def study(self, uuid: str) -> StudyDir:
        return StudyDir(self.root / "studies" / uuid)

    def trained(self, name: str) -> Path:
        return self.root / "trained" / name


@dataclass(frozen=True)
class StudyDir:
    """Files of one study on this host."""

    root: Path

    def log(self, worker: str) -> Path:
        return self.root / "logs" / f"{worker}.log"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def alive(self, worker: str) -> Path:
        return self.root / "workers" / f"{worker}.alive"

    @property
    def trials(self) -> Path:
        return self.root / "trials"

    def trial(self, number: int) -> Path:
        return self.trials / str(number)

    def weights(self, number: int) -> Path:
        return self.trial(number) / "weights.safetensors"

    def checkpoint(self, number: int, attempt: int, epoch: int) -> Path:
        return self.trial(number) / f"attempt-{attempt}" / f"epoch-{epoch}.ckpt"
