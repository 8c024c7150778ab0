"""A request as plain data, so that what the door decides can be tested by table."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

READS = ("GET", "HEAD")
GZIP = re.compile(
    r"(?:^|,)\s*(?:gzip|\*)\s*(?:;\s*q\s*=\s*(?P<q>[\d.]+)\s*)?(?=,|$)", re.IGNORECASE
)


@dataclass(frozen=True)
class Request:
    """What the door looks at. Absent headers are None; `path` has its escapes resolved."""

    method: str = "GET"
    path: str = "/"
    target: str = "/"
    """As it was asked for, escapes and query included."""
    host: str = ""
    origin: str | None = None
    referer: str | None = None
    fetch_site: str | None = None
    authorization: str | None = None
    cookies: str = ""
    accepts: str = ""
    """Encodings of the answer that the client takes."""
    transfer: str | None = None
    client: str = ""
    """The address that it comes from, behind a trusted proxy the one that the proxy names."""
    scheme: str = "http"
    port: str = ""

    @classmethod
    def of(cls, environ: WSGIEnvironment) -> Request:
        path = environ.get("PATH_INFO", "")
        return cls(
            method=environ["REQUEST_METHOD"],
            path=path.rstrip("/") or "/",
            target=environ.get("REQUEST_URI") or path,
            host=environ.get("HTTP_HOST", "").lower(),
            origin=environ.get("HTTP_ORIGIN"),
            referer=environ.get("HTTP_REFERER"),
            fetch_site=environ.get("HTTP_SEC_FETCH_SITE"),
            authorization=environ.get("HTTP_AUTHORIZATION"),
            cookies=environ.get("HTTP_COOKIE", ""),
            accepts=environ.get("HTTP_ACCEPT_ENCODING", ""),
            transfer=environ.get("HTTP_TRANSFER_ENCODING"),
            client=environ.get("REMOTE_ADDR", ""),
            scheme=environ.get("wsgi.url_scheme", "http"),
            port=environ.get("SERVER_PORT", ""),
        )

    @property
    def reads(self) -> bool:
        return self.method in READS

    @property
    def is_page(self) -> bool:
        """Whether a person looks at the answer; else a script or a page of ours does."""
        return self.reads and (self.path == "/" or self.path.split("/")[1] == "dashboard")

    @property
    def takes_gzip(self) -> bool:
        found = GZIP.search(self.accepts)
        return found is not None and found["q"] not in ("0", "0.0", "0.00", "0.000")

    @property
    def is_secure(self) -> bool:
        """Whether TLS stands in front; the browser's own word counts where no proxy is trusted."""
        return self.scheme == "https" or (self.origin or "").startswith("https://")

    @property
    def cookie_name(self) -> str:
        """Of the session. Browsers give a host's cookies to all its ports, so it names the port."""
        return f"hpo_{self.port}"

    @property
    def session(self) -> str | None:
        try:
            found = SimpleCookie(self.cookies).get(self.cookie_name)
        except CookieError:
            return None
        return found.value if found else None

    @property
    def bearer(self) -> str | None:
        return self._authorization("bearer")

    @property
    def basic_password(self) -> str | None:
        """The password of `curl -u NAME:PASSWORD`; the name is nobody's."""
        try:
            pair = base64.b64decode(self._authorization("basic") or "", validate=True).decode()
        except (binascii.Error, ValueError):
            return None
        _name, colon, password = pair.partition(":")
        return password if colon else None

    def _authorization(self, kind: str) -> str | None:
        given, _, value = (self.authorization or "").partition(" ")
        return value.strip() if given.lower() == kind else None
