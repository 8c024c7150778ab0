"""What a process writes to standard error holds no password, whoever writes it."""

from __future__ import annotations

import io
import logging
import sys
import traceback
from urllib.parse import quote, quote_plus

import pytest

from hpo import redaction
from hpo.redaction import keep_secret, redact, safe_streams


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_secrets", set())


@pytest.mark.parametrize("secret", ["hunter2", "p@ss/wörd %41+'\\"])
def test_a_secret_is_hidden_in_every_form(secret: str) -> None:
    keep_secret(secret)
    for form in (secret, quote(secret), quote(secret, safe=""), quote_plus(secret)):
        assert redact(f"//me:{form}@server") == "//me:***@server"
    assert redact(f"{ValueError(secret)!r}") == f"ValueError({repr(secret)[0]}***{repr(secret)[0]})"


def test_a_short_one_is_not_looked_for() -> None:
    keep_secret("me")
    assert redact("some method") == "some method"


def test_standard_error_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    keep_secret("hunter2")
    log = logging.Logger("test")
    with safe_streams():
        log.addHandler(logging.StreamHandler())
        print("print hunter2", file=sys.stderr)
        log.warning("log %s", "hunter2")
        try:
            raise RuntimeError("raised with hunter2")
        except RuntimeError:
            traceback.print_exc()
    assert sys.stderr is stream
    assert "hunter2" not in stream.getvalue()
    for line in ("print ***", "log ***", "RuntimeError: raised with ***"):
        assert line in stream.getvalue()
