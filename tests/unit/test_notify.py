"""Messages at the end of a search, and in trouble."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from hpo.cli.options import again_arguments
from hpo.errors import InputError, StorageGone
from hpo.redaction import redact
from hpo.search import study as studies
from hpo.search.status import StudyStatus, read_status
from hpo.storage.database import Database
from hpo.storage.records import Trial
from hpo.workers import notify
from hpo.workers.notify import Notifier, ring, target
from tests.harness.fakes import study_file


@pytest.fixture
def status(database: Database) -> StudyStatus:
    studies.create(database, study_file(trials=8))
    return replace(
        read_status(database, "toy"),
        trials=(made(0, "complete", 0.5), made(1, "complete", 0.75), made(2, "failed", None)),
    )


def made(number: int, state: str, value: float | None) -> Trial:
    return Trial(
        number=number, state=state, params={"optimizer.lr": 0.1}, value=value, best_epoch=None,
        epochs=(), attempts=(), reason=None,
    )  # fmt: skip


@contextmanager
def server(code: int = 200) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the URL of a loopback server and the bodies that were posted to it."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(code)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    found = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, args=[0.01])
    thread.start()
    try:
        yield f"http://127.0.0.1:{found.server_port}/hook/s3cret", bodies
    finally:
        found.shutdown()
        thread.join()
        found.server_close()


def test_a_webhook_gets_the_result(status: StudyStatus) -> None:
    with server() as (url, bodies):
        told = Notifier.of([url])
        told.ended(replace(status, row=replace(status.row, stop="user")), interrupted=False)
        told.close()
    (body,) = bodies
    assert (body["study"], body["state"], body["finished"], body["budget"]) == (
        "toy", "stopped", 3, 8,
    )  # fmt: skip
    assert body["best"] == {
        "trial": 1, "metric": "val_top1", "value": 0.75, "params": {"optimizer.lr": 0.1},
    }  # fmt: skip
    assert body["text"] == body["content"]
    assert body["text"] == "toy: stopped: best val_top1 0.7500 (trial 1); 3 of 8 trials finished"


def test_a_webhook_that_fails_is_only_warned_of(
    status: StudyStatus, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("http_proxy", raising=False)
    with server(500) as (url, _):
        told = Notifier.of([url])
        told.ended(status, interrupted=True)
        told.close()
    gone = Notifier.of([url])
    gone.ended(status, interrupted=True)
    gone.close()
    assert "127.0.0.1 did not take the message: HTTP Error 500" in caplog.text
    assert len(caplog.records) == 2
    assert "s3cret" not in caplog.text
    assert redact(f"posted to {url}") == "posted to ***"


def test_a_redirect_did_not_take_the_message(
    status: StudyStatus, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("http_proxy", raising=False)
    with server(302) as (url, bodies):
        told = Notifier.of([url])
        told.ended(status, interrupted=True)
        told.close()
    assert "HTTP Error 302" in caplog.text
    assert len(bodies) == 1


def test_a_command_gets_the_message_but_no_shell(status: StudyStatus, tmp_path: Path) -> None:
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['HPO_TEXT'] + sys.stdin.read())"
    out, evil = tmp_path / "out $(touch x)", tmp_path / "x"
    line = f"{sys.executable} -c '{code.replace(chr(39), chr(34))}' '{out}'"
    told = Notifier.of([line])
    told.failed(status, StorageGone("$(touch x); `touch x`\nand more"))
    told.close()
    text, _, rest = out.read_text().partition("{")
    assert text.startswith("toy: failed: $(touch x); `touch x`; best val_top1 0.7500")
    assert json.loads("{" + rest)["state"] == "failed"
    assert not evil.exists()
    assert not Path("x").exists()


def test_a_command_that_fails_is_only_warned_of(
    status: StudyStatus, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "COMMAND_S", 0.2)
    for line in ("false", "sleep 30"):
        target(line)(notify.message_of(status, "finished", ""))
    assert [one.message for one in caplog.records] == [
        "--notify false: exit code 1", "--notify sleep: no end after 0.2 s",
    ]  # fmt: skip


def test_the_bell_rings_on_a_terminal_alone(
    status: StudyStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    ring({})
    assert err.getvalue() == ""
    monkeypatch.setattr(err, "isatty", lambda: True)
    ring({})
    assert err.getvalue() == "\a"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bel", "--notify 'bel': allowed are bell, the URL of a webhook, and a command"),
        ("", "allowed are bell"),
        ("a 'b", "not a command: No closing quotation"),
        ("http://", "not a URL that can be posted to"),
        ("https://me:hush@host/x", "without a user"),
        ("https://host:port/x", "not a URL"),
        ("htps://host/hush", "not a URL that can be posted to"),
    ],
)
def test_what_cannot_be_a_target_is_refused_before_the_search(text: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        Notifier.of([text])
    assert said in str(refused.value)
    assert "hush" not in str(refused.value)


def test_trouble_is_told_once(status: StudyStatus) -> None:
    now, told = 0.0, []
    found = Notifier([lambda message: told.append(message["text"])], clock=lambda: now)
    lost = replace(status, trials=tuple(made(n, "failed", None) for n in range(notify.HOPELESS)))
    for shown in (status, lost, lost):
        found.look(shown, "")
    for now in (1.0, 50.0, 90.0, 200.0):  # noqa: B007  (the clock)
        found.look(status, "connection refused by db.example.org")
    found.close()
    assert told == [
        "toy: trouble: none of 5 trials has a result; 5 of 8 trials finished",
        "toy: trouble: the database cannot be reached; best val_top1 0.7500 (trial 1); "
        "3 of 8 trials finished",
    ]


def test_the_resume_line_has_what_was_given() -> None:
    options = {"workers": 2, "workers_per_device": 1, "device": None, "dashboard": True}
    given = Path("a b.toml"), ["study.seed=3"], ["bell", "https://host/s3cret"], options
    assert again_arguments(*given) == (
        "'a b.toml' --set study.seed=3 --workers 2 --dashboard --notify bell"
    )
    auto = again_arguments(Path("s.toml"), [], [], {"workers_per_device": "auto"})
    assert auto == "s.toml --workers-per-device auto"
