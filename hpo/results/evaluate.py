"""A trained run on images that it has not seen: its own test split, or a folder."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpo.definition.config import TrainConfig
from hpo.definition.data import DataConfig
from hpo.engine import inputs, models
from hpo.engine.answers import Answers, ask, mean_evaluation
from hpo.engine.cache import ImageCache, file_digests
from hpo.engine.checkpoint import load_trained
from hpo.engine.control import Control, Unattended
from hpo.engine.csv_data import csv_test_rows
from hpo.engine.datasets import FolderReader, open_test
from hpo.engine.embedding import Embedded, embed
from hpo.engine.features import PLAIN, Features, Preparation, found_cut, keep
from hpo.engine.folders import folder_to_test, list_folder
from hpo.engine.images import Images, Sizing
from hpo.engine.learner import Evaluation, memory_format
from hpo.engine.loader import EvalBatches
from hpo.engine.retrieval import Found, Index
from hpo.engine.runtime import torch_device
from hpo.errors import DataError
from hpo.paths import Home
from hpo.results.runs import About, Run, SeedDir, absent_classes, load_run, spread
from hpo.results.scores import scores
from hpo.results.trained_on import UNKNOWN, TrainedOn, overlap_text

__all__ = ["RunEvaluation", "evaluate_run", "find_images", "load_network", "load_run", "whole_note"]


def whole_note(config: TrainConfig) -> str | None:
    """What one must know where pictures without boxes meet a network that was trained on pictures
    cropped to theirs; None for others."""
    if not config.data.crop_to_box:
        return None
    return (
        "the run was trained on pictures cropped to their boxes (data.crop_to_box); these have "
        "none and are taken whole: crop them to the object first"
    )


@dataclass(frozen=True)
class RunEvaluation:
    """Every seed of a run on the same images."""

    data: str
    """Which images: the test split of the run's data, or a folder."""
    images: int
    classes: tuple[str, ...]
    seeds: Mapping[int, Evaluation | Found]
    together: Evaluation | None = None
    """Of the mean of the seeds' probabilities; None for one seed, and for a retrieval."""
    note: str | None = None
    """What one must know to read the numbers."""
    trained_on: tuple[str, ...] | None = None
    """Names of the images that the run was trained on; None where that is not known."""

    @property
    def overlap(self) -> str | None:
        """A line on the images that were trained on, where there are any or it is not known."""
        if self.trained_on is None:
            return UNKNOWN
        if not self.trained_on:
            return None
        return f"{overlap_text(self.trained_on, self.images)}. The scores are too good."

    @property
    def absent(self) -> str | None:
        """A line on the classes without images, where there are some."""
        return absent_classes(next(iter(self.scores().values())))

    def scores(self) -> dict[int, dict[str, Any]]:
        """Of each seed (see `hpo.results.scores.scores`)."""
        return {seed: scores(found, self.classes) for seed, found in self.seeds.items()}

    @property
    def ensemble(self) -> dict[str, Any] | None:
        """Scores of the seeds together."""
        return None if self.together is None else scores(self.together, self.classes)

    @property
    def summary(self) -> dict[str, dict[str, float | None]]:
        """Mean and standard deviation (n - 1; None for one seed) of each score over the seeds."""
        return spread(list(self.scores().values()))


def evaluate_run(
    run: Run,
    *,
    data: Path | None = None,
    home: Home,
    device: str,
    control: Control | None = None,
    force: bool = False,
) -> RunEvaluation:
    """Run every seed of `run`, and several as an ensemble, over the test split of its data, or over
    the folder `data`: test/ inside it where it has one, else itself, one folder per class; or over
    the images that the CSV file `data` lists, those of its split test where it has splits.

    Raises DataError where there is no test split, for classes that the run does not know, and,
    unless `force`, where images of `data` are among those that the run was trained on; InputError
    for an unknown device.
    """
    chosen, note = torch_device(device), None
    if data is None:
        images = open_test(run.config.data, home.cache)
        where = f"the test split of {run.config.data.title}"
    else:
        where, note = str(folder_to_test(data)), whole_note(run.config)
        images = open_labelled(Path(where), run.classes, run.config.data, home.cache)
    if images is None:
        raise DataError(
            f"{run.config.data.title} has no test split; "
            "give a folder of images by class, or a CSV file of them, with --data PATH"
        )
    trained = TrainedOn.load(run.files.trained_on)
    known = None if trained is None else tuple(trained.among(images))
    if known and data is not None and not force:
        raise DataError(
            f"{where}: {overlap_text(known, len(images))}. Their scores would be too good: give "
            "images that the run has not seen, or evaluate these all the same with --force"
        )
    if run.config.runtime.threads:
        torch.set_num_threads(run.config.runtime.threads)  # as it was tested: it decides last bits
    work = images, chosen, control or Unattended()
    found: dict[int, Evaluation | Found] = {}
    if run.config.task == "retrieval":
        found |= {
            one.seed: find_images(run.config, run.about, one.files, *work) for one in run.seeds
        }
        return RunEvaluation(where, len(images), run.classes, found, None, note, known)
    answers = {one.seed: _asked(run.config, run.about, one.files, *work) for one in run.seeds}
    found |= {seed: one.evaluation for seed, one in answers.items()}
    together = _together(list(answers.values()))
    return RunEvaluation(where, len(images), run.classes, found, together, note, known)


def _asked(
    config: TrainConfig,
    about: About,
    files: SeedDir,
    images: Images,
    device: torch.device,
    control: Control,
) -> Answers:
    """What the network of `files` answers on `images`, preprocessed as in its validation."""
    return ask(
        {"": load_network(config, about, files.weights, device)},
        eval_batches(config, about, images, device),
        classes=len(about.classes),
        device=device,
        precision=config.runtime.precision,
        control=control,
    )[""]


def _together(answers: Sequence[Answers]) -> Evaluation | None:
    if len(answers) < 2:
        return None
    return mean_evaluation([one.logits for one in answers], answers[0].labels)


def find_images(
    config: TrainConfig,
    about: About,
    files: SeedDir,
    images: Images,
    device: torch.device,
    control: Control,
) -> Found:
    """What `images` find in the index of `files`, by its network."""
    index = Index.load(files.index)
    queries = embed_images(config, about, files.weights, images, device, control)
    return index.search(queries, classes=len(about.classes))


def embed_images(
    config: TrainConfig,
    about: About,
    weights: Path,
    images: Images,
    device: torch.device,
    control: Control,
    cache: Path | None = None,
) -> Embedded:
    """The features of `images` in the network in `weights`, preprocessed as in its validation; of
    frozen layers kept under `cache`, as in training."""
    model = load_network(config, about, weights, device)
    judged, kept = None, None
    if config.frozen and cache is not None:
        frozen = models.set_trainable(model, config.model.trainable_blocks)
        cut = found_cut(model, frozen, config, device)
        how = Preparation(about.mean, about.std, config, device)
        found = keep(model, cut, how, [(images, PLAIN)], cache, control, epoch=0)
        kept = found.get((images, PLAIN))
        judged = cut.suffix(model) if cut and kept else None
    return embed(
        model,
        images,
        eval_batches(config, about, images, device, kept),
        classes=len(about.classes),
        device=device,
        precision=config.runtime.precision,
        control=control,
        judged=judged,
    )[0]


def load_network(
    config: TrainConfig, about: About, weights: Path, device: torch.device
) -> nn.Module:
    """A trained network on `device` in eval mode."""
    model = load_trained(
        weights, config.model, classes=len(about.classes), image_size=config.data.image_size
    )
    layout = memory_format(config.runtime.memory_format)
    return model.to(device, memory_format=layout)  # type: ignore[call-overload, no-any-return]


def eval_batches(
    config: TrainConfig,
    about: About,
    images: Images,
    device: torch.device,
    features: Features | None = None,
) -> EvalBatches:
    micro = config.runtime.micro_batch
    return inputs.eval_batches(images, config, about.mean, about.std, device, micro, features)


def open_labelled(data: Path, classes: tuple[str, ...], config: DataConfig, cache: Path) -> Images:
    """The pictures of a folder by class or of a CSV file, labelled by their place in `classes`, at
    the size of `config`. Raises DataError for other classes and for pictures that cannot be read.
    """
    if data.is_file():
        rows = csv_test_rows(data, skip_missing=config.skip_unreadable)
        root, listed = data.parent, [(row.file, row.label) for row in rows]
    else:
        root, listed = data, _listed(data, grouped=config.group_by is not None)
    # A Mac writes names in another form of Unicode than Linux.
    place = {unicodedata.normalize("NFC", name): label for label, name in enumerate(classes)}
    listed = [(name, unicodedata.normalize("NFC", label)) for name, label in listed]
    unknown = sorted({label for _, label in listed} - {*place})
    if unknown:
        raise DataError(
            f"{data}: the run does not know the classes {', '.join(unknown)}; it was trained on "
            f"{', '.join(classes)}"
        )
    names, labels = [name for name, _ in listed], [place[label] for _, label in listed]
    digests = file_digests(root, names, cache)
    images, index = ImageCache(cache, config.cache_limit_gb * 1e9).open(
        FolderReader(root), names, labels, [digests[name] for name in names], Sizing.of(config)
    )
    if index.bad and not (config.skip_unreadable and len(images)):
        shown = "".join(f"\n  {names[i]} ({why})" for i, why in list(index.bad.items())[:10])
        raise DataError(f"{data}: {len(index.bad)} files cannot be read as images:{shown}")
    images.files = tuple(digests[name] for name in images.names)
    return images


def _listed(root: Path, *, grouped: bool) -> list[tuple[str, str]]:
    """Name and class of each picture of a folder by class."""
    listing = list_folder(root, grouped=grouped)
    if "all" not in listing.parts:
        raise DataError(f"{root}: has train/ but no test/; give a folder with one folder per class")
    return [(name, listing.classes[label]) for name, label in listing.parts["all"]]
