"""The gateway in front of optuna-dashboard: who may send a request, from where, and what it may do.

optuna-dashboard itself has no login, checks neither Host nor Origin, and serves uploaded files as
pages of its own. The gateway checks, in this order: the form of the request; its host; the origin
of a write; the login; what nobody may change here. Only then does optuna-dashboard see the request.
"""

from __future__ import annotations

import csv
import gzip
import html
import io
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import werkzeug
from werkzeug.exceptions import HTTPException
from werkzeug.utils import cached_property
from werkzeug.wrappers import Response

from hpo.dashboard.auth import Credentials, LoginThrottle, Sessions
from hpo.errors import InputError, StorageError
from hpo.formatting import spreadsheet_text

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

MAX_FORM_BYTES = 4096
READS = ("GET", "HEAD")


class Request(werkzeug.Request):
    """A request, and what the gateway asks about it; forwarded headers are waitress's business."""

    max_content_length: int | None = MAX_FORM_BYTES
    """Of the form that the gateway itself reads, the login's."""

    def __init__(self, environ: WSGIEnvironment) -> None:
        super().__init__(environ, populate_request=False)
        self.path = self.path.rstrip("/") or "/"

    @cached_property
    def host(self) -> str:
        """Return the Host header alone: werkzeug would put the server's own name in its place."""
        return self.headers.get("Host", "").lower()

    @property
    def target(self) -> str:
        """The request target as it was sent, escapes and query included."""
        return str(self.environ.get("REQUEST_URI") or self.path)

    @property
    def reads(self) -> bool:
        """True if the request changes nothing."""
        return self.method in READS

    @property
    def is_page(self) -> bool:
        """True where a person looks at the response, not a script or a page of ours."""
        return self.reads and (self.path == "/" or self.path.split("/")[1] in ("dashboard", "hpo"))

    @property
    def is_secure(self) -> bool:
        """True behind TLS; the browser's own word counts where no proxy is trusted."""
        return self.scheme == "https" or self.headers.get("Origin", "").startswith("https://")

    @property
    def cookie_name(self) -> str:
        """Name of the session cookie. Browsers send a host's cookies to all its ports, so it holds
        the port."""
        return f"hpo_{self.environ.get('SERVER_PORT', '')}"

    @property
    def session(self) -> str | None:
        """The token of the session cookie; None without one."""
        return self.cookies.get(self.cookie_name)

    @property
    def bearer(self) -> str | None:
        """The token of the Authorization header; werkzeug takes one with a `=` for parameters."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token.strip() if scheme.lower() == "bearer" else None

    @property
    def basic_password(self) -> str:
        """The password of `curl -u NAME:PASSWORD`, whatever the name; empty without one."""
        try:
            given = self.authorization
        except ValueError:  # of what is not ASCII, werkzeug's own
            return ""
        return (given.password or "") if given is not None and given.type == "basic" else ""


LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
PATH = re.compile(r"/[A-Za-z0-9._~/-]*", re.ASCII)
MAX_PATH = 1024
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:\d{1,5})?", re.ASCII)
PAGE = re.compile(r"/(dashboard(/[A-Za-z0-9_-]+)*|hpo(/[A-Za-z0-9._-]+)*)", re.ASCII)

WRITES = {
    r"PUT /api/studies/\d+(/\d+)?/note": None,
    r"DELETE /api/studies/\d+": None,
    r"(POST|DELETE) /api/artifacts(/[0-9a-fA-F-]+){1,3}": None,
    r"POST /hpo/studies/[A-Za-z0-9._-]+/(stop|resume|extend|enqueue)": None,
    r"POST /api/studies": "a study is created from its file: hpo run STUDY.toml",
    r"POST /api/studies/\d+/rename": (
        "a study keeps its name: Optuna renames by copying, and the copy would lose every epoch "
        "and attempt"
    ),
    r"POST /api/trials/\d+/tell": (
        "trials are ended by their workers; to stop a study: hpo stop STUDY"
    ),
    r"POST /api/trials/\d+/user-attrs": "a trial's attributes are written by its worker",
}
"""What the pages may change (None), or why not; everything else is refused."""

INLINE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp", "image/bmp")
"""Artifacts that a browser may show as a page of their own: pixels carry no scripts."""
ATTACHMENT_TYPES = re.compile(r"(image|audio|video)/[\w.+-]+|text/(csv|plain)|application/json")
"""Artifacts that keep their type, for the dashboard's pages to show, but open as a download."""


@dataclass(frozen=True)
class Settings:
    """Credentials, host names and rights of a gateway."""

    credentials: Credentials = field(default_factory=Credentials)
    own_hosts: frozenset[str] = LOOPBACK
    """Names and addresses of this machine that it answers to, on any port."""
    allowed_hosts: frozenset[str] = frozenset()
    """Further ones, NAME or NAME:PORT, as in a browser's address bar."""
    read_only: bool = False

    def answers_to(self, host: str) -> bool:
        """Return whether a request may be for `host`. Else a page from elsewhere could reach this
        address by a name of its own (DNS rebinding)."""
        match = HOST.fullmatch(host)
        if match is None:
            return False
        return match[1] in self.own_hosts | self.allowed_hosts or host in self.allowed_hosts


def host_name(text: str) -> str:
    """Return a name for `allowed_hosts`; raise InputError for what no Host header can be."""
    name = text.strip().lower()
    if not HOST.fullmatch(name):
        raise InputError(
            f"--allowed-host {text!r}: a name as in the address bar, such as hpo.example.com, or "
            "NAME:PORT"
        )
    return name


def malformed(request: Request) -> tuple[int, str] | None:
    """Return status and reason if no honest client sends such a request."""
    path = request.path
    if request.method not in METHODS:
        return 405, f"method {request.method!r}; allowed: {', '.join(METHODS)}"
    if "Transfer-Encoding" in request.headers:
        return 400, "a body comes with its length, or in chunks by HTTP/1.1"
    if not request.target.startswith("/") or not request.query_string.isascii():
        return 400, "a request names a path of this server, with percent escapes"
    if not PATH.fullmatch(path) or len(path) > MAX_PATH:
        return 400, "not a path of the dashboard"
    if "//" in path or {".", ".."} & set(path.split("/")):
        return 400, "not a path of the dashboard"
    return None


def cross_site(request: Request, settings: Settings, *, scripts: bool) -> str | None:
    """Return why a write does not come from a page of ours; None if it may be done.

    Browsers say where a request comes from. What says nothing is a script, which has no cookies to
    be tricked out of; `scripts`: those may write.
    """
    if request.reads:
        return None
    headers = request.headers
    if "Origin" in headers:
        origin = headers["Origin"]
    elif "Sec-Fetch-Site" in headers:
        if headers["Sec-Fetch-Site"] == "same-origin":
            return None
        origin = f"a {headers['Sec-Fetch-Site']} page"
    elif "Referer" in headers:
        origin = "/".join(headers["Referer"].split("/")[:3])
    elif scripts:
        return None
    else:
        return "a browser says where a request comes from; scripts: Authorization: Bearer TOKEN"
    if _is_own(origin.lower(), request.host, settings):
        return None
    return f"origin {origin!r}: only the dashboard's own pages may change anything"


def _is_own(origin: str, host: str, settings: Settings) -> bool:
    """Compare names and ports, not schemes: a proxy in front speaks TLS, and may use another
    name for this server."""
    scheme, _, place = origin.partition("://")
    default_port = {"http": ":80", "https": ":443"}.get(scheme)
    if default_port is None:
        return False
    return place == host.removesuffix(default_port) or (
        scheme == "https" and place in settings.allowed_hosts
    )


def write_refused(request: Request, settings: Settings) -> str | None:
    """Return why a write is refused; None if optuna-dashboard may do it."""
    if request.reads:
        return None
    if settings.read_only:
        return "this dashboard is read-only"
    wanted = f"{request.method} {request.path}"
    for pattern, reason in WRITES.items():
        if re.fullmatch(pattern, wanted, re.ASCII):
            return reason
    return "hpo has no use for this"


def next_page(text: str) -> str:
    """Return where to go after the login: a page of the dashboard, whatever the address says."""
    return text if PAGE.fullmatch(text) else "/dashboard"


def artifact_headers(content_type: str) -> dict[str, str]:
    """Return headers that serve an uploaded file, never as a page with rights on this address."""
    kind = content_type.split(";")[0].strip().lower()
    inline = kind in INLINE_TYPES
    if not inline and not ATTACHMENT_TYPES.fullmatch(kind):
        kind = "application/octet-stream"
    return {
        "Content-Type": kind,
        "Content-Disposition": "inline" if inline else "attachment",
        "Content-Security-Policy": "default-src 'none'; sandbox; frame-ancestors 'none'",
    }


def harmless_csv(text: str) -> str:
    """Put a quote before each cell of `text` that a spreadsheet would compute."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    out = io.StringIO()
    csv.writer(out).writerows(
        [spreadsheet_text(cell) for cell in row]
        for row in csv.reader(io.StringIO(text, newline=""))
    )
    return out.getvalue()


SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
REMOVED_HEADERS = ("Access-Control-Allow-Origin", "Server")
DEFAULT_POLICY = "default-src 'none'; frame-ancestors 'none'"
"""Content security policy of everything but pages."""
PAGE_POLICY = "; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
"""What optuna-dashboard's own content security policy leaves out."""
LOGIN_POLICY = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:{PAGE_POLICY}"
CHALLENGE = {"WWW-Authenticate": "Bearer"}
"""Header of a 401. Not Basic, though it is accepted: browsers would ask in a window of theirs."""

COMPRESSED = (
    "application/json",
    "text/html",
    "text/css",
    "text/csv",
    "text/javascript",
    "text/plain",
)
MIN_GZIP_BYTES = 1024
GZIP_LEVEL = 3
"""5,000 trials, 14.8 MB of JSON (one core, best of five): 1.60 MB in 49 ms; level 1 1.79 MB in 44,
level 6 1.29 MB in 104, level 9 1.24 MB in 434."""


def json_response(status: int, value: Any) -> Response:
    """Return a response with `value` as JSON."""
    return Response(json.dumps(value), status, mimetype="application/json")


def refusal(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    """Return an error whose `reason` the pages show, as they do for errors of their own."""
    response = json_response(status, {"reason": reason})
    response.headers.update(headers or {})
    return response


def redirect(place: str) -> Response:
    """Return a redirect to `place`, a path of this server."""
    return Response(status=303, headers={"Location": place})


def set_body(response: Response, body: bytes) -> Response:
    """Replace the body, and drop what validated the old one."""
    for name in ("ETag", "Last-Modified"):
        response.headers.remove(name)
    response.set_data(body)
    return response


def harden(response: Response, *, path: str, gzipped: bool) -> Response:
    """Set the security headers of a response, forbid caches to keep it, and compress it if
    `gzipped`."""
    policy = response.headers.get("Content-Security-Policy", "")
    if response.mimetype == "text/html" and policy and "frame-ancestors" not in policy:
        policy += PAGE_POLICY
    # Static files are revalidated by their date; all else is somebody's data.
    static = path.startswith("/static/") or path == "/favicon.ico"
    for name in REMOVED_HEADERS:
        response.headers.remove(name)
    response.headers.update(SECURITY_HEADERS)
    response.headers["Content-Security-Policy"] = policy or DEFAULT_POLICY
    response.headers["Cache-Control"] = "private, no-cache" if static else "no-store"
    response.headers["Vary"] = "Accept-Encoding"
    if gzipped and response.mimetype in COMPRESSED and "Content-Encoding" not in response.headers:
        _compress(response)
    return response


def _compress(response: Response) -> None:
    """Compress a body of MIN_GZIP_BYTES and more. Guesses at secrets by the length of a response
    (BREACH) need a page elsewhere that sends our cookie, which SameSite=Strict withholds."""
    length = response.content_length
    if length is not None and length < MIN_GZIP_BYTES:
        return
    body = response.get_data()
    if len(body) >= MIN_GZIP_BYTES:  # HEAD has none
        set_body(response, gzip.compress(body, GZIP_LEVEL, mtime=0))
        response.headers["Content-Encoding"] = "gzip"


LOG = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
FORM_TYPE = "application/x-www-form-urlencoded"


@dataclass(frozen=True)
class Gateway:
    """WSGI middleware: passes to `app` what `settings` allow. `is_healthy` asks the database."""

    app: WSGIApplication
    settings: Settings
    is_healthy: Callable[[], bool]
    sessions: Sessions
    throttle: LoginThrottle

    def __call__(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        """Answer a request, or pass it to the app."""
        request = Request(environ)
        gzipped = request.accept_encodings.quality("gzip") > 0
        response = harden(self._respond(request), path=request.path, gzipped=gzipped)
        return response(environ, start)

    def _respond(self, request: Request) -> Response:
        return (
            self._check_form(request)
            or self._health(request)
            or self._check_origin(request)
            or self._own_page(request)
            or self._check_login(request)
            or self._check_write(request)
            or self._forward(request)
        )

    def _check_form(self, request: Request) -> Response | None:
        problem = malformed(request)
        if problem is None:
            return None
        return refusal(*problem, {"Allow": ", ".join(METHODS)} if problem[0] == 405 else None)

    def _health(self, request: Request) -> Response | None:
        """Answer a supervisor of the process: no host, no password, no details."""
        if request.path != "/healthz":
            return None
        if not request.reads:
            return refusal(405, "only GET and HEAD", {"Allow": "GET, HEAD"})
        if self.is_healthy():
            return json_response(200, {"database": "up"})
        return json_response(503, {"database": "away"})

    def _check_origin(self, request: Request) -> Response | None:
        if not request.host:
            return refusal(400, "a request names its host")
        if not self.settings.answers_to(request.host):
            advice = "to allow it: hpo dashboard --allowed-host NAME"
            return refusal(403, f"host {request.host!r} is not a name of this dashboard; {advice}")
        # The forms are for browsers alone; anything else may be a script.
        scripts = request.path not in ("/login", "/logout") and request.session is None
        reason = cross_site(request, self.settings, scripts=scripts)
        return None if reason is None else refusal(403, reason)

    def _own_page(self, request: Request) -> Response | None:
        if request.path == "/hpo.js":
            return Response((FOLDER / "page.js").read_bytes(), mimetype="text/javascript")
        if request.path == "/logout" and not request.reads:
            self.sessions.close(request.session or "")
            response = redirect("/login")
            _set_session(response, request, "", max_age=0)
            return response
        if request.path != "/login":
            return None
        if not self.settings.credentials.required:
            return redirect("/dashboard")
        if not request.reads:
            return self._log_in(request)
        place = next_page(request.args.get("next", ""))
        return redirect(place) if self._is_logged_in(request) else _login_page(200, place)

    def _is_logged_in(self, request: Request) -> bool:
        return request.session is not None and self.sessions.is_open(request.session)

    def _log_in(self, request: Request) -> Response:
        form = read_form(request)
        if "password" not in form:
            limit = f"of {MAX_FORM_BYTES} bytes at most, with a password"
            return refusal(400, f"the login is a form ({FORM_TYPE}) {limit}")
        place = next_page(form.get("next", ""))
        wait_s = self._try_password(request, form["password"])
        if wait_s is None:
            self.sessions.close(request.session or "")
            response = redirect(place)
            _set_session(response, request, self.sessions.open())
        elif wait_s:
            response = _login_page(429, place, _try_later(wait_s))
            response.headers.update(_retry_after(wait_s))
        else:
            response = _login_page(401, place, "Wrong password.")
            response.headers.update(CHALLENGE)
        return response

    def _try_password(self, request: Request, given: str) -> float | None:
        """Return None if it is right; else the seconds to wait before it is compared, 0 if it
        was."""
        client = request.remote_addr or ""
        wait_s = self.throttle.begin(client)
        if wait_s:
            return wait_s
        if self.settings.credentials.is_password(given):
            self.throttle.succeeded(client)
            return None
        LOG.warning("wrong password from %s", client)
        return 0.0

    def _check_login(self, request: Request) -> Response | None:
        """Return None for a request with a right token, password or session."""
        credentials = self.settings.credentials
        if not credentials.required:
            return None
        if request.bearer is not None and credentials.is_token(request.bearer):
            return None
        if "Authorization" in request.headers:
            return self._check_script(request)
        if self._is_logged_in(request):
            return None
        if request.is_page:
            return redirect(f"/login?next={quote(next_page(request.path), safe='')}")
        return refusal(401, "log in first: reload the page", CHALLENGE)

    def _check_script(self, request: Request) -> Response | None:
        wait_s = self._try_password(request, request.basic_password)
        if wait_s is None:
            return None
        if wait_s:
            return refusal(429, _try_later(wait_s), _retry_after(wait_s))
        return refusal(401, "wrong token or password", CHALLENGE)

    def _check_write(self, request: Request) -> Response | None:
        reason = write_refused(request, self.settings)
        return None if reason is None else refusal(403, reason)

    def _forward(self, request: Request) -> Response:
        """Ask optuna-dashboard, and make what it serves safe."""
        if request.path == "/":
            return redirect("/dashboard")
        response = self._ask(request)
        if response.status_code == 200 and request.path.startswith("/artifacts/"):
            response.headers.update(artifact_headers(response.mimetype or ""))
        elif response.mimetype == "text/csv":
            set_body(response, harmless_csv(response.get_data(as_text=True)).encode())
        elif (
            request.path.startswith("/dashboard")
            and request.is_page
            and response.status_code == 200
            and request.method == "GET"
        ):
            set_body(response, response.get_data().replace(b"</body>", self._bar() + b"</body>"))
        return response

    def _ask(self, request: Request) -> Response:
        environ = request.environ
        environ["PATH_INFO"] = request.path
        # Its static files fail without the header, and its gzipped icon does not say that it is.
        icon = request.path == "/favicon.ico"
        environ["HTTP_ACCEPT_ENCODING"] = "" if icon else environ.get("HTTP_ACCEPT_ENCODING", "")
        if request.is_page:
            for name in ("HTTP_IF_NONE_MATCH", "HTTP_IF_MODIFIED_SINCE"):
                environ.pop(name, None)  # the page is not only the file: it has our bar
        try:
            return Response.from_app(self.app, environ)
        except StorageError as error:
            LOG.warning("%s", error)
            return refusal(503, "database unavailable; the dashboard's terminal says why")

    def _bar(self) -> bytes:
        """Return what is added to optuna-dashboard's pages."""
        parts = ['<a href="/hpo">Workers, logs, reports</a>']
        if self.settings.read_only:
            parts.append("<span>read-only</span>")
        if self.settings.credentials.required:
            parts.append('<form method="post" action="/logout"><button>Log out</button></form>')
        bar = (FOLDER / "bar.html").read_text(encoding="utf-8")
        return bar.replace("<!-- parts -->", "".join(parts)).encode()


def read_form(request: Request) -> Mapping[str, str]:
    """Return the fields of a posted form; none if it is another type, too long or not UTF-8."""
    if request.mimetype != FORM_TYPE:
        return {}
    try:
        return request.form
    except HTTPException:
        return {}


def _login_page(status: int, place: str, problem: str = "") -> Response:
    page = (FOLDER / "login.html").read_text(encoding="utf-8")
    alert = f'<p role="alert">{html.escape(problem)}</p>' if problem else ""
    page = page.replace("<!-- problem -->", alert).replace("NEXT", html.escape(place))
    headers = {"Content-Security-Policy": LOGIN_POLICY}
    return Response(page, status, headers, mimetype="text/html")


def _set_session(
    response: Response, request: Request, token: str, max_age: int | None = None
) -> None:
    response.set_cookie(
        request.cookie_name,
        token,
        max_age=max_age,
        secure=request.is_secure,
        httponly=True,
        samesite="Strict",
    )


def _try_later(wait_s: float) -> str:
    return f"Too many wrong passwords: try again in {math.ceil(wait_s)} s."


def _retry_after(wait_s: float) -> dict[str, str]:
    return {"Retry-After": str(math.ceil(wait_s))}
