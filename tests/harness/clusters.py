"""Clusters on this host's loopback, started and ended by the tests, by process id alone."""

from __future__ import annotations

import inspect
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).parents[2]
DEADLINE_S = 240.0


def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`, with a deadline for a machine that does much else."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(inspect.getsource(condition).strip())
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def end_tree(process: psutil.Process) -> None:
    """Kill a process and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        tree = [*process.children(recursive=True), process]
        for one in tree:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(tree, timeout=30)


@dataclass
class RayNode:
    """One `ray start --block` and what it has started."""

    process: psutil.Process

    @property
    def raylet(self) -> psutil.Process:
        return next(one for one in self.process.children() if one.name() == "raylet")

    def end(self) -> None:
        with suppress(psutil.NoSuchProcess):
            for one in self.process.children():
                one.resume()
        end_tree(self.process)


@dataclass
class RayCluster:
    """A head that runs no workers, and nodes that do, each on a loopback address of its own;
    token authentication is on."""

    folder: Path
    settings: dict[str, str] = field(default_factory=dict)
    nodes: list[RayNode] = field(default_factory=list)
    token: str = field(default_factory=lambda: secrets.token_hex(32))

    def __post_init__(self) -> None:
        self.port, self.client_port, self.workers_from = free_ports(3)
        self.environment = os.environ | self.settings | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    @property
    def address(self) -> str:
        return f"ray://127.0.0.2:{self.client_port}"

    def start_head(self) -> None:
        self._start("--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false",
                    f"--ray-client-server-port={self.client_port}")  # fmt: skip

    def start_node(self, cpus: int = 4) -> RayNode:
        return self._start(f"--address=127.0.0.2:{self.port}", f"--num-cpus={cpus}")

    def _start(self, *options: str) -> RayNode:
        place = len(self.nodes)
        log = self.folder / f"node-{place}.log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options,
                   f"--node-ip-address=127.0.0.{place + 2}", "--num-gpus=0",
                   "--object-store-memory=80000000", f"--temp-dir={self.folder}"]  # fmt: skip
        if "--head" not in options:
            command.pop()  # a node takes the head's
        with log.open("wb") as output:
            started = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip
        node = RayNode(psutil.Process(started.pid))
        self.nodes.append(node)

        def is_up() -> bool:
            if started.poll() is not None:
                raise RuntimeError(log.read_text())
            return "Ray runtime started" in log.read_text()

        until(is_up)
        return node


@contextmanager
def ray_cluster(nodes: int, settings: dict[str, str]) -> Iterator[RayCluster]:
    """A head and so many nodes; `settings` are Ray's own, as environment variables. What runs on
    them ends with them."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # its sockets need a short path
    cluster = RayCluster(folder, settings)
    try:
        cluster.start_head()
        for _ in range(nodes):
            cluster.start_node()
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            node.end()
        shutil.rmtree(folder, ignore_errors=True)


SLURM_CONF = """\
ClusterName=hpo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=30
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=1
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
SLURM_TOOLS = ("slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo")


def _daemon(command: list[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )


@contextmanager
def slurm_cluster() -> Iterator[Path]:
    """slurmctld and two slurmd on loopback; SLURM_CONF names them while this lasts."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    (folder / "state").mkdir()
    host = socket.gethostname().partition(".")[0]
    user = psutil.Process().username()
    conf = folder / "slurm.conf"
    conf.write_text(
        SLURM_CONF.format(folder=folder, host=host, user=user, ports=free_ports(3)),
        encoding="utf-8",
    )
    os.environ["SLURM_CONF"] = str(conf)
    daemons = []
    try:
        for command in (
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D", "-N", "n1"],
            ["slurmd", "-D", "-N", "n2"],
        ):
            with (folder / f"{''.join(command)}.log").open("wb") as output:
                daemons.append(_daemon(command, output))

        def idle() -> bool:
            if any(one.poll() is not None for one in daemons):
                raise RuntimeError("".join(p.read_text() for p in folder.glob("*.log")))
            told = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], capture_output=True, text=True,
                                  check=False)  # fmt: skip
            return told.stdout.split() == ["idle", "idle"]

        until(idle)
        try:
            yield folder
        finally:  # its daemons leave behind what still runs
            subprocess.run(["scancel", "--me"], check=True)
            until(lambda: not subprocess.check_output(["squeue", "-h"], text=True))
    finally:
        for daemon in reversed(daemons):
            end_tree(psutil.Process(daemon.pid))
            daemon.wait()
        del os.environ["SLURM_CONF"]
        shutil.rmtree(folder, ignore_errors=True)
