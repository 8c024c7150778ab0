"""The optuna-dashboard behind the gateway, its address, and the process beside a search."""

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
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.storages import RDBStorage
from werkzeug.test import Client, TestResponse

from hpo.dashboard.app import Health
from hpo.dashboard.auth import LoginThrottle, Sessions
from hpo.dashboard.gateway import Gateway, Settings
from hpo.dashboard.server import make_app, serve, start_subprocess
from hpo.errors import InputError
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.study import Study
from hpo.storage import leases, tables
from hpo.storage.database import Database, connect
from hpo.storage.optuna import FencedStorage, add_waiting, cached
from tests.harness.fakes import study_file
from tests.harness.filled import Trial, fill

HERE = "127.0.0.1:8080"


on_both = pytest.mark.databases("sqlite", "postgresql")


@pytest.fixture
def study(database: Database) -> Study:
    return fill(database, study_file(), [Trial("complete", (0.5, 0.6))])


@pytest.fixture
def busy() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def ask(app: Any, method: str, path: str, body: Any = None, **headers: str) -> TestResponse:
    """The response of `app` to one request."""
    headers = {"Host": HERE, **headers}
    return Client(app).open(path, method=method, json=body, headers=headers, buffered=True)


def read(response: TestResponse) -> Any:
    return json.loads(response.get_data())


# optuna-dashboard behind the gateway


@on_both
def test_it_shows_the_study_and_its_trials(study: Study) -> None:
    app = make_app(study.database)
    found = read(ask(app, "GET", "/api/studies"))
    assert [one["study_name"] for one in found["study_summaries"]] == ["toy"]
    detail = read(ask(app, "GET", f"/api/studies/{study.row.study_id}"))
    assert [trial["state"] for trial in detail["trials"]] == ["Complete"]
    assert detail["objective_names"] == ["val_top1"]


def test_a_study_deleted_there_takes_our_rows_and_its_files_with_it(study: Study) -> None:
    log = study.directory(Home.default()).log("w")
    log.parent.mkdir(parents=True)
    log.touch()
    app = make_app(study.database)
    answer = ask(app, "DELETE", f"/api/studies/{study.row.study_id}")
    assert (answer.status_code, read(answer)) == (200, {})
    assert not log.exists()
    with study.database.read() as c:
        for table in (tables.studies, tables.attempts, tables.epochs):
            assert c.scalar(sa.select(sa.func.count()).select_from(table)) == 0


@on_both
def test_a_study_that_is_worked_on_is_not_deleted(study: Study) -> None:
    add_waiting(FencedStorage(study.database), study.row.study_id)
    assert leases.claim(study.database, study.uuid, study.snapshot().free[0], "w1") is not None
    app = make_app(study.database)
    answer = ask(app, "DELETE", f"/api/studies/{study.row.study_id}")
    assert answer.status_code == 409
    assert "is being worked on by w1" in read(answer)["reason"]
    assert ask(app, "GET", f"/api/studies/{study.row.study_id}").status_code == 200


def test_a_study_of_others_is_deleted_as_they_do(database: Database, study: Study) -> None:
    storage = FencedStorage(database)
    other = optuna.create_study(storage=storage, study_name="other")
    app = make_app(database)
    assert ask(app, "DELETE", f"/api/studies/{other._study_id}").status_code == 200
    assert [one.study_name for one in storage.get_all_studies()] == ["toy"]


def test_a_note_is_saved_and_its_answer_is_one_that_the_page_can_read(study: Study) -> None:
    app = make_app(study.database)
    path = f"/api/studies/{study.row.study_id}"
    version = read(ask(app, "GET", path))["note"]["version"]
    note = {"body": "looks good", "version": version + 1}
    answer = ask(app, "PUT", f"{path}/note", note, Origin=f"http://{HERE}")
    assert (answer.status_code, read(answer)) == (200, {})
    assert read(ask(app, "GET", path))["note"]["body"] == "looks good"


def stock(database: Database) -> None:
    """Tables as Optuna makes them, which on SQLite give ids out again."""
    RDBStorage(database.secret_url).engine.dispose()


def values(app: Any, study_id: int) -> list[float]:
    detail = read(ask(app, "GET", f"/api/studies/{study_id}"))
    best = [trial["number"] for trial in detail["best_trials"]]
    found = [trial["values"][0] for trial in detail["trials"]]
    assert [found.index(max(found))] == best
    return found


def test_an_id_given_out_again_shows_the_new_study(url: str, home: Home) -> None:
    database = connect(url)
    stock(database)
    study = fill(database, study_file(), [Trial("complete", (v,)) for v in (0.2, 0.3, 0.1)])
    app = make_app(database)
    importances = f"/api/studies/{study.row.study_id}/param_importances"
    assert values(app, study.row.study_id) == [0.2, 0.3, 0.1]
    before = ask(app, "GET", importances).get_data()
    elsewhere = connect(database.secret_url)
    studies.delete(studies.load(elsewhere, "toy"), home)
    space = "optimizer.momentum = {low = 0.1, high = 0.9}"
    again = fill(
        elsewhere, study_file(space=space), [Trial("complete", (v,)) for v in (0.8, 0.7, 0.9)]
    )
    elsewhere.dispose()
    assert again.row.study_id == study.row.study_id
    assert values(app, study.row.study_id) == [0.8, 0.7, 0.9]
    assert ask(app, "GET", importances).get_data() != before
    database.dispose()


@on_both
def test_an_id_of_our_tables_is_never_given_out_again(database: Database, home: Home) -> None:
    study = fill(database, study_file(), [Trial("complete", (0.2,))])
    app = make_app(database)
    assert values(app, study.row.study_id) == [0.2]
    studies.delete(study, home)
    again = fill(database, study_file(), [Trial("complete", (0.9,))])
    assert again.row.study_id > study.row.study_id
    assert ask(app, "GET", f"/api/studies/{study.row.study_id}").status_code == 404
    assert values(app, again.row.study_id) == [0.9]


def test_its_memory_lasts_while_nothing_is_deleted(study: Study) -> None:
    app = make_app(study.database)
    behind = app.app._app  # type: ignore[attr-defined]
    fill(study.database, study_file(name="second"), [Trial("complete", (0.2,))])
    assert ask(app, "GET", "/api/studies").status_code == 200
    assert app.app._app is behind  # type: ignore[attr-defined]


def test_files_that_people_upload_are_no_pages(tmp_path: Path, study: Study) -> None:
    import optuna_dashboard

    (tmp_path / "store").mkdir()
    store = FileSystemArtifactStore(tmp_path / "store")
    storage = cached(FencedStorage(study.database))
    app = Gateway(
        optuna_dashboard.wsgi(storage, artifact_store=store), Settings(), lambda: True,
        Sessions(), LoginThrottle(),
    )  # fmt: skip
    shown = {}
    optuna_study = optuna.load_study(study_name="toy", storage=storage)
    for name in ("evil.html", "evil.svg", "evil.js", "fine.png"):
        path = tmp_path / name
        path.write_text("<script>alert(1)</script>")
        key = upload_artifact(
            artifact_store=store, file_path=str(path), study_or_trial=optuna_study
        )
        shown[name] = ask(app, "GET", f"/artifacts/{study.row.study_id}/{key}")
    page = {"file": "data:text/html;base64,PGI+aGk8L2I+", "filename": "up.html"}
    up = read(ask(app, "POST", f"/api/artifacts/{study.row.study_id}", page))
    shown["up.html"] = ask(app, "GET", f"/artifacts/{study.row.study_id}/{up['artifact_id']}")
    assert shown["up.html"].get_data() == b"<b>hi</b>"
    for name, answer in shown.items():
        assert answer.status_code == 200
        assert "sandbox" in answer.headers["content-security-policy"]
        assert answer.headers.get("access-control-allow-origin") is None
        assert answer.headers["x-content-type-options"] == "nosniff"
        wanted = "inline" if name == "fine.png" else "attachment"
        assert answer.headers["content-disposition"] == wanted
        active = ("text/html", "text/javascript", "application/javascript")
        assert answer.mimetype not in active
    shut = Gateway(app.app, Settings(read_only=True), lambda: True, Sessions(), LoginThrottle())
    answer = ask(shut, "POST", f"/api/artifacts/{study.row.study_id}", page)
    assert (answer.status_code, read(answer)["reason"]) == (403, "this dashboard is read-only")


def test_a_database_that_is_away_is_said_and_not_more(study: Study) -> None:
    app = make_app(study.database)
    with study.database.engine.begin() as c:
        c.exec_driver_sql("DROP TABLE hpo_studies")
    answer = ask(app, "GET", "/api/studies")
    assert answer.status_code == 503
    assert "hpo_studies" not in read(answer)["reason"]


@on_both
def test_health_asks_the_database_now_and_then(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    health = Health(study.database)
    assert health()
    monkeypatch.setattr(health, "database", connect("sqlite:////no/such/folder/x.db"))
    assert health()  # asked a moment ago
    monkeypatch.setattr(health, "_asked", -100.0)
    assert not health()


# Its address, and the process beside a search


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::"])
def test_other_addresses_need_a_password(database: Database, host: str) -> None:
    with pytest.raises(InputError, match=r"it needs a password.*HPO_DASHBOARD_PASSWORD_FILE"):
        serve(database, host=host, ready=lambda _: None)


def test_an_address_that_is_none_is_an_error(database: Database) -> None:
    with pytest.raises(InputError, match="no address of that name"):
        serve(database, host="no such host", ready=lambda _: None)
    with pytest.raises(InputError, match="--trusted-proxy nginx: the proxy's IP address"):
        serve(database, trusted_proxy="nginx", ready=lambda _: None)


def test_a_busy_port_names_the_next_free_one(database: Database, busy: int) -> None:
    with pytest.raises(InputError, match=f"--port {busy}: in use by another program; --port"):
        serve(database, port=busy, ready=lambda _: None)


def test_beside_a_search_it_answers_and_ends_with_it(study: Study) -> None:
    address, stop = start_subprocess(study.database)
    try:
        with urllib.request.urlopen(address) as page:
            assert page.status == 200
    finally:
        stop()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address)


def test_beside_a_search_a_password_is_asked_as_well(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    password = tmp_path / "p"
    password.write_text("correct horse")
    password.chmod(0o600)
    monkeypatch.setenv("HPO_DASHBOARD_PASSWORD_FILE", str(password))
    address, stop = start_subprocess(study.database)
    try:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(address.replace("/dashboard", "/api/studies"))
    finally:
        stop()
    password.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        start_subprocess(study.database)


def test_beside_a_search_a_busy_port_is_an_error(study: Study, busy: int) -> None:
    with pytest.raises(InputError, match=f"--port {busy}"):
        start_subprocess(study.database, busy)


def test_it_ends_with_a_search_that_was_killed(study: Study) -> None:
    search = (
        "import os, sys; from hpo.dashboard.server import start_subprocess; "
        "from hpo.storage.database import connect; "
        "print(start_subprocess(connect(sys.argv[1]))[0], flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", search, study.database.secret_url]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == -signal.SIGKILL, found.stderr
    address = found.stdout.strip()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(address).close()
        except OSError:
            return
    raise AssertionError(f"{address} still answers")
