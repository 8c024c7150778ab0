"""What the dashboard's door decides, by table and by a clock of the test's own."""

from __future__ import annotations

import base64
import gzip
import json
import socket
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from hpo.dashboard import (
    auth,
    gateway,
)
from hpo.dashboard.auth import (
    Attempts,
    Credentials,
    Sessions,
    from_environment,
    read_credentials,
)
from hpo.dashboard.gateway import Answer, Door, Request, Settings
from hpo.dashboard.server import own_hosts
from hpo.errors import InputError

HERE = "127.0.0.1:8080"
NAMED = Settings(allowed_hosts=frozenset({"hpo.example.com", "other.example.com:8443"}))


class Clock:
    """Seconds that pass when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def environ(**headers: str) -> dict[str, Any]:
    """What a server hands to the door for a page of the API."""
    return {
        "REQUEST_METHOD": "GET", "PATH_INFO": "/api/studies", "HTTP_HOST": HERE,
        "SERVER_PORT": "8080", "wsgi.input": BytesIO(), **headers,
    }  # fmt: skip


# Rules: a request's text, and what comes of it


@pytest.mark.parametrize(
    ("host", "settings", "known"),
    [
        ("127.0.0.1:8080", Settings(), True),
        ("localhost:9999", Settings(), True),  # through a tunnel from another port
        ("[::1]:8080", Settings(), True),
        ("hpo.example.com", Settings(), False),
        ("hpo.example.com", NAMED, True),
        ("hpo.example.com:8080", NAMED, True),
        ("other.example.com:8443", NAMED, True),
        ("other.example.com", NAMED, False),
        ("localhost.evil.example", NAMED, False),
        ("evil.example:8080", NAMED, False),
        ("127.0.0.1:8080, evil.example", NAMED, False),
        ("localhost@evil.example", NAMED, False),
        ("localhost:8080:1", NAMED, False),
        ("", NAMED, False),
    ],
)
def test_hosts_that_it_answers_to(host: str, settings: Settings, known: bool) -> None:
    assert settings.answers_to(host) is known


def test_a_machine_knows_its_own_addresses_and_name() -> None:
    assert own_hosts("192.168.1.7") == gateway.LOOPBACK | {"192.168.1.7"}
    assert own_hosts("fe80::1") == gateway.LOOPBACK | {"[fe80::1]"}
    assert own_hosts("gpu1") == gateway.LOOPBACK | {"gpu1"}
    everywhere = own_hosts("0.0.0.0")
    assert socket.gethostname().lower() in everywhere
    assert all(Settings(own_hosts=everywhere).answers_to(host) for host in everywhere)


@pytest.mark.parametrize("text", ["http://x", "a b", "*", "", "x/y", "a:b"])
def test_a_host_that_no_browser_asks_for_is_an_error(text: str) -> None:
    with pytest.raises(InputError, match=r"such as hpo\.example\.com"):
        gateway.host_name(text)


def test_a_host_is_known_in_any_case() -> None:
    assert gateway.host_name(" HPO.example.com:8443 ") == "hpo.example.com:8443"


@pytest.mark.parametrize(
    ("host", "headers", "own"),
    [
        (HERE, {"origin": f"http://{HERE}"}, True),
        ("hpo.example.com", {"origin": "https://hpo.example.com"}, True),  # TLS in front
        ("hpo.example.com:443", {"origin": "https://hpo.example.com"}, True),
        (HERE, {"origin": "https://hpo.example.com"}, True),  # ... that asks us by our address
        (HERE, {"origin": "https://other.example.com:8443"}, True),
        (HERE, {"origin": "http://hpo.example.com"}, False),
        (HERE, {"origin": "https://hpo.example.com:9443"}, False),
        (HERE, {"origin": "http://localhost:8080"}, False),
        (HERE, {"origin": "http://127.0.0.1:9999"}, False),
        (HERE, {"origin": "http://127.0.0.1:8080.evil.example"}, False),
        (HERE, {"origin": "null"}, False),
        (HERE, {"origin": ""}, False),
        (HERE, {"origin": "file://"}, False),
        (HERE, {"origin": f"http://{HERE}", "fetch_site": "cross-site"}, True),
        (HERE, {"fetch_site": "same-origin"}, True),
        (HERE, {"fetch_site": "same-site"}, False),
        (HERE, {"fetch_site": "cross-site", "referer": f"http://{HERE}/"}, False),
        (HERE, {"referer": f"http://{HERE}/dashboard"}, True),
        (HERE, {"referer": "http://evil.example/"}, False),
        (HERE, {"referer": f"http://evil.example/http://{HERE}/"}, False),
    ],
)
def test_only_pages_of_ours_may_write(host: str, headers: dict[str, str], own: bool) -> None:
    request = Request(method="POST", host=host, **headers)
    for silent in (True, False):
        assert (gateway.foreign(request, NAMED, may_be_silent=silent) is None) is own
    read_only = Request(method="GET", host=host, **headers)
    assert gateway.foreign(read_only, NAMED, may_be_silent=False) is None


def test_a_write_that_does_not_say_where_it_comes_from_is_a_script() -> None:
    request = Request(method="POST", host=HERE)
    assert gateway.foreign(request, NAMED, may_be_silent=True) is None
    assert "Bearer" in str(gateway.foreign(request, NAMED, may_be_silent=False))


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (Request(path="/api/studies/1"), None),
        (Request(path="/static/bundle.js"), None),
        (Request(path="/dashboard/studies/1/trialTable"), None),
        (Request(path="/a//b"), 400),
        (Request(path="/static/../secret"), 400),
        (Request(path="/static/./secret"), 400),
        (Request(path="/a\x00b"), 400),
        (Request(path="/a\\b"), 400),
        (Request(path="/api/trials/\xd9\xa3/tell"), 400),  # a digit of another script
        (Request(path="/" + "a" * 2000), 400),
        (Request(path="*"), 400),
        (Request(path="/x", target="http://evil.example/x"), 400),
        (Request(transfer="chunked"), 400),
        (Request(method="TRACE"), 405),
        (Request(method="PATCH"), 405),
    ],
)
def test_what_no_honest_client_asks(request_: Request, status: int | None) -> None:
    found = gateway.malformed(request_)
    assert (found and found[0]) == status


@pytest.mark.parametrize(
    ("method", "path", "why"),
    [
        ("GET", "/api/studies/1", None),
        ("PUT", "/api/studies/1/note", None),
        ("PUT", "/api/studies/1/12/note", None),
        ("DELETE", "/api/studies/1", None),
        ("POST", "/api/artifacts/1/2", None),
        ("DELETE", "/api/artifacts/1/2/0123-abcd", None),
        ("POST", "/api/studies", "hpo run STUDY.toml"),
        ("POST", "/api/studies/1/rename", "keeps its name"),
        ("POST", "/api/trials/1/tell", "ended by their workers"),
        ("POST", "/api/trials/1/user-attrs", "written by its worker"),
        ("POST", "/api/studies/1/preference", "no use"),
        ("POST", "/api/llm/trial_filter_query", "no use"),
        ("PUT", "/api/anything/new", "no use"),
    ],
)
def test_what_may_be_changed(method: str, path: str, why: str | None) -> None:
    found = gateway.write_refused(Request(method=method, path=path), Settings())
    assert found is None if why is None else why in str(found)
    if method != "GET":
        shut = gateway.write_refused(Request(method=method, path=path), Settings(read_only=True))
        assert shut == "this dashboard is read-only"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("/dashboard/studies/1", "/dashboard/studies/1"),
        ("//evil.example", "/dashboard"),
        ("https://evil.example/dashboard", "/dashboard"),
        ("/dashboard/../logout", "/dashboard"),
        ("/dashboard\r\nSet-Cookie: x", "/dashboard"),
        ("/dashboard/\\evil.example", "/dashboard"),
        ("/dashboard//evil.example", "/dashboard"),
        ("", "/dashboard"),
    ],
)
def test_a_login_leads_to_the_dashboard_alone(text: str, place: str) -> None:
    assert gateway.next_page(text) == place


@pytest.mark.parametrize(
    ("kind", "served", "disposition"),
    [
        ("image/png", "image/png", "inline"),
        ("image/svg+xml", "image/svg+xml", "attachment"),
        ("video/mp4", "video/mp4", "attachment"),
        ("text/csv", "text/csv", "attachment"),
        ("text/html", "application/octet-stream", "attachment"),
        ("text/html; charset=utf-8", "application/octet-stream", "attachment"),
        ("application/xhtml+xml", "application/octet-stream", "attachment"),
        ("text/javascript", "application/octet-stream", "attachment"),
        ("IMAGE/PNG, text/html", "application/octet-stream", "attachment"),
        ("", "application/octet-stream", "attachment"),
    ],
)
def test_an_uploaded_file_is_no_page(kind: str, served: str, disposition: str) -> None:
    found = dict(gateway.artifact_headers(kind))
    assert found["Content-Type"] == served
    assert found["Content-Disposition"] == disposition
    assert "sandbox" in found["Content-Security-Policy"]


def test_a_table_computes_nothing() -> None:
    rows = 'a,b\n=cmd(),-1.5e-3\n"@x, ""y""",+x\n-x,\n'
    assert gateway.harmless_csv(rows).splitlines() == [
        "a,b", "'=cmd(),-1.5e-3", "\"'@x, \"\"y\"\"\",'+x", "'-x,",
    ]  # fmt: skip


def test_what_a_request_brings_along() -> None:
    def basic(text: str) -> Request:
        return Request(authorization="Basic " + base64.b64encode(text.encode()).decode())

    assert basic("me:a:b").basic_password == "a:b"
    assert basic("nocolon").basic_password is None
    assert Request(authorization="Basic !!").basic_password is None
    assert Request(authorization="bearer  t ").bearer == "t"
    assert Request(authorization="Basic x").bearer is None
    assert Request(cookies="a=1; hpo_80=t; hpo_8080=u", port="8080").session == "u"
    assert Request(cookies="\x00;;=", port="8080").session is None


@pytest.mark.parametrize(
    ("accepts", "takes"),
    [
        ("gzip", True), ("br, GZIP;q=0.5", True), ("*", True), ("deflate, gzip , br", True),
        ("", False), ("identity", False), ("gzip;q=0", False), ("gzip; q=0.0, br", False),
        ("notgzip", False), ("xgzip;q=1", False),
    ],
)  # fmt: skip
def test_who_takes_gzip(accepts: str, takes: bool) -> None:
    assert Request(accepts=accepts).takes_gzip is takes


# The password and the token


def secret(path: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


@pytest.mark.parametrize("text", ["correct horse", "correct horse\n", "correct horse\r\n"])
def test_a_password_is_the_line_of_its_file(tmp_path: Path, text: str) -> None:
    found = read_credentials(secret(tmp_path / "p", text), None, {})
    assert found.asked
    assert found.is_password("correct horse")
    for wrong in ("", "correct hors", "correct horse\n", "correct horse ", "Correct horse"):
        assert not found.is_password(wrong)
    assert not found.is_token("correct horse")


def test_an_accent_is_an_accent_however_it_is_typed() -> None:
    assert Credentials.of(password="caf\u00e9 creme").is_password("cafe\u0301 creme")


def test_a_token_is_taken_in_the_form_as_well() -> None:
    token = "0123456789" * 3
    found = Credentials.of(token=token)
    assert found.is_token(token)
    assert found.is_password(token)
    assert not found.is_token("")
    assert not Credentials().asked
    assert not Credentials().is_password("")


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [
        ("correct horse", 0o644, "every user of this machine"),
        ("correct horse", 0o602, "every user of this machine"),
        ("", 0o600, "is empty"),
        ("\n", 0o600, "is empty"),
        ("  \n", 0o600, "is empty"),
        ("seven77\n", 0o600, "7 characters; allowed: 8 and more"),
        ("correct horse\nbattery\n", 0o600, "more than one line"),
        ("x" * 10_000, 0o600, "more than one line"),
        (b"\xff\xfe12345678", 0o600, "not text"),
    ],
)
def test_a_bad_password_file_is_an_error(
    tmp_path: Path, text: str | bytes, mode: int, why: str
) -> None:
    with pytest.raises(InputError, match=why) as error:
        read_credentials(secret(tmp_path / "p", text, mode), None, {})
    assert "correct" not in str(error.value)


def test_a_missing_password_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_credentials(tmp_path / "none", None, {})
    with pytest.raises(InputError, match="directory"):
        read_credentials(tmp_path, None, {})


def test_a_short_token_is_an_error() -> None:
    with pytest.raises(InputError, match="token has 8 characters; allowed: 20 and more"):
        Credentials.of(token="8letters")


def test_credentials_come_from_the_environment(tmp_path: Path) -> None:
    password = secret(tmp_path / "p", "correct horse")
    token = secret(tmp_path / "t", "0123456789" * 2)
    found = from_environment({"HPO_DASHBOARD_PASSWORD_FILE": str(password)})
    assert found.is_password("correct horse")
    found = from_environment({"HPO_DASHBOARD_TOKEN_FILE": str(token)})
    assert found.is_token("0123456789" * 2)
    assert from_environment({"HPO_DASHBOARD_TOKEN": "9876543210" * 2}).is_token("9876543210" * 2)
    assert not from_environment({"HPO_DASHBOARD_TOKEN": ""}).asked
    found = from_environment({"HPO_DASHBOARD_PASSWORD": "from the environment"})
    assert found.is_password("from the environment")
    assert not found.is_password("from a file")


# Sessions and attempts


def test_a_session_ends_by_logout_by_idleness_and_after_a_week(clock: Clock) -> None:
    open_ = Sessions(clock)
    first, second = open_.open(), open_.open()
    assert first != second
    assert open_.knows(first)
    open_.close(first)
    assert not open_.knows(first)
    assert not open_.knows("")
    for _ in range(int(auth.SESSION_S / auth.IDLE_S * 2) - 1):
        clock.now += auth.IDLE_S / 2
        assert open_.knows(second)
    clock.now += auth.IDLE_S / 2
    assert not open_.knows(second)
    third = open_.open()
    clock.now += auth.IDLE_S
    assert not open_.knows(third)


def test_many_sessions_push_out_the_idlest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MOST_SESSIONS", 3)
    open_ = Sessions(Clock())
    first, second, third = (open_.open() for _ in range(3))
    assert open_.knows(first)
    fourth = open_.open()
    assert [open_.knows(one) for one in (first, second, third, fourth)] == [True, False, True, True]


def test_wrong_passwords_cost_a_client_more_and_more_time(clock: Clock) -> None:
    tries = Attempts(clock)
    for _ in range(auth.FREE):
        assert tries.begin("1.1.1.1") == 0
    pauses = []
    for _ in range(12):
        pauses.append(wait_s := tries.begin("1.1.1.1"))
        assert tries.begin("1.1.1.1") == wait_s  # asking in between costs nothing
        assert tries.begin("2.2.2.2") == 0
        tries.succeeded("2.2.2.2")
        clock.now += wait_s
        assert tries.begin("1.1.1.1") == 0
    assert pauses[:4] == [1, 2, 4, 8]
    assert pauses[-1] == auth.LONGEST_S


def test_a_right_password_or_an_hour_forgives(clock: Clock) -> None:
    tries = Attempts(clock)
    for _ in range(auth.FREE + 1):
        clock.now += 10
        assert tries.begin("1.1.1.1") == 0
    assert tries.begin("1.1.1.1") > 0
    tries.succeeded("1.1.1.1")
    assert tries.begin("1.1.1.1") == 0
    for _ in range(auth.FREE):
        tries.begin("1.1.1.1")
    clock.now += auth.FORGOTTEN_S + 1
    assert [tries.begin("1.1.1.1") for _ in range(auth.FREE)] == [0] * auth.FREE


def test_guesses_from_many_addresses_are_slow_together(clock: Clock) -> None:
    tries = Attempts(clock)
    for i in range(auth.TOGETHER):
        assert tries.begin(f"1.1.{i}.1") == 0
    assert 0 < tries.begin("9.9.9.9") <= auth.TOGETHER_S
    clock.now += auth.TOGETHER_S
    assert tries.begin("9.9.9.9") == 0
    assert tries.begin("8.8.8.8") > 0


def test_memory_for_clients_is_bounded(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(auth, "MOST", 5)
    tries = Attempts(clock)
    for i in range(50):
        clock.now += auth.TOGETHER_S
        tries.begin(f"1.1.{i}.1")
    assert len(tries._clients) == 5


def test_a_client_is_an_address_or_a_network_of_ipv6() -> None:
    assert auth.client_of("1.2.3.4") == "1.2.3.4"
    assert auth.client_of("::ffff:1.2.3.4") == "1.2.3.4"
    assert auth.client_of("2001:db8::1") == auth.client_of("2001:db8::ffff:2")
    assert auth.client_of("2001:db8::1") != auth.client_of("2001:db8:0:1::1")
    assert auth.client_of("proxy says what") == "proxy says what"


def test_while_a_client_waits_its_right_password_does_too(clock: Clock) -> None:
    token = "0123456789" * 2
    credentials = Credentials.of(password="correct horse", token=token)
    door = Door(
        lambda _environ, start: [start("200 OK", []) or b"in"], Settings(credentials),
        lambda: True, Sessions(clock), Attempts(clock),
    )  # fmt: skip

    def knock(kind: str, value: str, client: str = "10.0.0.1") -> Answer:
        return gateway.ask(door, environ(HTTP_AUTHORIZATION=f"{kind} {value}", REMOTE_ADDR=client))

    def basic(password: str) -> str:
        return base64.b64encode(f"me:{password}".encode()).decode()

    statuses = [knock("Basic", basic(f"guess {i}")).status for i in range(auth.FREE + 1)]
    assert statuses == [401] * auth.FREE + [429]
    assert knock("Basic", basic("correct horse")).header("retry-after") == "1"
    assert knock("Bearer", "guess").status == 429
    assert knock("Bearer", token).status == 200
    assert knock("Basic", basic("correct horse"), client="10.0.0.2").status == 200
    clock.now += 1.0
    assert knock("Basic", basic("correct horse")).status == 200
    assert knock("Basic", basic("guess")).status == 401


# Answers


def finished(answer: Answer, path: str = "/api/studies", *, gzipped: bool = True) -> Answer:
    return gateway.finished(answer, path=path, gzipped=gzipped)


def test_long_texts_are_packed_for_who_takes_it() -> None:
    value = {"trials": ["x" * 100] * 100}
    packed = finished(gateway.from_json(200, value))
    body = packed.whole()
    assert packed.header("content-encoding") == "gzip"
    assert packed.header("vary") == "Accept-Encoding"
    assert int(packed.header("content-length")) == len(body) < 1000
    assert json.loads(gzip.decompress(body)) == value
    plain = finished(gateway.from_json(200, value), gzipped=False)
    assert plain.header("content-encoding") == ""
    assert plain.header("vary") == "Accept-Encoding"
    assert json.loads(plain.whole()) == value


@pytest.mark.parametrize(
    "answer",
    [
        gateway.from_json(200, "short"),
        Answer(200, [("Content-Type", "image/png")]).saying(b"x" * 5000),
        Answer(200, [("Content-Type", "text/javascript"), ("Content-Encoding", "gzip")]).saying(
            b"x" * 5000
        ),
        Answer(200, [("Content-Type", "application/json")], []),
    ],
)
def test_what_is_short_or_packed_already_is_left(answer: Answer) -> None:
    before = b"".join(answer.body)
    after = finished(answer)
    assert after.whole() == before
    assert after.header("content-encoding") == answer.header("content-encoding")


def test_every_answer_is_guarded() -> None:
    loose = Answer(200, [("Access-Control-Allow-Origin", "*"), ("X-Frame-Options", "ALLOWALL")])
    found = finished(loose)
    assert found.header("access-control-allow-origin") == ""
    assert found.header("x-frame-options") == "DENY"
    assert found.header("x-content-type-options") == "nosniff"
    assert found.header("content-security-policy") == gateway.NOTHING
    assert found.header("cache-control") == "no-store"
    assert finished(loose, "/static/bundle.js").header("cache-control") == "private, no-cache"
    page = [("Content-Type", "text/html"), ("Content-Security-Policy", "default-src 'self'")]
    policy = finished(Answer(200, page)).header("content-security-policy")
    assert policy.startswith("default-src 'self'; ")
    assert "frame-ancestors 'none'" in policy
