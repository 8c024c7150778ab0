"""The way into a Ray cluster: its address, its token, and whether it asks for one at all."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hpo.errors import EngineError, InputError
from hpo.extras import install_command
from hpo.workers.engines.ray import NAMESPACE, RayEngine

CLIENT_PORT = 10001
"""Ray Client's, by default."""
ANSWER_S = 5.0
PING = "/ray.rpc.RayletDriver/ClusterInfo"
"""A call of Ray Client's server that needs nothing, and answers nobody without a token."""
PING_HEAD = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""The same of the head itself."""
START_ONE = (
    "to start a cluster: `ray get-auth-token --generate`, then RAY_AUTH_MODE=token ray start "
    "--head, and on each other node RAY_AUTH_MODE=token ray start --address=HEAD:6379"
)


@contextmanager
def connected(on: str, *, insecure: bool) -> Iterator[RayEngine]:
    """A connection: `ray` is the cluster that this host is a node of (or RAY_ADDRESS), `ray://...`
    one that is reached from anywhere, through Ray Client.

    Raises EngineError where nothing answers or it does not let us in, and, unless `insecure`, for a
    cluster that lets everybody in: whoever reaches such a port runs code there.
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
        raise EngineError(f"--on {on} needs Ray ({error}): {install_command('ray')}") from None
    if address is not None and token is None and not insecure:
        _check_door(grpc, address, PING, token)
    try:
        _init(ray, f"ray://{address}" if address else "auto")
    except Exception as error:
        if address is not None:
            _check_door(grpc, address, PING, token, or_open=True)  # why Ray did not say
        words = str(error).strip().splitlines() or [repr(error)]
        raise EngineError(f"--on {on}: no connection: {words[-1]}; {START_ONE}") from None
    try:
        if not insecure:
            # Not before: Ray Client's server starts a process for each client by a fork, which may
            # hang where another call has just been answered.
            head = ray.get_runtime_context().gcs_address if address is None else address
            _check_door(grpc, head, PING if address else PING_HEAD, token)
        yield RayEngine(ray)
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
    """HOST:PORT of ray://HOST[:PORT]."""
    parts = urlsplit(on)
    try:
        host, port = parts.hostname, parts.port or CLIENT_PORT
    except ValueError:
        host = None
    if not host or parts.path.strip("/"):
        raise InputError(f"--on {on}: ray://HOST:PORT is wanted, such as ray://head:{CLIENT_PORT}")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _refuse_password_in_argv() -> None:
    """Ray shows the command line of whoever connects in its dashboard."""
    for word in sys.argv:
        url = word.partition("=")[2] or word if word.startswith("--") else word
        if "://" in url and urlsplit(url).password:
            raise InputError(
                "the storage URL in this command line has a password, and Ray shows command lines "
                "in its dashboard; put it into HPO_STORAGE instead"
            )


def _token() -> str | None:
    """The cluster's token, from where Ray itself looks for it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return path.read_text().strip() if path.exists() else None


def _check_door(
    grpc: Any, address: str, method: str, token: str | None, *, or_open: bool = False
) -> None:
    """Raise EngineError unless the cluster at `address` asks for a token, and takes this one; with
    `or_open` it need not ask."""
    code, details = _ping(grpc, address, method, None)
    closed = grpc.StatusCode.UNAUTHENTICATED
    if code == grpc.StatusCode.OK:
        if or_open:
            return
        raise EngineError(
            f"the Ray cluster at {address} asks nobody for a token: whoever reaches it runs code "
            f"there and reads the database's password; {START_ONE}; or, where nobody else can "
            "reach it: --insecure"
        )
    if code == grpc.StatusCode.UNIMPLEMENTED:
        raise EngineError(
            f"what answers at {address} is not Ray Client, whose port is {CLIENT_PORT} unless ray "
            "start was given --ray-client-server-port"
        )
    if code != closed:
        raise EngineError(f"no Ray cluster answers at {address}: {details}; {START_ONE}")
    if token is None:
        raise EngineError(
            f"the Ray cluster at {address} asks for a token: put it into ~/.ray/auth_token, or "
            "name its file in RAY_AUTH_TOKEN_PATH"
        )
    code, details = _ping(grpc, address, method, token)
    if code == closed:
        raise EngineError(
            f"the Ray cluster at {address} refuses our token (RAY_AUTH_TOKEN, the file that "
            "RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token): use the one of its nodes"
        )


def _ping(grpc: Any, address: str, method: str, token: str | None) -> tuple[Any, str]:
    """What a server says to an empty call, with a token or without."""
    headers = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(method)
        try:
            call(b"", timeout=ANSWER_S, metadata=headers)
        except grpc.RpcError as error:
            return error.code(), error.details()
    return grpc.StatusCode.OK, ""
