"""waitress, with a deadline for a request to be whole and our headers on its own refusals.

Without the deadline a client that sends one byte now and then keeps its connection for ever, and a
few hundred of those keep everybody else out (slowloris).
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask

from hpo.dashboard.answers import ALWAYS

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

REQUEST_S = 30.0
LIMITS: dict[str, Any] = {
    "threads": 8,
    "connection_limit": 200,
    "channel_timeout": 30,  # seconds without a byte
    "cleanup_interval": 5,
    "max_request_header_size": 16 * 1024,
    "max_request_body_size": 1024 * 1024,  # a note; waitress reads a body before we are asked
    "asyncore_use_poll": True,
    "ident": "",
}


class _Refusal(ErrorTask):  # type: ignore[misc]
    def execute(self) -> None:
        self.response_headers = list(ALWAYS)
        super().execute()


class _Channel(HTTPChannel):  # type: ignore[misc]
    error_task_class = _Refusal


class Server(TcpWSGIServer):  # type: ignore[misc]
    """One socket's server; `run` serves until Ctrl-C."""

    channel_class = _Channel
    _began: Mapping[Any, float] = {}
    """When each request was first seen that is not whole yet."""

    def maintenance(self, now: float) -> None:
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
    """A server of `app` on the socket `bound`."""
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
