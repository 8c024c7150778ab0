"""The dashboard's address and its server: waitress, with limits that strangers cannot outwait."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil

from hpo.dashboard.attempts import Attempts
from hpo.dashboard.credentials import PASSWORD_FILE, TOKEN_FILE
from hpo.dashboard.door import Door
from hpo.dashboard.house import Health, House
from hpo.dashboard.rules import LOOPBACK, Settings
from hpo.dashboard.sessions import Sessions
from hpo.errors import InputError
from hpo.storage.db import Database

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

PORTS_TRIED = 50


def make_app(database: Database, settings: Settings | None = None) -> WSGIApplication:
    """The dashboard over `database`, whose tables are made if they are missing."""
    return Door(House(database), settings or Settings(), Health(database), Sessions(), Attempts())


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
    Raises InputError for an address other than loopback where nobody is asked for a password, and
    for a port that is taken.
    """
    from hpo.dashboard.server import make_server

    settings = settings or Settings()
    _check_proxy(trusted_proxy)
    family, address = _resolved(host, port)
    if not is_loopback(address) and not settings.credentials.asked:
        raise InputError(
            f"--host {host}: others can reach that address, so it needs a password: put one into a "
            f"file and name it in {PASSWORD_FILE} (or a token's in {TOKEN_FILE}). Without one: "
            f"ssh -L {port}:127.0.0.1:{port} HOST"
        )
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a busy moment is no warning
    app = make_app(database, settings)  # before the port is taken: the database may be away
    bound = _bind(family, address, port, host)
    server = make_server(app, bound, trusted_proxy)
    try:
        ready(f"http://{_shown(host, address)}:{bound.getsockname()[1]}/dashboard")
        server.run()
    finally:
        server.close()


def _check_proxy(address: str | None) -> None:
    """waitress compares it with the sender's address as text, so a name would match nothing."""
    if address in (None, "*"):
        return
    try:
        ipaddress.ip_address(str(address))
    except ValueError:
        raise InputError(
            f"--trusted-proxy {address}: the proxy's address, such as 127.0.0.1; or * where "
            "nothing but the proxy can reach this port"
        ) from None


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def own_hosts(host: str) -> frozenset[str]:
    """What a browser may call a dashboard that listens on `host`: loopback, which ssh forwards,
    and that address; where it is every address of the machine, all of them and its name."""
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return LOOPBACK | {host.lower()}
    if not everywhere:
        return LOOPBACK | {_bracketed(host)}
    found = {
        _bracketed(one.address.split("%")[0])
        for of_card in psutil.net_if_addrs().values()
        for one in of_card
        if one.family in (socket.AF_INET, socket.AF_INET6)
    }
    return LOOPBACK | found | {socket.gethostname().lower()}


def _bracketed(address: str) -> str:
    return f"[{ipaddress.ip_address(address)}]" if ":" in address else address


def _shown(host: str, address: str) -> str:
    everywhere = ipaddress.ip_address(address.split("%")[0]).is_unspecified
    return socket.gethostname() if everywhere else f"[{host}]" if ":" in host else host


def _resolved(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    """The first address of `host`; raises InputError for a name without one."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise InputError(
            f"--host {host}: no address of that name; such as 127.0.0.1, or 0.0.0.0 for all"
        ) from None
    # localhost may be ::1 first, which a browser would find as well, but an ssh tunnel would not.
    family, *_, address = sorted(found, key=lambda one: one[0] != socket.AF_INET)[0]
    return family, str(address[0])


def _bind(family: socket.AddressFamily, address: str, port: int, host: str) -> socket.socket:
    """A socket on `port`; raises InputError naming the next free one."""
    try:
        return _open(family, address, port)
    except PermissionError:
        raise InputError(f"--port {port}: needs root; use one above 1023") from None
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise InputError(f"--host {host} --port {port}: {error.strerror}") from None
        advice = _next_free(family, address, port)
        raise InputError(f"--port {port}: another program has it; {advice}") from None


def _open(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((address, port))
    except BaseException:
        found.close()
        raise
    return found


def _next_free(family: socket.AddressFamily, address: str, port: int) -> str:
    for other in range(port + 1, min(port + PORTS_TRIED, 65536)):
        try:
            _open(family, address, other).close()
        except OSError:
            continue
        return f"free is --port {other}, and --port 0 takes any"
    return "--port 0 takes any free one"
