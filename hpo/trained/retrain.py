"""Retraining: several seeds on training and validation images, then the test set, once per seed.

The trial chose its best epoch by the validation images; retraining adds them to the training
images, so nothing is left to choose an epoch by, and the full schedule is run instead. The ensemble
of the seeds is computed from `test.npz` of each: the test set is not opened for it.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpo.config.base import flatten
from hpo.config.metrics import user_function
from hpo.config.study import dump_config
from hpo.config.train import TrainConfig
from hpo.control import Control, NullControl
from hpo.data import dataset
from hpo.data.dataset import Data, concat
from hpo.data.images import Images
from hpo.data.report import DataReport
from hpo.errors import Conflict, Damaged, InputError, TrialFailed
from hpo.formatting import approximately
from hpo.io import discard, short_hash, write_text
from hpo.paths import Home
from hpo.search.trackers import Run, Trackers, require, scalars
from hpo.trained.environment import environment_of
from hpo.trained.inference import TrainedModel
from hpo.trained.onnx_files import OnnxTargets, open_files, try_export, write_files
from hpo.trained.plain import weights_metadata, write_loader
from hpo.trained.recipe import Recipe, make_recipe, seeds_needed, stored_recipe
from hpo.trained.run import (
    NOTHING_SEEN,
    Overlap,
    RunDir,
    RunMetadata,
    SeedDir,
    TrainedRun,
    as_json,
    exclusive,
    read_run,
)
from hpo.trained.seen import Seen
from hpo.training import models
from hpo.training.checkpoint import Checkpoint, best_weights, save_weights
from hpo.training.device import processor_name, resolve, torch_device
from hpo.training.evaluation import (
    StoredLogits,
    full_scores,
    load_logits,
    mean_evaluation,
    plain_scores,
)
from hpo.training.inputs import TrainingData
from hpo.training.tasks import task_of
from hpo.training.train import EpochResult, train
from hpo.training.weights import fetch, needed_weights

Tell = Callable[[str], object]

TOLD = ("train_loss", "train_top1", "val_loss", "val_top1", "val_precision_at_k")
"""Metrics in a line of progress."""
RECENT = 5
"""Epochs whose median length counts."""


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
    """Resolve what is `auto`, write run.json and config.toml, and return the resolved recipe."""
    runtime = resolve(
        config,
        classes=len(data.classes),
        device=device,
        threads=threads,
        steps=recipe.epochs * (len(data.train) // config.batch_size),
    )
    about = RunMetadata(
        classes=data.classes,
        mean=data.mean,
        std=data.std,
        fingerprint=data.fingerprint,
        keep_validation=keep_validation,
        has_test=data.has_test,
        epochs=recipe.epochs,
        notes=(*recipe.notes, *_data_notes(config, provenance, data, report, keep_validation)),
        environment=environment_of(config, device.type, processor_name(device)),
    )
    about.write(files.about)
    settled = config.model_copy(update={"runtime": runtime})
    write_text(files.config, dump_config(settled, provenance))
    return recipe.with_runtime(runtime)


def read_metadata(files: RunDir, data: Data) -> RunMetadata:
    """Read the metadata of the run in `files`. Raises Conflict if it has other images."""
    about = RunMetadata.read(files.about)
    if about.fingerprint != data.fingerprint:
        raise Conflict(f"{files.root} was begun with other images; restore them, or use -o")
    return about


def _data_notes(
    config: TrainConfig,
    provenance: Mapping[str, Any],
    data: Data,
    report: DataReport,
    keep_validation: bool,
) -> Iterator[str]:
    if config.data.limit_train is not None:
        yield (
            f"data.limit_train = {config.data.limit_train}: only so many training images were "
            "used, as in the search; --set data.limit_train=1000000000 uses all"
        )
    if config.data.folds is not None:
        yield f"data.folds = {config.data.folds} applies to the search: a seed trains one network."
    known = provenance.get("data_fingerprints", [])
    if known and data.fingerprint not in known:
        yield "The images are not those of the search: their contents or their split changed."
    if seeds_needed(config, 2) == 1:
        yield "Nothing is trained: every seed would give the same result, so one is run."
    yield from report.oddities()
    if not data.has_test:
        yield (
            f"There is no test split: no number here is a test result. {report.remedy}."
            + " The validation images are kept out of the training, to report on them."
            * keep_validation
        )


def retrain(
    config: TrainConfig,
    provenance: Mapping[str, Any],
    *,
    seeds: int = 1,
    out: Path,
    home: Home,
    device: str,
    keep_validation: bool = False,
    onnx: bool = False,
    quantize: Sequence[str] = (),
    log: Sequence[str] = (),
    control: Control | None = None,
    progress: Tell = lambda line: None,
) -> TrainedRun:
    """Train `config` with the seeds config.seed, +1, ... into the directory `out`, each to the end
    of its schedule, then evaluate each once on the test split, if any.

    `provenance` is that of an exported trial, or empty. Training takes in the validation images,
    unless `keep_validation`, or there is no test split: then the best epoch's weights are kept, and
    early stopping and the plateau schedule watch validation. `onnx` writes each seed as model.onnx
    too, `quantize` ("dynamic", "static") also in int8; all are evaluated in one pass over the test
    images. Several seeds are also evaluated as an ensemble, from their logits. After an
    interruption the same call resumes; finished seeds are not run again. `log` names trackers that
    get every epoch and the test scores; `progress` gets a line for each epoch and step.

    Raises ConfigError where the schedule cannot be run without validation images, InputError for
    what cannot be written as ONNX, or is not installed for that or for `log`, Conflict where `out`
    holds the run of another configuration or is being written to, TrialFailed for a loss that is
    not finite, Interrupted when `control` says so.
    """
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: at least 1")
    require(log)
    wanted = OnnxTargets.of(task_of(config), onnx=onnx, quantize=quantize)
    chosen, threads = torch_device(device), torch.get_num_threads()
    files = RunDir(out)
    asked = range(config.seed, config.seed + seeds_needed(config, seeds))
    with exclusive(out):
        data = models.normalized(dataset.open_data(config.data, home.cache), config)
        keep_validation = keep_validation or _must_keep_validation(files, data)
        recipe = make_recipe(config, provenance, keep_validation)
        stored = stored_recipe(files, recipe, keep_validation)
        if any(not files.seed(seed).metrics.exists() for seed in asked):
            fetch(needed_weights([config]), progress)
            fill = config.data.folds is None  # else the cache of the folds, which are not trained
            report = dataset.examine_data(config.data, home.cache, fill=fill)  # before an epoch
            try_export(config, data, wanted)
        if stored is None:
            for line in report.lines():
                progress(line)
            how = chosen, threads, keep_validation
            recipe = begin(files, config, provenance, recipe, data, report, *how)
        job = _Job(
            files=files,
            metadata=read_metadata(files, data),
            recipe=stored or recipe,
            data=data,
            home=home,
            device=chosen,
            seeds=asked,
            wanted=wanted,
            control=control or NullControl(),
            progress=progress,
            trackers=Trackers.of(log, home, files.root / "tensorboard"),
        )
        job.keep_digests()
        with closing(job.trackers):
            for seed in job.seeds:
                job.run(seed)
        return _summarize(files, job.metadata)


def _must_keep_validation(files: RunDir, data: Data) -> bool:
    """Return whether the validation images are all that a run can be measured by; one that exists
    goes on as it began."""
    if data.has_test:
        return False
    return not files.exists or RunMetadata.read(files.about).keep_validation


def _summarize(files: RunDir, metadata: RunMetadata) -> TrainedRun:
    """Load the finished seeds as a run; write the ensemble of several, and the summary."""
    run = read_run(files, files.finished())
    if task_of(run.config).averages and all(one.metrics["test"] is not None for one in run.seeds):
        _write_ensemble(files, files.finished(), metadata.classes)
        run = read_run(files, files.finished())
    write_text(files.summary, as_json(run.summary))
    return run


def _write_ensemble(files: RunDir, seeds: Sequence[int], classes: Sequence[str]) -> None:
    """Write ensemble.json of the finished `seeds`: {"seeds", "test": scores or None, "why": why
    there are none}; remove it for a single seed. Raises DataError for a damaged file."""
    if len(seeds) < 2:
        files.ensemble.unlink(missing_ok=True)
        return
    found: dict[str, Any] = {"seeds": list(seeds), "test": None, "why": None}
    lacking = [seed for seed in seeds if not files.seed(seed).test_logits.exists()]
    if lacking:
        found["why"] = _missing_logits(lacking)
    else:
        stored = [load_logits(files.seed(seed).test_logits) for seed in seeds]
        if all(_same_images(stored[0], one) for one in stored[1:]):
            mean = mean_evaluation([one.logits for one in stored], stored[0].labels)
            found["test"] = full_scores(mean, classes)
        else:
            found["why"] = "No ensemble: the test images changed from one seed to another."
    write_text(files.ensemble, as_json(found))


def _missing_logits(seeds: Sequence[int]) -> str:
    named = ", ".join(map(str, seeds))
    return f"No ensemble: there are no logits of the test images (test.npz) of seed {named}."


def _same_images(first: StoredLogits, second: StoredLogits) -> bool:
    return np.array_equal(first.names, second.names) and np.array_equal(first.labels, second.labels)


@dataclass
class EpochTimer:
    """Measured epochs of a training of several seeds; epochs of another phase take another time."""

    config: TrainConfig
    epochs: int
    """Most epochs of each seed."""
    clock: Callable[[], float] = time.monotonic
    _seconds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    _since: float = 0.0

    def start(self) -> None:
        """Begin to measure an epoch."""
        self._since = self.clock()

    def done(self, epoch: int) -> None:
        """Note that `epoch` has ended, and that the next one begins."""
        now = self.clock()
        self._seconds[self.config.phase_of(epoch).number].append(now - self._since)
        self._since = now

    def left(self, epoch: int, seeds: int) -> float | None:
        """Return the seconds until the end of this seed, which is after `epoch`, and of so many
        further ones; None before any epoch was measured."""
        if not self._seconds:
            return None
        lengths = [self._length(number) for number in range(1, self.epochs + 1)]
        return sum(lengths[epoch:]) + seeds * sum(lengths)

    def _length(self, epoch: int) -> float:
        """Return the seconds of an epoch: the median of its phase's last ones; before these, of all
        others."""
        own = self._seconds.get(self.config.phase_of(epoch).number)
        known = own or [one for several in self._seconds.values() for one in several]
        return statistics.median(known[-RECENT:])


@dataclass(frozen=True)
class _Job:
    """A retraining: trains and tests each seed."""

    files: RunDir
    metadata: RunMetadata
    recipe: Recipe
    data: Data
    home: Home
    device: torch.device
    seeds: Sequence[int]
    wanted: OnnxTargets
    control: Control
    progress: Tell
    trackers: Trackers

    def tell(self, seed: int, line: str) -> None:
        """Report progress of a seed, by its place among several."""
        count = len(self.seeds)
        place = f" ({self.seeds.index(seed) + 1} of {count})" if count > 1 else ""
        self.progress(f"seed {seed}{place}: {line}")

    @cached_property
    def pace(self) -> EpochTimer:
        """How long epochs take."""
        return EpochTimer(self.recipe.config, self.recipe.epochs)

    def keep_digests(self) -> None:
        """Write digests of the images that are trained and validated on, unless they exist."""
        kept, files = self.metadata.keep_validation, self.files
        if not (files.trained_on.exists() and (files.validated_on.exists() or not kept)):
            self.seen.save(files)

    @cached_property
    def seen(self) -> Seen:
        """The images that are trained and validated on."""
        return Seen.of(self.data, self.metadata.keep_validation)

    def run(self, seed: int) -> None:
        """Train one seed and test it, unless that is done; then remove its checkpoints."""
        files = self.files.seed(seed)
        if files.metrics.exists():
            self.tell(seed, "finished before")
            self.add_loader(files)
            self.add_files(seed, files)
        else:
            self.complete(seed, files)
        for _, path in files.checkpoints():
            discard(path)

    def complete(self, seed: int, files: SeedDir) -> None:
        """Train one seed, test it, and write its metrics last."""
        seen = self.training_data()
        trained = self.train(seed, files, seen)
        about = weights_metadata(self.recipe.config, self.metadata, seed)
        save_weights(files.weights, best_weights(trained), about)
        done = Checkpoint.load(trained)
        write_text(files.curves, curves(done.metrics))
        model = self.model(files, self.device)
        write_loader(files, model.config, self.metadata, model.networks[0])
        model.task.save(model, files, seen.train, self.home.cache)
        made = self.write_files(seed, files, seen.train)
        test, known = self.test(seed, model, seen, made)
        counts = {"train": len(seen.train), "val": len(seen.val) if seen.val else 0}
        counts["test"] = known.images
        report = {**_report(seed, done), "images": counts, "test": test, "onnx": made}
        report |= {"trained_on": known.trained, "validated_on": known.validated}
        if not (test or report["val"]):
            report["train"] |= model.task.test_on_training(model, files, seen.train)
        write_text(files.metrics, as_json(report))
        self.trackers.end(self.key(seed), "complete", _results(report))

    def key(self, seed: int) -> str:
        """Return the key of a seed's run in trackers: of this folder, since it was begun."""
        begun = self.files.about.stat().st_mtime_ns
        return f"{short_hash([str(self.files.root.absolute()), begun])[:16]}-{seed}"

    def follow(self, seed: int, config: TrainConfig, last: Path | None) -> None:
        """Begin a seed's run in trackers, or go on with it after the checkpoint `last`."""
        done = Checkpoint.load(last).metrics if last else []
        params = scalars(flatten(config.to_dict()))
        name = self.files.root.absolute().name
        self.trackers.open(Run(name, f"seed-{seed}", self.key(seed), params, done))

    def model(self, files: SeedDir, device: torch.device) -> TrainedModel:
        """Load the trained network of one seed."""
        config, metadata = self.recipe.config, self.metadata
        return TrainedModel.of_seeds(config, metadata, (files,), device, self.control)

    def training_data(self) -> TrainingData:
        """Return the images to train on; mean and deviation are of the training part alone."""
        data, kept = self.data, self.metadata.keep_validation
        return TrainingData(
            classes=len(data.classes),
            train=data.train if kept else concat(data.train, data.val),
            val=data.val if kept else None,
            mean=data.mean,
            std=data.std,
            names=tuple(data.classes),
        )

    def newest(self, seed: int, files: SeedDir, config: TrainConfig) -> tuple[int, Path | None]:
        """Return the last epoch with a sound checkpoint, and its path; report and remove damaged
        ones."""
        for epoch, path in reversed(files.checkpoints()):
            try:
                Checkpoint.load(path).require(config)
                return epoch, path
            except Damaged as error:
                self.tell(seed, f"{error}; it is not used")
                discard(path)
        return 0, None

    def train(self, seed: int, files: SeedDir, seen: TrainingData) -> Path:
        """Train to the end of the recipe; return the last checkpoint."""
        config = self.recipe.config.model_copy(update={"seed": seed})
        done, last = self.newest(seed, files, config)
        self.follow(seed, config, last)
        if done < self.recipe.epochs:
            results = train(
                config,
                seen,
                self.control,
                device=self.device,
                metric=self.recipe.metric,
                checkpoint=files.checkpoint,
                resume=last,
                cache=self.home.cache,
            )
            self.pace.start()
            with closing(results):
                for result in results:
                    self.pace.done(result.epoch)
                    self.tell(seed, self.line(seed, result))
                    self.trackers.log(self.key(seed), result.epoch, result.metrics)
                    if last is not None:
                        discard(last)
                    last = result.checkpoint
                    if result.epoch >= self.recipe.epochs:
                        break
        assert last is not None  # every epoch leaves one
        _require_finite(seed, last)
        return last

    def line(self, seed: int, result: EpochResult) -> str:
        """Return the metrics of an epoch, and how long all seeds that are left will take."""
        names = [name for name in TOLD if name in result.metrics]
        values = "  ".join(f"{name} {result.metrics[name]:.4f}" for name in names)
        later = self.seeds[self.seeds.index(seed) + 1 :]
        unfinished = [one for one in later if not self.files.seed(one).metrics.exists()]
        left = self.pace.left(result.epoch, len(unfinished))
        time_left = f"  {approximately(left)} left" if left else ""
        return f"epoch {result.epoch}/{self.recipe.epochs}  {values}{time_left}"

    def write_files(self, seed: int, files: SeedDir, train: Images) -> list[dict[str, Any]]:
        """Write the ONNX files, not tested yet."""
        if not self.wanted.files:
            return []
        self.tell(seed, f"writing {', '.join(self.wanted.files)}")
        model = self.model(files, torch_device("cpu"))
        made = write_files(model, files.root, train, self.wanted)
        return [{**one, "test": None} for one in made]

    def add_loader(self, files: SeedDir) -> None:
        """Write load.py if the seed, of an earlier version, lacks it."""
        if files.weights.exists() and not files.loader.exists():
            model = self.model(files, torch_device("cpu"))
            write_loader(files, model.config, self.metadata, model.networks[0])

    def add_files(self, seed: int, files: SeedDir) -> None:
        """Write ONNX files that a finished seed lacks, untested: its test set was opened before."""
        metrics = files.read_metrics()
        there = metrics.get("onnx", [])
        if self.wanted.files.keys() <= {one["file"] for one in there}:
            return
        made = self.write_files(seed, files, self.training_data().train)
        tested = {one["file"]: one["test"] for one in there}
        for one in made:
            one["test"] = tested.get(one["file"])
        kept = [one for one in there if one["file"] not in self.wanted.files]
        if self.metadata.has_test:
            self.tell(seed, "new files are not tested, the test set was opened before")
        write_text(files.metrics, as_json({**metrics, "onnx": [*made, *kept]}))

    def test(
        self, seed: int, model: TrainedModel, seen: TrainingData, made: list[dict[str, Any]]
    ) -> tuple[dict[str, Any] | None, Overlap]:
        """Open the test set, once for each seed, and evaluate the network and the ONNX files that
        were `made` of it together; each file gets its scores. Return the network's scores, and
        which of the images were seen before."""
        if not self.metadata.has_test:
            return None, NOTHING_SEEN
        config, classes, [files] = self.recipe.config, self.metadata.classes, model.files
        images = dataset.open_test(config.data, self.home.cache)
        if images is None:  # a data set of the user's own, asked for its test split only now
            return None, NOTHING_SEEN
        known = self.seen.among(images)
        self.tell(seed, f"opening the test set ({len(images)} images)")
        exported = open_files(files, [one["file"] for one in made], config)
        found = model.task.test(model, files, images, seen.train, exported)
        for one in made:
            one["test"] = plain_scores(found[one["file"]], classes)
        return full_scores(found[""], classes), known


def _require_finite(seed: int, checkpoint: Path) -> None:
    metrics = Checkpoint.load(checkpoint).metrics
    losses = [value for name, value in metrics[-1].items() if name.endswith("_loss")]
    if not all(math.isfinite(value) for value in losses):
        raise TrialFailed(
            f"seed {seed}: the loss is not finite in epoch {len(metrics)}; try a smaller "
            "--set optimizer.lr=..., or a limit on the gradient, --set clip_grad_norm=1.0, with -o "
            "another directory"
        )


def _report(seed: int, done: Checkpoint) -> dict[str, Any]:
    """Return the part of metrics.json about the training, with the scores of the kept epoch."""
    kept = done.metrics[done.best_epoch - 1]
    train, val = ({name.removeprefix(part): value for name, value in kept.items()
                   if name.startswith(part)} for part in ("train_", "val_"))  # fmt: skip
    val |= {name: value for name, value in kept.items() if user_function(name)}
    return {
        "seed": seed,
        "epochs": done.epoch,
        "best_epoch": done.best_epoch,
        "micro_batch": done.micro_batch,
        "seconds": sum(one["seconds"] for one in done.metrics),
        "train": train,
        "val": val or None,
    }


def _results(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of a finished seed, as trackers show them."""
    part = "test" if report["test"] else "val"
    scores = report[part] or {}
    return {f"{part}_{k}": v for k, v in scores.items() if isinstance(v, int | float)}


def curves(metrics: list[dict[str, float]]) -> str:
    """Return every metric of every epoch as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["epoch", *metrics[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"epoch": epoch, **row} for epoch, row in enumerate(metrics, 1))
    return text.getvalue()
