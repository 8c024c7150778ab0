"""A trained run as the plain data that its report is drawn from."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from typing import Any

from hpo.results.runs import Run, SeedResult


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


def _result(scores: Mapping[str, Any]) -> dict[str, Any]:
    macro = {name: scores[f"macro_{name}"] for name in ("precision", "recall", "f1")}
    per_class = [{"class": name, **row} for name, row in scores["per_class"].items()]
    plain = {name: scores[name] for name in ("loss", "top1", "top5", "confusion")}
    return {**plain, "macro": macro, "per_class": per_class}


def _with_count(summary: Mapping[str, Mapping[str, Any]], seeds: int) -> dict[str, Any]:
    return {name: {**row, "n": seeds} for name, row in summary.items()}
