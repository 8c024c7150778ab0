"""`hpo dashboard`: optuna-dashboard behind a gateway."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hpo.cli.options import Storage, database, program
from hpo.errors import NotFound

ALLOWED_HOSTS = "HPO_DASHBOARD_ALLOWED_HOSTS"


def dashboard(
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Address to listen on; 0.0.0.0: all addresses of this machine (needs a password).",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="TCP port; 0: any free one.")
    ] = 8080,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Refuse every change: notes, deletions, uploads.")
    ] = False,
    password_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="HPO_DASHBOARD_PASSWORD_FILE",
            help="File with the password, readable by you alone (chmod 600); or the password in "
            "HPO_DASHBOARD_PASSWORD.",
            show_default="no login",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="HPO_DASHBOARD_TOKEN_FILE",
            help="File with a token for scripts (Authorization: Bearer TOKEN); or the token in "
            "HPO_DASHBOARD_TOKEN.",
            show_default="none",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="Another name by which browsers reach it, repeatable; or "
            f"{ALLOWED_HOSTS}, separated by commas.",
            show_default="none",
        ),
    ] = [],  # noqa: B006
    trusted_proxy: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Proxy whose X-Forwarded-For and X-Forwarded-Proto are trusted; *: any sender.",
            show_default="none",
        ),
    ] = None,
    storage: Storage = None,
) -> None:
    """Serve the dashboard until Ctrl-C, on this machine alone unless --host says otherwise.

    It is optuna-dashboard, and at /hpo pages of hpo's own: live workers, trials with all metrics
    and reasons, logs, the report, and buttons to stop, resume, extend and enqueue.

    Any other address requires a password or a token; once set, it is also asked for on this
    machine, whose other users reach 127.0.0.1 as well as you do. The dashboard speaks plain HTTP,
    which lets the network read passwords: put a proxy with TLS in front of it, under a host name of
    its own (its paths begin at /, so it cannot run under a sub-path).

    Example: hpo dashboard --port 8080
    """
    import logging
    import signal

    from hpo.dashboard.auth import read_credentials
    from hpo.dashboard.gateway import Settings, host_name
    from hpo.dashboard.server import own_hosts, serve
    from hpo.storage.records import is_empty

    names = [*allowed_host, *filter(None, os.environ.get(ALLOWED_HOSTS, "").split(","))]
    settings = Settings(
        read_credentials(password_file, token_file, os.environ),
        own_hosts(host),
        frozenset(host_name(name) for name in names),
        read_only,
    )

    def ready(address: str) -> None:
        typer.echo(f"dashboard: {address}  (Ctrl-C to stop)")

    with database(storage) as found:
        # On a server the dashboard may start before the first study.
        if found.is_sqlite and is_empty(found):
            raise NotFound(
                f"no studies in {found.shown}; to create one: {program()} run STUDY.toml"
            )
        logging.basicConfig(format="%(asctime)s %(message)s")  # wrong passwords, with their time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # how a container is stopped
        serve(found, settings, host=host, port=port, trusted_proxy=trusted_proxy, ready=ready)
