"""The ensemble of a run's seeds, from their stored answers: the test set is not opened for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpo.io import write_text
from hpo.trained.run import RunDir, as_json
from hpo.training.evaluation import StoredLogits, full_scores, load_logits, mean_evaluation


def write_ensemble(files: RunDir, seeds: Sequence[int], classes: Sequence[str]) -> None:
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
