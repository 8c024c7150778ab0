"""The page of `hpo compare`."""

from __future__ import annotations

from hpo.results import compare_figures
from hpo.results.comparison import Comparison
from hpo.results.page import render


def comparison_report(found: Comparison, title: str) -> str:
    """The page of `hpo compare`."""
    drawn = compare_figures.figures_of(found)
    names = [name for name, figure in drawn.items() if figure is not None]
    return render(
        "compare.html",
        drawn,
        title=title,
        entries=compare_figures.entries_table(found),
        runs=compare_figures.runs_table(found),
        costs=[name for name in names if name.startswith("cost-")],
        curves=[name for name in names if name.startswith("curves-")],
        notes=found.notes,
    )
