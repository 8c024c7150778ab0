"""Passwords stay out of what people see: the last line of defence.

Messages of hpo are made without them. This is for what nobody foresaw: a traceback whose exception
quotes a URL, a library that writes its arguments into an error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO
from urllib.parse import quote, quote_plus

SHORTEST = 4
"""Replacing shorter ones would make any text unreadable, and hide what is guessed anyway."""

_secrets: set[str] = set()


def keep_secret(secret: str) -> None:
    """From now on `redact` replaces `secret`, as it is and as it stands in URLs and in `repr`."""
    forms = {secret, quote(secret), quote(secret, safe=""), quote(secret, safe=" +")}
    forms |= {quote_plus(secret), repr(secret)[1:-1]}
    _secrets.update(form for form in forms if len(form) >= SHORTEST)


def redact(text: str) -> str:
    """`text` with *** in place of every secret."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


class _Redacted:
    """A text stream that writes through `redact`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def redacted_stderr() -> Iterator[None]:
    """All that this process writes to `sys.stderr` inside, logs and tracebacks too, is redacted."""
    before = sys.stderr
    sys.stderr = _Redacted(before)
    try:
        yield
    finally:
        sys.stderr = before
