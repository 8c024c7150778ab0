"""The dashboard's server: waitress, its limits, and the subprocess of a search.

Without the deadline a client that sends a byte now and then keeps its connection for ever, and a
few hundred of those keep everybody else out (slowloris).
"""

from __future__ import annotations

import errno
import ipaddress
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any

import psutil
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask

from hpo.dashboard.app import DashboardApp, Health
from hpo.dashboard.auth import PASSWORD_FILE, TOKEN_FILE, LoginThrottle, Sessions, from_environment
from hpo.dashboard.gateway import LOOPBACK, SECURITY_HEADERS, Gateway, Settings
from hpo.errors import HpoError, InputError
from hpo.storage.database import Database, connect
from hpo.storage.schema import create_schema

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

REQUEST_S = 30.0
LIMITS: dict[str, Any] = {
    "threads": 8,
    "connection_limit": 200,
    "channel_timeout": 30,  # seconds without a byte
    "cleanup_interval": 5,
    "max_request_header_size": 16 * 1024,
    "max_request_body_size": 1024 * 1024,  # a note; read before the gateway is called
    "asyncore_use_poll": True,
    "ident": "",
}


class _ErrorTask(ErrorTask):  # type: ignore[misc]
    def execute(self) -> None:
        self.response_headers = list(SECURITY_HEADERS.items())
        super().execute()


class _Channel(HTTPChannel):  # type: ignore[misc]
    error_task_class = _ErrorTask


class Server(TcpWSGIServer):  # type: ignore[misc]
    """A server of one socket; `run` serves until Ctrl-C."""

    channel_class = _Channel
    _began: Mapping[Any, float] = {}
    """When each incomplete request was first seen."""

    def maintenance(self, now: float) -> None:
        """Close connections whose request is not complete after REQUEST_S."""
        super().maintenance(now)
        began = {}
        for channel in self.active_channels.values():
            if channel.request is not None:
                began[channel.request] = self._began.get(channel.request, now)
                if now - began[channel.request] >= REQUEST_S:
                    channel.will_close = True
        self._began = began


def make_server(
    app: WSGIApplication, bound: socket.socket, trusted_proxy: str | None = None
) -> Server:
    """Return a server of `app` on the socket `bound`."""
    options = dict(LIMITS)
    if trusted_proxy is not None:
        options["trusted_proxy"] = trusted_proxy
        options["trusted_proxy_headers"] = {"x-forwarded-for", "x-forwarded-proto"}
    return Server(
        app,
        {},
        _sock=bound,
        adj=Adjustments(sockets=[bound], **options),
        sockinfo=(bound.family, bound.type, bound.proto, bound.getsockname()),
        bind_socket=False,
    )


PORTS_TRIED = 50


def make_app(database: Database, settings: Settings | None = None) -> WSGIApplication:
    """Return the dashboard over `database`, whose tables are created if they are missing."""
    settings = settings or Settings()
    app, health = DashboardApp(database, read_only=settings.read_only), Health(database)
    return Gateway(app, settings, health, Sessions(), LoginThrottle())


def serve(
    database: Database,
    settings: Settings | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    trusted_proxy: str | None = None,
    ready: Callable[[str], None],
) -> None:
    """Serve until interrupted; `ready` is called with the address once it answers.

    Port 0 is any free one. `trusted_proxy` is the address whose X-Forwarded-For and -Proto count.
    Raises InputError for an address other than loopback without a password, and for a port that is
    taken.
    """
    settings = settings or Settings()
    _check_proxy(trusted_proxy)
    family, address = _resolved(host, port)
    if not is_loopback(address) and not settings.credentials.required:
        raise InputError(
            f"--host {host}: others can reach that address, so it needs a password: put one into a "
            f"file and name the file in {PASSWORD_FILE} (or a token's in {TOKEN_FILE}). Without "
            "one: "
            f"ssh -L {port}:127.0.0.1:{port} HOST"
        )
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a busy moment is no warning
    app = make_app(database, settings)  # before the port is taken: the database may be unavailable
    bound = _bind(family, address, port, host)
    server = make_server(app, bound, trusted_proxy)
    try:
        ready(f"http://{_shown(host, address)}:{bound.getsockname()[1]}/dashboard")
        server.run()
    finally:
        server.close()


def _check_proxy(address: str | None) -> None:
    """Raise InputError for a name: waitress compares the sender's address with it as text."""
    if address in (None, "*"):
        return
    try:
        ipaddress.ip_address(str(address))
    except ValueError:
        raise InputError(
            f"--trusted-proxy {address}: the proxy's IP address, such as 127.0.0.1; or * if "
            "nothing but the proxy can reach this port"
        ) from None


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach `address`."""
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def own_hosts(host: str) -> frozenset[str]:
    """Return the names by which a browser may call a dashboard that listens on `host`: loopback,
    which ssh forwards, and that address; for 0.0.0.0 all addresses of the machine, and its name.
    """
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return LOOPBACK | {host.lower()}
    if not everywhere:
        return LOOPBACK | {_bracketed(host)}
    addresses = {
        _bracketed(entry.address.split("%")[0])
        for interface in psutil.net_if_addrs().values()
        for entry in interface
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }
    return LOOPBACK | addresses | {socket.gethostname().lower()}


def _bracketed(address: str) -> str:
    return f"[{ipaddress.ip_address(address)}]" if ":" in address else address


def _shown(host: str, address: str) -> str:
    everywhere = ipaddress.ip_address(address.split("%")[0]).is_unspecified
    return socket.gethostname() if everywhere else f"[{host}]" if ":" in host else host


def _resolved(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    """Return the first address of `host`; raise InputError for a name without one."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise InputError(
            f"--host {host}: no address of that name; for example 127.0.0.1, or 0.0.0.0 for all"
        ) from None
    # localhost may be ::1 first, which a browser would find as well, but an ssh tunnel would not.
    family, *_, address = min(addresses, key=lambda entry: entry[0] != socket.AF_INET)
    return family, str(address[0])


def _bind(family: socket.AddressFamily, address: str, port: int, host: str) -> socket.socket:
    """Return a socket on `port`; raise InputError naming the next free one."""
    try:
        return _open(family, address, port)
    except PermissionError:
        raise InputError(f"--port {port}: needs root; choose one above 1023") from None
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise InputError(f"--host {host} --port {port}: {error.strerror}") from None
        advice = _next_free(family, address, port)
        raise InputError(f"--port {port}: in use by another program; {advice}") from None


def _open(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address, port))
    except BaseException:
        bound.close()
        raise
    return bound


def _next_free(family: socket.AddressFamily, address: str, port: int) -> str:
    for other in range(port + 1, min(port + PORTS_TRIED, 65536)):
        try:
            _open(family, address, other).close()
        except OSError:
            continue
        return f"--port {other} is free, and --port 0 takes any"
    return "--port 0 takes any free one"


STOP_S = 10.0


def start_subprocess(database: Database, port: int = 0) -> tuple[str, Callable[[], None]]:
    """Serve from a subprocess, on loopback; return the address and a function that ends it.

    The subprocess ends with this process, however that dies: it reads a pipe that closes then. It
    gets the storage URL, which may hold a password, in its environment, and so the dashboard's own
    password and token. Raises InputError as `serve` and `from_environment` do.
    """
    create_schema(database)
    log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
    child = subprocess.Popen(
        [sys.executable, "-m", "hpo.dashboard", str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, "HPO_STORAGE": database.secret_url},
        start_new_session=True,  # Ctrl-C in the terminal is for the search
    )
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        reason = _last_line(log) or "it ended without a message"
        _end(child, log)
        raise HpoError(f"the dashboard did not start: {reason}")
    answer = json.loads(line)
    if "error" in answer:
        _end(child, log)
        raise InputError(answer["error"])
    return answer["address"], lambda: _end(child, log)


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _end(child: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """Close the pipe that it waits on; kill it if that is not enough."""
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        pipe.close()
    try:
        child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    log.close()


def main(port: int) -> None:
    """Serve as `start_subprocess` expects: print the address or the error as a line of JSON."""

    def say(**answer: Any) -> None:
        print(json.dumps(answer), flush=True)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        database = connect(os.environ["HPO_STORAGE"])
        settings = Settings(from_environment(os.environ))
        serve(database, settings, port=port, ready=lambda address: say(address=address))
    except HpoError as error:
        say(error=str(error))
