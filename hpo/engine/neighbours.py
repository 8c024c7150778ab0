"""The nearest rows of a matrix, exactly: candidates by scikit-learn, then every distance anew.

A quick search multiplies matrices, which loses digits and may swap rows that are almost equally
far. So a few more candidates are taken than are asked for and their distances computed directly;
where the quick distances are too close to say that no other row belongs among them, all rows are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hpo.engine.images import Numbers
from hpo.errors import DataError

Matrix = NDArray[np.float64]
Ranked = tuple[Numbers, Matrix]
"""Places in the gallery and their distances, best first."""
Distance = Literal["euclidean", "cosine"]

QUICK: dict[Distance, str] = {"euclidean": "sqeuclidean", "cosine": "cosine"}
SPARE = 8
"""Candidates beyond those that are needed."""
BLOCK = 1024
"""Queries that are looked up at once."""


def nearest(
    gallery: Matrix, queries: Matrix, k: int, distance: Distance, without: Sequence[Numbers]
) -> tuple[Numbers, Matrix]:
    """The `k` rows of `gallery` (N, D) nearest to each row of `queries` (Q, D), and their
    distances: (Q, k) each, nearest first, of equally near rows the earlier one.

    `without` holds for each query the rows that do not count. Where fewer than k rows are left,
    all of them come, then -1 at distance infinity. Raises DataError where none is left.
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
        raise DataError("there is no other image to find among the training images; add some")
    return indices, np.sqrt(distances) if distance == "euclidean" else distances


def _quick(
    gallery: Matrix, queries: Matrix, count: int, distance: Distance
) -> Iterator[tuple[Numbers, float]]:
    """For each query the `count` rows that seem nearest, and the largest distance among them."""
    from sklearn.neighbors import NearestNeighbors

    finder = NearestNeighbors(n_neighbors=count, algorithm="brute", metric=QUICK[distance])
    finder.fit(gallery)
    for start in range(0, len(queries), BLOCK):
        distances, found = finder.kneighbors(queries[start : start + BLOCK])
        yield from zip(found, distances[:, -1].tolist(), strict=True)


class _Rows:
    """The gallery, its k best by squared or cosine distance, then by place."""

    def __init__(self, gallery: Matrix, k: int, distance: Distance) -> None:
        self.gallery, self.k, self.distance = gallery, k, distance
        self._last: tuple[bytes, Ranked] = (b"", (np.empty(0, np.int64), np.empty(0)))

    def ranked(self, rows: Numbers, query: Matrix, without: Numbers) -> Ranked:
        """The first k of `rows`, and their distances."""
        if len(without):
            rows = rows[~np.isin(rows, without)]
        if self.distance == "euclidean":
            exact = np.square(self.gallery[rows] - query).sum(axis=1)
        else:
            exact = (1.0 - (self.gallery[rows] * query).sum(axis=1)).clip(0.0, 2.0)
        order = np.lexsort((rows, exact))[: self.k]
        return rows[order], exact[order]

    def all_ranked(self, query: Matrix, without: Numbers) -> Ranked:
        """The first k of all rows. To a network that has collapsed all pictures are alike: the
        answer to the query before is kept."""
        key = query.tobytes() + without.tobytes()
        if key != self._last[0]:
            self._last = key, self.ranked(np.arange(len(self.gallery)), query, without)
        return self._last[1]


def unit(vectors: Matrix) -> Matrix:
    """Each row divided by its length; a row of zeros stays, at cosine distance 1 from all."""
    lengths = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
    scaled: Matrix = vectors / np.where(lengths == 0, 1.0, lengths)
    return scaled


def _doubt(gallery: Matrix, queries: Matrix) -> float:
    """More than a quick squared or cosine distance can be wrong: the rounding of a sum of D
    products (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1), several
    times over."""
    longest = sum(np.sqrt(np.square(rows).sum(axis=1).max()) for rows in (gallery, queries))
    return float(8 * (gallery.shape[1] + 8) * np.finfo(np.float64).eps * longest**2)
