"""Values and messages as text that a terminal can show."""

from __future__ import annotations

import re

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal would obey instead of showing it (but for tabs and line ends), and what cannot be
encoded."""


def printable(text: str) -> str:
    """`text` for a terminal: control characters, and those that turn its direction, as \\x1b."""
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)
