"""A search whose workers reach PostgreSQL through PgBouncer, which pools by transaction: any
session of the server may run the next transaction of any worker."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from hpo.search.status import read_status
from hpo.storage.database import Database
from hpo.storage.records import Outcome
from tests.harness.clusters import free_ports

BOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
SESSIONS, WORKERS, TRIALS = 3, 4, 12
READY_S = 120.0
CONFIGURATION = """
[databases]
* = host={socket} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {sessions}
"""
STUDY = f"""
[study]
name = "toy"
trials = {TRIALS}
[train]
epochs = 3
model.cnn.filters = [4]
runtime = {{precision = "float32", memory_format = "contiguous"}}
[space]
optimizer.lr = {{low = 1e-4, high = 1e-1, log = true}}
"""

pytestmark = [
    pytest.mark.process,
    pytest.mark.databases("postgresql"),
    pytest.mark.skipif(BOUNCER is None, reason="needs PgBouncer: apt install pgbouncer"),
]


@pytest.fixture
def pooled(postgres: Any, url: str) -> Iterator[str]:
    """`url` through a pooler that opens SESSIONS sessions at most."""
    direct, (port,) = sa.make_url(url), free_ports(1)
    with tempfile.TemporaryDirectory(prefix="hpo-pooler-") as folder:
        Path(folder).chmod(0o755)  # it is the server's user, where tests run as root
        file = Path(folder, "pooler.ini")
        socket = direct.query["host"]
        file.write_text(CONFIGURATION.format(socket=socket, port=port, sessions=SESSIONS))
        assert BOUNCER is not None
        process = subprocess.Popen([BOUNCER, file], user=postgres.system_user,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        found = direct.set(host="127.0.0.1", port=port, query={})
        try:
            await_answer(found)
            yield found.render_as_string(hide_password=False)
        finally:
            process.terminate()
            process.wait(READY_S)


def await_answer(url: sa.URL) -> None:
    engine, deadline = sa.create_engine(url, poolclass=sa.NullPool), time.monotonic() + READY_S
    while True:
        try:
            engine.connect().close()
        except sa.exc.OperationalError:
            assert time.monotonic() < deadline, "the pooler did not answer"
            time.sleep(0.05)
        else:
            return


def run(storage: str, folder: Path) -> subprocess.CompletedProcess[str]:
    study = folder / "toy.toml"
    study.write_text(STUDY)
    command = [sys.executable, "-m", "hpo", "run", study, "--workers", str(WORKERS)]
    environment = os.environ | {"HPO_STORAGE": storage, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_search_through_few_sessions(pooled: str, database: Database, tmp_path: Path) -> None:
    done = run(f"{pooled}?prepare_threshold=none", tmp_path)
    assert done.returncode == 0, done.stderr
    status = read_status(database, "toy")
    assert status.state == "finished"
    assert len(status.trials) == status.count("complete") + status.count("pruned") == TRIALS
    outcomes = {one.outcome for trial in status.trials for one in trial.attempts[:-1]}
    assert outcomes <= {Outcome.PAUSED}
    with database.read() as c:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        others = c.scalar(sa.text(f"{query} AND pid <> pg_backend_pid()"))
    assert others == SESSIONS


def test_without_the_option_it_is_told(pooled: str, tmp_path: Path) -> None:
    done = run(pooled, tmp_path)
    assert done.returncode in (1, 2)  # only its workers met it, or the command itself
    assert "prepared statement" in done.stderr
    assert "?prepare_threshold=none" in done.stderr
    assert "Traceback" not in done.stderr
