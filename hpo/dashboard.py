"""The real optuna-dashboard over our storage, on this machine only.

Its writes go through FencedStorage, so they begin as writers, and a study deleted there takes our
rows with it. Its cache is per process: one process with threads. It knows no passwords and checks
no host, so a door stands in front of it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from typing import IO, TYPE_CHECKING, Any

from hpo.errors import HpoError, InputError
from hpo.redaction import redacted_stderr
from hpo.storage.db import Database, connect
from hpo.storage.optuna_rdb import FencedStorage, cached, create_schema

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")
THREADS = 4
PORTS_TRIED = 50
STOP_S = 10.0

REFUSED = {
    r"/api/studies/\d+/rename": (
        "a study keeps its name: Optuna renames by copying, and the copy would lose every epoch "
        "and attempt"
    ),
    r"/api/trials/\d+/tell": "trials are ended by their workers; to stop a study: hpo stop STUDY",
}
"""Requests of the dashboard that would break a study of ours, and why."""


def make_app(database: Database) -> WSGIApplication:
    """The dashboard over `database`, whose tables are made if they are missing."""
    import optuna_dashboard

    create_schema(database)
    app: WSGIApplication = optuna_dashboard.wsgi(cached(FencedStorage(database)))
    return _Door(app)


class _Door:
    """Lets in what a page of this very address asks for, and nothing that breaks a study.

    Without the check of the host, a page from elsewhere could reach a loopback address by a name of
    its own (DNS rebinding); without that of the origin, it could post to it.
    """

    def __init__(self, app: WSGIApplication) -> None:
        self.app = app

    def __call__(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        reason = _refusal(
            environ["REQUEST_METHOD"],
            environ.get("PATH_INFO", ""),
            environ.get("HTTP_HOST", ""),
            environ.get("HTTP_ORIGIN"),
        )
        if reason is None:
            return self.app(environ, start)
        # The page shows `reason`, as it does for errors of its own.
        body = json.dumps({"reason": reason}).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        start("403 Forbidden", headers)
        return [body]


def _refusal(method: str, path: str, host: str, origin: str | None) -> str | None:
    """Why a request is not let in; None if it is."""
    if not OWN_HOST.fullmatch(host):
        return f"host {host!r}: the dashboard answers on this machine only"
    if method in ("GET", "HEAD"):
        return None
    if origin is not None and origin != f"http://{host}":
        return f"origin {origin!r}: only the dashboard's own pages may change anything"
    return next(
        (why for known, why in REFUSED.items() if re.fullmatch(known, path.rstrip("/"))), None
    )


def serve(
    database: Database,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    ready: Callable[[str], None],
) -> None:
    """Serve until interrupted; `ready` is called with the address once it answers.

    Port 0 is any free one. Raises InputError for an address that is not this machine's own
    loopback, and for a port that is taken.
    """
    from waitress.server import create_server

    if host not in LOOPBACK:
        raise InputError(
            f"--host {host}: the dashboard has no password, so it answers on this machine only; "
            f"allowed: {', '.join(LOOPBACK)}. From elsewhere: ssh -L {port}:127.0.0.1:{port} HOST"
        )
    bound = _bind(host, port)
    server = create_server(make_app(database), sockets=[bound], threads=THREADS)
    try:
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{bound.getsockname()[1]}/dashboard")
        server.run()
    finally:
        server.close()


def _bind(host: str, port: int) -> socket.socket:
    """A socket on `port`; raises InputError naming the next free one."""
    try:
        return _open(host, port)
    except PermissionError:
        raise InputError(f"--port {port}: needs root; use one above 1023") from None
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise InputError(f"--host {host} --port {port}: {error.strerror}") from None
        advice = _next_free(host, port)
        raise InputError(f"--port {port}: another program has it; {advice}") from None


def _open(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except BaseException:
        found.close()
        raise
    return found


def _next_free(host: str, port: int) -> str:
    for other in range(port + 1, min(port + PORTS_TRIED, 65536)):
        try:
            _open(host, other).close()
        except OSError:
            continue
        return f"free is --port {other}, and --port 0 takes any"
    return "--port 0 takes any free one"


def start_beside(database: Database, port: int = 0) -> tuple[str, Callable[[], None]]:
    """Serve from a process of its own; returns the address and what ends it.

    The process ends with this one, however that dies: it reads a pipe that closes then. The storage
    URL goes there by its environment, since it may hold a password. Raises InputError as `serve`.
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
        reason = _last_line(log) or "it ended without a word"
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
    """Close the pipe that it waits on; kill it if it does not heed that."""
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        pipe.close()
    try:
        child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    log.close()


def _beside(port: int) -> None:
    """The process of `start_beside`: one line of JSON says the address or the error."""

    def say(**answer: Any) -> None:
        print(json.dumps(answer), flush=True)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        database = connect(os.environ["HPO_STORAGE"])
        serve(database, port=port, ready=lambda address: say(address=address))
    except HpoError as error:
        say(error=str(error))


if __name__ == "__main__":
    with redacted_stderr():
        _beside(int(sys.argv[1]))
