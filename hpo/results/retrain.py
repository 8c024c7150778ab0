"""From a configuration to tested networks: train anew with several seeds, then open the test set.

The trial chose its best epoch by the validation images; retraining adds them to the training
images, so nothing is left to choose by, and the full schedule is run instead.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpo.definition.config import TrainConfig
from hpo.definition.goals import own_function
from hpo.engine import datasets
from hpo.engine.answers import ask, save_answers
from hpo.engine.checkpoint import Checkpoint, best_weights, save_weights
from hpo.engine.control import Control, Unattended
from hpo.engine.datasets import Data, concat
from hpo.engine.images import Images
from hpo.engine.runtime import torch_device
from hpo.engine.train import EpochResult, TrainingData, train
from hpo.errors import Damaged, InputError, TrialFailed
from hpo.files import discard
from hpo.paths import Home
from hpo.results.beginning import alone, begin, begun, stored_recipe
from hpo.results.deploy import Wanted, open_files, rehearse, write_files
from hpo.results.ensemble import write_ensemble
from hpo.results.evaluate import eval_batches, find_images, load_network
from hpo.results.recipe import Recipe, make_recipe
from hpo.results.retrieval import keep_examples, keep_index, seeds_needed, within_gallery
from hpo.results.runs import About, Run, RunDir, SeedDir, as_json, read_run, write_whole
from hpo.results.scores import plain_scores, scores
from hpo.results.trained_on import TrainedOn

__all__ = ["Run", "retrain"]

Tell = Callable[[str], object]


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
    control: Control | None = None,
    progress: Tell = lambda line: None,
) -> Run:
    """Train `config` with the seeds config.seed, +1, ... into the directory `out`, each to the end
    of its schedule, then evaluate each once on the test split, if there is one.

    `provenance` is that of an exported trial, or empty. Training takes in the validation images,
    unless `keep_validation`: then the best epoch's weights are kept, and early stopping and the
    plateau schedule watch validation. `onnx` writes each seed as model.onnx too, `quantize`
    ("dynamic", "static") also in int8; all are evaluated in one pass over the test images. Several
    seeds are also evaluated as one, from their answers. Interrupted, the same call goes on where it
    was; finished seeds are not run again. `progress` gets a line for each epoch and step.

    Raises ConfigError where the schedule cannot be run without validation images, InputError for
    what cannot be written as ONNX or is not installed for it, Conflict where `out` holds the run of
    another configuration or is being written to, TrialFailed for a loss that is not finite,
    Interrupted when `control` says so.
    """
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: at least 1")
    wanted = Wanted.of(config.task, onnx=onnx, quantize=quantize)
    chosen, threads = torch_device(device), torch.get_num_threads()
    recipe = make_recipe(config, provenance, keep_validation)
    files = RunDir(out)
    asked = range(config.seed, config.seed + seeds_needed(config, seeds))
    with alone(out):
        stored = stored_recipe(files, recipe, keep_validation)
        data = datasets.open_data(config.data, home.cache)
        if any(not files.seed(seed).metrics.exists() for seed in asked):
            report = datasets.examine_data(config.data, home.cache)  # before an epoch, not the test
            rehearse(config, data, wanted)
        if stored is None:
            for line in report.lines():
                progress(line)
            how = chosen, threads, keep_validation
            recipe = begin(files, config, provenance, recipe, data, report, *how)
        job = _Job(
            files=files,
            about=begun(files, data),
            recipe=stored or recipe,
            data=data,
            home=home,
            device=chosen,
            wanted=wanted,
            control=control or Unattended(),
            progress=progress,
        )
        job.keep_digests()
        for seed in asked:
            job.run(seed)
        return _summed_up(files, job.about)


def _summed_up(files: RunDir, about: About) -> Run:
    """The finished seeds as a run, with the ensemble of several and a summary of all on disk."""
    run = read_run(files, files.finished())
    classified = run.config.task == "classification"
    if classified and all(one.metrics["test"] is not None for one in run.seeds):
        write_ensemble(files, files.finished(), about.classes)
        run = read_run(files, files.finished())
    write_whole(files.summary, as_json(run.summary))
    return run


@dataclass(frozen=True)
class _Job:
    """What all seeds of a run share."""

    files: RunDir
    about: About
    recipe: Recipe
    data: Data
    home: Home
    device: torch.device
    wanted: Wanted
    control: Control
    progress: Tell

    def keep_digests(self) -> None:
        """Of the images that are trained on, unless they are there."""
        if not self.files.trained_on.exists():
            TrainedOn.of(self.training_data().train).save(self.files.trained_on)

    def run(self, seed: int) -> None:
        """Train one seed and test it, unless that is done; then drop its checkpoints."""
        files = self.files.seed(seed)
        if files.metrics.exists():
            self.progress(f"seed {seed}: finished before")
            self.add_files(seed, files)
        else:
            self.complete(seed, files)
        for _, path in files.checkpoints():
            discard(path)

    def complete(self, seed: int, files: SeedDir) -> None:
        seen = self.training_data()
        trained = self.train(seed, files, seen)
        save_weights(files.weights, best_weights(trained), {"seed": str(seed)})
        done = Checkpoint.load(trained)
        write_whole(files.curves, curves(done.metrics))
        config, home = self.recipe.config, self.home
        if config.task == "retrieval":
            keep_index(config, self.about, files, seen.train, self.device, self.control, home.cache)
        made = self.write_files(seed, files, seen.train)
        test, tested, known = self.test(seed, files, seen, made)
        counts = {"train": len(seen.train), "val": len(seen.val) if seen.val else 0, "test": tested}
        report = {**_report(seed, done), "images": counts, "test": test, "onnx": made}
        report["trained_on"] = known
        if config.task == "retrieval" and not (test or report["val"]):
            report["train"] |= within_gallery(self.about, files, seen.train)
        write_whole(files.metrics, as_json(report))

    def training_data(self) -> TrainingData:
        """Normalised by the training part alone, whatever is trained on."""
        data, kept = self.data, self.about.keep_validation
        return TrainingData(
            classes=len(data.classes),
            train=data.train if kept else concat(data.train, data.val),
            val=data.val if kept else None,
            mean=data.mean,
            std=data.std,
            names=tuple(data.classes),
        )

    def newest(self, seed: int, files: SeedDir, config: TrainConfig) -> tuple[int, Path | None]:
        """The epoch to go on after, and its checkpoint; damaged ones are told of and removed."""
        for epoch, path in reversed(files.checkpoints()):
            try:
                Checkpoint.load(path).require(config)
                return epoch, path
            except Damaged as error:
                self.progress(f"seed {seed}: {error}; it is not used")
                discard(path)
        return 0, None

    def train(self, seed: int, files: SeedDir, seen: TrainingData) -> Path:
        """Train to the end of the recipe; returns the last checkpoint."""
        config = self.recipe.config.model_copy(update={"seed": seed})
        done, last = self.newest(seed, files, config)
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
            with closing(results):
                for result in results:
                    self.progress(_line(seed, result, self.recipe.epochs))
                    if last is not None:
                        discard(last)
                    last = result.checkpoint
                    if result.epoch >= self.recipe.epochs:
                        break
        assert last is not None  # every epoch leaves one
        _require_finite(seed, last)
        return last

    def write_files(self, seed: int, files: SeedDir, train: Images) -> list[dict[str, Any]]:
        """The ONNX files, not tested yet."""
        if self.wanted.files:
            self.progress(f"seed {seed}: writing {', '.join(self.wanted.files)}")
        made = write_files(self.recipe.config, self.about, files, train, self.wanted)
        return [{**one, "test": None} for one in made]

    def add_files(self, seed: int, files: SeedDir) -> None:
        """Files that a finished seed lacks. Its test set was opened: they are not tested."""
        metrics = files.read_metrics()
        there = metrics.get("onnx", [])
        if self.wanted.files.keys() <= {one["file"] for one in there}:
            return
        made = self.write_files(seed, files, self.training_data().train)
        tested = {one["file"]: one["test"] for one in there}
        for one in made:
            one["test"] = tested.get(one["file"])
        kept = [one for one in there if one["file"] not in self.wanted.files]
        if self.about.has_test:
            self.progress(f"seed {seed}: new files are not tested, the test set was opened before")
        write_whole(files.metrics, as_json({**metrics, "onnx": [*made, *kept]}))

    def test(
        self, seed: int, files: SeedDir, seen: TrainingData, made: list[dict[str, Any]]
    ) -> tuple[dict[str, Any] | None, int, list[str]]:
        """Open the test set: the one place where training does, once for each seed, and for all
        that was `made` of it together, which gets its scores. Returns the network's, how many
        images there are, and the names of those that were trained on."""
        if not self.about.has_test:
            return None, 0, []
        config, about = self.recipe.config, self.about
        images = datasets.open_test(config.data, self.home.cache)
        if images is None:  # a data set of the user's own, asked for its test split only now
            return None, 0, []
        known = TrainedOn.of(seen.train).among(images)
        self.progress(f"seed {seed}: opening the test set ({len(images)} images)")
        if config.task == "retrieval":
            looked_up = find_images(config, about, files, images, self.device, self.control)
            keep_examples(files, looked_up, images, seen.train, "test")
            return scores(looked_up, about.classes), len(images), known
        return self.ask_all(files, images, made), len(images), known

    def ask_all(self, files: SeedDir, images: Images, made: list[dict[str, Any]]) -> dict[str, Any]:
        """Scores of the network; those of what was `made` of it are added there."""
        config, about = self.recipe.config, self.about
        found = ask(
            {
                "": load_network(config, about, files.weights, self.device),
                **open_files(files, [one["file"] for one in made], config),
            },
            eval_batches(config, about, images, self.device),
            classes=len(about.classes),
            device=self.device,
            precision=config.runtime.precision,
            control=self.control,
        )
        save_answers(files.answers, found[""], images.names)
        for one in made:
            one["test"] = plain_scores(found[one["file"]].evaluation, about.classes)
        return scores(found[""].evaluation, about.classes)


def _line(seed: int, result: EpochResult, epochs: int) -> str:
    told = ("train_loss", "train_top1", "val_loss", "val_top1", "val_precision_at_k")
    names = [name for name in told if name in result.metrics]
    values = "  ".join(f"{name} {result.metrics[name]:.4f}" for name in names)
    return f"seed {seed}: epoch {result.epoch}/{epochs}  {values}"


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
    """What metrics.json says of the training: its kept epoch's scores, and how it went."""
    kept = done.metrics[done.best_epoch - 1]
    train, val = ({name.removeprefix(part): value for name, value in kept.items()
                   if name.startswith(part)} for part in ("train_", "val_"))  # fmt: skip
    val |= {name: value for name, value in kept.items() if own_function(name)}
    return {
        "seed": seed,
        "epochs": done.epoch,
        "best_epoch": done.best_epoch,
        "micro_batch": done.micro_batch,
        "seconds": sum(one["seconds"] for one in done.metrics),
        "train": train,
        "val": val or None,
    }


def curves(metrics: list[dict[str, float]]) -> str:
    """Every metric of every epoch as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["epoch", *metrics[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"epoch": epoch, **row} for epoch, row in enumerate(metrics, 1))
    return text.getvalue()
