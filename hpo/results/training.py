"""A trained run as the plain data that its report is drawn from."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from typing import Any

from hpo.results.runs import Run, SeedResult

PLAIN = ("loss", "top1", "top5", "precision_at_5", "precision_at_k", "mean_distance")
"""Scores that stand for themselves, of either task."""


def as_page(run: Run) -> dict[str, Any]:
    """`run` in the form that `hpo.results.report.training_report` takes."""
    summary = run.summary
    return {
        "title": run.path.absolute().name,
        "config": run.config.to_dict(),
        "provenance": run.provenance or None,
        "classes": list(run.classes),
        "notes": list(run.notes),
        "seeds": [_seed(one) for one in run.seeds],
        "retrieval": _neighbours(run.seeds[0]),
        "summary": summary["test"] and _with_count(summary["test"], len(run.seeds)),
    }


def _seed(one: SeedResult) -> dict[str, Any]:
    with one.files.curves.open(newline="") as file:
        epochs = [
            {"epoch": int(row.pop("epoch")), **{name: float(row[name]) for name in row}}
            for row in csv.DictReader(file)
        ]
    test = one.metrics["test"]
    return {
        "seed": one.seed,
        "epochs": epochs,
        "test": test and _result(test),
        "validation": None,  # of validation only the curves are known
    }


def _neighbours(one: SeedResult) -> dict[str, Any] | None:
    """What a retrieval found, of `hpo.results.retrieval.keep_examples`; None of other tasks."""
    file = one.files.neighbours
    found: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
    return found


def _result(scores: Mapping[str, Any]) -> dict[str, Any]:
    macro = {name: scores[f"macro_{name}"] for name in ("precision", "recall", "f1")}
    per_class = [{"class": name, **row} for name, row in scores["per_class"].items()]
    plain = {name: scores[name] for name in (*PLAIN, "confusion") if name in scores}
    return {**plain, "macro": macro, "per_class": per_class}


def _with_count(summary: Mapping[str, Mapping[str, Any]], seeds: int) -> dict[str, Any]:
    return {name: {**row, "n": seeds} for name, row in summary.items()}
