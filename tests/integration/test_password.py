"""A search on a server that wants a password: it is in no argv, log, page or file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa

from hpo.search.status import read_status
from hpo.storage.database import connect
from tests.harness.secrets import SECRET, traces_in, traces_in_files
from tests.harness.servers import with_login

pytestmark = [pytest.mark.process, pytest.mark.databases("postgresql", "mysql")]

STUDY = """
[study]
name = "toy"
trials = 4
pruner = "none"
[train]
epochs = 2
model.cnn.filters = [4]
runtime = {precision = "float32", memory_format = "contiguous"}
[space]
optimizer.lr = {low = 1e-4, high = 1e-1, log = true}
"""
PAGES = ("/dashboard", "/api/meta", "/api/studies", "/api/studies/1", "/api/studies/1?after=0")
DEADLINE_S = 300.0


@pytest.fixture
def login(kind: str, url: str, request: pytest.FixtureRequest) -> sa.URL:
    if kind == "mysql":
        found: sa.URL = request.getfixturevalue("mariadb").with_login(url, "eve", SECRET)
        return found
    return with_login(request.getfixturevalue("postgres"), url, "eve", SECRET)


def environments(login: sa.URL, kind: str, folder: Path) -> dict[str, dict[str, str]]:
    """Every way to hand the password over without argv."""
    bare = login.render_as_string(hide_password=False)
    folder.mkdir()
    file = folder / "password"
    file.write_text(SECRET + "\n")
    ways = {
        "HPO_STORAGE": {
            "HPO_STORAGE": login.set(password=SECRET).render_as_string(hide_password=False)
        },
        "file": {"HPO_STORAGE": bare, "HPO_STORAGE_PASSWORD_FILE": str(file)},
    }
    if kind == "postgresql":
        passes = folder / "pgpass"
        passes.write_text(f"*:*:*:{login.username}:{SECRET}\n")
        passes.chmod(0o600)
        ways["PGPASSWORD"] = {"HPO_STORAGE": bare, "PGPASSWORD": SECRET}
        ways["PGPASSFILE"] = {"HPO_STORAGE": bare, "PGPASSFILE": str(passes)}
    return ways


def test_every_way_to_hand_over_the_password_works(
    login: sa.URL, kind: str, tmp_path: Path
) -> None:
    bare = login.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "hpo", "list"]
    ways = environments(login, kind, tmp_path / "secrets") | {"none": {"HPO_STORAGE": bare}}
    for way, given in ways.items():
        done = subprocess.run(
            command, env=os.environ | given, capture_output=True, text=True, check=False
        )
        assert done.returncode == (2 if way == "none" else 0), (way, done.stderr)
        assert not traces_in(done.stdout + done.stderr)


def test_a_search_shows_its_password_nowhere(login: sa.URL, kind: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "toy.toml").write_text(STUDY)
    given = environments(login, kind, tmp_path / "secrets")["file"]
    options = ["--workers", "2", "--device", "cpu", "--dashboard"]
    with subprocess.Popen(
        [sys.executable, "-m", "hpo", "run", "toy.toml", *options],
        cwd=work, env=os.environ | given, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as search:  # fmt: skip
        assert search.stdout is not None
        first = ""
        while "dashboard: " not in first:  # behind what is said of the data
            line = search.stdout.readline()
            assert line, first
            first += line
        seen = _look_at(search, re.sub("/dashboard.*", "", line.partition(": ")[2].strip()))
        printed = first + search.stdout.read()
        assert search.wait() == 0, printed
    assert {"worker", "hpo.dashboard"} <= seen["kinds"]
    assert not seen["traces"]
    assert not traces_in(printed)
    assert any((tmp_path / "runs").rglob("*.log"))
    assert not traces_in_files(tmp_path / "runs")
    assert not traces_in_files(work)
    database = connect(login.set(password=SECRET).render_as_string(hide_password=False))
    assert read_status(database, "toy").count("complete") == 4
    database.dispose()


def _look_at(search: subprocess.Popen[str], address: str) -> dict[str, Any]:
    """The command lines of all processes and the pages of the dashboard, while workers run."""
    kinds: set[str] = set()
    traces: list[object] = []
    deadline = time.monotonic() + DEADLINE_S
    while not {"worker", "hpo.dashboard"} <= kinds:
        assert time.monotonic() < deadline, "no worker was seen"
        assert search.poll() is None, "the search ended early"
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if traces_in(" ".join(line)):
                traces.append(line)
        for child in psutil.Process(search.pid).children(recursive=True):
            kinds |= set(child.cmdline()) & {"worker", "hpo.dashboard"}
    for page in PAGES:
        try:
            with urllib.request.urlopen(f"{address}{page}", timeout=60) as answer:
                body = answer.read().decode()
        except urllib.error.HTTPError as error:
            body = error.read().decode()
        if traces_in(body):
            traces.append(page)
    return {"kinds": kinds, "traces": traces}
