"""The door in front of optuna-dashboard, which has none: no password, no check of the host, files
that people uploaded as pages of its own.

Its order: what no honest client sends; a host that is not ours; a write from a page that is not
ours; who is there; what nobody may change here. Only then does optuna-dashboard see the request.
"""

from __future__ import annotations

import html
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote

from hpo.dashboard import answers, rules
from hpo.dashboard.answers import Answer, redirect, refusal
from hpo.dashboard.attempts import Attempts
from hpo.dashboard.request import Request
from hpo.dashboard.rules import Settings
from hpo.dashboard.sessions import Sessions
from hpo.errors import StorageError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

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
        answer = answers.finished(
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
        found = rules.malformed(request)
        if found is None:
            return None
        allow = [("Allow", ", ".join(rules.METHODS))] if found[0] == 405 else []
        return refusal(*found, *allow)

    def _health(self, request: Request) -> Answer | None:
        """For whoever watches over the process: no host, no password, nothing told."""
        if request.path != "/healthz":
            return None
        if not request.reads:
            return refusal(405, "only read", ("Allow", "GET, HEAD"))
        well = self.alive()
        return answers.from_json(200 if well else 503, {"database": "up" if well else "away"})

    def _misdirected(self, request: Request) -> Answer | None:
        if not request.host:
            return refusal(400, "a request names its host")
        if not self.settings.answers_to(request.host):
            advice = "to let it: hpo dashboard --allowed-host NAME"
            return refusal(403, f"host {request.host!r} is none of this dashboard's; {advice}")
        # The forms are for browsers alone; anything else may be a script, whose word it has to be.
        silent = request.path not in ("/login", "/logout") and request.session is None
        why = rules.foreign(request, self.settings, may_be_silent=silent)
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
        place = rules.next_page(query.get("next", [""])[0])
        return redirect(place) if self._is_logged_in(request) else _login(200, place)

    def _is_logged_in(self, request: Request) -> bool:
        return request.session is not None and self.sessions.knows(request.session)

    def _log_in(self, request: Request, environ: WSGIEnvironment) -> Answer:
        form = _form(environ)
        if form is None:
            return refusal(400, f"the login is a form ({FORM}) of {LONGEST_FORM} bytes at most")
        place = rules.next_page(form.get("next", [""])[0])
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
            known = rules.next_page(request.path)
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
        why = rules.write_refused(request, self.settings)
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
            answer = answers.ask(self.app, environ)
        except StorageError as error:
            LOG.warning("%s", error)
            return refusal(503, "the storage does not answer; the dashboard's terminal says why")
        if answer.status == 200 and request.path.startswith("/artifacts/"):
            return answer.having(*rules.artifact_headers(answer.kind))
        if answer.kind == "text/csv":
            return answer.saying(rules.harmless_csv(answer.whole().decode()).encode())
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
