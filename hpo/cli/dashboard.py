"""`hpo dashboard`: optuna-dashboard behind a gateway."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hpo.cli.options import (
    Storage,
    database,
    program,
)
from hpo.errors import NotFound

ALLOWED_HOSTS = "HPO_DASHBOARD_ALLOWED_HOSTS"


def dashboard(
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Address to listen on; 0.0.0.0: all of this machine's, with a password.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="TCP port; 0: any that is free.")
    ] = 8080,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Refuse every change: notes, deleting, uploads.")
    ] = False,
    password_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="HPO_DASHBOARD_PASSWORD_FILE",
            help="A file with the password, for your eyes alone (chmod 600); or the password in "
            "HPO_DASHBOARD_PASSWORD.",
            show_default="nobody is asked",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="HPO_DASHBOARD_TOKEN_FILE",
            help="A file with a token for scripts (Authorization: Bearer TOKEN); or the token in "
            "HPO_DASHBOARD_TOKEN.",
            show_default="none",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="A further name that browsers call it by, repeatable; or "
            f"{ALLOWED_HOSTS}, with commas.",
            show_default="none",
        ),
    ] = [],  # noqa: B006
    trusted_proxy: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="The proxy whose X-Forwarded-For and X-Forwarded-Proto count; *: whoever asks.",
            show_default="none",
        ),
    ] = None,
    storage: Storage = None,
) -> None:
    """Serve optuna-dashboard until Ctrl-C, on this machine alone unless --host says otherwise.

    On any other address it needs a password or a token, and with one it asks on this machine too;
    other users of the machine reach 127.0.0.1 as well as you do. It speaks plain HTTP, in which a
    network can read passwords: put a proxy with TLS in front, under a host name of its own (its
    paths begin at /, so it cannot live under a sub-path).

    Example: hpo dashboard --port 8080
    """
    import logging
    import signal

    from hpo.dashboard.auth import read_credentials
    from hpo.dashboard.gateway import (
        Settings,
        host_name,
    )
    from hpo.dashboard.server import (
        own_hosts,
        serve,
    )
    from hpo.storage.records import is_empty

    names = [*allowed_host, *filter(None, os.environ.get(ALLOWED_HOSTS, "").split(","))]
    settings = Settings(
        read_credentials(password_file, token_file, os.environ),
        own_hosts(host),
        frozenset(host_name(name) for name in names),
        read_only,
    )

    def ready(address: str) -> None:
        typer.echo(f"dashboard: {address}  (Ctrl-C ends)")

    with database(storage) as found:
        # On a server one may look before the first study is there.
        if found.is_sqlite and is_empty(found):
            raise NotFound(f"no studies in {found.shown}; to make one: {program()} run STUDY.toml")
        logging.basicConfig(format="%(asctime)s %(message)s")  # wrong passwords, with their time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # what ends a container
        serve(found, settings, host=host, port=port, trusted_proxy=trusted_proxy, ready=ready)
