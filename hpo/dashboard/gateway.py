"""The gateway in front of optuna-dashboard, and the policy of what it lets through.

that people uploaded as pages of its own.

Its order: what no honest client sends; a host that is not ours; a write from a page that is not
ours; who is there; what nobody may change here. Only then does optuna-dashboard see the request.
"""

from __future__ import annotations

import base64
import binascii
import csv
import gzip
import html
import io
import json
import logging
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

from hpo.dashboard.auth import Attempts, Credentials, Sessions
from hpo.errors import InputError, StorageError
from hpo.formatting import spreadsheet_text

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

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
        [spreadsheet_text(cell) for cell in row]
        for row in csv.reader(io.StringIO(text, newline=""))
    )
    return out.getvalue()


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


LOG = logging.getLogger(__name__)
HERE = Path(__file__).parent
LONGEST_FORM = 4096  # bytes
FORM = "application/x-www-form-urlencoded"
LOGIN_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
WHO = ("WWW-Authenticate", "Bearer")
"""What a 401 names. Not Basic, though it is taken: browsers would ask in a window of theirs."""


@dataclass(frozen=True)
class Door:
    """Lets in whom `settings` says, to `app`; `alive` says whether the database answers."""

    app: WSGIApplication
    settings: Settings
    alive: Callable[[], bool]
    sessions: Sessions
    attempts: Attempts

    def __call__(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        request = Request.of(environ)
        answer = finished(
            self._answer(request, environ), path=request.path, gzipped=request.takes_gzip
        )
        start(answer.status_line, answer.headers)
        return () if request.method == "HEAD" else answer.body

    def _answer(self, request: Request, environ: WSGIEnvironment) -> Answer:
        return (
            self._unreadable(request)
            or self._health(request)
            or self._misdirected(request)
            or self._own_page(request, environ)
            or self._stranger(request)
            or self._not_for_anyone(request)
            or self._inside(request, environ)
        )

    def _unreadable(self, request: Request) -> Answer | None:
        found = malformed(request)
        if found is None:
            return None
        allow = [("Allow", ", ".join(METHODS))] if found[0] == 405 else []
        return refusal(*found, *allow)

    def _health(self, request: Request) -> Answer | None:
        """For whoever watches over the process: no host, no password, nothing told."""
        if request.path != "/healthz":
            return None
        if not request.reads:
            return refusal(405, "only read", ("Allow", "GET, HEAD"))
        well = self.alive()
        return from_json(200 if well else 503, {"database": "up" if well else "away"})

    def _misdirected(self, request: Request) -> Answer | None:
        if not request.host:
            return refusal(400, "a request names its host")
        if not self.settings.answers_to(request.host):
            advice = "to let it: hpo dashboard --allowed-host NAME"
            return refusal(403, f"host {request.host!r} is none of this dashboard's; {advice}")
        # The forms are for browsers alone; anything else may be a script, whose word it has to be.
        silent = request.path not in ("/login", "/logout") and request.session is None
        why = foreign(request, self.settings, may_be_silent=silent)
        return None if why is None else refusal(403, why)

    def _own_page(self, request: Request, environ: WSGIEnvironment) -> Answer | None:
        if request.path == "/hpo-door.js":
            script = (HERE / "page.js").read_bytes()
            return Answer(200, [("Content-Type", "text/javascript")]).saying(script)
        if request.path == "/logout" and not request.reads:
            self.sessions.close(request.session or "")
            return redirect("/login", _cookie(request, "", "; Max-Age=0"))
        if request.path != "/login":
            return None
        if not self.settings.credentials.asked:
            return redirect("/dashboard")
        if not request.reads:
            return self._log_in(request, environ)
        query = parse_qs(environ.get("QUERY_STRING", ""))
        place = next_page(query.get("next", [""])[0])
        return redirect(place) if self._is_logged_in(request) else _login(200, place)

    def _is_logged_in(self, request: Request) -> bool:
        return request.session is not None and self.sessions.knows(request.session)

    def _log_in(self, request: Request, environ: WSGIEnvironment) -> Answer:
        form = _form(environ)
        if form is None:
            return refusal(400, f"the login is a form ({FORM}) of {LONGEST_FORM} bytes at most")
        place = next_page(form.get("next", [""])[0])
        wait_s = self._try_password(request, form.get("password", [""])[0])
        if wait_s is None:
            self.sessions.close(request.session or "")
            return redirect(place, _cookie(request, self.sessions.open()))
        if wait_s:
            return _login(429, place, _later(wait_s)).having(("Retry-After", _seconds(wait_s)))
        return _login(401, place, "That is not the password.").having(WHO)

    def _try_password(self, request: Request, given: str) -> float | None:
        """None if it is right; else the seconds to wait before it is looked at, 0 if it was."""
        wait_s = self.attempts.begin(request.client)
        if wait_s:
            return wait_s
        if self.settings.credentials.is_password(given):
            self.attempts.succeeded(request.client)
            return None
        LOG.warning("a wrong password from %s", request.client)
        return 0.0

    def _stranger(self, request: Request) -> Answer | None:
        """Why the sender of `request` is not let in; None for who is."""
        credentials = self.settings.credentials
        if not credentials.asked:
            return None
        if request.bearer is not None and credentials.is_token(request.bearer):
            return None
        if request.authorization is not None:
            return self._script(request)
        if self._is_logged_in(request):
            return None
        if request.is_page:
            known = next_page(request.path)
            return redirect(f"/login?next={quote(known, safe='')}")
        return refusal(401, "log in first: reload the page", WHO)

    def _script(self, request: Request) -> Answer | None:
        wait_s = self._try_password(request, request.basic_password or "")
        if wait_s is None:
            return None
        if wait_s:
            return refusal(429, _later(wait_s), ("Retry-After", _seconds(wait_s)))
        return refusal(401, "that is not the token or the password", WHO)

    def _not_for_anyone(self, request: Request) -> Answer | None:
        why = write_refused(request, self.settings)
        return None if why is None else refusal(403, why)

    def _inside(self, request: Request, environ: WSGIEnvironment) -> Answer:
        if request.path == "/":
            return redirect("/dashboard")
        environ["PATH_INFO"] = request.path
        # Its static files fail without, and its packed icon does not say that it is packed.
        packed = "" if request.path == "/favicon.ico" else request.accepts
        environ["HTTP_ACCEPT_ENCODING"] = packed
        if request.is_page:
            for name in ("HTTP_IF_NONE_MATCH", "HTTP_IF_MODIFIED_SINCE"):
                environ.pop(name, None)  # the page is not only the file: it has our bar
        try:
            answer = ask(self.app, environ)
        except StorageError as error:
            LOG.warning("%s", error)
            return refusal(503, "the storage does not answer; the dashboard's terminal says why")
        if answer.status == 200 and request.path.startswith("/artifacts/"):
            return answer.having(*artifact_headers(answer.kind))
        if answer.kind == "text/csv":
            return answer.saying(harmless_csv(answer.whole().decode()).encode())
        if request.is_page and answer.status == 200 and request.method == "GET":
            return answer.saying(answer.whole().replace(b"</body>", self._bar() + b"</body>"))
        return answer

    def _bar(self) -> bytes:
        """What we add to optuna-dashboard's page."""
        parts = ["<span>read-only</span>"] if self.settings.read_only else []
        if self.settings.credentials.asked:
            parts.append('<form method="post" action="/logout"><button>Log out</button></form>')
        bar = (HERE / "bar.html").read_text(encoding="utf-8")
        return bar.replace("<!-- parts -->", "".join(parts)).encode()


def _form(environ: WSGIEnvironment) -> dict[str, list[str]] | None:
    """The fields of a posted form; None for what is none."""
    kind = environ.get("CONTENT_TYPE", "").split(";")[0].strip().lower()
    size = int(environ.get("CONTENT_LENGTH") or 0)
    if kind != FORM or size > LONGEST_FORM:
        return None
    try:
        return parse_qs(environ["wsgi.input"].read(size).decode(), max_num_fields=8)
    except ValueError:
        return None


def _login(status: int, place: str, problem: str = "") -> Answer:
    page = (HERE / "login.html").read_text(encoding="utf-8")
    alert = f'<p role="alert">{html.escape(problem)}</p>' if problem else ""
    page = page.replace("<!-- problem -->", alert).replace("NEXT", html.escape(place))
    found = Answer(status, [("Content-Type", "text/html; charset=utf-8")])
    return found.saying(page.encode()).having(("Content-Security-Policy", LOGIN_POLICY))


def _cookie(request: Request, value: str, more: str = "") -> tuple[str, str]:
    secure = "; Secure" if request.is_secure else ""
    cookie = f"{request.cookie_name}={value}; Path=/; HttpOnly; SameSite=Strict{secure}{more}"
    return "Set-Cookie", cookie


def _later(wait_s: float) -> str:
    return f"Too many wrong passwords: try again in {_seconds(wait_s)} s."


def _seconds(wait_s: float) -> str:
    return str(math.ceil(wait_s))
