"""Layout of a run directory: the only module that knows its file names.

    hpo_runs/                     HPO_HOME, default under the working directory
    ├── hpo.db                    the default storage
    ├── cache/                    decoded images, features/ of frozen layers, and compiled/
    │                             networks, shared by all studies and workers of this host
    ├── studies/<uuid>/
    │   ├── logs/<worker>.log
    │   ├── workers/<worker>.alive   touched at every step; the supervisor's watchdog reads its age
    │   ├── tensorboard/trial-<number>/   event files of `log = ["tensorboard"]`
    │   └── trials/<number>/attempt-<k>/
    │       ├── epoch-<n>.ckpt       the last one; gone when the trial is over (keep_checkpoints)
    │       ├── weights.safetensors  best epoch's, for the best three trials
    │       └── predictions.npz      of those weights, on the validation images
    ├── mlflow.db, wandb/         of `log = ["mlflow", "wandb"]`, where no server has them
    └── trained/<name>/           what `hpo train` writes, by default (-o)

Where a study has artifacts (`--artifacts`), its trials/ are there too, under the same names, with
study.toml and report.html.

Ids of the database are not used in paths: SQLite gives an id out again after a delete. What does
come from there (uuids, numbers, workers) must look as hpo writes it: a row that somebody changed
leads to no file outside of the run directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpo.errors import StorageError

CHECKPOINT = re.compile(r"trials/(\d+)/attempt-(\d+)/epoch-(\d+)\.ckpt")
"""Name of a checkpoint within its study: trial, attempt, epoch."""
WEIGHTS = re.compile(r"trials/(\d+)/attempt-(\d+)/weights\.safetensors")
"""Name of kept weights within their study: trial, attempt."""
PREDICTIONS = re.compile(r"trials/(\d+)/attempt-(\d+)/predictions\.npz")
"""Name of their predictions: trial, attempt."""


@dataclass(frozen=True)
class Home:
    """The run directory."""

    root: Path

    @classmethod
    def default(cls) -> Home:
        """Return HPO_HOME, or hpo_runs under the working directory."""
        return cls(Path(os.environ.get("HPO_HOME", "hpo_runs")).absolute())

    @property
    def database(self) -> Path:
        """Return the file of the default storage."""
        return self.root / "hpo.db"

    @property
    def storage(self) -> str:
        """Return the URL of the default storage."""
        return f"sqlite:///{self.database}"

    @property
    def cache(self) -> Path:
        """Return the folder of caches."""
        return self.root / "cache"

    def signs(self, host: str) -> Iterator[Path]:
        """Yield the files that the workers of `host` touch, in all studies."""
        return self.root.glob(f"studies/*/workers/{host}-*.alive")

    def study(self, uuid: str) -> StudyDir:
        """Return the files of a study; raise StorageError for what is no uuid of one."""
        return StudyDir(self.root / "studies" / _matching(UUID, uuid))

    def studies(self) -> list[StudyDir]:
        """Return the files of all studies that have some here."""
        found = sorted((self.root / "studies").glob("*/"))
        return [StudyDir(path) for path in found if is_uuid(path.name)]

    @property
    def mlflow(self) -> Path:
        """Return the file of MLflow's runs, where no server has them."""
        return self.root / "mlflow.db"

    def trained(self, name: str) -> Path:
        """Return the folder of a trained run."""
        return self.root / "trained" / name


@dataclass(frozen=True)
class StudyDir:
    """Files of one study on this host."""

    root: Path

    @property
    def uuid(self) -> str:
        """Return the study's uuid."""
        return self.root.name

    @property
    def above(self) -> list[Path]:
        """Return the folders of the run directory that it is in, the innermost first."""
        return list(self.root.parents[:2])

    def name_of(self, path: Path) -> str:
        """Return the name of a file or folder below, relative to the study."""
        return path.relative_to(self.root).as_posix()

    def log(self, worker: str) -> Path:
        """Return a worker's log."""
        return self.logs / f"{_matching(WORKER, worker)}.log"

    @property
    def logs(self) -> Path:
        """Return the folder of logs."""
        return self.root / "logs"

    def alive(self, worker: str) -> Path:
        """Return the file that a worker touches at every step."""
        return self.root / "workers" / f"{_matching(WORKER, worker)}.alive"

    @property
    def tensorboard(self) -> Path:
        """Return the folder of TensorBoard's event files."""
        return self.root / "tensorboard"

    @property
    def trials(self) -> Path:
        """Return the folder of trials."""
        return self.root / "trials"

    def trial(self, number: int) -> Path:
        """Return a trial's folder."""
        return self.trials / _number(number)

    def attempt(self, number: int, attempt: int) -> Path:
        """Return an attempt's folder."""
        return self.trial(number) / f"attempt-{_number(attempt)}"

    def weights(self, number: int, attempt: int) -> Path:
        """Return the file of an attempt's best weights."""
        return self.attempt(number, attempt) / "weights.safetensors"

    def predictions(self, number: int, attempt: int) -> Path:
        """Return the file of those weights' predictions on the validation images."""
        return self.attempt(number, attempt) / "predictions.npz"

    def checkpoint(self, number: int, attempt: int, epoch: int) -> Path:
        """Return the file of an attempt's checkpoint after `epoch`."""
        return self.attempt(number, attempt) / f"epoch-{_number(epoch)}.ckpt"

    def checkpoints(self, number: int) -> list[tuple[int, int, Path]]:
        """Return (epoch, attempt, file) of each checkpoint of a trial on this host."""
        found = []
        for path in files_in(self.trial(number)):
            if name := CHECKPOINT.fullmatch(self.name_of(path)):
                found.append((int(name[3]), int(name[2]), path))
        return found


def files_in(folder: Path) -> list[Path]:
    """Return all files below `folder`. Others remove theirs meanwhile: what is gone holds none,
    where pathlib's own search would raise."""
    return [Path(at, name) for at, _, names in os.walk(folder) for name in names]


def folders_in(folder: Path) -> list[Path]:
    """Return all folders below `folder`, the deepest first; likewise."""
    return [Path(at) for at, *_ in os.walk(folder, topdown=False) if at != str(folder)]


UUID = r"[0-9a-f]{32}"
WORKER = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"


def is_uuid(name: str) -> bool:
    """Return whether a folder of that name can be a study's."""
    return re.fullmatch(UUID, name) is not None


def _matching(pattern: str, value: object) -> str:
    """Return `value` as text; raise StorageError where it is not wholly of this form."""
    text = str(value)
    if not re.fullmatch(pattern, text):
        raise StorageError(
            f"the database holds {text[:80]!r} where hpo writes {pattern}: somebody changed it; "
            "no file of that name is touched"
        )
    return text


def _number(value: int) -> str:
    """Return a number for a name; SQLite takes text in a column of numbers as well."""
    return _matching(r"\d+", value)
