"""The dashboard's gateway: its decisions, by table and by a clock of the test's own."""

from __future__ import annotations

import base64
import gzip
import json
import random
import socket
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import Client, TestResponse
from werkzeug.wrappers import Response

from hpo.dashboard import auth, gateway
from hpo.dashboard.auth import (
    Credentials,
    LoginThrottle,
    Sessions,
    from_environment,
    read_credentials,
)
from hpo.dashboard.gateway import Gateway, Request, Settings
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


def request(method: str = "GET", path: str = "/", **headers: str) -> Request:
    """A request as the server hands it to the gateway; `fetch_site` is a header `Fetch-Site`."""
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method, "PATH_INFO": path, "SERVER_NAME": "localhost",
        "SERVER_PORT": "8080", "wsgi.url_scheme": "http", "wsgi.input": BytesIO(),
    }  # fmt: skip
    for name in ("REQUEST_URI", "QUERY_STRING"):
        if name in headers:
            environ[name] = headers.pop(name)
    return Request(environ | {f"HTTP_{name.upper()}": value for name, value in headers.items()})


# The policy: a request's text, and what comes of it


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
        (HERE, {"origin": f"http://{HERE}", "sec_fetch_site": "cross-site"}, True),
        (HERE, {"sec_fetch_site": "same-origin"}, True),
        (HERE, {"sec_fetch_site": "same-site"}, False),
        (HERE, {"sec_fetch_site": "cross-site", "referer": f"http://{HERE}/"}, False),
        (HERE, {"referer": f"http://{HERE}/dashboard"}, True),
        (HERE, {"referer": "http://evil.example/"}, False),
        (HERE, {"referer": f"http://evil.example/http://{HERE}/"}, False),
    ],
)
def test_only_pages_of_ours_may_write(host: str, headers: dict[str, str], own: bool) -> None:
    write, read = (request(method, host=host, **headers) for method in ("POST", "GET"))
    for scripts in (True, False):
        assert (gateway.cross_site(write, NAMED, scripts=scripts) is None) is own
    assert gateway.cross_site(read, NAMED, scripts=False) is None


def test_a_write_that_does_not_say_where_it_comes_from_is_a_script() -> None:
    silent = request("POST", host=HERE)
    assert gateway.cross_site(silent, NAMED, scripts=True) is None
    assert "Bearer" in str(gateway.cross_site(silent, NAMED, scripts=False))


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (request(path="/api/studies/1"), None),
        (request(path="/static/bundle.js"), None),
        (request(path="/dashboard/studies/1/trialTable"), None),
        (request(path="/a//b"), 400),
        (request(path="/static/../secret"), 400),
        (request(path="/static/./secret"), 400),
        (request(path="/a\x00b"), 400),
        (request(path="/a\\b"), 400),
        (request(path="/api/trials/\xd9\xa3/tell"), 400),  # a digit of another script
        (request(path="/" + "a" * 2000), 400),
        (request(path="*"), 400),
        (request(path="/x", REQUEST_URI="http://evil.example/x"), 400),
        (request(path="/login", QUERY_STRING="next=\xff"), 400),
        (request(transfer_encoding="chunked"), 400),
        (request("TRACE"), 405),
        (request("PATCH"), 405),
    ],
)
def test_what_no_honest_client_asks(asked: Request, status: int | None) -> None:
    found = gateway.malformed(asked)
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
    found = gateway.write_refused(request(method, path), Settings())
    assert found is None if why is None else why in str(found)
    if method != "GET":
        shut = gateway.write_refused(request(method, path), Settings(read_only=True))
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
    found = gateway.artifact_headers(kind)
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
        return request(authorization="Basic " + base64.b64encode(text.encode()).decode())

    assert basic("me:a:b").basic_password == "a:b"
    assert basic("nocolon").basic_password == ""
    assert request(authorization="Basic !!").basic_password == ""
    assert request(authorization="Digest password=x").basic_password == ""
    assert request(authorization="bearer  t ").bearer == "t"
    assert request(authorization="Bearer a=b=").bearer == "a=b="
    assert request(authorization="Basic x").bearer is None
    assert request(cookie="a=1; hpo_80=t; hpo_8080=u").session == "u"
    assert request(cookie="\x00;;=").session is None


def test_only_the_host_header_names_the_host() -> None:
    assert request().host == ""
    assert request(x_forwarded_host=HERE, forwarded=f"host={HERE}").host == ""
    assert request(host="localhost:80", x_forwarded_host="evil.example").host == "localhost:80"
    assert not request(x_forwarded_proto="https").is_secure
    assert request(x_forwarded_for="10.0.0.1").remote_addr is None


@pytest.mark.parametrize(
    ("accepts", "takes"),
    [
        ("gzip", True), ("br, GZIP;q=0.5", True), ("*", True), ("deflate, gzip , br", True),
        ("", False), ("identity", False), ("gzip;q=0", False), ("gzip; q=0.0, br", False),
        ("notgzip", False), ("xgzip;q=1", False), ("gzip;q=0, *", False),
    ],
)  # fmt: skip
def test_who_takes_gzip(accepts: str, takes: bool) -> None:
    long = gateway.json_response(200, "x" * 5000)
    app = Gateway(long, Settings(), lambda: True, Sessions(), LoginThrottle())
    client = Client(app)
    response = client.get("/api", headers={"Accept-Encoding": accepts, "Host": HERE})
    assert (response.headers.get("Content-Encoding") == "gzip") is takes


# The password and the token


def secret(path: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


@pytest.mark.parametrize("text", ["correct horse", "correct horse\n", "correct horse\r\n"])
def test_a_password_is_the_line_of_its_file(tmp_path: Path, text: str) -> None:
    found = read_credentials(secret(tmp_path / "p", text), None, {})
    assert found.required
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
    assert not Credentials().required
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
        (b"\xff\xfe12345678", 0o600, "not UTF-8 text"),
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
    assert not from_environment({"HPO_DASHBOARD_TOKEN": ""}).required
    found = from_environment({"HPO_DASHBOARD_PASSWORD": "from the environment"})
    assert found.is_password("from the environment")
    assert not found.is_password("from a file")


# Sessions and the login throttle


def test_a_session_ends_by_logout_by_idleness_and_after_a_week(clock: Clock) -> None:
    open_ = Sessions(clock)
    first, second = open_.open(), open_.open()
    assert first != second
    assert open_.is_open(first)
    open_.close(first)
    assert not open_.is_open(first)
    assert not open_.is_open("")
    for _ in range(int(auth.MAX_SESSION_S / auth.IDLE_S * 2) - 1):
        clock.now += auth.IDLE_S / 2
        assert open_.is_open(second)
    clock.now += auth.IDLE_S / 2
    assert not open_.is_open(second)
    third = open_.open()
    clock.now += auth.IDLE_S
    assert not open_.is_open(third)


def test_many_sessions_push_out_the_idlest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_SESSIONS", 3)
    open_ = Sessions(Clock())
    first, second, third = (open_.open() for _ in range(3))
    assert open_.is_open(first)
    fourth = open_.open()
    assert [open_.is_open(one) for one in (first, second, third, fourth)] == [
        True,
        False,
        True,
        True,
    ]


def test_wrong_passwords_cost_a_client_more_and_more_time(clock: Clock) -> None:
    tries = LoginThrottle(clock)
    for _ in range(auth.FREE_ATTEMPTS):
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
    assert pauses[-1] == auth.MAX_WAIT_S


def test_a_right_password_or_an_hour_forgives(clock: Clock) -> None:
    tries = LoginThrottle(clock)
    for _ in range(auth.FREE_ATTEMPTS + 1):
        clock.now += 10
        assert tries.begin("1.1.1.1") == 0
    assert tries.begin("1.1.1.1") > 0
    tries.succeeded("1.1.1.1")
    assert tries.begin("1.1.1.1") == 0
    for _ in range(auth.FREE_ATTEMPTS):
        tries.begin("1.1.1.1")
    clock.now += auth.FORGET_S + 1
    assert [tries.begin("1.1.1.1") for _ in range(auth.FREE_ATTEMPTS)] == [0] * auth.FREE_ATTEMPTS


def test_guesses_from_many_addresses_are_slow_together(clock: Clock) -> None:
    tries = LoginThrottle(clock)
    for i in range(auth.ALL_ATTEMPTS):
        assert tries.begin(f"1.1.{i}.1") == 0
    assert 0 < tries.begin("9.9.9.9") <= auth.REFILL_S
    clock.now += auth.REFILL_S
    assert tries.begin("9.9.9.9") == 0
    assert tries.begin("8.8.8.8") > 0


def test_memory_for_clients_is_bounded(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(auth, "MAX_CLIENTS", 5)
    tries = LoginThrottle(clock)
    for i in range(50):
        clock.now += auth.REFILL_S
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
    app = Gateway(Response("in"), Settings(credentials), lambda: True, Sessions(clock),
                  LoginThrottle(clock))  # fmt: skip

    def knock(kind: str, value: str, client: str = "10.0.0.1") -> TestResponse:
        headers = {"Host": HERE, "Authorization": f"{kind} {value}"}
        return Client(app).get("/api", headers=headers, environ_base={"REMOTE_ADDR": client})

    def basic(password: str) -> str:
        return base64.b64encode(f"me:{password}".encode()).decode()

    statuses = [
        knock("Basic", basic(f"guess {i}")).status_code for i in range(auth.FREE_ATTEMPTS + 1)
    ]
    assert statuses == [401] * auth.FREE_ATTEMPTS + [429]
    assert knock("Basic", basic("correct horse")).headers["Retry-After"] == "1"
    assert knock("Bearer", "guess").status_code == 429
    assert knock("Bearer", token).status_code == 200
    assert knock("Basic", basic("correct horse"), client="10.0.0.2").status_code == 200
    clock.now += 1.0
    assert knock("Basic", basic("correct horse")).status_code == 200
    assert knock("Basic", basic("guess")).status_code == 401


# Responses


def harden(response: Response, path: str = "/api/studies", *, gzipped: bool = True) -> Response:
    return gateway.harden(response, path=path, gzipped=gzipped)


def test_long_texts_are_packed_for_who_takes_it() -> None:
    value = {"trials": ["x" * 100] * 100}
    packed = harden(gateway.json_response(200, value))
    body = packed.get_data()
    assert packed.headers["Content-Encoding"] == "gzip"
    assert packed.headers["Vary"] == "Accept-Encoding"
    assert packed.content_length == len(body) < 1000
    assert json.loads(gzip.decompress(body)) == value
    plain = harden(gateway.json_response(200, value), gzipped=False)
    assert "Content-Encoding" not in plain.headers
    assert plain.headers["Vary"] == "Accept-Encoding"
    assert json.loads(plain.get_data()) == value


@pytest.mark.parametrize(
    "response",
    [
        gateway.json_response(200, "short"),
        Response(b"x" * 5000, mimetype="image/png"),
        Response(b"x" * 5000, headers={"Content-Encoding": "gzip"}, mimetype="text/javascript"),
        Response(mimetype="application/json"),
    ],
)
def test_what_is_short_or_packed_already_is_left(response: Response) -> None:
    body, encoding = response.get_data(), response.headers.get("Content-Encoding")
    assert harden(response).get_data() == body
    assert response.headers.get("Content-Encoding") == encoding


def test_every_answer_is_guarded() -> None:
    def loose() -> Response:
        headers = {"Access-Control-Allow-Origin": "*", "X-Frame-Options": "ALLOWALL", "Server": "x"}
        return Response(headers=headers)

    found = harden(loose()).headers
    assert "Access-Control-Allow-Origin" not in found
    assert "Server" not in found
    assert found.getlist("X-Frame-Options") == ["DENY"]
    assert found["X-Content-Type-Options"] == "nosniff"
    assert found["Content-Security-Policy"] == gateway.DEFAULT_POLICY
    assert found["Cache-Control"] == "no-store"
    static = harden(loose(), "/static/bundle.js").headers
    assert static["Cache-Control"] == "private, no-cache"
    page = Response(headers={"Content-Security-Policy": "default-src 'self'"}, mimetype="text/html")
    policy = harden(page).headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'; ")
    assert "frame-ancestors 'none'" in policy


# Requests whole: what werkzeug parses, and what the gateway makes of it


@pytest.fixture
def client(clock: Clock) -> Client:
    """A client of a gateway with a password, before an app that anybody would be shown."""
    credentials = Credentials.of(password="correct horse")
    app = Gateway(Response("in"), Settings(credentials), lambda: True, Sessions(clock),
                  LoginThrottle(clock))  # fmt: skip
    return Client(app)


def log_in(client: Client, data: Any, **headers: str) -> TestResponse:
    return client.post("/login", data=data, headers={"Origin": "http://localhost", **headers})


def test_no_odd_request_is_an_error_of_ours(client: Client) -> None:
    """Whatever an attacker writes into headers, query and form is refused, never a traceback."""
    draw = random.Random(0)
    alphabet = "ab=;\",*'% \t/:.\xff\xc3\u00e9()<>@\\?{}[]gzip;q=utf-8''hpo_80"

    def text(*starts: str) -> str:
        return draw.choice(starts or ("",)) + "".join(draw.choices(alphabet, k=draw.randint(0, 30)))

    for _ in range(3000):
        environ = {
            "REQUEST_METHOD": draw.choice(["GET", "POST"]), "SERVER_NAME": "x",
            "PATH_INFO": draw.choice(["/login", "/api", "/dashboard"]), "SERVER_PORT": "80",
            "HTTP_HOST": "localhost", "HTTP_ORIGIN": "http://localhost", "wsgi.url_scheme": "http",
            "HTTP_COOKIE": text("", "hpo_80="), "HTTP_ACCEPT_ENCODING": text("", "gzip;q="),
            "QUERY_STRING": text("", "next=%ff"), "wsgi.input": BytesIO(text("password=").encode()),
            "CONTENT_TYPE": draw.choice([gateway.FORM_TYPE, text("multipart/form-data;")]),
            "CONTENT_LENGTH": draw.choice(["", "30", "-1", "x"]),
        }  # fmt: skip
        if draw.random() < 0.5:
            environ["HTTP_AUTHORIZATION"] = text("Basic ", "Bearer ", "Digest ", "")
        response = Response.from_app(client.application, environ)
        assert response.status_code in (200, 303, 400, 401, 429)
        assert response.get_data() != b"in"


@pytest.mark.parametrize("debug", ["/console", "/?__debugger__=yes&cmd=resource&f=debugger.js"])
def test_werkzeug_offers_no_debugger(client: Client, debug: str) -> None:
    assert client.get(debug).status_code in (303, 401)


def test_a_session_is_a_cookie_of_this_host_and_its_pages(client: Client) -> None:
    response = log_in(client, {"password": "correct horse", "next": "//evil.example"})
    assert (response.status_code, response.headers["Location"]) == (303, "/dashboard")
    _token, *attributes = response.headers["Set-Cookie"].split("; ")
    assert sorted(attributes) == ["HttpOnly", "Path=/", "SameSite=Strict"]
    assert client.get("/api").get_data() == b"in"
    session = client.get_cookie("hpo_80")
    assert session is not None
    for cookie in (f"x=1; =;;hpo_80={session.value}", f'hpo_80="{session.value}"; hpo_80=x'):
        other = Client(client.application, use_cookies=False)
        assert other.get("/api", headers={"Cookie": cookie}).status_code == 200
    bad = {"Authorization": "Bearer nonsense"}  # what says who it is, is no longer a browser
    assert client.get("/api", headers=bad).status_code == 401
    out = client.post("/logout", headers={"Origin": "http://localhost"})
    assert out.headers["Location"] == "/login"
    assert client.get("/api").status_code == 401


@pytest.mark.parametrize(
    ("data", "headers"),
    [
        (b"password=correct+horse", {"Content-Type": "text/plain"}),
        (b"password=correct+horse&x=" + b"x" * 5000, {}),
        (b"password=correct+horse\xff", {}),
        ({"password": (BytesIO(b"correct horse"), "x.txt")}, {}),  # multipart
    ],
)
def test_a_login_is_a_short_form(client: Client, data: Any, headers: dict[str, str]) -> None:
    if isinstance(data, bytes):
        headers = {"Content-Type": gateway.FORM_TYPE, **headers}
    response = log_in(client, data, **headers)
    assert response.status_code == 400
    assert "Set-Cookie" not in response.headers
