"""A trained run as the plain data that its report is drawn from."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from typing import Any

from hpo.results.runs import Run, SeedResult, read_json

PLAIN = ("loss", "top1", "top5", "precision_at_5", "precision_at_k", "mean_distance")
"""Scores that stand for themselves, of either task."""


def as_page(run: Run) -> dict[str, Any]:
    """`run` in the form that `training_report` takes."""
    summary = run.summary
    part = "test" if summary["test"] else "val"
    together = summary["ensemble"]
    return {
        "title": run.path.absolute().name,
        "config": run.config.to_dict(),
        "provenance": run.provenance or None,
        "classes": list(run.classes),
        "notes": list(run.notes),
        "seeds": [_seed(one) for one in run.seeds],
        "summary": summary[part] and _with_count(summary[part], len(run.seeds)),
        "ensemble": together and _result(together),
        "onnx": [_file(name, found, run) for name, found in summary["onnx"].items()],
        "retrieval": _neighbours(run.seeds[0]),
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
        "validation": one.metrics["val"],
    }


def _neighbours(one: SeedResult) -> dict[str, Any] | None:
    """What a retrieval found, of `hpo.results.retrieval.keep_examples`; None of other tasks."""
    file = one.files.neighbours
    found: dict[str, Any] | None = read_json(file) if file.exists() else None
    return found


def _result(scores: Mapping[str, Any]) -> dict[str, Any]:
    macro = {name: scores[f"macro_{name}"] for name in ("precision", "recall", "f1")}
    per_class = [{"class": name, **row} for name, row in scores["per_class"].items()]
    plain = {name: scores[name] for name in (*PLAIN, "confusion") if name in scores}
    return {**plain, "macro": macro, "per_class": per_class}


def _file(name: str, found: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Of an ONNX file: means over the seeds; the largest difference to torch of any."""
    entries = [entry for one in run.seeds for entry in one.onnx if entry["file"] == name]
    differences = [one["max_difference"] for one in entries if "max_difference" in one]
    return {
        "file": name,
        "precision": entries[0]["precision"],
        **{score: row["mean"] for score, row in found.items()},
        "max_difference": max(differences, default=None),
    }


def _with_count(summary: Mapping[str, Mapping[str, Any]], seeds: int) -> dict[str, Any]:
    return {name: {**row, "n": seeds} for name, row in summary.items()}
