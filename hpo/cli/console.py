"""The console: text from anywhere made safe for a terminal, sparklines and bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import rich.text
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from hpo.formatting import UNPRINTABLE, printable, spreadsheet_text


def encodable(text: str) -> str:
    """Return `text` for standard output, with escapes for what its encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def as_json(data: Any) -> str:
    """Return indented JSON, with escapes for control characters and what cannot be encoded."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    text = UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return text if encodable(text) == text else json.dumps(data, indent=2)


def nearby(path: Path) -> str:
    """Return a path relative to the working directory if it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def moment(seconds: float) -> str:
    """Format seconds since 1970 as a local time, to the minute."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def bar(share: float, width: int) -> str:
    """Draw `width` cells, filled to `share` (0..1) in eighths of a cell."""
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
    """Console that shows escape sequences in a text instead of passing them to the terminal."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render with printable text alone."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment  # the console's own
            else:
                yield Segment(printable(segment.text), segment.style)


class Text(rich.text.Text):
    """Text that shows escape sequences from the start, so that columns are measured as wide as
    they are printed."""

    def __init__(self, text: str = "", *args: Any, **options: Any) -> None:
        super().__init__(encodable(printable(text)), *args, **options)

    def append(self, text: rich.text.Text | str, *args: Any, **options: Any) -> Text:
        """Append text, its escape sequences shown."""
        shown = encodable(printable(text)) if isinstance(text, str) else text
        super().append(shown, *args, **options)
        return self
