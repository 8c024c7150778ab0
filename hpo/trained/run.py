"""Trained runs on disk, as `hpo train` writes them, and their score in a line.

    RUN/
    ├── run.json                 classes, normalisation, what was trained on
    ├── config.toml              the configuration with its runtime resolved, and its provenance
    ├── summary.json             mean and standard deviation over the seeds
    ├── ensemble.json            the test scores of several seeds' mean probabilities
    ├── trained-on.bin           digests of the training images (see `hpo.trained.seen`)
    └── seed-<s>/
        ├── epoch-<n>.ckpt       while it trains
        ├── weights.safetensors
        ├── load.py              loads them in plain torch
        ├── curves.csv           every metric of every epoch
        ├── model.onnx           also model-int8-dynamic.onnx, ..., if asked for
        ├── test.npz             logits (N, C), labels (N,) and names (N,) of the test images
        ├── index.npz            the gallery, where images are looked up in one
        ├── neighbours.json      examples of retrieved images for the report
        └── metrics.json         written last: a seed that has it is finished

Each file is written atomically: what is visible is complete.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from hpo.config.study import load_config
from hpo.config.train import TrainConfig
from hpo.errors import Conflict, InputError, NotFound
from hpo.formatting import number, plural, plus_minus
from hpo.intervals import CONFIDENCE, Interval, of_spread, wilson
from hpo.io import write_text

REPAIR = "restore it, or train into another folder"

MOST_NAMED = 10
"""Most classes, or images, in a line."""
TRAINED, VALIDATED = "trained on", "used for validation, which chose the epoch"
PARTS = {"test": "test", "val": "validation", "train": "training only"}
"""Parts of the data with their names; metrics.json and summary.json have scores of each, or null.
The most honest comes first."""


@dataclass(frozen=True)
class SeedDir:
    """Files of one seed."""

    root: Path

    @property
    def weights(self) -> Path:
        """Trained weights."""
        return self.root / "weights.safetensors"

    @property
    def loader(self) -> Path:
        """Python that loads the weights (see `hpo.trained.plain`)."""
        return self.root / "load.py"

    @property
    def curves(self) -> Path:
        """Every metric of every epoch, as CSV."""
        return self.root / "curves.csv"

    @property
    def test_logits(self) -> Path:
        """Logits of the test images."""
        return self.root / "test.npz"

    @property
    def index(self) -> Path:
        """Features of the gallery."""
        return self.root / "index.npz"

    @property
    def neighbours(self) -> Path:
        """Examples for the report."""
        return self.root / "neighbours.json"

    @property
    def metrics(self) -> Path:
        """Scores; written last."""
        return self.root / "metrics.json"

    def read_metrics(self) -> dict[str, Any]:
        """Read the metrics. Raises InputError for a file that lacks a part."""
        metrics = read_json(self.metrics)
        for part in PARTS:
            if part not in metrics or not isinstance(metrics[part], dict | None):
                raise InputError(f"{self.metrics}: {part!r} is no table of scores; {REPAIR}")
        return metrics

    def checkpoint(self, epoch: int) -> Path:
        """Return the checkpoint after `epoch`."""
        return self.root / f"epoch-{epoch}.ckpt"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return (epoch, file) of the existing checkpoints, oldest first."""
        paths = self.root.glob("epoch-*.ckpt")
        return sorted((int(path.stem.removeprefix("epoch-")), path) for path in paths)


@dataclass(frozen=True)
class RunDir:
    """Files of a run."""

    root: Path

    @property
    def about(self) -> Path:
        """Metadata (`RunMetadata`)."""
        return self.root / "run.json"

    @property
    def config(self) -> Path:
        """Configuration and provenance."""
        return self.root / "config.toml"

    @property
    def summary(self) -> Path:
        """Mean and standard deviation over the seeds."""
        return self.root / "summary.json"

    @property
    def ensemble(self) -> Path:
        """Scores of the ensemble."""
        return self.root / "ensemble.json"

    @property
    def trained_on(self) -> Path:
        """Digests of the training images (see `hpo.trained.seen`)."""
        return self.root / "trained-on.bin"

    @property
    def validated_on(self) -> Path:
        """Digests of the validation images, where these were kept to choose the epoch."""
        return self.root / "validated-on.bin"

    @property
    def exists(self) -> bool:
        """True if it holds a run, finished or not."""
        return self.about.is_file() and self.config.is_file()

    def seed(self, seed: int) -> SeedDir:
        """Return the files of a seed."""
        return SeedDir(self.root / f"seed-{seed}")

    def finished(self) -> list[int]:
        """Return the seeds that were trained and tested, in order."""
        paths = self.root.glob("seed-*/metrics.json")
        return sorted(int(path.parent.name.removeprefix("seed-")) for path in paths)


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Lock `out` for one writer. Raises Conflict if another holds it, InputError if `out` cannot be
    a directory."""
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


@dataclass(frozen=True)
class RunMetadata:
    """Facts that all seeds of a run share, configuration apart."""

    classes: tuple[str, ...]
    """Names, in the order of the network's outputs."""
    mean: tuple[float, ...]
    """Mean of each channel, of pixels scaled to 0..1: of the training part alone, or ImageNet's."""
    std: tuple[float, ...]
    fingerprint: str
    """Fingerprint of the training and validation images."""
    keep_validation: bool
    """Whether the validation images validate instead of being trained on."""
    has_test: bool
    epochs: int
    """Most epochs that are trained."""
    notes: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    """Versions, code and device (see `hpo.trained.environment`); empty of an earlier version."""

    @classmethod
    def read(cls, path: Path) -> RunMetadata:
        """Read a file. Raises InputError for one that `write` did not write."""
        try:
            return TypeAdapter(cls).validate_python(read_json(path))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}: {where}: {first['msg']}; {REPAIR}") from None

    def write(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        write_text(path, as_json(asdict(self)))


@dataclass(frozen=True)
class Overlap:
    """Names of those of some images that a run has seen."""

    trained: tuple[str, ...]
    validated: tuple[str, ...] | None
    """None if unknown."""
    images: int
    """Number of all images."""

    def __bool__(self) -> bool:
        return bool(self.trained or self.validated)

    def text(self, what: str = "images") -> str:
        """Return `3 of 15 images were trained on: a.jpg, b.jpg, c.jpg`, and the same of those that
        were used for validation; the first MOST_NAMED names of each."""
        pairs = ((self.trained, TRAINED), (self.validated, VALIDATED))
        return "; ".join(self._line(names, what, use) for names, use in pairs if names)

    def _line(self, names: Sequence[str], what: str, use: str) -> str:
        more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
        verb = "was" if len(names) == 1 else "were"
        shown = ", ".join(names[:MOST_NAMED])
        return f"{len(names):,} of {self.images:,} {what} {verb} {use}: {shown}{more}"


NOTHING_SEEN = Overlap((), (), 0)


@dataclass(frozen=True)
class SeedResult:
    """A finished seed."""

    seed: int
    files: SeedDir
    metrics: dict[str, Any]
    """metrics.json: epochs, best_epoch, micro_batch, seconds, images {part: count}, and scores of
    test, val and train, each null where there are none; onnx: a list with file, precision, bytes,
    latency_ms, test (plain scores, or null) and, of the float32 file, max_difference; trained_on,
    validated_on: names of the test images that are training or kept validation images, too."""

    @property
    def onnx(self) -> list[dict[str, Any]]:
        """Return the ONNX files; none for a run of a version without them."""
        entries: list[dict[str, Any]] = self.metrics.get("onnx", [])
        return entries

    @cached_property
    def epochs(self) -> tuple[dict[str, float], ...]:
        """Return every metric of every epoch: {"epoch": number from 1, metric: value, ...}."""
        with self.files.curves.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            return tuple({"epoch": int(row.pop("epoch")), **_floats(row)} for row in rows)

    @property
    def neighbours(self) -> dict[str, Any] | None:
        """Return examples of retrieved images; None for a task without an index."""
        file = self.files.neighbours
        return read_json(file) if file.exists() else None


def _floats(row: Mapping[str, str]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items()}


@dataclass(frozen=True)
class TrainedRun:
    """A trained run with its finished seeds."""

    path: Path
    config: TrainConfig
    provenance: dict[str, Any]
    metadata: RunMetadata
    seeds: tuple[SeedResult, ...]
    ensemble: dict[str, Any] | None = None
    """Ensemble of exactly these seeds: `seeds`, `test` (scores or None), `why` there are none."""

    @property
    def files(self) -> RunDir:
        """Files of the run."""
        return RunDir(self.path)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the network's outputs."""
        return self.metadata.classes

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines that a reader of the scores must know."""
        why = self.ensemble and self.ensemble["why"]
        return (*self.metadata.notes, *self._overlap(), *self._absent(), *([why] if why else []))

    def _absent(self) -> Iterator[str]:
        """Yield a line if test images of some class are missing; it is the same for every seed."""
        metrics = self.seeds[0].metrics
        if metrics["test"] and (line := absent_classes(metrics["test"])):
            yield line

    def _overlap(self) -> Iterator[str]:
        """Yield a line if test images were seen before; it is the same for every seed."""
        metrics = self.seeds[0].metrics
        trained, validated = metrics.get("trained_on", ()), metrics.get("validated_on", ())
        if trained or validated:
            found = Overlap(tuple(trained), tuple(validated), metrics["images"]["test"])
            told = found.text("test images")
            yield f"{told}. The test scores are too good: remove the duplicates and train anew."

    @property
    def measured_part(self) -> str:
        """Return the most honest part that all seeds were measured on: test, else val, else
        train."""
        return next(
            part for part in PARTS if all(one.metrics[part] is not None for one in self.seeds)
        )

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Summarize all finished seeds: {"test": {"top1": {"mean": .., "std": ..}, ...} or None,
        "val": .., "train": .., "seeds": [..], "certainty": [a
        `Certainty` each], "ensemble": test scores or None, "onnx": {file: {score: .., "bytes": ..,
        "latency_ms": ..}}, "notes": [..]}. `std` is of a sample (n - 1),
        None for one seed."""
        parts: dict[str, Any] = {}
        for part in PARTS:
            found = [one.metrics[part] for one in self.seeds if one.metrics[part] is not None]
            parts[part] = spread(found) if found else None
        seeds = [one.seed for one in self.seeds]
        kept = self.metadata.keep_validation
        return {
            "seeds": seeds,
            "keep_validation": kept,
            **parts,
            "certainty": [one.to_dict() for one in self.certainties],
            "ensemble": self.ensemble and self.ensemble["test"],
            "onnx": self._onnx(),
            "notes": list(self.notes),
        }

    @cached_property
    def certainties(self) -> list[Certainty]:
        """Return how sure the scores on `measured_part` are; none of training images, which the
        networks know, and none for a run of a version that did not count them."""
        part = self.measured_part
        if part == "train":
            return []
        scores = [one.metrics[part] for one in self.seeds]
        images = self.seeds[0].metrics.get("images", {}).get(part, 0)
        return certainties(spread(scores), images, len(scores))

    def _onnx(self) -> dict[str, Any]:
        """Summarize each ONNX file over the seeds that have it."""
        found: dict[str, list[dict[str, float]]] = {}
        for entry in (entry for one in self.seeds for entry in one.onnx):
            row = {"bytes": float(entry["bytes"]), "latency_ms": entry["latency_ms"]}
            found.setdefault(entry["file"], []).append(row | (entry["test"] or {}))
        shared = {
            file: set.intersection(*(set(row) for row in rows)) for file, rows in found.items()
        }
        return {
            file: spread([{key: row[key] for key in row if key in shared[file]} for row in rows])
            for file, rows in found.items()
        }


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file of a run. Raises InputError for any other content."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}); {REPAIR}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: damaged (no object in it); {REPAIR}")
    return found


def load_run(path: Path) -> TrainedRun:
    """Load the run in the directory `path`, or one seed of it if `path` is that seed's directory.

    Raises NotFound if there is no run or none of its seeds is finished.
    """
    root, only = path, None
    if not RunDir(path).exists and RunDir(path.absolute().parent).exists:
        root, only = path.absolute().parent, path.name
    files = RunDir(root)
    if not files.exists:
        raise NotFound(
            f"{path}: not a trained run (no {files.about.name} and {files.config.name} in it); "
            "`hpo train CONFIG.toml -o DIR` makes one"
        )
    finished = [seed for seed in files.finished() if only in (None, files.seed(seed).root.name)]
    if not finished:
        raise NotFound(
            f"{path}: no finished seed yet; type the same `hpo train` again, it goes on from there"
        )
    return read_run(files, finished)


def read_run(files: RunDir, seeds: Sequence[int]) -> TrainedRun:
    """Load the run in `files` with these seeds, which must be finished."""
    config, provenance = load_config(files.config, recorded=True)
    results = [
        SeedResult(seed, files.seed(seed), files.seed(seed).read_metrics()) for seed in seeds
    ]
    together = read_json(files.ensemble) if files.ensemble.exists() else None
    if together and together.get("seeds") != list(seeds):
        together = None
    metadata = RunMetadata.read(files.about)
    return TrainedRun(files.root, config, provenance, metadata, tuple(results), together)


def absent_classes(scores: Mapping[str, Any]) -> str | None:
    """Return a line on the classes without images in `scores` (`full_scores`), or None."""
    names = [name for name, row in scores["per_class"].items() if not row["support"]]
    if not names:
        return None
    shown = ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
    what = "1 class has" if len(names) == 1 else f"{len(names)} classes have"
    return (
        f"{what} no images here: {shown}. Macro scores are means over the classes with images or "
        "answers."
    )


def spread(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return {score: {"mean", "std"}} of every plain number; the standard deviation is of a sample
    (n - 1), None for a single seed."""
    numbers = [
        key
        for key, value in results[0].items()
        if isinstance(value, float) and all(key in one for one in results)
    ]
    return {
        key: {
            "mean": statistics.fmean(one[key] for one in results),
            "std": statistics.stdev([one[key] for one in results]) if len(results) > 1 else None,
        }
        for key in numbers
    }


COUNTED = ("top1", "top5")
"""Scores that are a share of the images."""


@dataclass(frozen=True)
class Certainty:
    """How sure the mean of a score over the seeds is. The two intervals say different things: how
    other images would score these networks, and how other seeds would score on these images."""

    score: str
    mean: float
    images: int
    of_images: Interval
    seeds: int
    of_seeds: Interval | None
    """None for one seed."""

    def __str__(self) -> str:
        """Return `top1 0.9870: 95 % 0.969 to 0.995 by 269 images, 0.981 to 0.993 by 3 seeds`."""
        seeds = f", {self.of_seeds} by {self.seeds} seeds" if self.of_seeds else ""
        level = f"{CONFIDENCE * 100:.0f} %"
        images = f"{self.of_images} by {self.images:,} images"
        return f"{self.score} {self.mean:.4f}: {level} {images}{seeds}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self) | {"confidence": CONFIDENCE}


def certainties(
    summary: Mapping[str, Mapping[str, float | None]], images: int, seeds: int
) -> list[Certainty]:
    """Return how sure the scores are that count images, from their `summary` (see `spread`)."""
    found = []
    for name in COUNTED:
        mean, std = summary[name].values() if name in summary else (None, None)
        if mean is None or not images:
            continue
        of_seeds = None if std is None else of_spread(mean, std, seeds).within(0.0, 1.0)
        found.append(Certainty(name, mean, images, wilson(mean, images), seeds, of_seeds))
    return found


def as_json(value: Any) -> str:
    """Return indented JSON with a line end."""
    return json.dumps(value, indent=2) + "\n"


def score_name(run: TrainedRun) -> str:
    """Return the score that the search maximized or minimized if the run has it, else top1 or, of a
    retrieval, its precision."""
    found = run.summary[run.measured_part]
    searched = str(run.provenance.get("metric", "")).removeprefix("val_")
    names = (searched, "top1", "precision_at_5", "precision_at_k", *found)
    return next((name for name in names if name in found), "")


def score_line(run: TrainedRun) -> str | None:
    """Return the run's score on its most honest part, with the validation value in front of that of
    the test; None if only the training was measured. `TrainedRun.certainties` has intervals."""
    part, name = run.measured_part, score_name(run)
    if part == "train" or not name:
        return None
    found = run.summary[part][name]
    seeds = plural(len(run.seeds), "seed")
    line = f"{PARTS[part]} {plus_minus(found['mean'], found['std'])} ({name}, {seeds})"
    before = _validation(run, name) if part == "test" else None
    return f"{before} → {line}" if before else line


def _validation(run: TrainedRun, name: str) -> str | None:
    """Return the validation value before the test: that of the seeds if they kept the validation
    images, else that of the trial; None if there is none."""
    kept = [one.metrics["val"] for one in run.seeds]
    if all(scores and name in scores for scores in kept):
        return f"validation {number(fmean(scores[name] for scores in kept))}"
    trial = run.provenance
    if trial.get("metric") == f"val_{name}" and trial.get("value") is not None:
        return f"validation {number(trial['value'])} (trial {trial.get('trial')})"
    return None
