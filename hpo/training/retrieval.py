"""Image retrieval: an index of the training images, searched exactly.

A quick search multiplies matrices, which loses digits and may swap rows that are almost equally
far. So a few more candidates are taken than are asked for and their distances computed directly;
where the quick distances are too close to say that no other row belongs among them, all rows are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hpo.config.retrieval import RETRIEVED, RetrievalConfig
from hpo.config.train import TrainConfig
from hpo.control import Control
from hpo.data.arrays import read_arrays, write_arrays
from hpo.data.images import Images, Numbers
from hpo.errors import ConfigError, DataError, TrialFailed
from hpo.training.evaluation import Embedded, Vectors, embed
from hpo.training.learner import Batch
from hpo.training.metrics import ClassificationReport, classification_report, confusion_matrix

Matrix = NDArray[np.float64]
Ranked = tuple[Numbers, Matrix]
"""Indices in the gallery and their distances, nearest first."""
Distance = Literal["euclidean", "cosine"]

QUICK: dict[Distance, str] = {"euclidean": "sqeuclidean", "cosine": "cosine"}
SPARE = 8
"""Candidates in addition to those needed."""
BLOCK = 1024
"""Queries searched at once."""


def nearest(
    gallery: Matrix, queries: Matrix, k: int, distance: Distance, without: Sequence[Numbers]
) -> tuple[Numbers, Matrix]:
    """Return the `k` rows of `gallery` (N, D) nearest to each row of `queries` (Q, D), and their
    distances: (Q, k) each, nearest first, ties by index.

    `without` holds for each query the rows to exclude. If fewer than k rows are left, the rest is
    -1 at infinite distance. Raises DataError if none is left.
    """
    if distance == "cosine":
        gallery, queries = unit(gallery), unit(queries)
    rows = _Rows(gallery, k, distance)
    most = max((len(left_out) for left_out in without), default=0)
    count = min(len(gallery), k + most + SPARE)
    doubt = _doubt(gallery, queries)
    indices = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf)
    for place, (candidates, farthest) in enumerate(_quick(gallery, queries, count, distance)):
        query, left_out = queries[place], without[place]
        best, exact = rows.ranked(candidates, query, left_out)
        if count < len(gallery) and (len(best) < k or farthest - doubt <= exact[-1]):
            best, exact = rows.all_ranked(query, left_out)
        indices[place, : len(best)] = best
        distances[place, : len(best)] = exact
    if (indices[:, 0] < 0).any():
        raise DataError("the training images contain no other image to find; add some")
    return indices, np.sqrt(distances) if distance == "euclidean" else distances


def _quick(
    gallery: Matrix, queries: Matrix, count: int, distance: Distance
) -> Iterator[tuple[Numbers, float]]:
    """Yield for each query the `count` rows that seem nearest, and the largest distance among
    them."""
    from sklearn.neighbors import NearestNeighbors

    finder = NearestNeighbors(n_neighbors=count, algorithm="brute", metric=QUICK[distance])
    finder.fit(gallery)
    for start in range(0, len(queries), BLOCK):
        distances, indices = finder.kneighbors(queries[start : start + BLOCK])
        yield from zip(indices, distances[:, -1].tolist(), strict=True)


class _Rows:
    """The gallery, ranked by squared or cosine distance, then by index."""

    def __init__(self, gallery: Matrix, k: int, distance: Distance) -> None:
        self.gallery, self.k, self.distance = gallery, k, distance
        self._last: tuple[bytes, Ranked] = (b"", (np.empty(0, np.int64), np.empty(0)))

    def ranked(self, rows: Numbers, query: Matrix, without: Numbers) -> Ranked:
        """Return the first k of `rows`, and their distances."""
        if len(without):
            rows = rows[~np.isin(rows, without)]
        if self.distance == "euclidean":
            exact = np.square(self.gallery[rows] - query).sum(axis=1)
        else:
            exact = (1.0 - (self.gallery[rows] * query).sum(axis=1)).clip(0.0, 2.0)
        order = np.lexsort((rows, exact))[: self.k]
        return rows[order], exact[order]

    def all_ranked(self, query: Matrix, without: Numbers) -> Ranked:
        """Return the first k of all rows. The result for the previous query is reused, because all
        images are alike to a network that has collapsed."""
        key = query.tobytes() + without.tobytes()
        if key != self._last[0]:
            self._last = key, self.ranked(np.arange(len(self.gallery)), query, without)
        return self._last[1]


def unit(vectors: Matrix) -> Matrix:
    """Scale each row to length 1; a row of zeros stays, at cosine distance 1 from all."""
    lengths = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
    scaled: Matrix = vectors / np.where(lengths == 0, 1.0, lengths)
    return scaled


def _doubt(gallery: Matrix, queries: Matrix) -> float:
    """Bound the error of a quick squared or cosine distance: several times the rounding of a sum of
    D products (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1)."""
    longest = sum(np.sqrt(np.square(rows).sum(axis=1).max()) for rows in (gallery, queries))
    return float(8 * (gallery.shape[1] + 8) * np.finfo(np.float64).eps * longest**2)


LEAST = 5
"""Neighbours searched even for a smaller k, because precision at 5 is always reported."""


@dataclass(frozen=True)
class Affine:
    """(x - shift) @ turn.T / scale, fitted on the gallery."""

    shift: Matrix
    """(D,)."""
    scale: Matrix
    """(P,)."""
    turn: Matrix | None
    """(P, D); None: P = D, no rotation."""

    def __call__(self, vectors: Matrix) -> Matrix:
        """Transform (N, D) vectors to (N, P)."""
        moved = vectors - self.shift
        return (moved if self.turn is None else moved @ self.turn.T) / self.scale


@dataclass(frozen=True)
class Index:
    """The gallery, and the transformation of feature vectors before distances are measured."""

    gallery: Embedded
    config: RetrievalConfig
    steps: tuple[Affine, ...]
    """Standardisation and PCA, if enabled, in this order."""

    @classmethod
    def fit(cls, gallery: Embedded, config: RetrievalConfig) -> Index:
        """Build the index of `gallery`. Raises ConfigError for more components than `gallery`
        allows, TrialFailed for features that are not finite."""
        if not np.isfinite(gallery.features).all():
            raise TrialFailed("the network's features are not finite; check its weights")
        vectors, steps = gallery.features.astype(np.float64), []
        if config.standardize:
            steps.append(_scaler(vectors))
            vectors = steps[-1](vectors)
        if config.pca:
            steps.append(_pca(vectors, config.pca))
        return cls(gallery, config, tuple(steps))

    def place(self, features: Vectors) -> Matrix:
        """Transform (N, D) features to the space in which distances are measured, (N, P)
        float64."""
        placed = features.astype(np.float64)
        for step in self.steps:
            placed = step(placed)
        return placed

    @cached_property
    def placed(self) -> Matrix:
        """The transformed features of the gallery."""
        return self.place(self.gallery.features)

    def search(self, queries: Embedded, k: int | None = None, classes: int = 0) -> Found:
        """Return the max(k, 5) nearest gallery images of each query, excluding the query itself;
        `k` defaults to the index's own. Raises DataError if there are no others."""
        k = k or self.config.k
        places: dict[str, list[int]] = {}
        for place, identity in enumerate(self.gallery.identities):
            places.setdefault(identity, []).append(place)
        own = [np.array(places.get(one, ()), np.int64) for one in queries.identities]
        count, target = min(max(k, LEAST), len(self.gallery)), self.place(queries.features)
        indices, distances = nearest(self.placed, target, count, self.config.distance, own)
        labels = np.where(indices < 0, -1, self.gallery.labels[indices])
        return Found(indices, distances, labels, queries.labels, k, classes)

    def save(self, path: Path) -> None:
        """Write the index as .npz, without pickle and atomically: `features`, `labels`, `names`,
        `identities`, `config` (JSON), and `shift`, `scale` and `turn` of each step."""
        arrays: dict[str, Any] = {
            "features": self.gallery.features,
            "labels": self.gallery.labels,
            "names": np.array(self.gallery.names, np.str_),
            "identities": np.array(self.gallery.identities, np.str_),
            "config": np.array(self.config.model_dump_json()),
        }
        for number, step in enumerate(self.steps):
            arrays |= {f"shift{number}": step.shift, f"scale{number}": step.scale}
            arrays |= {} if step.turn is None else {f"turn{number}": step.turn}
        write_arrays(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Index:
        """Read the index that `save` wrote. Raises DataError if `path` is missing, damaged, or not
        an index."""
        advice = "`hpo train` writes it anew into another folder"
        known = read_arrays(path, advice)
        try:
            gallery = Embedded(
                known["features"],
                known["labels"],
                tuple(known["names"].tolist()),
                tuple(known["identities"].tolist()),
            )
            config = RetrievalConfig.model_validate(json.loads(str(known["config"])))
            count = sum(name.startswith("shift") for name in known)
            steps = (
                Affine(known[f"shift{i}"], known[f"scale{i}"], known.get(f"turn{i}"))
                for i in range(count)
            )
            return cls(gallery, config, tuple(steps))
        except (KeyError, ValueError) as error:
            raise DataError(f"{path} cannot be read as an index ({error}); {advice}") from error


def _scaler(vectors: Matrix) -> Affine:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(vectors)
    return Affine(scaler.mean_, scaler.scale_, None)


def require_components(components: int, images: int, features: int) -> None:
    """Raise ConfigError for more principal components than (images, features) vectors have."""
    most = min(images, features)
    if components > most:
        raise ConfigError(
            f"{components}: more components than {images} training images of {features} features "
            f"allow; 0 to {most}",
            key="retrieval.pca",
        )


def _pca(vectors: Matrix, components: int) -> Affine:
    from sklearn.decomposition import PCA

    images, features = vectors.shape
    require_components(components, images, features)
    # Exact and deterministic both; the second is far quicker for many images.
    solver = "full" if images <= features else "covariance_eigh"
    pca = PCA(components, svd_solver=solver).fit(vectors)
    return Affine(pca.mean_, np.ones(components), pca.components_)


@dataclass(frozen=True)
class Found:
    """The neighbours of Q queries, nearest first; columns after the last neighbour hold -1."""

    indices: Numbers
    """(Q, K) indices in the gallery."""
    distances: Matrix
    """(Q, K)."""
    neighbours: Numbers
    """(Q, K) classes of the neighbours."""
    labels: Numbers
    """(Q,) classes of the queries."""
    k: int
    """Number of neighbours that vote."""
    classes: int

    def precision(self, k: int) -> Matrix:
        """Return (Q,) the fraction of neighbours with the right class among the k nearest, or among
        all if there are fewer."""
        near = self.neighbours[:, :k]
        right = (near == self.labels[:, None]).sum(axis=1)
        shares: Matrix = right / (near >= 0).sum(axis=1)
        return shares

    @cached_property
    def votes(self) -> Numbers:
        """(Q,) most frequent class among the k nearest; ties go to the class of the nearest
        neighbour."""
        votes = np.empty(len(self.labels), np.int64)
        for query, row in enumerate(self.neighbours[:, : self.k]):
            near = row[row >= 0]
            votes[query] = near[np.bincount(near)[near].argmax()]
        return votes

    @cached_property
    def mean_distances(self) -> Matrix:
        """(Q,) mean distance to the k nearest."""
        near = self.distances[:, : self.k]
        there = np.isfinite(near)
        means: Matrix = np.where(there, near, 0.0).sum(axis=1) / there.sum(axis=1)
        return means

    @cached_property
    def confusion(self) -> Numbers:
        """(C, C): true classes in rows, the neighbours' votes in columns."""
        return confusion_matrix(self.labels, self.votes, self.classes)

    @cached_property
    def report(self) -> ClassificationReport:
        """Scores of the votes."""
        return classification_report(self.confusion)

    @property
    def headline(self) -> dict[str, float]:
        """precision_at_5, precision_at_k, top1 of the neighbours' vote, mean_distance."""
        names = ("precision_at_5", "precision_at_k", "top1", "mean_distance")
        found = self.metrics()
        return {name: found[f"val_{name}"] for name in names}

    def metrics(self) -> dict[str, float]:
        """Return the metrics, by the names of RETRIEVED."""
        return {
            "val_precision_at_5": float(self.precision(5).mean()),
            "val_precision_at_k": float(self.precision(self.k).mean()),
            "val_top1": self.report.accuracy,
            "val_precision": self.report.macro_precision,
            "val_recall": self.report.macro_recall,
            "val_f1": self.report.macro_f1,
            "val_mean_distance": float(self.mean_distances.mean()),
        }


@dataclass(frozen=True)
class Validation:
    """Validation of a retrieval after each epoch: validation images are looked up in the training
    images."""

    gallery: Images
    gallery_batches: Iterable[Batch]
    queries: Images
    query_batches: Iterable[Batch]

    def measure(
        self,
        model: nn.Module,
        suffix: nn.Module,
        config: TrainConfig,
        *,
        classes: int,
        device: torch.device,
        control: Control,
        epoch: int,
    ) -> dict[str, float]:
        """Return the metrics of RETRIEVED, and val_loss if the classifier is trained; `suffix`:
        `model`, or the part of it that the batches feed. NaN for a network that has diverged;
        raises TrialFailed if features are not finite although nothing was trained."""

        def embedded(images: Images, batches: Iterable[Batch]) -> tuple[Embedded, float]:
            found, evaluation = embed(
                model,
                images,
                batches,
                classes=classes,
                device=device,
                precision=config.runtime.precision,
                control=control,
                epoch=epoch,
                suffix=suffix,
            )
            return found, evaluation.loss

        gallery, _ = embedded(self.gallery, self.gallery_batches)
        queries, loss = embedded(self.queries, self.query_batches)
        losses = {} if config.frozen else {"val_loss": loss}
        finite = np.isfinite(gallery.features).all() and np.isfinite(queries.features).all()
        if not config.frozen and not finite:
            return {"val_loss": math.nan, **dict.fromkeys(RETRIEVED, math.nan)}
        index = Index.fit(gallery, config.retrieval)
        return losses | index.search(queries, classes=classes).metrics()
