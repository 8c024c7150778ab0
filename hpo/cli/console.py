"""The console: text from anywhere made safe for a terminal, bars, and tables as wide as it is."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import rich.text
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Column, Table

from hpo.formatting import UNPRINTABLE, printable, spreadsheet_text

GAP = 2
"""Spaces between columns."""
HEAD = 10
"""Longest header that is never broken."""
WHOLE = 1_000
"""Length of headers that nothing breaks."""
PROSE = 28
"""Text that is longer may be wrapped between its words."""
NOTHING = ("", "-", "–")
"""Cells without a value."""


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


def is_drawn(console: Console) -> bool:
    """Return whether a console can be drawn on in place: a terminal whose cursor can be moved."""
    return console.is_terminal and not console.is_dumb_terminal


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


def tell(out: Console, line: str, style: str = "") -> None:
    """Print a sentence: broken between words on a terminal, which would break them anywhere; in one
    line elsewhere."""
    out.print(Text(line, style), soft_wrap=not out.is_terminal)


class FittedTable(Table):
    """Table without lines and without empty columns.

    Where a terminal is too narrow for all columns, headers are broken between words; where that is
    not enough, the table goes on below, with its first column again.
    """

    def __init__(self) -> None:
        super().__init__(box=None, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render one table, or several of whole columns, one below the other."""
        filled = [one for one in self.columns if _is_filled(one)] or self.columns[:1]
        columns = [_bounded(one, console, options) for one in filled]
        if next(_parts(columns, options.max_width)) != columns:
            columns = [_bounded(one, console, options, head=HEAD) for one in filled]
        for place, part in enumerate(_parts(columns, options.max_width)):
            if place:
                yield rich.text.Text()
            yield self._table(part, options.max_width)

    def _table(self, columns: Sequence[Column], width: int) -> Table:
        """Return a table of some columns; the last ones get what is left of `width`."""
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0))
        left = width - sum(one.min_width or 0 for one in columns) - GAP * (len(columns) - 1)
        tallest = max(str(one.header).count("\n") for one in columns)
        for place, one in enumerate(columns):
            more = min(left, (one.max_width or 0) - (one.min_width or 0))
            left -= max(0, more)
            size = (one.min_width or 0) + max(0, more)
            head = rich.text.Text("\n" * (tallest - str(one.header).count("\n")) + str(one.header))
            fixed = replace(one, _index=place, header=head, width=size)
            table.columns.append(replace(fixed, min_width=None, max_width=None))
        table.rows = self.rows
        return table


def _is_filled(column: Column) -> bool:
    """Return whether a column has a cell with something in it, or no cells at all."""
    cells = list(column.cells)
    return not cells or any(
        not isinstance(one, str | rich.text.Text) or str(one) not in NOTHING for one in cells
    )


def _bounded(
    column: Column, console: Console, options: ConsoleOptions, head: int = WHOLE
) -> Column:
    """Return a column with the least and the greatest width that it should get; a header longer
    than `head` and the cells is broken."""
    cells = list(column.cells)
    longest = max((_width(one, console, options) for one in cells), default=0)
    title = broken(str(column.header), max(head, min(longest, PROSE)))
    least = longest
    if column.justify == "left" and longest > PROSE:
        least = max(PROSE, *(_longest_word(one) for one in cells))
    words = max(map(cell_len, title.splitlines()), default=0)
    least = max(words, min(least, max(PROSE, options.max_width // 2)))
    sizes = [min(size, options.max_width) for size in (least, max(least, longest))]
    return replace(column, header=rich.text.Text(title), min_width=sizes[0], max_width=sizes[1])


def _width(cell: RenderableType, console: Console, options: ConsoleOptions) -> int:
    if isinstance(cell, str | rich.text.Text):
        return max(map(cell_len, str(cell).splitlines()), default=0)
    return Measurement.get(console, options, cell).maximum


def _longest_word(cell: RenderableType) -> int:
    return max(map(cell_len, str(cell).split()), default=0)


def _parts(columns: Sequence[Column], width: int) -> Iterator[list[Column]]:
    """Yield the columns in parts that fit into `width`, each with the first column."""
    first, part = columns[0], [columns[0]]
    taken = first.min_width or 0
    for column in columns[1:]:
        needed = GAP + (column.min_width or 0)
        if len(part) > 1 and taken + needed > width:
            yield part
            part, taken = [first], first.min_width or 0
        part.append(column)
        taken += needed
    yield part


def broken(head: str, width: int) -> str:
    """Return a header in lines of up to `width`, broken after spaces and underscores and before
    dots; a longer word stays whole."""
    if cell_len(head) <= width:
        return head
    lines = [""]
    for part in re.split(r"(?<=[ _])|(?=\.)", head):
        if lines[-1] and cell_len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)
