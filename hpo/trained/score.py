"""A run's score in a line: validation beside test."""

from __future__ import annotations

from statistics import fmean

from hpo.formatting import number, plural, plus_minus
from hpo.trained.run import PARTS, TrainedRun


def score_name(run: TrainedRun) -> str:
    """Return the score that the search maximized or minimized if the run has it, else top1 or, of a
    retrieval, its precision."""
    found = run.summary[run.measured_part]
    searched = str(run.provenance.get("metric", "")).removeprefix("val_")
    names = (searched, "top1", "precision_at_5", "precision_at_k", *found)
    return next((name for name in names if name in found), "")


def score_line(run: TrainedRun) -> str | None:
    """Return the run's score on its most honest part, with the validation value in front of that of
    the test; None if only the training was measured. `TrainedRun.certainties` has intervals."""
    part, name = run.measured_part, score_name(run)
    if part == "train" or not name:
        return None
    found = run.summary[part][name]
    seeds = plural(len(run.seeds), "seed")
    line = f"{PARTS[part]} {plus_minus(found['mean'], found['std'])} ({name}, {seeds})"
    before = _validation(run, name) if part == "test" else None
    return f"{before} → {line}" if before else line


def _validation(run: TrainedRun, name: str) -> str | None:
    """Return the validation value before the test: that of the seeds if they kept the validation
    images, else that of the trial; None if there is none."""
    kept = [one.metrics["val"] for one in run.seeds]
    if all(scores and name in scores for scores in kept):
        return f"validation {number(fmean(scores[name] for scores in kept))}"
    trial = run.provenance
    if trial.get("metric") == f"val_{name}" and trial.get("value") is not None:
        return f"validation {number(trial['value'])} (trial {trial.get('trial')})"
    return None
