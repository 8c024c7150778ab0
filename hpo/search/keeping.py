"""Which files of a study stay: nothing of a trial that is over, but the best three's weights."""

from __future__ import annotations

import shutil

from hpo.paths import Home
from hpo.search.study import Study
from hpo.storage import leases, records

KEPT = 3
"""Weights of this many best trials are kept."""


def ranked(study: Study) -> dict[int, float]:
    """Values of complete trials, best first, by number."""
    attempts = records.read_attempts(study.database, study.uuid)
    done = {
        number: rows[-1].value
        for number, rows in attempts.items()
        if rows[-1].outcome == "complete" and rows[-1].value is not None
    }
    sign = -1 if study.maximize else 1
    return dict(sorted(done.items(), key=lambda item: (sign * item[1], item[0])))


def tidy(study: Study, home: Home) -> None:
    """Remove checkpoints of finished trials, and weights of all but the best three."""
    attempts = records.read_attempts(study.database, study.uuid)
    best = set(list(ranked(study))[:KEPT])
    root = study.directory(home).trials
    for path in root.iterdir() if root.is_dir() else ():
        rows = attempts.get(int(path.name), [])
        if not rows or rows[-1].outcome not in leases.FINAL:
            continue
        if int(path.name) not in best:
            shutil.rmtree(path, ignore_errors=True)
            continue
        for folder in path.glob("attempt-*"):
            shutil.rmtree(folder, ignore_errors=True)


def is_kept(study: Study, value: float) -> bool:
    """Whether a trial that ends with `value` is among the best so far."""
    others = list(ranked(study).values())
    better = [other for other in others if (other > value if study.maximize else other < value)]
    return len(better) < KEPT
