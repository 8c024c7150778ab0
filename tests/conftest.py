"""Fixtures for every test: a run directory of its own, no settings from outside."""

from __future__ import annotations

import errno
import gc
import importlib
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Before torch is imported anywhere: two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `hpo` itself sets it

import hpo.data.cache
import hpo.io
import hpo.redaction
from hpo.paths import Home
from hpo.storage.database import Database, connect
from tests.harness.databases import KINDS, Databases
from tests.harness.mariadb import mariadb
from tests.harness.servers import postgres, s3, s3_server

if TYPE_CHECKING:
    from hpo.trained.run import TrainedRun

__all__ = ["mariadb", "postgres", "s3", "s3_server"]


SERVERS = {"postgres", "mariadb", "s3", "s3_server"}
"""Fixtures that start one."""
SERVED = {"postgresql", "mysql", "s3"}
"""Parameters of tests that ask for one."""
LONGEST = ("cluster", "chaos", "process")
"""Markers of the tests that take longest, these first."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--databases",
        choices=["sqlite", "all"],
        default="sqlite",
        help="where tests marked `databases` run: on SQLite, or on every kind that they name",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what is marked `databases` once on each kind of database that it names and
    `--databases` allows."""
    marker = metafunc.definition.get_closest_marker("databases")
    if marker is None or "kind" not in metafunc.fixturenames:
        return
    kinds = marker.args or KINDS
    if metafunc.config.getoption("databases") == "sqlite":
        needed = pytest.mark.skip(reason="needs --databases=all")
        others = [pytest.param(kind, marks=needed) for kind in kinds]
        kinds = [kind for kind in kinds if kind == "sqlite"] or others
    metafunc.parametrize("kind", kinds)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a server, so that `pytest` leaves it to `make test-all` (see `addopts`)."""
    for item in items:
        case = getattr(getattr(item, "callspec", None), "id", "")
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & SERVERS or SERVED & set(case.split("-")):
            item.add_marker("server")
    items.sort(key=_place)  # the longest begin first, so that no processor is idle at the end


def _place(item: pytest.Item) -> int:
    return next((i for i, name in enumerate(LONGEST) if item.get_closest_marker(name)), 99)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from walking what was imported: training collects when it runs out
    of memory."""
    if "trio" in sys.modules:
        importlib.import_module("hypothesis")  # trio's plugin of it needs what freezing hides
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No HPO_* of the caller reaches a test, and nothing is written beside the sources."""
    for name in [name for name in os.environ if name.startswith("HPO_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "runs"))
    # Another test's password may be a word of this one's messages.
    monkeypatch.setattr(hpo.redaction, "_secrets", set())


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with n, and no file that is written whole may have more than n bytes: beyond them the
    disk is full."""

    class Small(io.FileIO):
        most = 10**15

        def write(self, data: Any, /) -> int:
            if self.tell() >= self.most:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(memoryview(data)[: self.most - self.tell()])

    def limit(size: int) -> None:
        Small.most = size

    monkeypatch.setattr(hpo.io, "FileIO", Small)
    monkeypatch.setattr(hpo.data.cache, "FileIO", Small)
    return limit


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "runs")


@pytest.fixture
def far_east() -> Iterator[None]:
    """Local time is not UTC: Optuna's tables have the one, its trials the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture(scope="session")
def databases(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Databases:
    return Databases(request, tmp_path_factory.mktemp("databases"))


@pytest.fixture
def kind() -> str:
    """The kind of database; the marker `databases` names others."""
    return "sqlite"


@pytest.fixture
def url(kind: str, databases: Databases, tmp_path: Path) -> str:
    """The URL of a database without tables, unless the test also takes `database`."""
    return databases.empty(kind, tmp_path)


@pytest.fixture
def database(url: str, databases: Databases) -> Iterator[Database]:
    """A database with all tables, without a study."""
    databases.add_tables(url)
    found = connect(url)
    yield found
    found.dispose()


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A run of two seeds that names most of its test images right; tests only read it."""
    from tests.harness.trained import pictures, tiny_config, train_run

    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(pictures(folder), {"epochs": 12, "model.cnn.filters": [8, 16]})
    return train_run(config, folder / "run", Home(folder), seeds=2)


@pytest.fixture
def run_copy(trained_run: TrainedRun, tmp_path: Path) -> TrainedRun:
    """A copy of `trained_run` that a test may change."""
    from hpo.trained.run import load_run

    return load_run(shutil.copytree(trained_run.path, tmp_path / "run"))


NETS = """
from tests.harness import networks


def build(classes, image_size, name):
    return getattr(networks, name)()
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the working directory a module of the user's that makes the networks of
    `tests.harness.networks`."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("nets", None)
