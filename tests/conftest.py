"""Fixtures for every test: a run directory of its own, no settings from outside."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported anywhere: two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hpo.paths import Home
from hpo.storage.db import Database, connect
from tests.servers import new_database, postgres, s3, s3_server

__all__ = ["postgres", "s3", "s3_server"]


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No HPO_* of the caller reaches a test, and nothing is written beside the sources."""
    for name in [name for name in os.environ if name.startswith("HPO_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "runs"))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "runs")


@pytest.fixture
def kind() -> str:
    """The kind of database; a module that runs on every kind overrides this."""
    return "sqlite"


@pytest.fixture
def url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if kind == "sqlite":
        return f"sqlite:///{tmp_path / 'hpo.db'}"
    return new_database(request.getfixturevalue("postgres"), f"t{uuid.uuid4().hex}")


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """An empty database."""
    found = connect(url)
    yield found
    found.dispose()
