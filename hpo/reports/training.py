"""The report of a trained run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpo.config.base import flatten
from hpo.formatting import Table, number_cell, setting_cell, settings_table, text_cell
from hpo.reports import figures
from hpo.reports.mistakes import confused_table
from hpo.reports.page import curve_figures, render
from hpo.trained.run import PARTS, TrainedRun, score_line

SCORES = ("precision_at_5", "precision_at_k", "top1", "top5", "loss", "mean_distance")
"""Scores in the order in which they are shown; those that a task lacks are left out."""
PLAIN, RATES = ("top1", "top5", "loss"), ("precision", "recall", "f1")


def training_report(run: TrainedRun) -> str:
    """Return the page of `run` as HTML."""
    part = run.measured_part if run.measured_part != "train" else None
    results = [seed.metrics[part] for seed in run.seeds] if part else []
    results = [result for result in results if "confusion" in result]
    confusion = _summed([result["confusion"] for result in results])
    neighbours = run.seeds[0].neighbours
    return render(
        "training.html",
        {
            **curve_figures({f"seed {seed.seed}": seed.epochs for seed in run.seeds}),
            "confusion": figures.confusion(run.classes, confusion),
            **figures.distributions(neighbours),
        },
        title=run.path.absolute().name,
        classes=run.classes,
        notes=run.notes,
        seeds=run.seeds,
        measured_on=part and PARTS[part],
        summary=_ordered(run.summary[part]) if part else [],
        scores=[*filter(None, [score_line(run)]), *map(str, run.certainties)],
        validated=[seed for seed in run.seeds if seed.metrics["val"]],
        detailed=bool(results),
        by_seed=_seeds_table(run, part),
        ensemble=run.summary["ensemble"],
        onnx=_onnx_table(run),
        per_class=_per_class_table([result["per_class"] for result in results]),
        confused=confused_table(run.classes, confusion),
        neighbours=neighbours,
        config=settings_table(flatten(run.config.to_dict()).items()),
        provenance=settings_table(flatten(run.provenance).items()),
        largest_matrix=figures.LARGEST_MATRIX,
    )


def _summed(matrices: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """Return the sum of (C, C) counts over seeds."""
    return [
        [sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)
    ]


def _ordered(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Sort (score, mean and std) by SCORES, the others after them."""
    return [(name, summary[name]) for name in dict.fromkeys((*SCORES, *summary)) if name in summary]


def _seeds_table(run: TrainedRun, part: str | None) -> Table:
    """Return a row for each seed, and one for their ensemble; scores of `part`, and validation's
    next to those of the test."""
    ensemble = run.summary["ensemble"]
    headers = ["seed", "epochs"]
    rows = [[setting_cell(one.seed), setting_cell(len(one.epochs))] for one in run.seeds]
    if ensemble:
        rows.append([text_cell("ensemble"), number_cell(None)])
    if part:
        results = [seed.metrics[part] for seed in run.seeds] + ([ensemble] if ensemble else [])
        names = [name for name in SCORES if name in results[0]]
        headers += [*names, "macro precision", "macro recall", "macro F1"]
        for row, result in zip(rows, results, strict=True):
            row += [number_cell(result[name]) for name in names]
            row += [number_cell(result.get(f"macro_{name}")) for name in RATES]
    if part == "test":
        validated = [seed.metrics["val"] or {} for seed in run.seeds] + ([{}] if ensemble else [])
        names = [name for name in PLAIN if any(name in scores for scores in validated)]
        headers += [f"validation {name}" for name in names]
        for row, scores in zip(rows, validated, strict=True):
            row += [number_cell(scores.get(name)) for name in names]
    return Table(headers, rows)


def _onnx_table(run: TrainedRun) -> Table:
    """Return a row for each ONNX file: means over the seeds, and the largest difference of any."""
    headers = ("file", "precision", *PLAIN, "macro F1", "MB", "ms per image", "largest difference")
    rows = []
    for file, scores in run.summary["onnx"].items():
        entries = [entry for seed in run.seeds for entry in seed.onnx if entry["file"] == file]
        differences = [one["max_difference"] for one in entries if "max_difference" in one]
        means = {name: score["mean"] for name, score in scores.items()}
        rows.append(
            [
                text_cell(file, "name"),
                text_cell(entries[0]["precision"]),
                *(number_cell(means.get(name)) for name in (*PLAIN, "macro_f1")),
                number_cell(means["bytes"] / 1e6, digits=2),
                number_cell(means["latency_ms"], digits=2),
                number_cell(max(differences, default=None)),
            ]
        )
    return Table(headers, rows)


def _per_class_table(by_seed: Sequence[Mapping[str, Mapping[str, Any]]]) -> Table:
    """Return a row for each class: means over the seeds."""
    rows = []
    for name, first in by_seed[0].items() if by_seed else ():
        of_class = [per_class[name] for per_class in by_seed]
        means = [number_cell(sum(one[rate] for one in of_class) / len(of_class)) for rate in RATES]
        rows.append([text_cell(name), *means, setting_cell(first["support"])])
    return Table(("class", "precision", "recall", "F1", "images"), rows)
