"""What the door decides from a request's text alone: no database, no clock, no memory."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass, field

from hpo.dashboard.credentials import Credentials
from hpo.dashboard.request import Request
from hpo.errors import InputError

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
PATH = re.compile(r"/[A-Za-z0-9._~/-]*", re.ASCII)
LONGEST_PATH = 1024
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:\d{1,5})?", re.ASCII)
PAGE = re.compile(r"/dashboard(/[A-Za-z0-9_-]+)*", re.ASCII)

WRITES = {
    r"PUT /api/studies/\d+(/\d+)?/note": None,
    r"DELETE /api/studies/\d+": None,
    r"(POST|DELETE) /api/artifacts(/[0-9a-fA-F-]+){1,3}": None,
    r"POST /api/studies": "a study is made from its file: hpo run STUDY.toml",
    r"POST /api/studies/\d+/rename": (
        "a study keeps its name: Optuna renames by copying, and the copy would lose every epoch "
        "and attempt"
    ),
    r"POST /api/trials/\d+/tell": (
        "trials are ended by their workers; to stop a study: hpo stop STUDY"
    ),
    r"POST /api/trials/\d+/user-attrs": "a trial's attributes are written by its worker",
}
"""What optuna-dashboard's pages may change (None), or why not; everything else is refused."""

SHOWN_IN_PLACE = ("image/png", "image/jpeg", "image/gif", "image/webp", "image/bmp")
"""Artifacts that a browser may show as a page of their own: pixels carry no scripts."""
NEVER_A_PAGE = re.compile(r"(image|audio|video)/[\w.+-]+|text/(csv|plain)|application/json")
"""Artifacts that keep their type, for the dashboard's pages to show, but open as a download."""


@dataclass(frozen=True)
class Settings:
    """How the door stands."""

    credentials: Credentials = field(default_factory=Credentials)
    own_hosts: frozenset[str] = LOOPBACK
    """Names and addresses of this machine that it answers to, on any port."""
    allowed_hosts: frozenset[str] = frozenset()
    """Further ones, NAME or NAME:PORT, as browsers have them in the address bar."""
    read_only: bool = False

    def answers_to(self, host: str) -> bool:
        """Whether a request may be for `host`. Else a page from elsewhere could reach this address
        by a name of its own (DNS rebinding)."""
        found = HOST.fullmatch(host)
        if found is None:
            return False
        return found[1] in self.own_hosts | self.allowed_hosts or host in self.allowed_hosts


def host_name(text: str) -> str:
    """A name for `allowed_hosts`; raises InputError for what no Host header can be."""
    name = text.strip().lower()
    if not HOST.fullmatch(name):
        raise InputError(
            f"--allowed-host {text!r}: a name as it stands in the address bar, such as "
            "hpo.example.com, or NAME:PORT"
        )
    return name


def malformed(request: Request) -> tuple[int, str] | None:
    """Status and reason where no honest client asks like that."""
    if request.method not in METHODS:
        return 405, f"method {request.method!r}; allowed: {', '.join(METHODS)}"
    if request.transfer is not None:
        return 400, "a body comes with its length, or in chunks by HTTP/1.1"
    if not request.target.startswith("/"):
        return 400, "a request names a path of this server"
    path = request.path
    if not PATH.fullmatch(path) or len(path) > LONGEST_PATH:
        return 400, "the path is none of the dashboard's"
    if "//" in path or {".", ".."} & set(path.split("/")):
        return 400, "the path is none of the dashboard's"
    return None


def foreign(request: Request, settings: Settings, *, may_be_silent: bool) -> str | None:
    """Why a write comes from no page of ours; None if it may. Browsers say where a request comes
    from; what says nothing is a script, which has no cookies to be tricked out of."""
    if request.reads:
        return None
    if request.origin is not None:
        origin = request.origin
    elif request.fetch_site is not None:
        if request.fetch_site == "same-origin":
            return None
        origin = f"a {request.fetch_site} page"
    elif request.referer is not None:
        origin = "/".join(request.referer.split("/")[:3])
    elif may_be_silent:
        return None
    else:
        return "a browser says where a request comes from; scripts: Authorization: Bearer TOKEN"
    if _is_own(origin.lower(), request.host, settings):
        return None
    return f"origin {origin!r}: only the dashboard's own pages may change anything"


def _is_own(origin: str, host: str, settings: Settings) -> bool:
    """The scheme is not compared: a proxy in front speaks TLS, and may ask us by another name."""
    scheme, _, place = origin.partition("://")
    usual = {"http": ":80", "https": ":443"}.get(scheme)
    if usual is None:
        return False
    return place == host.removesuffix(usual) or (
        scheme == "https" and place in settings.allowed_hosts
    )


def write_refused(request: Request, settings: Settings) -> str | None:
    """Why a write is not done; None if it is optuna-dashboard's to do."""
    if request.reads:
        return None
    if settings.read_only:
        return "this dashboard is read-only"
    asked = f"{request.method} {request.path}"
    for known, why in WRITES.items():
        if re.fullmatch(known, asked, re.ASCII):
            return why
    return "hpo has no use for this"


def next_page(text: str) -> str:
    """Where to go after the login: a page of the dashboard, whatever the address says."""
    return text if PAGE.fullmatch(text) else "/dashboard"


def artifact_headers(content_type: str) -> list[tuple[str, str]]:
    """How an uploaded file is served: never as a page with rights on this address."""
    kind = content_type.split(";")[0].strip().lower()
    in_place = kind in SHOWN_IN_PLACE
    if not in_place and not NEVER_A_PAGE.fullmatch(kind):
        kind = "application/octet-stream"
    return [
        ("Content-Type", kind),
        ("Content-Disposition", "inline" if in_place else "attachment"),
        ("Content-Security-Policy", "default-src 'none'; sandbox; frame-ancestors 'none'"),
    ]


def harmless_csv(text: str) -> str:
    """`text` with a quote before each cell that a spreadsheet would compute."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    out = io.StringIO()
    csv.writer(out).writerows(
        [_harmless(cell) for cell in row] for row in csv.reader(io.StringIO(text, newline=""))
    )
    return out.getvalue()


def _harmless(cell: str) -> str:
    if not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
