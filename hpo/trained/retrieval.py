"""What a trained run of image retrieval leaves behind: its index, and examples of what it finds."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hpo.config.train import TrainConfig
from hpo.control import (
    Control,
    NullControl,
)
from hpo.data.images import Images
from hpo.io import write_text
from hpo.trained.inference import (
    embed_images,
    eval_batches,
    load_network,
    read_images,
    scores,
    unhelped,
)
from hpo.trained.run import (
    About,
    Run,
    SeedDir,
    as_json,
)
from hpo.training.device import torch_device
from hpo.training.evaluation import embed
from hpo.training.retrieval import (
    Found,
    Index,
)

if TYPE_CHECKING:
    import torch

EXAMPLES = 12
"""Queries that a report shows with their neighbours."""
SHOWN = 5
"""Neighbours of each."""
SIDE = 96
"""Longer side of a thumbnail, in pixels."""


def seeds_needed(config: TrainConfig, seeds: int) -> int:
    """Frozen features that come from a file are the same with every seed: one will do."""
    return 1 if config.frozen and config.model.weights is not None else seeds


def keep_index(
    config: TrainConfig,
    about: About,
    files: SeedDir,
    gallery: Images,
    device: torch.device,
    control: Control,
    cache: Path,
) -> None:
    """Write the index of `gallery` under the trained network of `files`; what frozen layers make of
    it is kept under `cache`. Raises as Index.fit."""
    embedded = embed_images(config, about, files.weights, gallery, device, control, cache)
    Index.fit(embedded, config.retrieval).save(files.index)


def within_gallery(about: About, files: SeedDir, gallery: Images) -> dict[str, Any]:
    """Where no other images are left: scores of each training image among the others."""
    index = Index.load(files.index)
    found = index.search(index.gallery, classes=len(about.classes))
    keep_examples(files, found, gallery, gallery, "training")
    return scores(found, about.classes)


def keep_examples(
    files: SeedDir, found: Found, queries: Images, gallery: Images, part: str
) -> None:
    """Write what a report shows: each query's precision and mean distance, and some queries with
    their neighbours as pictures. `part` names the queries."""
    shown = [_example(place, found, queries, gallery) for place in _chosen(found)]
    data = {
        "part": part,
        "k": found.k,
        "precision_at_5": found.precision(5).tolist(),
        "mean_distance": found.mean_distances.tolist(),
        "right": (found.votes == found.labels).tolist(),
        "examples": shown,
    }
    write_text(files.neighbours, as_json(data))


def _chosen(found: Found) -> list[int]:
    """Half of the examples have a wrong vote, if so many have; both kinds evenly spread."""
    right = np.flatnonzero(found.votes == found.labels).tolist()
    wrong = np.flatnonzero(found.votes != found.labels).tolist()
    some = _spread(wrong, max(EXAMPLES // 2, EXAMPLES - len(right)))
    return sorted(some + _spread(right, EXAMPLES - len(some)))


def _spread(places: Sequence[int], count: int) -> list[int]:
    if len(places) <= count:
        return list(places)
    return [places[i * len(places) // count] for i in range(count)]


def _example(place: int, found: Found, queries: Images, gallery: Images) -> dict[str, Any]:
    near = zip(found.indices[place, :SHOWN], found.distances[place, :SHOWN], strict=True)
    return {
        **_picture(queries, place),
        "vote": int(found.votes[place]),
        "neighbours": [
            {**_picture(gallery, int(one)), "distance": float(far)} for one, far in near if one >= 0
        ],
    }


def _picture(images: Images, place: int) -> dict[str, Any]:
    image = Image.fromarray(np.asarray(images.pixels(place)))
    image.thumbnail((SIDE, SIDE))
    held = io.BytesIO()
    image.save(held, "JPEG", quality=80)
    data = base64.b64encode(held.getvalue()).decode()
    return {
        "name": images.names[place],
        "label": int(images.labels[place]),
        "thumbnail": f"data:image/jpeg;base64,{data}",
    }


@dataclass(frozen=True)
class Neighbour:
    """A training image near to an image."""

    name: str
    label: str
    """Its class."""
    distance: float


@dataclass(frozen=True)
class Lookup:
    """What is nearest to one image, nearest first."""

    path: Path
    neighbours: tuple[Neighbour, ...] = ()
    trained_on: bool | None = None
    """Whether it is among the images that the run was trained on; None where that is unknown."""
    error: str | None = None
    """Why the image cannot be read; then there is nothing else."""

    @property
    def cells(self) -> Sequence[tuple[Any, ...]]:
        """A row for each neighbour: its name, its class, its distance."""
        return [(one.name, one.label, one.distance) for one in self.neighbours]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        near = [dict(zip(("image", "class", "distance"), row, strict=True)) for row in self.cells]
        return {
            "image": str(self.path),
            "nearest": near,
            "trained_on": self.trained_on,
            "error": self.error,
        }


def look_up(run: Run, images: Sequence[Path], *, device: str, k: int = 5) -> list[Lookup]:
    """All of `lookups`."""
    return list(lookups(run, images, device=device, k=k))


def lookups(
    run: Run, images: Sequence[Path | Image.Image], *, device: str, k: int = 5
) -> Iterator[Lookup]:
    """The `k` training images nearest to each image (all, where there are fewer), by the first
    seed of `run`; an image is never its own neighbour, and one that cannot be read has an error.

    Raises as `hpo.trained.inference.predictions` does, and DataError for an unreadable index.
    """
    chosen, config = torch_device(device), unhelped(run.config)
    chunks = read_images(run, images, k)
    files = run.seeds[0].files
    index = Index.load(files.index)
    model = load_network(config, run.about, files.weights, chosen)
    for chunk in chunks:
        near: dict[int, Lookup] = {}
        if len(chunk):
            batches = eval_batches(config, run.about, chunk, chosen)
            queries = embed(
                model,
                chunk,
                batches,
                classes=len(run.classes),
                device=chosen,
                precision=config.runtime.precision,
                control=NullControl(),
            )[0]
            found = index.search(queries, k)
            for place, (i, known) in enumerate(zip(chunk.good, chunk.trained_on, strict=True)):
                named = tuple(_neighbours(index, run, found, place, k))
                near[i] = Lookup(chunk.paths[i], named, known)
        for i, path in enumerate(chunk.paths):
            yield near.get(i) or Lookup(path, error=chunk.bad[i])


def _neighbours(index: Index, run: Run, found: Found, place: int, k: int) -> Iterator[Neighbour]:
    for one, far in zip(found.indices[place, :k], found.distances[place, :k], strict=True):
        if one >= 0:
            label = run.classes[index.gallery.labels[one]]
            yield Neighbour(index.gallery.names[one], label, float(far))
