"""Workers on a Ray cluster: a detached actor each, and the way into the cluster.

The actor is an agent, with the worker as its child process. A torch that crashes or runs out of
memory takes no Ray process with it; the worker can be asked to hand back (Ray knows no SIGTERM) and
has a log of its own. Ray re-runs only `__init__` of an actor that it restarts, so that is where the
agent starts. Ray declares a node dead after a silence (about a minute by default) and starts its
actors elsewhere; what still runs there meanwhile is kept apart by the leases.

The database's URL travels as an argument of the actor. Environment variables of an actor are shown
by Ray's state API, arguments are not; every client of the cluster may run code there.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hpo.errors import HpoError, InputError, LauncherError
from hpo.extras import install_command
from hpo.workers.agent import Agent, AgentSpec, logs_after
from hpo.workers.launchers.base import LaunchedWorker, LaunchRequest, Size, Target

log = logging.getLogger(__name__)

NAMESPACE = "hpo"
ANSWER_S = 5.0
"""How long an actor may take to answer; one that waits for a place never does."""
PLACING_S = 30.0
"""How long `start` waits for the first word of its actors: one that cannot begin says why."""


class AgentActor:
    """An agent in a process of Ray's; `name` is the actor's."""

    def __init__(self, name: str, spec: AgentSpec, folder: str) -> None:
        self.name, self.agent, self.stop = name, Agent(spec), threading.Event()
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        if Path(folder).is_dir():
            os.chdir(folder)  # where relative paths and modules of one's own are looked for
        threading.Thread(target=self._keep, name="agent", daemon=True).start()

    def _keep(self) -> None:
        try:
            self.agent.run(self.stop)
        except HpoError:
            pass  # said where `hpo workers` shows it
        except Exception:
            log.exception("the agent failed")
        import ray

        ray.kill(ray.get_actor(self.name, namespace=NAMESPACE), no_restart=True)

    def leave(self) -> None:
        """Hand back and end."""
        self.stop.set()

    def about(self) -> dict[str, str]:
        """Return state, place and workers."""
        import ray

        working = self.agent.running
        state = "ending" if self.stop.is_set() else "running" if working else "starting"
        address = ray.util.get_node_ip_address()
        note = ", ".join(working) or self.agent.note
        return {"state": state, "host": f"{socket.gethostname()} ({address})", "note": note}

    def logs(self, seen: Mapping[str, int]) -> dict[str, bytes]:
        """Return the logs of the workers of this actor."""
        return logs_after(self.agent.spec.directory, seen, self.agent.started)


@dataclass
class RayLauncher:
    """A Ray cluster that we are connected to."""

    ray: Any
    has_our_files: bool = False

    def check(self, size: Size) -> None:
        """Raise InputError for a size that can never be placed here."""
        check_room(self._nodes(), self._filled(size))

    def start(self, request: LaunchRequest) -> None:
        """Create an actor for each worker; raise LauncherError, leaving none, where one fails."""
        target, size = request.target, self._filled(request.size)
        device, cpus = "cuda:0" if size.gpus else "cpu", size.cpus or 1
        spec = AgentSpec(target.study, target.uuid, request.storage, request.home, [device], cpus)
        actor = self.ray.remote(AgentActor)
        settings = {
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": -1,
            "num_cpus": cpus,
            "num_gpus": size.gpus,
            "scheduling_strategy": "SPREAD",
        }
        names = [f"{target.label}-{secrets.token_hex(3)}" for _ in range(size.workers)]
        folder = str(Path.cwd())
        try:
            self._await_birth(
                [actor.options(name=n, **settings).remote(n, spec, folder) for n in names]
            )
        except Exception as error:
            for name in names:
                self._kill(name)
            raise LauncherError(_words(error)) from None

    def _nodes(self) -> list[Mapping[str, float]]:
        """Return the resources of each node by Ray's names, CPU and GPU above all."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def _filled(self, size: Size) -> Size:
        """Return the size with this cluster's defaults for what it leaves open."""
        gpus = size.gpus
        if gpus is None:
            gpus = float(any(node.get("GPU") for node in self._nodes()))
        return Size(size.workers, gpus, size.cpus or 1)

    def _await_birth(self, actors: Sequence[Any]) -> None:
        """Raise the error of an actor that could not begin; those that wait for a place may."""
        asked = [actor.about.remote() for actor in actors]
        ready, _ = self.ray.wait(asked, num_returns=len(asked), timeout=PLACING_S)
        self.ray.get(ready)

    def launched(self, target: Target) -> list[LaunchedWorker]:
        """Return what is placed for the study now."""
        answers = self._ask(target, "about")
        waiting = {"state": "waiting", "host": "", "note": "for a place, or for its node's answer"}
        return [LaunchedWorker(name, **(answer or waiting)) for name, answer in answers.items()]

    def stop(self, target: Target) -> None:
        """Ask the actors to hand back and end; kill those that do not answer."""
        for name, answer in self._ask(target, "about").items():
            if answer is None:
                self._kill(name)
            else:
                with suppress(Exception):
                    self.ray.get_actor(name, namespace=NAMESPACE).leave.remote()

    def logs(self, target: Target, seen: Mapping[str, int]) -> dict[str, bytes]:
        """Return each worker's log after its first `seen` bytes."""
        answers = self._ask(target, "logs", dict(seen))
        return {worker: text for part in answers.values() for worker, text in (part or {}).items()}

    def _ask(self, target: Target, method: str, *args: Any) -> dict[str, Any]:
        """Return the answer of each actor of the study by name; None from one that gives none."""
        names = [name for name in self.ray.util.list_named_actors()
                 if name.startswith(f"{target.label}-")]  # fmt: skip
        asked = {}
        for name in sorted(names):
            with suppress(ValueError):  # it has ended since
                actor = self.ray.get_actor(name, namespace=NAMESPACE)
                asked[name] = getattr(actor, method).remote(*args)
        answers: dict[str, Any] = dict.fromkeys(asked)
        if asked:
            self.ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
        for name, reference in asked.items():
            with suppress(self.ray.exceptions.RayError):  # it waits, is restarting, or has ended
                answers[name] = self.ray.get(reference, timeout=0)
        return answers

    def _kill(self, name: str) -> None:
        with suppress(Exception):
            self.ray.kill(self.ray.get_actor(name, namespace=NAMESPACE), no_restart=True)


def check_room(nodes: Sequence[Mapping[str, float]], size: Size) -> None:
    """Raise InputError where so many workers never fit on nodes of these resources, busy or not."""
    cpus, gpus, room = size.cpus or 1, size.gpus or 0.0, 0
    for node in nodes:
        by_cpu = int(node.get("CPU", 0) // cpus)
        room += min(by_cpu, int(node.get("GPU", 0)) * size.per_gpu) if gpus else by_cpu
    if size.workers > room:
        have = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
        raise InputError(
            f"--workers {size.workers} with {cpus} CPU and {gpus:g} GPU each: the Ray cluster has "
            f"{len(nodes)} nodes with {have['CPU']:g} CPU and {have['GPU']:g} GPU, room for "
            f"{room}; give fewer --workers, or less --gpus-per-worker or --cpus-per-worker"
        )


def _words(error: Exception) -> str:
    """Return what a user can do about an agent that could not begin."""
    text = str(error)
    missing = re.search(r"No module named '[\w.]+'", text)
    if missing:
        return (
            f"a node of the Ray cluster cannot begin: {missing[0]}; every node needs hpo, in the "
            "Python that Ray runs there, and the images at the same path; here: "
            f"{install_command('ray')}"
        )
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return f"Ray could not place the workers: {lines[-1].strip() if lines else error!r}"


CLIENT_PORT = 10001
"""Ray Client's, by default."""
PING = "/ray.rpc.RayletDriver/ClusterInfo"
"""A call of Ray Client's server that needs nothing, and gets no answer without a token."""
PING_HEAD = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""The same of the head itself."""
START_ONE = (
    "to start a cluster: `ray get-auth-token --generate`, then RAY_AUTH_MODE=token ray start "
    "--head, and on each other node RAY_AUTH_MODE=token ray start --address=HEAD:6379"
)


@contextmanager
def connected(on: str, *, insecure: bool) -> Iterator[RayLauncher]:
    """Connect to a cluster: `ray` is the cluster that this host is a node of (or RAY_ADDRESS), `ray://...`
    one that is reached from anywhere, through Ray Client.

    Raises LauncherError where nothing answers or it does not let us in, and, unless `insecure`, for
    a cluster that asks for no token: everyone who reaches such a port can run code there.
    """
    _refuse_password_in_argv()
    address = _client_address(on) if on != "ray" else None
    token = _token()
    if token:
        # Ray Client does not look by itself, and Ray reads its settings when it is imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import grpc
        import ray
    except ImportError as error:
        raise LauncherError(f"--on {on} needs Ray ({error}): {install_command('ray')}") from None
    if address is not None and token is None and not insecure:
        _check_door(grpc, address, PING, token)
    try:
        _init(ray, f"ray://{address}" if address else "auto")
    except Exception as error:
        if address is not None:
            _check_door(grpc, address, PING, token, or_open=True)  # why Ray did not say
        words = str(error).strip().splitlines() or [repr(error)]
        raise LauncherError(f"--on {on}: no connection: {words[-1]}; {START_ONE}") from None
    try:
        if not insecure:
            # Not before: Ray Client's server starts a process for each client by a fork, which may
            # hang where another call has just been answered.
            head = ray.get_runtime_context().gcs_address if address is None else address
            _check_door(grpc, head, PING if address else PING_HEAD, token)
        yield RayLauncher(ray)
    finally:
        ray.shutdown()


def _init(ray: Any, address: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
        try:
            ray.init(address, **settings)
        except ConnectionAbortedError:  # its process for us did not begin in time: another will
            ray.init(address, **settings)


def _client_address(on: str) -> str:
    """Return HOST:PORT of ray://HOST[:PORT]."""
    parts = urlsplit(on)
    try:
        host, port = parts.hostname, parts.port or CLIENT_PORT
    except ValueError:
        host = None
    if not host or parts.path.strip("/"):
        raise InputError(f"--on {on}: ray://HOST:PORT is wanted, such as ray://head:{CLIENT_PORT}")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _refuse_password_in_argv() -> None:
    """Raise InputError for one: Ray shows the command lines of its clients in its dashboard."""
    for word in sys.argv:
        url = word.partition("=")[2] or word if word.startswith("--") else word
        if "://" in url and urlsplit(url).password:
            raise InputError(
                "the storage URL in this command line has a password, and Ray shows command lines "
                "in its dashboard; put it into HPO_STORAGE instead"
            )


def _token() -> str | None:
    """Return the cluster's token, from where Ray itself looks for it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return path.read_text().strip() if path.exists() else None


def _check_door(
    grpc: Any, address: str, method: str, token: str | None, *, or_open: bool = False
) -> None:
    """Raise LauncherError unless the cluster at `address` asks for a token, and takes this one;
    with `or_open` it need not ask."""
    code, details = _ping(grpc, address, method, None)
    closed = grpc.StatusCode.UNAUTHENTICATED
    if code == grpc.StatusCode.OK:
        if or_open:
            return
        raise LauncherError(
            f"the Ray cluster at {address} asks for no token: everyone who reaches it can run "
            f"code there and read the database's password; {START_ONE}; or, where nobody else can "
            "reach it: --insecure"
        )
    if code == grpc.StatusCode.UNIMPLEMENTED:
        raise LauncherError(
            f"what answers at {address} is not Ray Client, whose port is {CLIENT_PORT} unless ray "
            "start was given --ray-client-server-port"
        )
    if code != closed:
        raise LauncherError(f"no Ray cluster answers at {address}: {details}; {START_ONE}")
    if token is None:
        raise LauncherError(
            f"the Ray cluster at {address} asks for a token: put it into ~/.ray/auth_token, or "
            "name its file in RAY_AUTH_TOKEN_PATH"
        )
    code, details = _ping(grpc, address, method, token)
    if code == closed:
        raise LauncherError(
            f"the Ray cluster at {address} refuses our token (RAY_AUTH_TOKEN, the file that "
            "RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token): use the one of its nodes"
        )


def _ping(grpc: Any, address: str, method: str, token: str | None) -> tuple[Any, str]:
    """Return a server's status code and words on an empty call, with a token or without."""
    headers = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(method)
        try:
            call(b"", timeout=ANSWER_S, metadata=headers)
        except grpc.RpcError as error:
            return error.code(), error.details()
    return grpc.StatusCode.OK, ""
