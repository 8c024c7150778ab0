"""A page as one HTML file that opens without network.

plotly.js is part of the file, and its content policy lets the page load nothing at all. Names come
from outside (classes, reasons, paths): Jinja escapes them in the text, `tojson` inside scripts.
"""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hpo.formatting import duration, number, plural
from hpo.io import write_text
from hpo.reports import figures

LOSSES = ("train_loss", "val_loss")
ACCURACIES = (
    "train_top1",
    "val_top1",
    "val_top5",
    "val_macro_f1",
    "val_precision_at_5",
    "val_precision_at_k",
)


def write_report(path: Path, page: str) -> None:
    """Write a page atomically. Raises InputError for a path that cannot be written."""
    write_text(path, page)


def render(template: str, figures_by_name: Mapping[str, Any], **values: Any) -> str:
    """Render a template as one HTML file; figures that are None are left out."""
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {
        "number": number,
        "duration": duration,
        "plural": plural,
        "quoted": shlex.quote,
        "key": lambda key: f"{key:.9g}" if isinstance(key, float) else str(key),
    }
    known = {name: figure for name, figure in figures_by_name.items() if figure is not None}
    page = environment.get_template(template).render(
        figures={
            name: {key: value for key, value in figure.items() if key != "alt"}
            for name, figure in known.items()
        },
        alts={name: figure["alt"] for name, figure in known.items()},
        plotly=get_plotlyjs(),
        nonce=secrets.token_urlsafe(16),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **values,
    )
    # A file name that is not UTF-8 holds lone surrogates.
    return page.encode(errors="backslashreplace").decode()


def curve_figures(
    series: Mapping[str, figures.Epochs], mark: int | None = None
) -> dict[str, figures.Figure | None]:
    """Draw loss, accuracy and learning rate of `series` ({label: epochs}); `mark` is an epoch."""
    return {
        "loss": figures.curves(series, LOSSES, mark=mark),
        "accuracy": figures.curves(series, ACCURACIES, mark=mark),
        "lr": figures.curves(series, ["lr"], mark=mark),
    }
