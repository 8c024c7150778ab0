"""`hpo dashboard` as its users start it: a process of its own, on a port that is free."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from hpo.storage.database import Database

PASSWORD = "correct horse"
TOKEN = "t0ken-of-a-script-0123456789"


@dataclass(frozen=True)
class Dashboard:
    """One that runs; `errors` is what it said on standard error so far."""

    address: str
    errors_path: Path

    @property
    def host(self) -> str:
        return urlsplit(self.address).netloc

    @property
    def origin(self) -> str:
        return f"http://{self.host}"

    @property
    def errors(self) -> str:
        return self.errors_path.read_text()


@contextmanager
def running(
    database: Database, folder: Path, *args: str, locked: bool = True, **environment: str
) -> Iterator[Dashboard]:
    """A dashboard over `database` with its files in `folder`; `locked`: PASSWORD and TOKEN."""
    folder.mkdir(parents=True, exist_ok=True)
    if locked:
        password = folder / "password"
        password.write_text(f"{PASSWORD}\n")
        password.chmod(0o600)
        environment |= {
            "HPO_DASHBOARD_PASSWORD_FILE": str(password), "HPO_DASHBOARD_TOKEN": TOKEN,
        }  # fmt: skip
    errors = folder / "errors.txt"
    with errors.open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "hpo", "dashboard", "--port", "0", *args],
            stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "HPO_STORAGE": database.secret_url, **environment},
        )  # fmt: skip
    assert child.stdout is not None
    try:
        words = child.stdout.readline().split()
        assert words, errors.read_text()
        yield Dashboard(words[1], errors)
    finally:
        child.terminate()  # SIGINT is ignored by whatever a script has started in the background
        child.wait(120)
        child.stdout.close()
