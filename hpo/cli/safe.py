"""A console for text from anywhere: class names, reasons, hosts, study names."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from hpo.cli.text import printable


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
