"""The dashboard's door, its address, and the process beside a search."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
import sqlalchemy as sa

from hpo import dashboard
from hpo.errors import InputError
from hpo.search.study import Study
from hpo.storage import tables
from hpo.storage.db import Database
from tests.fakes import study_file
from tests.filled import Trial, fill


@pytest.fixture
def study(database: Database) -> Study:
    return fill(database, study_file(), [Trial("complete", (0.5, 0.6))])


@pytest.fixture
def busy() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def ask(
    app: Any, method: str, path: str, body: Any = None, **headers: str
) -> tuple[str, dict[str, Any]]:
    """Status and JSON of one request to `app`."""
    raw = json.dumps(body).encode()
    environ = {
        "REQUEST_METHOD": method, "PATH_INFO": path, "HTTP_HOST": "127.0.0.1:8080",
        "CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(raw)),
        "wsgi.input": BytesIO(raw), "wsgi.errors": BytesIO(), **headers,
    }  # fmt: skip
    said: list[str] = []
    chunks = app(environ, lambda status, _headers, _info=None: said.append(status))
    answer = b"".join(chunks)
    return said[0], json.loads(answer) if answer else {}


def test_it_shows_the_study_and_its_trials(study: Study) -> None:
    app = dashboard.make_app(study.database)
    _, found = ask(app, "GET", "/api/studies")
    assert [one["study_name"] for one in found["study_summaries"]] == ["toy"]
    _, detail = ask(app, "GET", f"/api/studies/{study.row.study_id}")
    assert [trial["state"] for trial in detail["trials"]] == ["Complete"]
    assert detail["objective_names"] == ["val_top1"]


def test_a_study_deleted_there_takes_our_rows_with_it(study: Study) -> None:
    status, _ = ask(
        dashboard.make_app(study.database), "DELETE", f"/api/studies/{study.row.study_id}"
    )
    assert status.startswith("204")
    with study.database.read() as c:
        for table in (tables.studies, tables.attempts, tables.epochs):
            assert c.scalar(sa.select(sa.func.count()).select_from(table)) == 0


@pytest.mark.parametrize(
    ("method", "path", "headers", "why"),
    [
        ("GET", "/api/studies", {"HTTP_HOST": "evil.example:8080"}, "this machine only"),
        ("GET", "/api/studies", {"HTTP_HOST": "localhost.evil.example"}, "this machine only"),
        ("GET", "/api/studies", {"HTTP_HOST": ""}, "this machine only"),
        ("POST", "/api/studies", {"HTTP_ORIGIN": "http://evil.example"}, "own pages"),
        ("POST", "/api/studies", {"HTTP_ORIGIN": "http://127.0.0.1:9999"}, "own pages"),
        ("POST", "/api/studies/1/rename", {}, "keeps its name"),
        ("POST", "/api/studies/1/rename/", {}, "keeps its name"),
        ("POST", "/api/trials/1/tell", {}, "ended by their workers"),
    ],
)
def test_the_door_is_shut(
    study: Study, method: str, path: str, headers: dict[str, str], why: str
) -> None:
    status, answer = ask(dashboard.make_app(study.database), method, path, {}, **headers)
    assert status == "403 Forbidden"
    assert why in answer["reason"]


def test_its_own_pages_may_write(study: Study) -> None:
    app = dashboard.make_app(study.database)
    path = f"/api/studies/{study.row.study_id}/note"
    note = {"body": "looks good", "version": 1}
    status, _ = ask(app, "PUT", path, note, HTTP_ORIGIN="http://127.0.0.1:8080")
    assert status.startswith("204")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "example.com"])
def test_other_addresses_are_refused(database: Database, host: str) -> None:
    with pytest.raises(InputError, match="this machine only"):
        dashboard.serve(database, host=host, ready=lambda _: None)


def test_a_busy_port_names_the_next_free_one(database: Database, busy: int) -> None:
    with pytest.raises(InputError, match=f"--port {busy}: another program has it; free is --port"):
        dashboard.serve(database, port=busy, ready=lambda _: None)


def test_beside_a_search_it_answers_and_ends_with_it(study: Study) -> None:
    address, stop = dashboard.start_beside(study.database)
    try:
        with urllib.request.urlopen(address) as page:
            assert page.status == 200
    finally:
        stop()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address)


def test_beside_a_search_a_busy_port_is_an_error(study: Study, busy: int) -> None:
    with pytest.raises(InputError, match=f"--port {busy}"):
        dashboard.start_beside(study.database, busy)


def test_it_ends_with_a_search_that_was_killed(study: Study) -> None:
    search = (
        "import os, sys; from hpo.dashboard import start_beside; "
        "from hpo.storage.db import connect; "
        "print(start_beside(connect(sys.argv[1]))[0], flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", search, study.database.secret_url]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == -signal.SIGKILL, found.stderr
    address = found.stdout.strip()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(address).close()
        except OSError:
            return
    raise AssertionError(f"{address} still answers")
