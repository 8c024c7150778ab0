"""Answers of the door, and what every answer gets on its way out."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

Headers = list[tuple[str, str]]

ALWAYS = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
NOTHING = "default-src 'none'; frame-ancestors 'none'"
"""The content policy of what is no page."""
OF_PAGES = "; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
"""What optuna-dashboard's own content policy leaves out."""
SCATTERED = ("access-control-allow-origin", "server", *(name.lower() for name, _ in ALWAYS))
"""Headers that the door alone sets, or nobody."""

COMPRESSED = (
    "application/json",
    "text/html",
    "text/css",
    "text/csv",
    "text/javascript",
    "text/plain",
)
LEAST_BYTES = 1024
LEVEL = 3
"""Of gzip. 5,000 trials, 14.8 MB of JSON (one core, best of five): 1.60 MB in 49 ms; level 1
1.79 MB in 44, level 6 1.29 MB in 104, level 9 1.24 MB in 434."""


@dataclass(frozen=True)
class Answer:
    """Status, headers and body of one response."""

    status: int
    headers: Headers = field(default_factory=list)
    body: Iterable[bytes] = ()

    def header(self, name: str) -> str:
        """The value of a header, empty where it is missing."""
        return next((value for key, value in self.headers if key.lower() == name), "")

    def having(self, *headers: tuple[str, str]) -> Answer:
        """The same with `headers` in place of any of their names."""
        names = {name.lower() for name, _ in headers}
        kept = [(key, value) for key, value in self.headers if key.lower() not in names]
        return replace(self, headers=[*kept, *headers])

    def without(self, *names: str) -> Answer:
        kept = [(key, value) for key, value in self.headers if key.lower() not in names]
        return replace(self, headers=kept)

    @property
    def kind(self) -> str:
        """Its type, without parameters."""
        return self.header("content-type").split(";")[0].strip().lower()

    def whole(self) -> bytes:
        """All of its body, which is then used up."""
        try:
            return b"".join(self.body)
        finally:
            close = getattr(self.body, "close", None)
            if close is not None:
                close()

    def saying(self, body: bytes) -> Answer:
        """The same with another body."""
        length = ("Content-Length", str(len(body)))
        return replace(self.without("etag", "last-modified").having(length), body=[body])

    @property
    def status_line(self) -> str:
        return f"{self.status} {HTTPStatus(self.status).phrase}"


def refusal(status: int, reason: str, *headers: tuple[str, str]) -> Answer:
    """The pages show `reason`, as they do for errors of their own."""
    return from_json(status, {"reason": reason}).having(*headers)


def from_json(status: int, value: Any) -> Answer:
    found = Answer(status, [("Content-Type", "application/json")])
    return found.saying(json.dumps(value).encode())


def redirect(place: str, *headers: tuple[str, str]) -> Answer:
    return Answer(303, [("Location", place), ("Content-Length", "0"), *headers])


def ask(app: WSGIApplication, environ: WSGIEnvironment) -> Answer:
    """The answer of `app`."""
    said: list[Any] = []

    def start(status: str, headers: Headers, _error: Any = None) -> Any:
        said[:] = [int(status.split()[0]), list(headers)]

    body = app(environ, start)
    return Answer(said[0], said[1], body)


def finished(answer: Answer, *, path: str, gzipped: bool) -> Answer:
    """`answer` as it leaves: guarded, not kept by anybody, and compressed if `gzipped`."""
    policy = answer.header("content-security-policy")
    if answer.kind == "text/html" and policy and "frame-ancestors" not in policy:
        policy += OF_PAGES
    # Static files are asked for again with their date; all else is somebody's data.
    static = path.startswith("/static/") or path == "/favicon.ico"
    done = answer.without(*SCATTERED).having(
        *ALWAYS,
        ("Content-Security-Policy", policy or NOTHING),
        ("Cache-Control", "private, no-cache" if static else "no-store"),
        ("Vary", "Accept-Encoding"),
    )
    return _compressed(done) if gzipped and _is_worth_it(done) else done


def _is_worth_it(answer: Answer) -> bool:
    """Guesses at secrets by the length of an answer (BREACH) need a page elsewhere that asks with
    our cookie, which SameSite=Strict withholds."""
    long = int(answer.header("content-length") or LEAST_BYTES) >= LEAST_BYTES
    return answer.kind in COMPRESSED and long and not answer.header("content-encoding")


def _compressed(answer: Answer) -> Answer:
    body = answer.whole()
    if len(body) < LEAST_BYTES:  # none at all for HEAD
        return replace(answer, body=[body])
    packed = gzip.compress(body, LEVEL, mtime=0)
    return answer.saying(packed).having(("Content-Encoding", "gzip"))
