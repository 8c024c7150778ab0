"""The seeds of a run as one: the mean of their probabilities, from the answers they left.

The test set is not opened for it: `test.npz` of each seed is read instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpo.engine.answers import Stored, load_answers, mean_evaluation
from hpo.results.runs import RunDir, as_json, write_whole
from hpo.results.scores import scores


def write_ensemble(files: RunDir, seeds: Sequence[int], classes: Sequence[str]) -> None:
    """Write ensemble.json of the finished `seeds`: {"seeds", "test": scores or None, "why": why
    there are none}; nothing where there is only one. Raises DataError for a damaged file."""
    if len(seeds) < 2:
        files.ensemble.unlink(missing_ok=True)
        return
    found: dict[str, Any] = {"seeds": list(seeds), "test": None, "why": None}
    lacking = [seed for seed in seeds if not files.seed(seed).answers.exists()]
    if lacking:
        found["why"] = _kept_none(lacking)
    else:
        stored = [load_answers(files.seed(seed).answers) for seed in seeds]
        if all(_same_images(stored[0], one) for one in stored[1:]):
            mean = mean_evaluation([one.logits for one in stored], stored[0].labels)
            found["test"] = scores(mean, classes)
        else:
            found["why"] = "No ensemble: the test images changed from one seed to another."
    write_whole(files.ensemble, as_json(found))


def _kept_none(seeds: Sequence[int]) -> str:
    named = ", ".join(map(str, seeds))
    return f"No ensemble: of seed {named} there are no answers to the test images (test.npz)."


def _same_images(first: Stored, second: Stored) -> bool:
    return np.array_equal(first.names, second.names) and np.array_equal(first.labels, second.labels)
