"""The promise from the user's end: a search on digits by the commands of the README."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hpo.search.scheduling import budget_parts
from hpo.search.status import StudyStatus, read_status
from hpo.storage import records
from hpo.storage.database import Database, connect
from hpo.storage.snapshot import Spending
from tests.harness.images import make_folder
from tests.integration.test_scenes import check_exact, computed_twice

STUDY = Path(__file__).parents[2] / "studies" / "digits.toml"
DEADLINE_S = 240.0


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hpo", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something has happened while `process` runs; fail when it ends before."""
    deadline = time.monotonic() + DEADLINE_S
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def end(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a command that succeeds; return what it printed."""
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err
    return out


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    found = f"sqlite:///{tmp_path / 'runs' / 'hpo.db'}"
    monkeypatch.setenv("HPO_STORAGE", found)
    return found


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Digits, cut down to seconds, every parameter fixed but the learning rate."""
    text = STUDY.read_text(encoding="utf-8").partition("# What is searched")[0]
    text += "[space]\noptimizer.lr = {low = 1e-3, high = 1e-1, log = true}\n"
    path = tmp_path / "digits.toml"
    path.write_text(text, encoding="utf-8")
    return path


def small(trials: int) -> list[str]:
    values = [f"study.trials={trials}", "epochs=6", "data.limit_train=200", "model.cnn.filters=[8]"]
    return [word for value in values for word in ("--set", value)]


def epochs_done(database: Database) -> int:
    if records.is_empty(database) or not records.list_studies(database):
        return 0
    return sum(len(trial.epochs) for trial in read_status(database, "digits").trials)


def test_a_search_survives_the_kill_of_its_worker(url: str, study: Path) -> None:
    """hpo run; kill -9 of its worker in the middle of a trial; the budget is exact all the same."""
    process = start("run", study, *small(5), "--workers", 1, "--quiet")
    (study.parent / "runs").mkdir(exist_ok=True)
    database = connect(url)
    wait_for(lambda: epochs_done(database) >= 3, process)
    uuid = records.get_study(database, "digits").uuid
    (worker,) = [one for one in records.read_workers(database, uuid) if one.ended is None]
    os.kill(worker.pid, signal.SIGKILL)
    end(process)
    status = check_exact(database, "digits", 5)
    assert computed_twice(status) <= 1
    assert len({one.worker for trial in status.trials for one in trial.attempts}) == 2
    report = json.loads(end(start("status", "digits", "--json")))
    assert report["state"] == "finished"
    assert "no faults" in end(start("storage", "check"))


def test_two_workers_share_a_study(url: str, study: Path) -> None:
    """hpo run --workers 2: both work, no trial and no epoch twice."""
    told = end(start("run", study, *small(12), "--time", "1h", "--workers", 2))
    assert "12/12" in told
    status = check_exact(connect(url), "digits", 12)
    assert status.row.stop_reason is None  # the time that is left over ends nothing
    attempts = [one for trial in status.trials for one in trial.attempts]
    assert {one.outcome for one in attempts} <= {"complete", "pruned", "paused"}  # none was lost
    assert len({one.worker for one in attempts}) == 2
    assert computed_twice(status) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--max-full-trainings", 4], "max_full_trainings = 4: "),
        (["--time", "4s"], "max_time = 4s is over"),
        (["--set", "study.timeout_s=8"], "timeout_s = 8 of training were spent"),
    ],
)
def test_the_budget_that_is_spent_first_ends_a_study(
    url: str, study: Path, options: list[object], reason: str
) -> None:
    """hpo run with 2 workers: no worker begins an epoch once the budget is spent."""
    text = study.read_text(encoding="utf-8")
    study.write_text(re.sub(r"(?m)^(trials|pruner) = .*$", "", text), encoding="utf-8")
    fields = ["epochs=6", "data.limit_train=200", "model.cnn.filters=[8]"]
    sets = [word for field in fields for word in ("--set", field)]
    told = end(start("run", study, *sets, *options, "--workers", 2))
    database = connect(url)
    status = read_status(database, "digits")
    assert status.state == "finished"
    assert {trial.state for trial in status.trials} <= {"complete", "pruned"}
    assert computed_twice(status) == 0
    assert reason in told
    assert str(status.row.stop_reason).startswith(reason)
    assert max(epochs_after(status).values(), default=0) <= 1, status
    if status.row.max_full_trainings is not None:
        assert 4 * 6 <= epochs_done(database) <= 4 * 6 + 2
    if status.row.max_time_s is not None:
        assert status.budget is None
        assert status.elapsed_s >= 4


def epochs_after(status: StudyStatus) -> Counter[str]:
    """How many epochs each worker finished after the first one at whose end a budget was spent."""
    workers = {
        (trial.number, attempt.k): attempt.worker
        for trial in status.trials
        for attempt in trial.attempts
    }
    done = [(row.finished, workers[trial.number, row.attempt])
            for trial in status.trials for row in trial.epochs]  # fmt: skip
    over = (at for at, _ in sorted(done) if max(budget_parts(until(status, at)).values()) >= 1)
    first = next(over, math.inf)  # none: it was spent between two trials
    return Counter(worker for at, worker in done if at > first)


def until(status: StudyStatus, at: float) -> Spending:
    """What was spent until then."""
    trials = [
        replace(
            trial,
            epochs=tuple(row for row in trial.epochs if row.finished <= at),
            attempts=tuple(
                replace(attempt, ended=min(at, attempt.ended or at))
                for attempt in trial.attempts
                if attempt.started <= at
            ),
        )
        for trial in status.trials
    ]
    return replace(status, trials=tuple(trials)).spending


@pytest.mark.process
def test_a_verification_survives_the_kill_of_all_its_processes(
    url: str, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hpo run; hpo verify; kill -9 of everything; hpo verify again; hpo export takes the winner."""
    monkeypatch.chdir(study.parent)
    study.write_text(study.read_text().replace("trials =", "lease_s = 2\ntrials ="))
    end(start("run", study, *small(6), "--workers", 1, "--quiet"))
    database = connect(url)
    asked = ("verify", "digits", "--top", 2, "--seeds", 2, "--workers", 1, "--json")
    process = start(*asked)

    def is_halfway() -> bool:
        found = records.find_study(database, "digits.verify")
        return found is not None and read_status(database, "digits.verify").finished == 2

    wait_for(is_halfway, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for worker in read_status(database, "digits.verify").live_workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
    told = json.loads(end(start(*asked)))
    status = check_exact(database, "digits.verify", 4)
    assert len({json.dumps(trial.params, sort_keys=True) for trial in status.trials}) == 4
    assert computed_twice(status) <= 1
    assert [set(one["values"]) for one in told["candidates"]] == [{"1", "2"}] * 2
    assert f"trial {told['winner']}. Verified with 2 other seeds" in end(start("export", "digits"))
    assert "no faults" in end(start("storage", "check"))


@pytest.mark.slow
def test_a_folder_of_images_is_run_as_it_is(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(Path("photos"), {"train": 12, "val": 4}, size=(16, 16))
    said = end(start("run", "photos", "--quick", "--trials", "1", "--device", "cpu"))
    assert "photos.toml written" in said
    assert "there is no test/: 15% of train/ are kept for the test" in said
    assert "best: trial 0" in said
    assert "photos.toml is there and is used" in end(start("run", "photos", "--quick"))
