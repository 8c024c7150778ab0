"""Fixtures for every test: a run directory of its own, no settings from outside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported anywhere: two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hpo.paths import Home
from hpo.storage.db import Database, connect


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No HPO_* of the caller reaches a test, and nothing is written beside the sources."""
    for name in [name for name in os.environ if name.startswith("HPO_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "runs"))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "runs")


@pytest.fixture(params=["sqlite"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database of each kind."""
    found = connect(f"sqlite:///{tmp_path / 'hpo.db'}")
    yield found
    found.dispose()
