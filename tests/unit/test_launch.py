"""`hpo launch`, `hpo workers`, `hpo stop --on`, `hpo logs --on`: over a fake launcher; and what the
launchers decide without a cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpo.cli import workers
from hpo.errors import HpoError, InputError, LauncherError, NotFound
from hpo.paths import Home
from hpo.search import study as studies
from hpo.storage import database, records
from hpo.storage.database import Database, connect
from hpo.workers import agent
from hpo.workers.agent import Agent, AgentSpec
from hpo.workers.launchers import open_launcher, ray, slurm
from hpo.workers.launchers.base import LaunchRequest, Size, Target
from hpo.workers.launchers.local import Local, _is_agent, agent_command
from hpo.workers.launchers.ray import check_room
from hpo.workers.launchers.slurm import Slurm
from hpo.workers.process import stop_on_signal
from tests.harness.commands import Hpo, calls
from tests.harness.deployment import parse
from tests.harness.fake_launcher import FakeLauncher
from tests.harness.fakes import study_file

# The fake's trials begin again where real ones go on from a checkpoint.
pytestmark = pytest.mark.filterwarnings("ignore:The reported value is ignored")


@pytest.fixture
def hpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hpo:
    """Calls `hpo` in an empty working directory: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    return calls(monkeypatch, capsys)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLauncher]:
    """Stands for every launcher; its workers end with the test."""
    launcher = FakeLauncher(lambda: 0.2)

    def opened(*_args: object, **_options: object) -> AbstractContextManager[FakeLauncher]:
        return nullcontext(launcher)

    monkeypatch.setattr("hpo.workers.launchers.open_launcher", opened)
    yield launcher
    for one in launcher.hired.values():
        one.stop.set()
        one.thread.join(timeout=60)
        assert not one.thread.is_alive()


@pytest.fixture
def store() -> Database:
    """The default storage."""
    Home.default().root.mkdir(parents=True, exist_ok=True)
    return connect(Home.default().storage)


def join(fake: FakeLauncher) -> None:
    for one in fake.hired.values():
        one.thread.join(timeout=60)


def test_launched_stopped_launched_again_and_finished(
    hpo: Hpo, fake: FakeLauncher, store: Database
) -> None:
    Path("toy.toml").write_text(study_file(trials=6, train="epochs = 30").text)
    code, out, _ = hpo("launch", "toy.toml", "--workers", 2, "--on", "ray://head:1")
    assert code == 0
    assert "2 workers of toy on ray://head:1" in out
    assert out.count("running") == 2
    assert "hpo stop toy" in out
    assert json.loads(hpo("status", "toy", "--json")[1])["finished"] < 6

    shown = json.loads(hpo("workers", "toy", "--on", "slurm", "--json")[1])
    assert [one["state"] for one in shown["placed"]] == ["running"] * 2
    assert {one["state"] for one in shown["workers"]} <= {"preparing", "training", "between trials"}
    assert ": attempt 1" in hpo("logs", "toy", "--on", "ray://head:1")[1]

    assert hpo("stop", "toy", "--on", "slurm")[0] == 0
    join(fake)
    assert "no live workers of toy" in hpo("workers", "toy")[1]
    assert hpo("workers", "toy", "--all")[1].count("ended") == 2

    fake.pace = float
    code, out, _ = hpo("launch", "toy", "-n", 3)
    assert code == 0
    assert "study toy was stopped; resuming it" in out
    join(fake)
    told = json.loads(hpo("status", "toy", "--json")[1])
    assert (told["state"], told["finished"], told["budget"]) == ("finished", 6, 6)
    code, _, err = hpo("launch", "toy")
    assert code == 2
    assert "hpo extend toy" in err


def test_what_was_stopped_is_not_begun_before_it_has_ended(
    hpo: Hpo, fake: FakeLauncher, store: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()

    def waits() -> float:
        begun.set()
        go.wait(60)
        return 0.0

    fake.pace = waits
    study, _ = studies.create(store, study_file(train="epochs = 1000"))
    assert hpo("launch", "toy")[0] == 0
    assert begun.wait(60)
    monkeypatch.setattr(workers, "NEWS_S", 0.0)
    records.stop_study(store, study.uuid, "user", "stopped")
    code, _, err = hpo("launch", "toy")
    assert code == 2
    go.set()
    assert "have not ended yet (fake-" in err
    assert len(fake.requests) == 1


def test_more_than_there_is_room_for_creates_nothing(hpo: Hpo, fake: FakeLauncher) -> None:
    Path("toy.toml").write_text(study_file().text)
    code, _, err = hpo("launch", "toy.toml", "--workers", 9)
    assert code == 2
    assert "room for 8" in err
    assert "no studies" in hpo("list")[1]


def test_workers_that_cannot_work_say_why(
    hpo: Hpo, store: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real launcher of this host, and a GPU that torch does not find."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "99")
    studies.create(store, study_file())
    code, out, err = hpo("launch", "toy", "--gpus-per-worker", 1)
    assert code == 2, out
    assert "cuda:0" in err
    assert "no worker of toy could start on local" in err
    assert "cannot work" in hpo("workers", "toy", "--all")[1]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--on", "slrum"], "did you mean 'slurm'?"),
        (["--on", "ray://"], "ray://HOST:PORT is wanted"),
        (["--on", "ray://host:port"], "ray://HOST:PORT is wanted"),
        (["--gpus-per-worker", "2"], "allowed: 0 (the CPU) to 1"),
        (["--gpus-per-worker", "nan"], "allowed: 0 (the CPU) to 1"),
        (["--workers", "0"], "--workers"),
        (["--sbatch", "partition=gpu"], "--on slurm"),
        (["--insecure"], "Ray"),
        (["--dry-run"], "--on slurm"),
        (["--set", "epochs=3"], "study file"),
    ],
)
def test_what_cannot_be_launched_is_told(hpo: Hpo, args: list[str], says: str) -> None:
    code, _, err = hpo("launch", "toy", *args)
    assert code == 2
    assert says in err
    assert "Traceback" not in err


def test_an_unknown_study_names_the_nearest(hpo: Hpo, store: Database) -> None:
    studies.create(store, study_file())
    code, _, err = hpo("launch", "tpy")
    assert code == 2
    assert "did you mean 'toy'?" in err


def test_a_password_in_argv_does_not_reach_ray(hpo: Hpo, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql+psycopg://me:secret@nowhere/hpo"
    for words in (["--storage", url], [f"--storage={url}"]):
        monkeypatch.setattr(sys, "argv", ["hpo", "launch", "toy", *words])
        code, out, err = hpo("launch", "toy", "--on", "ray://head:1", *words)
        assert code == 2
        assert "HPO_STORAGE" in err
        assert "secret" not in out + err


def test_an_order_does_not_show_the_password() -> None:
    request = LaunchRequest(
        Target("toy", "0" * 32), Size(1), "postgresql://me:secret@db/x", Home(Path("x"))
    )
    spec = AgentSpec("toy", "0" * 32, request.storage, request.home, ["cpu"], 1)
    assert "secret" not in f"{request}{spec}{Agent(spec)}"


def request(**size: Any) -> LaunchRequest:
    target = Target("toy", "0123456789abcdef" * 2)
    return LaunchRequest(
        target, Size(**size), "postgresql://me:secret@db/x", Home(Path("/shared/runs"))
    )


def test_slurm_script() -> None:
    given = Slurm(Home(Path("/shared/runs")), ["--time=4:00:00", "exclusive", "signal=B:TERM@300"])
    lines = given.script(request(workers=4, gpus=0.5, cpus=3)).splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in (
        *("#SBATCH --array=0-1", "#SBATCH --requeue", "#SBATCH --gres=gpu:1"),
        *("#SBATCH --cpus-per-task=6", "#SBATCH --time=4:00:00", "#SBATCH --exclusive"),
        *("#SBATCH --job-name=hpo-toy-01234567", "#SBATCH --signal=B:TERM@300"),
        f"#SBATCH --output=/shared/runs/studies/{'0123456789abcdef' * 2}/logs/slurm-%A_%a.log",
        "export HPO_HOME=/shared/runs",
    ):
        assert lines.count(line) == 1, line
    assert lines[-1].count("--device cuda:0") == 2
    assert "secret" not in "".join(lines)
    assert "gres" not in given.script(request(workers=4, gpus=0))


def test_slurm_gives_whole_gpus() -> None:
    with pytest.raises(InputError, match="give a multiple of 2"):
        Slurm(Home(Path("x"))).check(Size(3, gpus=0.5))
    for extra in ("-p gpu", "a b=c", "partition=a\nrm"):
        with pytest.raises(InputError, match="--sbatch"):
            Slurm(Home(Path("x")), [extra]).script(request(workers=1, gpus=0))


def test_without_slurm_the_script_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LauncherError, match="--dry-run"):
        Slurm(Home(Path("x"))).launched(Target("toy", "0" * 32))


@pytest.mark.parametrize(
    ("over", "sent", "state", "requeued"),
    [
        (False, signal.SIGTERM, "RUNNING", True),
        (False, signal.SIGTERM, "COMPLETING", False),  # scancel, or requeued already
        (False, signal.SIGINT, "RUNNING", False),  # hpo stop --on slurm
        (True, signal.SIGTERM, "RUNNING", False),
        (True, None, "RUNNING", False),
    ],
)
def test_a_task_is_requeued_where_its_time_ran_out(
    over: bool,
    sent: int | None,
    state: str,
    requeued: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def call(command: list[str]) -> str:
        calls.append(command)
        return f"{state}\n"

    class Kept(Agent):
        def run(self, stop: threading.Event) -> bool:
            if sent is not None:
                os.kill(os.getpid(), sent)
                assert stop.wait(60)
            return over

    monkeypatch.setattr(slurm, "_call", call)
    # Of its last task an array has the number.
    for name, number in (("JOB", "17"), ("ARRAY_JOB", "17"), ("ARRAY_TASK", "3")):
        monkeypatch.setenv(f"SLURM_{name}_ID", number)
    slurm.run_in_task(Kept(AgentSpec("toy", "0" * 32, "", Home(Path("x")), ["cpu"], 1)))
    asked = [["squeue", "--noheader", "--jobs=17_3", "--format=%T"]]
    assert calls[:1] == (asked if requeued or state == "COMPLETING" else [])
    assert calls[1:] == ([["scontrol", "requeue", "17_3"]] if requeued else [])


@pytest.mark.parametrize(
    ("nodes", "size", "fits"),
    [
        ([{"CPU": 4}, {"CPU": 4}], Size(8, 0, 1), True),
        ([{"CPU": 4}, {"CPU": 4}], Size(9, 0, 1), False),
        ([{"CPU": 3}, {"CPU": 3}], Size(3, 0, 2), False),  # none is split over nodes
        ([{"CPU": 8, "GPU": 2}], Size(4, 0.5, 1), True),
        ([{"CPU": 8, "GPU": 2}], Size(5, 0.5, 1), False),
        ([{"CPU": 8, "GPU": 2}], Size(5, 0.4, 1), False),  # two of 0.4 on each GPU
        ([{"CPU": 8, "GPU": 1}, {"CPU": 8}], Size(2, 1, 1), False),
        ([{"CPU": 1, "GPU": 2}], Size(2, 1, 1), False),
        ([], Size(1, 0, 1), False),
    ],
)
def test_room_on_a_ray_cluster(nodes: list[dict[str, float]], size: Size, fits: bool) -> None:
    if fits:
        check_room(nodes, size)
    else:
        with pytest.raises(InputError, match="room for"):
            check_room(nodes, size)


@pytest.mark.parametrize(
    ("visible", "size", "found"),
    [
        ("0,1", Size(3), ["cuda:0", "cuda:1", "cuda:0"]),
        ("0,1", Size(2, 0), ["cpu", "cpu"]),
        ("0,1", Size(4, 0.5), ["cuda:0", "cuda:1"] * 2),
        ("", Size(2), ["cpu", "cpu"]),
        ("0,1", Size(5, 0.5), None),
        ("", Size(1, 1), None),
    ],
)
def test_devices_of_this_host(
    visible: str, size: Size, found: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpo.workers.launchers.local import _devices

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if found is None:
        with pytest.raises(InputError, match="room for"):
            _devices(size)
    else:
        assert _devices(size) == found


def test_an_agent_refuses_another_study_of_the_name(store: Database) -> None:
    study, _ = studies.create(store, study_file())
    spec = AgentSpec("toy", study.uuid, store.secret_url, Home.default(), ["cpu"], 1)
    with pytest.raises(NotFound, match="made again"):
        Agent(replace(spec, uuid="0" * 32)).run(threading.Event())
    records.stop_study(store, study.uuid, "user", "stopped")
    stop = threading.Event()
    assert Agent(replace(spec, devices=[])).run(stop) is True  # stopped: over
    assert Local(Home.default()).launched(Target("toy", study.uuid)) == []


def test_an_agent_waits_for_the_database(store: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "RETRY_S", 0.5)
    study, _ = studies.create(store, study_file())
    records.stop_study(store, study.uuid, "user", "stopped")
    away = Home.default().database
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.2)
    store.dispose()
    other = sqlite3.connect(away, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")  # against readers, too
    other.execute("BEGIN EXCLUSIVE")
    kept = Agent(AgentSpec("toy", study.uuid, store.secret_url, Home.default(), [], 1))
    over: list[bool] = []
    thread = threading.Thread(target=lambda: over.append(kept.run(threading.Event())))
    thread.start()
    while not kept.note and thread.is_alive():
        thread.join(0.05)
    assert "locked" in kept.note
    other.close()
    thread.join(60)
    assert over == [True]


def test_a_second_sigterm_is_no_second_ctrl_c() -> None:
    with stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(60)


HAMMER = """
import os, signal, subprocess, sys, time
from hpo.workers.process import stop_on_signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
me = os.getpid()
code = f"import os\\nwhile os.getppid() == {me}: os.kill({me}, 15)"
sender = subprocess.Popen([sys.executable, "-c", code])
heard, end = 0, time.monotonic() + 4
while heard < 3 or time.monotonic() < end:
    with stop_on_signal() as stop:
        while not stop.wait(1e-4):
            pass
    heard += 1
sender.kill()
sender.wait()
"""


def test_signals_at_any_instant_are_heard() -> None:
    """Many at once, while the event is waited for and set: `timeout` and Slurm send several."""
    done = subprocess.run([sys.executable, "-c", HAMMER], timeout=120, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr[-2000:]


def test_ray_is_asked_at_the_address_that_was_given() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"  # nobody listens there
    grpc = pytest.importorskip("grpc", reason="needs Ray: pip install -e '.[ray]'")
    with pytest.raises(LauncherError, match=f"no Ray cluster answers at {address}") as told:
        ray._check_door(grpc, address, ray.PING, None)
    assert "ray start" in str(told.value)


class Door:
    """A Ray Client server that answers as it is told, in the order of its calls."""

    def __init__(self, grpc: Any, *codes: Any) -> None:
        self.grpc, self.codes = grpc, list(codes)
        self.seen: list[str | None] = []

    def handle(self, request: bytes, context: Any) -> bytes:
        metadata = dict(context.invocation_metadata())
        self.seen.append(metadata.get("authorization"))
        code = self.codes.pop(0)
        if code != self.grpc.StatusCode.OK:
            context.abort(code, "no")
        return b""

    def service(self, details: Any) -> Any:
        assert details.method == ray.PING
        return self.grpc.unary_unary_rpc_method_handler(self.handle)


@pytest.mark.parametrize(
    ("codes", "token", "says"),
    [
        (["OK"], "t", "asks for no token"),
        (["UNAUTHENTICATED"], None, "asks for a token"),
        (["UNAUTHENTICATED", "UNAUTHENTICATED"], "t", "refuses our token"),
        (["UNAUTHENTICATED", "OK"], "t", None),
        (["UNIMPLEMENTED"], "t", "not Ray Client"),
    ],
)
def test_who_is_let_in_to_a_ray_cluster(
    codes: list[str], token: str | None, says: str | None
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    grpc = pytest.importorskip("grpc", reason="needs Ray: pip install -e '.[ray]'")
    door = Door(grpc, *(grpc.StatusCode[code] for code in codes))

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc, name-defined]
        def service(self, details: Any) -> Any:
            return door.service(details)

    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        address = f"127.0.0.1:{port}"
        if says is None:
            ray._check_door(grpc, address, ray.PING, token)
        else:
            with pytest.raises(HpoError, match=says):
                ray._check_door(grpc, address, ray.PING, token)
    finally:
        server.stop(None).wait()
    assert door.seen == [None, f"Bearer {token}"][: len(codes)]
    assert not door.codes


def test_the_token_is_where_ray_looks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ray._token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    assert ray._token() == "home"
    (tmp_path / "other").write_text("file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert ray._token() == "file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "variable")
    assert ray._token() == "variable"


def test_an_engine_is_found_by_its_name(home: Home) -> None:
    with open_launcher("local", home) as launcher:
        assert isinstance(launcher, Local)
    with open_launcher("slurm", home, sbatch=["partition=gpu"]) as launcher:
        assert isinstance(launcher, Slurm)


def test_an_agent_is_known_by_its_old_name_too() -> None:
    target = Target("toy", "0" * 32)
    now = agent_command(target, "local")
    before = ["keep", "toy", "--uuid", "0" * 32, "--engine", "local"]
    for words in (now, before):
        assert parse([*words, "--device", "cpu", "--threads", "1"]) == words[0]
        assert _is_agent(words, now)
    assert not _is_agent(before, agent_command(target, "slurm"))
