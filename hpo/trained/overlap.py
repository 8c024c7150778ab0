"""The overlap of some images with those that a run has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 10
"""Most names in a line."""
TRAINED, VALIDATED = "trained on", "used for validation, which chose the epoch"


@dataclass(frozen=True)
class Overlap:
    """Names of those of some images that a run has seen."""

    trained: tuple[str, ...]
    validated: tuple[str, ...] | None
    """None if unknown."""
    images: int
    """Number of all images."""

    def __bool__(self) -> bool:
        return bool(self.trained or self.validated)

    def text(self, what: str = "images") -> str:
        """Return `3 of 15 images were trained on: a.jpg, b.jpg, c.jpg`, and the same of those that
        were used for validation; the first SHOWN names of each."""
        pairs = ((self.trained, TRAINED), (self.validated, VALIDATED))
        return "; ".join(self._line(names, what, use) for names, use in pairs if names)

    def _line(self, names: Sequence[str], what: str, use: str) -> str:
        more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
        verb = "was" if len(names) == 1 else "were"
        shown = ", ".join(names[:SHOWN])
        return f"{len(names):,} of {self.images:,} {what} {verb} {use}: {shown}{more}"


NOTHING_SEEN = Overlap((), (), 0)
