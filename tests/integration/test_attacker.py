"""What an attacker sends to `hpo dashboard`, byte by byte over a socket; and that the same with the
password works."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from hpo.search.study import Study
from hpo.storage import records
from hpo.storage.database import Database, connect
from tests.harness.dashboards import PASSWORD, TOKEN, Dashboard, running
from tests.harness.fakes import study_file
from tests.harness.filled import Trial, fill

pytestmark = pytest.mark.process

DEADLINE_S = 120
STUDY = "/api/studies/1"
NOTE = b'{"body": "seen", "version": 2}'
PAGE = b'{"file": "data:text/html;base64,PGI+aGk8L2I+", "filename": "x.html"}'
BEARER = f"Authorization: Bearer {TOKEN}"
BASIC = "Authorization: Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()
OTHERS = "Origin: http://evil.example"
FORM = "Content-Type: application/x-www-form-urlencoded"


@dataclass(frozen=True)
class Reply:
    """One HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes


def send(dashboard: Dashboard, raw: bytes) -> list[Reply]:
    """What comes back for `raw` until the server closes the connection."""
    host, port = dashboard.host.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        received = b""
        with suppress(ConnectionError):  # it need not read what it refuses
            connection.sendall(raw)
            while chunk := connection.recv(65536):
                received += chunk
    return list(replies(received))


def replies(raw: bytes) -> Iterator[Reply]:
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {key.lower(): value for key, value in (one.split(": ", 1) for one in lines)}
        size = int(headers["content-length"])
        yield Reply(int(first.split()[1]), headers, raw[:size])
        raw = raw[size:]


def request(
    dashboard: Dashboard, asked: str, *lines: str, body: bytes = b"", host: bool = True
) -> bytes:
    """The bytes of `asked`, such as "GET /x", with further header lines."""
    head = [f"{asked} HTTP/1.1", *lines, *([f"Host: {dashboard.host}"] if host else [])]
    if not any(line.startswith("Connection") for line in lines):
        head.append("Connection: close")
    if body:
        head.append(f"Content-Length: {len(body)}")
        if not any(line.startswith("Content-Type") for line in lines):
            head.append("Content-Type: application/json")
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


def ask(
    dashboard: Dashboard, asked: str, *lines: str, body: bytes = b"", host: bool = True
) -> Reply:
    (reply,) = send(dashboard, request(dashboard, asked, *lines, body=body, host=host))
    return reply


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    database = connect(f"sqlite:///{tmp_path_factory.mktemp('studies') / 'hpo.db'}")
    yield fill(database, study_file(), [Trial("complete", (0.5,)), Trial("complete", (0.7,))])
    database.dispose()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Database, Dashboard]]:
    """Two studies, 1 and 2, that may be written to, and a dashboard that is nobody's else."""
    folder = tmp_path_factory.mktemp("other")
    database = connect(f"sqlite:///{folder / 'hpo.db'}")
    for name in ("toy", "second"):
        fill(database, study_file(name=name), [Trial("complete", (0.5,))])
    with running(database, folder) as found:
        yield database, found
    database.dispose()


@pytest.fixture(scope="module")
def locked(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """With a password and a token; behind a proxy, so that each test is a client of its own."""
    folder = tmp_path_factory.mktemp("locked")
    with running(study.database, folder, "--trusted-proxy", "127.0.0.1") as found:
        yield found


@pytest.fixture(scope="module")
def read_only(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    folder = tmp_path_factory.mktemp("read-only")
    with running(study.database, folder, "--read-only", locked=False) as found:
        yield found


def untouched(study: Study) -> bool:
    """Whether all that a test sent left the study as it was."""
    (row,) = records.list_studies(study.database)
    states = records.read_states(study.database, row.study_id)
    with study.database.read() as c:
        notes = c.exec_driver_sql(
            "SELECT value_json FROM study_system_attributes WHERE key = 'dashboard:note_ver'"
        ).scalar()
    return (row.uuid, set(states.values()), notes) == (study.uuid, {"COMPLETE"}, "1")


# Each of these gets `refused` from a stranger, and `known` from who has the token.

STRANGERS = [
    ("the list", "GET /api/studies", b"", 401, 200),
    ("a study", f"GET {STUDY}", b"", 401, 200),
    ("its importances", f"GET {STUDY}/param_importances", b"", 401, 200),
    ("its table", "GET /csv/1", b"", 401, 200),
    ("its headers", f"HEAD {STUDY}", b"", 401, 200),
    ("what it can do", "GET /api/meta", b"", 401, 200),
    ("a page", "GET /dashboard/studies/1", b"", 303, 200),
    ("the root", "GET /", b"", 303, 303),
    ("its script", "GET /static/bundle.js", b"", 401, 200),
    ("an upload", "GET /artifacts/1/0a-1b", b"", 401, 400),  # there is no store
    ("a path in capitals", "GET /API/studies", b"", 401, 404),
    ("a path with parameters", "GET /api/studies?next=/login&x=/healthz", b"", 401, 200),
    ("the health's path and more", "GET /healthz/x", b"", 401, 404),
    ("the login's path and more", "GET /login/x", b"", 401, 404),
    ("an encoded slash", "GET /api%2Fstudies", b"", 401, 200),
    ("an encoded letter", "GET /%61pi/studies", b"", 401, 200),
    ("two slashes in front", "GET //api/studies", b"", 401, 200),
    ("a slash at the end", "GET /api/studies/", b"", 401, 200),
    ("a migration", "POST /incompatible-rdb-schema", b"x", 401, 403),
    ("a new study", "POST /api/studies", b'{"study_name": "x"}', 401, 403),
    ("a new name", f"POST {STUDY}/rename", b'{"study_name": "x"}', 401, 403),
    ("the end of a trial", "POST /api/trials/1/tell", b'{"state": "Fail"}', 401, 403),
    ("an attribute", "POST /api/trials/1/user-attrs", b'{"user_attrs": {"a": 1}}', 401, 403),
    ("a page uploaded", "POST /api/artifacts/1", PAGE, 401, 400),  # there is no store
    ("a page uploaded to a trial", "POST /api/artifacts/1/1", PAGE, 401, 400),
    ("a method in a header", f"POST {STUDY}\r\nX-HTTP-Method-Override: DELETE", b"x", 401, 403),
    ("a method in the query", f"POST {STUDY}?_method=DELETE", b"_method=DELETE", 401, 403),
    ("a note", f"PUT {STUDY}/note", NOTE, 401, 200),
    ("deleting", f"DELETE {STUDY}", b"{}", 401, 200),
]


@pytest.mark.parametrize(("asked", "body", "refused"), [(a, b, r) for _, a, b, r, _ in STRANGERS],
                         ids=[name for name, *_ in STRANGERS])  # fmt: skip
def test_a_stranger_gets_nothing(
    locked: Dashboard, study: Study, asked: str, body: bytes, refused: int
) -> None:
    asked, *lines = asked.split("\r\n")
    reply = ask(locked, asked, *lines, body=body)
    assert reply.status == refused
    assert b"toy" not in reply.body
    if refused == 303:
        assert reply.headers["location"].startswith("/login?next=%2Fdashboard")
    assert untouched(study)


def test_the_same_with_the_password_works(other: tuple[Database, Dashboard]) -> None:
    database, own = other
    for name, asked, body, _, known in STRANGERS:
        asked, *lines = asked.split("\r\n")
        for secret in (BEARER, BASIC) if asked.startswith("GET") else (BEARER,):
            reply = ask(own, asked, *lines, secret, body=body)
            assert reply.status == known, (name, reply)
    assert [row.name for row in records.list_studies(database)] == ["second"]


# What no password helps: sent with the token all the same.

ALWAYS_REFUSED = [
    ("a host elsewhere", 403, ["GET /api/studies", "Host: evil.example"]),
    ("a host like ours", 403, ["GET /api/studies", "Host: 127.0.0.1.evil.example"]),
    ("a host and a user", 403, ["GET /api/studies", "Host: 127.0.0.1@evil.example"]),
    ("two hosts", 403, ["GET /api/studies", "Host: 127.0.0.1", "Host: evil.example"]),
    ("no host", 400, ["GET /api/studies"]),
    ("an empty host", 400, ["GET /api/studies", "Host:"]),
    ("the proxy's word on the host", 403,
     ["GET /api/studies", "Host: evil.example", "X-Forwarded-Host: 127.0.0.1"]),
    ("another server's address", 400, ["GET http://evil.example/api/studies", "Host: 127.0.0.1"]),
    ("TRACE", 405, ["TRACE /", "Host: 127.0.0.1"]),
    ("PATCH", 405, [f"PATCH {STUDY}", "Host: 127.0.0.1"]),
    ("OPTIONS", 405, ["OPTIONS *", "Host: 127.0.0.1"]),
    ("CONNECT", 405, ["CONNECT evil.example:80", "Host: 127.0.0.1"]),
    ("PROPFIND", 405, ["PROPFIND /", "Host: 127.0.0.1"]),
    ("a method in small letters", 400, ["get /", "Host: 127.0.0.1"]),
    ("up and out", 400, ["GET /static/../../../etc/passwd", "Host: 127.0.0.1"]),
    ("up and out, encoded", 400, ["GET /static/%2e%2e/%2e%2e/_app.py", "Host: 127.0.0.1"]),
    ("up and out, all encoded", 400, ["GET /static%2f..%2f..%2f_app.py", "Host: 127.0.0.1"]),
    ("up and out, backslashes", 400, ["GET /static/..%5c..%5c_app.py", "Host: 127.0.0.1"]),
    ("past the health", 400, ["GET /healthz/../api/studies", "Host: 127.0.0.1"]),
    ("past the login", 400, ["GET /login/..%2fapi/studies", "Host: 127.0.0.1"]),
    ("two slashes inside", 400, ["GET /static//etc/passwd", "Host: 127.0.0.1"]),
    ("NUL", 400, ["GET /static/bundle.js%00.png", "Host: 127.0.0.1"]),
    ("bytes in the query", 400, ["GET /login?next=\xff", "Host: 127.0.0.1"]),
    ("a line's end", 400, ["GET /dashboard%0d%0aSet-Cookie:x", "Host: 127.0.0.1"]),
    ("a digit of another script", 400, ["POST /api/trials/%D9%A1/tell", "Host: 127.0.0.1"]),
    ("a long path", 400, [f"GET /{'a' * 3000}", "Host: 127.0.0.1"]),
    ("long headers", 431, ["GET /", "Host: 127.0.0.1", f"X: {'a' * 20000}"]),
    ("a large body", 413, ["POST /login", "Host: 127.0.0.1", "Content-Length: 9999999"]),
    ("two lengths", 400,
     ["POST /login", "Host: 127.0.0.1", "Content-Length: 3", "Content-Length: 5"]),
    ("a length below zero", 400, ["POST /login", "Host: 127.0.0.1", "Content-Length: -1"]),
    ("a length with a sign", 400, ["POST /login", "Host: 127.0.0.1", "Content-Length: +1"]),
    ("an unknown coding", 501, ["POST /login", "Host: 127.0.0.1", "Transfer-Encoding: gzip"]),
    ("a blank before the colon", 400, ["GET /", "Host : 127.0.0.1"]),
    ("a header without a colon", 400, ["GET /", "Host: 127.0.0.1", "nothing"]),
    ("a line's end alone", 400, ["GET /", "Host: 127.0.0.1", "X: a\nY: b"]),
    ("another page's write", 403, [f"DELETE {STUDY}", "Host: 127.0.0.1", OTHERS]),
    ("a write from nowhere", 403, [f"DELETE {STUDY}", "Host: 127.0.0.1", "Origin: null"]),
    ("a write from another port", 403,
     [f"DELETE {STUDY}", "Host: 127.0.0.1", "Origin: http://127.0.0.1:9"]),
    ("a write from a sister", 403,
     [f"DELETE {STUDY}", "Host: 127.0.0.1", "Sec-Fetch-Site: same-site"]),
    ("a write by a link", 403,
     [f"DELETE {STUDY}", "Host: 127.0.0.1", "Referer: http://evil.example/127.0.0.1"]),
]  # fmt: skip


@pytest.mark.parametrize(("status", "lines"), [(s, lines) for _, s, lines in ALWAYS_REFUSED],
                         ids=[name for name, *_ in ALWAYS_REFUSED])  # fmt: skip
def test_what_no_password_helps(
    locked: Dashboard, study: Study, status: int, lines: list[str]
) -> None:
    asked, *headers = lines
    found = send(locked, request(locked, asked, *headers, BEARER, host=False))
    if status != 431 or found:  # that one may be cut off before it is read
        assert [reply.status for reply in found] == [status]
    for reply in found:
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "server" not in reply.headers
        assert b"waitress" not in reply.body
    assert untouched(study)


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /api/studies\r\n\r\n",
        b"GET /api/studies HTTP/1.0\r\n\r\n",
        b"POST /login HTTP/1.0\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
        b"\x00" * 100 + b"\r\n\r\n",
    ],
    ids=["HTTP/0.9", "HTTP/1.0", "chunks by HTTP/1.0", "TLS", "zeros"],
)
def test_other_languages(locked: Dashboard, raw: bytes) -> None:
    assert [reply.status for reply in send(locked, raw)] == [400]


def test_chunks_are_counted(locked: Dashboard) -> None:
    chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    head = request(locked, "POST /login", "Transfer-Encoding: chunked", FORM)
    host, port = locked.host.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        connection.sendall(head)
        try:
            for _ in range(40):
                connection.sendall(chunk)
            received = connection.recv(65536)
        except (BrokenPipeError, ConnectionResetError):
            return  # it has closed, which is refusal enough
    assert b" 413 " in received.split(b"\r\n")[0]


def test_a_smuggled_request_is_asked_for_its_own_password(locked: Dashboard) -> None:
    """A length and chunks at once: whoever counts otherwise, the second has no token."""
    inner = request(locked, "GET /api/studies")
    body = b"0\r\n\r\n" + inner
    lines = ("Connection: keep-alive", "Transfer-Encoding: chunked",
             f"Content-Length: {len(body)}", BEARER)  # fmt: skip
    found = send(locked, request(locked, "GET /api/studies", *lines) + body)
    assert [reply.status for reply in found] in ([200, 401], [200], [400])


# Passwords, tokens, cookies

WRONG = [
    ("no token", "Authorization: Bearer"),
    ("a wrong token", f"Authorization: Bearer {TOKEN}x"),
    ("half a token", f"Authorization: Bearer {TOKEN[:-1]}"),
    ("the password as a token", f"Authorization: Bearer {PASSWORD}"),
    ("two tokens", f"Authorization: Bearer x\r\nAuthorization: Bearer {TOKEN}"),
    ("a wrong password", "Authorization: Basic " + base64.b64encode(b"me:wrong").decode()),
    ("no colon", "Authorization: Basic " + base64.b64encode(PASSWORD.encode()).decode()),
    ("no base64", "Authorization: Basic !!!!"),
    ("another scheme", f'Authorization: Digest username="me", response="{PASSWORD}"'),
    ("a made-up session", "Cookie: hpo_{port}=" + "A" * 43),
    ("an empty session", "Cookie: hpo_{port}="),
    ("a session of nonsense", "Cookie: hpo_{port}=\xff; ;=;hpo_{port}"),
]


@pytest.mark.parametrize("k", range(len(WRONG)), ids=[name for name, _ in WRONG])
def test_a_wrong_secret_is_none(locked: Dashboard, k: int) -> None:
    lines = WRONG[k][1].replace("{port}", locked.host.rsplit(":", 1)[1]).split("\r\n")
    client = f"X-Forwarded-For: 10.0.0.{k}"
    assert ask(locked, "GET /api/studies", *lines, client).status == 401
    assert ask(locked, f"DELETE {STUDY}", *lines, client).status in (401, 403)


def log_in(dashboard: Dashboard, password: str = PASSWORD, *lines: str, place: str = "") -> Reply:
    body = f"password={quote(password)}&next={quote(place, safe='')}".encode()
    lines = lines or (f"Origin: {dashboard.origin}",)
    return ask(dashboard, "POST /login", FORM, *lines, body=body)


def session(dashboard: Dashboard) -> str:
    return "Cookie: " + log_in(dashboard).headers["set-cookie"].split(";")[0]


def test_a_login_opens_and_a_logout_shuts(locked: Dashboard) -> None:
    reply = log_in(locked, place="/dashboard/studies/1")
    assert (reply.status, reply.headers["location"]) == (303, "/dashboard/studies/1")
    session, *attributes = reply.headers["set-cookie"].split("; ")
    assert re.fullmatch(r"hpo_\d+=[\w-]{43}", session)
    assert sorted(attributes) == ["HttpOnly", "Path=/", "SameSite=Strict"]
    cookie = f"Cookie: {session}"
    assert ask(locked, "GET /api/studies", cookie).status == 200
    assert ask(locked, "GET /login", cookie).status == 303
    foreign = ask(locked, "POST /logout", cookie, OTHERS)
    assert foreign.status == 403
    assert ask(locked, "GET /api/studies", cookie).status == 200
    reply = ask(locked, "POST /logout", cookie, f"Origin: {locked.origin}")
    assert (reply.status, reply.headers["location"]) == (303, "/login")
    assert "Max-Age=0" in reply.headers["set-cookie"]
    assert ask(locked, "GET /api/studies", cookie).status == 401


def test_every_login_has_a_session_of_its_own(locked: Dashboard) -> None:
    assert session(locked) != session(locked)


def test_behind_tls_the_cookie_stays_there(locked: Dashboard) -> None:
    proxied = ("Sec-Fetch-Site: same-origin", "X-Forwarded-Proto: https")
    for lines in ((f"Origin: https://{locked.host}",), proxied):
        _, *attributes = log_in(locked, PASSWORD, *lines).headers["set-cookie"].split("; ")
        assert sorted(attributes) == ["HttpOnly", "Path=/", "SameSite=Strict", "Secure"]


LOGINS_REFUSED = [
    ("from another page", [OTHERS, FORM], f"password={PASSWORD}", 403),
    ("from nowhere", ["Origin: null", FORM], f"password={PASSWORD}", 403),
    ("by a script", [FORM], f"password={PASSWORD}", 403),
    ("as JSON", ["Origin: OWN", "Content-Type: application/json"], '{"password": "x"}', 400),
    ("of a kind of its own", ["Origin: OWN", "Content-Type: text/plain"], "password=x", 400),
    ("with a long form", ["Origin: OWN", FORM], "password=" + "x" * 5000, 400),
    ("with many fields", ["Origin: OWN", FORM], "&".join("a=b" for _ in range(50)), 400),
    ("with bytes that are no text", ["Origin: OWN", FORM], "password=\xff", 400),
    ("without a password", ["Origin: OWN", FORM], "next=/dashboard", 400),
    ("with a wrong password", ["Origin: OWN", FORM], "password=wrong", 401),
]


@pytest.mark.parametrize(("lines", "body", "status"), [case[1:] for case in LOGINS_REFUSED],
                         ids=[name for name, *_ in LOGINS_REFUSED])  # fmt: skip
def test_a_login_is_refused(locked: Dashboard, lines: list[str], body: str, status: int) -> None:
    lines = [line.replace("OWN", locked.origin) for line in lines]
    client = f"X-Forwarded-For: 10.1.0.{status % 250}"
    reply = ask(locked, "POST /login", *lines, client, body=body.encode("latin-1"))
    assert reply.status == status
    assert "set-cookie" not in reply.headers


@pytest.mark.parametrize("place", ["//evil.example", "https://evil.example", "/dashboard\r\nX: y"])
def test_a_login_leads_nowhere_else(locked: Dashboard, place: str) -> None:
    reply = log_in(locked, place=place)
    assert (reply.status, reply.headers["location"]) == (303, "/dashboard")
    shown = ask(locked, f"GET /login?next={quote(place, safe='')}")
    assert b'value="/dashboard"' in shown.body
    script = ask(locked, "GET /login?next=%22%3E%3Cscript%3Ealert(1)%3C/script%3E")
    assert b"<script" not in script.body


WRITES_BY_COOKIE = [
    ("ours", ["Origin: OWN"], 200),
    ("ours, without an origin", ["Sec-Fetch-Site: same-origin"], 200),
    ("ours, by an old browser", ["Referer: OWN/dashboard"], 200),
    ("silent", [], 403),
    ("another page's", [OTHERS], 403),
    ("a sister's", ["Sec-Fetch-Site: same-site"], 403),
    ("another page's, by an old browser", ["Referer: http://evil.example/"], 403),
    ("another port's", ["Origin: http://127.0.0.1:1"], 403),
]


def test_a_cookie_writes_from_our_pages_alone(other: tuple[Database, Dashboard]) -> None:
    _, own = other
    study, cookie, version = "/api/studies/2", session(own), 1  # hpo wrote the first
    for name, lines, status in WRITES_BY_COOKIE:
        lines = [line.replace("OWN", own.origin) for line in lines]
        note = json.dumps({"body": name, "version": version + 1}).encode()
        reply = ask(own, f"PUT {study}/note", cookie, *lines, body=note)
        assert reply.status == status, name
        version += status == 200
    detail = json.loads(ask(own, f"GET {study}", cookie).body)
    assert detail["note"] == {"version": 4, "body": "ours, by an old browser"}
    # A browser that was given the password in an address sends it along from anywhere.
    assert ask(own, f"DELETE {study}", BASIC, OTHERS, body=b"{}").status == 403
    assert ask(own, f"GET {study}", BEARER).status == 200


def test_guesses_get_slower_and_hold_up_nobody_else(other: tuple[Database, Dashboard]) -> None:
    _, own = other
    cookie = session(own)
    statuses, deadline = [401], time.monotonic() + DEADLINE_S
    while statuses[-1] == 401 and time.monotonic() < deadline:
        reply = log_in(own, "a guess")
        statuses.append(reply.status)
    assert statuses[-1] == 429
    assert int(reply.headers["retry-after"]) >= 1
    assert b"Too many wrong passwords: try again in" in reply.body
    assert ask(own, "GET /api/studies", BEARER).status == 200
    assert ask(own, "GET /api/studies", cookie).status == 200
    while (reply := log_in(own)).status == 429 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert reply.status == 303
    said = re.findall(r"^\d{4}-.* wrong password from 127.0.0.1$", own.errors, re.MULTILINE)
    assert len(said) == len(statuses) - 2
    assert "a guess" not in own.errors


# What it says, and to whom


def test_a_health_check_needs_nothing(locked: Dashboard) -> None:
    for lines in ([], ["Host: evil.example"]):
        reply = ask(locked, "GET /healthz", *lines, host=False)
        assert (reply.status, json.loads(reply.body)) == (200, {"database": "up"})
    assert ask(locked, "HEAD /healthz").body == b""
    assert ask(locked, "POST /healthz", body=b"x").status == 405


def test_answers_are_packed_and_kept_by_nobody(locked: Dashboard) -> None:
    plain = ask(locked, f"GET {STUDY}", BEARER)
    packed = ask(locked, f"GET {STUDY}", BEARER, "Accept-Encoding: gzip")
    assert json.loads(gzip.decompress(packed.body)) == json.loads(plain.body)
    assert len(packed.body) < len(plain.body)
    for reply in (plain, packed):
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["vary"] == "Accept-Encoding"
    script = ask(locked, "GET /static/bundle.js", BEARER, "Accept-Encoding: gzip")
    assert script.headers["content-encoding"] == "gzip"
    again = f"If-Modified-Since: {script.headers['last-modified']}"
    host, port = locked.host.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        raw = request(locked, "GET /static/bundle.js", BEARER, "Accept-Encoding: gzip", again)
        connection.sendall(raw)
        assert connection.recv(100).startswith(b"HTTP/1.1 304")


def test_read_only_refuses_every_write(read_only: Dashboard, study: Study) -> None:
    for _, asked, body, *_ in STRANGERS:
        asked, *lines = asked.split("\r\n")
        if not asked.startswith(("GET", "HEAD")):
            reply = ask(read_only, asked, *lines, body=body)
            assert reply.status == 403
            assert json.loads(reply.body)["reason"] == "this dashboard is read-only"
    assert ask(read_only, f"GET {STUDY}").status == 200
    assert untouched(study)


def test_a_request_has_to_be_whole_in_time(tmp_path: Path, database: Database) -> None:
    """One byte now and then does not keep a connection."""
    fill(database, study_file(), [Trial("complete", (0.5,))])
    code = (
        "import sys; from hpo.dashboard import server; server.REQUEST_S = 1.0; "
        "server.LIMITS['cleanup_interval'] = 1; from hpo.cli.main import main; "
        "main(['dashboard', '--port', '0'])"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"HPO_STORAGE": database.secret_url},
    )  # fmt: skip
    assert child.stdout is not None
    try:
        own = Dashboard(child.stdout.readline().split()[1], tmp_path)
        host, port = own.host.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
            deadline = time.monotonic() + DEADLINE_S
            connection.settimeout(0.2)
            connection.sendall(b"GET / HTTP/1.1\r\n")
            while time.monotonic() < deadline:
                try:
                    connection.sendall(b"X")
                    if connection.recv(1) == b"":
                        break
                except TimeoutError:
                    continue
                except (BrokenPipeError, ConnectionResetError):
                    break
            else:
                raise AssertionError("the connection is still open")
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
