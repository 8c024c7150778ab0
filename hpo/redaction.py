"""Standard streams: passwords stay out of what people see, and any text can be written.

Messages of hpo are made without passwords. This is the last line of defence, for what nobody
foresaw: a traceback whose exception quotes a URL, a library whose error has its arguments in it.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO
from urllib.parse import quote, quote_plus

SHORTEST = 4
"""Replacing shorter ones would make any text unreadable, and hide what is guessed anyway."""

_secrets: set[str] = set()


def keep_secret(secret: str) -> None:
    """Let `redact` replace `secret` from now on, also in the forms of URLs and of `repr`."""
    forms = {secret, quote(secret), quote(secret, safe=""), quote(secret, safe=" +")}
    forms |= {quote_plus(secret), repr(secret)[1:-1]}
    _secrets.update(form for form in forms if len(form) >= SHORTEST)


def redact(text: str) -> str:
    """Return `text` with *** in place of every secret."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


class _Tolerant:
    """A text stream that writes what its encoding lacks with backslashes. Nothing goes past it:
    click would write UTF-8 to the bytes below a stream that is ASCII."""

    def __init__(self, stream: TextIO) -> None:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self._stream, name)


class _Redacted(_Tolerant):
    """One that also writes through `redact`."""

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Encode whatever this process writes inside to `sys.stdout` and `sys.stderr`, and redact what
    it writes to `sys.stderr`, logs and tracebacks too."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Tolerant(sys.stdout), _Redacted(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
