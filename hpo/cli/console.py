"""The console: text from anywhere made safe for a terminal, and small drawings."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import rich.text
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from hpo.formatting import (
    UNPRINTABLE,
    printable,
    spreadsheet_text,
)

SPARKS = "▁▂▃▄▅▆▇█"


def encodable(text: str) -> str:
    """`text` for standard output, with backslashes in place of what its encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def as_json(data: Any) -> str:
    """Indented JSON, with escapes for what a terminal would obey and what cannot be encoded."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    text = UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return text if encodable(text) == text else json.dumps(data, indent=2)


def moment(seconds: float) -> str:
    """A time since 1970 in this machine's time zone, to the minute."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def sparkline(values: Sequence[float]) -> str:
    """One block per value, from the lowest to the highest; a dot where it is not finite."""
    finite = [one for one in values if math.isfinite(one)]
    if not finite:
        return "·" * len(values)
    low, span = min(finite), max(finite) - min(finite)

    def block(one: float) -> str:
        if not math.isfinite(one):
            return "·"
        return SPARKS[round((one - low) / span * (len(SPARKS) - 1))] if span else SPARKS[0]

    return "".join(block(one) for one in values)


def bar(share: float, width: int) -> str:
    """`width` cells, filled to `share` (0..1) in eighths of a cell."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")).ljust(width)


def cell(item: Any) -> str:
    """Return a value for a spreadsheet, which must not run text as a formula."""
    if item is None:
        return ""
    if isinstance(item, bool | int | float):
        return json.dumps(item)
    return spreadsheet_text(
        printable(item) if isinstance(item, str) else json.dumps(item, default=str)
    )


class SafeConsole(Console):
    """Shows the escapes that a text holds instead of passing them on to the terminal."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment  # of the console's own
            else:
                yield Segment(printable(segment.text), segment.style)


class Text(rich.text.Text):
    """Text whose escapes are shown, as wide as it will be: a column that was measured before they
    were would cut them."""

    def __init__(self, text: str = "", *args: Any, **options: Any) -> None:
        super().__init__(encodable(printable(text)), *args, **options)

    def append(self, text: rich.text.Text | str, *args: Any, **options: Any) -> Text:
        shown = encodable(printable(text)) if isinstance(text, str) else text
        super().append(shown, *args, **options)
        return self
