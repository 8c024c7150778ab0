"""The nearest rows of a matrix, exactly: candidates by scikit-learn, then every distance anew.

A quick search multiplies matrices, which loses digits and may swap rows that are almost equally
far. So a few more candidates are taken than are asked for and their distances computed directly;
where the quick distances are too close to say that no other row belongs among them, all rows are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hpo.engine.images import Numbers
from hpo.errors import DataError

Matrix = NDArray[np.float64]
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
    from sklearn.neighbors import NearestNeighbors

    if distance == "cosine":
        gallery, queries = unit(gallery), unit(queries)
    most = max((len(rows) for rows in without), default=0)
    count = min(len(gallery), k + most + SPARE)
    finder = NearestNeighbors(n_neighbors=count, algorithm="brute", metric=QUICK[distance])
    finder.fit(gallery)
    indices = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf)
    doubt = _doubt(gallery, queries)
    for start in range(0, len(queries), BLOCK):
        quick, found = finder.kneighbors(queries[start : start + BLOCK])
        for row, (far, rows) in enumerate(zip(quick[:, -1], found, strict=True), start):
            best, exact = _ranked(gallery, queries[row], rows, without[row], k, distance)
            if count < len(gallery) and (len(best) < k or far - doubt <= exact[-1]):
                rows = np.arange(len(gallery))
                best, exact = _ranked(gallery, queries[row], rows, without[row], k, distance)
            indices[row, : len(best)] = best
            distances[row, : len(best)] = exact
    if (indices[:, 0] < 0).any():
        raise DataError("there is no other image to find among the training images; add some")
    return indices, np.sqrt(distances) if distance == "euclidean" else distances


def _ranked(
    gallery: Matrix, query: Matrix, rows: Numbers, without: Numbers, k: int, distance: Distance
) -> tuple[Numbers, Matrix]:
    """The first k of `rows` by squared or cosine distance, then by place."""
    if len(without):
        rows = rows[~np.isin(rows, without)]
    if distance == "euclidean":
        exact = np.square(gallery[rows] - query).sum(axis=1)
    else:
        exact = (1.0 - (gallery[rows] * query).sum(axis=1)).clip(0.0, 2.0)
    order = np.lexsort((rows, exact))[:k]
    return rows[order], exact[order]


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
