"""A console for text from anywhere: class names, reasons, hosts, study names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import rich.text
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from hpo.cli.text import encodable
from hpo.formatting import printable


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
