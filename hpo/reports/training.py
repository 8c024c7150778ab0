"""The page of `hpo train`."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from typing import Any

from hpo.config.base import flatten
from hpo.formatting import (
    Cell,
    Table,
    number_cell,
    setting_cell,
    settings_table,
    text_cell,
)
from hpo.reports import (
    figures,
)
from hpo.reports.page import (
    curve_figures,
    render,
)
from hpo.trained.run import (
    Run,
    SeedResult,
    read_json,
)

PLAIN_SCORES = ("loss", "top1", "top5", "precision_at_5", "precision_at_k", "mean_distance")
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
    """What a retrieval found, of `hpo.trained.retrieval.keep_examples`; None of other tasks."""
    file = one.files.neighbours
    found: dict[str, Any] | None = read_json(file) if file.exists() else None
    return found


def _result(scores: Mapping[str, Any]) -> dict[str, Any]:
    macro = {name: scores[f"macro_{name}"] for name in ("precision", "recall", "f1")}
    per_class = [{"class": name, **row} for name, row in scores["per_class"].items()]
    plain = {name: scores[name] for name in (*PLAIN_SCORES, "confusion") if name in scores}
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


SCORES = ("precision_at_5", "precision_at_k", "top1", "top5", "loss", "mean_distance")
MOST_CONFUSED = 10


def training_report(run: Mapping[str, Any]) -> str:
    """The page of `hpo train`, from plain data:

    {"title", "config": nested, "provenance": nested or None, "classes": [C names], "notes": [...],
     "seeds": [{"seed", "epochs": [{"epoch", metric: value, ...}], "test": result or None,
     "validation": {"loss", "top1", "top5"} of the kept epoch, a result, or None}],
     "summary": {metric: {"mean", "std", "n"}} or None, "ensemble": result or None (may lack),
     "onnx": [{"file", "precision", "bytes", "latency_ms", "max_difference" or None, scores}] (may
     lack), "retrieval": what `hpo.trained.retrieval.keep_examples` writes, or None or absent}

    A result is {"loss", "top1", "top5" (of a retrieval "precision_at_5", "precision_at_k",
    "mean_distance", "top1"), "macro": {"precision", "recall", "f1"}, "per_class":
    [{"class", "precision", "recall", "f1", "support"}], "confusion": (C, C) counts, rows true}.
    """
    classes, seeds = list(run["classes"]), list(run["seeds"])
    measured_on = _measured_on(seeds)
    results = [seed[measured_on] for seed in seeds] if measured_on else []
    results = [result for result in results if "confusion" in result]
    counts = _summed([result["confusion"] for result in results])
    series = {f"seed {seed['seed']}": seed["epochs"] for seed in seeds}
    retrieval = run.get("retrieval")
    return render(
        "training.html",
        {
            **curve_figures(series),
            "confusion": figures.confusion(classes, counts),
            **figures.distributions(retrieval),
        },
        title=run["title"],
        classes=classes,
        notes=list(run["notes"]),
        seeds=seeds,
        measured_on=measured_on,
        summary=_summary_rows(run["summary"]),
        detailed=bool(results),
        by_seed=_seeds_table(seeds, measured_on, run.get("ensemble")),
        ensemble=run.get("ensemble"),
        onnx=_onnx_table(run.get("onnx", [])),
        per_class=_per_class_table([result["per_class"] for result in results]),
        confused=_confused_table(classes, counts),
        retrieval=retrieval,
        config=settings_table(flatten(run["config"]).items()),
        provenance=settings_table(flatten(run["provenance"] or {}).items()),
        largest_matrix=figures.LARGEST_MATRIX,
    )


def _measured_on(seeds: Sequence[Mapping[str, Any]]) -> str | None:
    """The images that all seeds were measured on at the end: the test's, else the validation's."""
    for split in ("test", "validation"):
        if seeds and all(seed.get(split) for seed in seeds):
            return split
    return None


def _summed(matrices: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """The sum of (C, C) counts over seeds."""
    return [
        [sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)
    ]


def _summary_rows(summary: Mapping[str, Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """In the order of SCORES, the others after them."""
    known = summary or {}
    names = [*(name for name in SCORES if name in known), *(n for n in known if n not in SCORES)]
    return [{"metric": name, **known[name]} for name in names]


PLAIN, MACRO = ("top1", "top5", "loss"), ("precision", "recall", "f1")


def _seeds_table(
    seeds: Sequence[Mapping[str, Any]], split: str | None, ensemble: Mapping[str, Any] | None
) -> Table:
    """A row for each seed, and one for all as an ensemble; validation's scores beside the test's,
    where there are both."""
    headers = ["seed", "epochs"]
    rows = [[setting_cell(seed["seed"]), setting_cell(len(seed["epochs"]))] for seed in seeds]
    results = [seed[split] for seed in seeds] if split else []
    if ensemble:
        rows.append([text_cell("ensemble"), number_cell(None)])
        results.append(ensemble)
    if split:
        shown = [name for name in SCORES if name in results[0]]
        headers += [*shown, "macro precision", "macro recall", "macro F1"]
        for row, result in zip(rows, results, strict=True):
            row += [number_cell(result[name]) for name in shown]
            row += [number_cell(result.get("macro", {}).get(name)) for name in MACRO]
    validated = [seed.get("validation") for seed in seeds]
    if split == "test" and any(validated):
        known = [name for name in PLAIN if any(name in (found or {}) for found in validated)]
        headers += [f"validation {name}" for name in known]
        for row, found in zip(rows, [*validated, None][: len(rows)], strict=True):
            row += [number_cell((found or {}).get(name)) for name in known]
    return Table(headers, rows)


def _onnx_table(files: Sequence[Mapping[str, Any]]) -> Table:
    headers = ("file", "precision", *PLAIN, "macro F1", "MB", "ms per image", "largest difference")
    rows = [
        [
            text_cell(one["file"], "name"),
            text_cell(one["precision"]),
            *(number_cell(one.get(name)) for name in (*PLAIN, "macro_f1")),
            number_cell(one["bytes"] / 1e6, digits=2),
            number_cell(one["latency_ms"], digits=2),
            number_cell(one["max_difference"]),
        ]
        for one in files
    ]
    return Table(headers, rows)


def _per_class_table(by_seed: Sequence[Sequence[Mapping[str, Any]]]) -> Table:
    """A row for each class: means over the seeds."""
    rows = []
    for same in zip(*by_seed, strict=True):
        means = [
            number_cell(sum(row[name] for row in same) / len(same))
            for name in ("precision", "recall", "f1")
        ]
        rows.append([text_cell(same[0]["class"]), *means, setting_cell(same[0]["support"])])
    return Table(("class", "precision", "recall", "F1", "images"), rows)


def _confused_table(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Table:
    """The pairs that were confused most, by share of the true class."""
    pairs = [
        (n / sum(row), n, classes[i], classes[j])
        for i, row in enumerate(counts)
        for j, n in enumerate(row)
        if n and i != j
    ]
    pairs.sort(key=lambda pair: (-pair[0], -pair[1]))
    rows = [
        [text_cell(true), text_cell(named), Cell(f"{n:,}", n, "number"),
         Cell(f"{share:.1%}", share, "number")]
        for share, n, true, named in pairs[:MOST_CONFUSED]
    ]  # fmt: skip
    return Table(("true class", "named", "images", "share of the class"), rows)
