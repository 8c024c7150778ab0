"""A password of the storage is never printed: every command, every kind of URL."""

from __future__ import annotations

import inspect
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from typer.main import get_command

from hpo.cli import main as entry
from hpo.errors import InputError, StorageUnavailable
from hpo.storage.database import Database, connect
from tests.harness.fakes import study_file
from tests.harness.filled import MIXED, fill
from tests.harness.secrets import SECRET, traces_in, traces_in_files
from tests.harness.servers import with_login

ARGUMENTS: dict[str, list[str]] = {
    "STUDY": ["toy"],
    "STUDY|RUN...": ["toy"],
    "STUDY.toml": ["toy.toml"],
    "STUDY.toml|DATA": ["toy.toml"],
    "N": ["0"],
    "KEY=VALUE...": ["optimizer.lr=0.05"],
}
"""What stands for an argument, by its metavar."""

OPTIONS = {
    "run": ["--device", "cpu", "--workers", "1"],
    "worker": ["--device", "cpu"],
    "launch": ["--on", "slurm", "--dry-run"],  # starts nothing
    "compare": ["--device", "cpu"],
    "extend": ["--trials", "+0"],
    "report": ["-o", "report.html"],
    "delete": [],  # without --yes: the study is for all commands
}


def commands() -> dict[str, Any]:
    """Every command that takes a storage, by what is typed for it."""
    found: dict[str, Any] = {}

    def walk(group: Any, path: tuple[str, ...]) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, (*path, name))
            elif not command.hidden and any(_takes_storage(one) for one in command.params):
                found[" ".join((*path, name))] = command

    walk(get_command(entry.app), ())
    del found["mcp"]  # speaks a protocol on standard streams: test_mcp.py
    return found


def _takes_storage(param: Any) -> bool:
    return "HPO_STORAGE" in (param.envvar or ()) or param.metavar in ("SRC", "DST")


COMMANDS = commands()


def typed(name: str, url: str, *, in_argv: bool) -> list[str]:
    """The command with everything that it needs."""
    args = name.split()
    for param in COMMANDS[name].params:
        if param.metavar in ("SRC", "DST"):
            args.append(url)
        elif param.param_type_name == "argument":
            args += ARGUMENTS[param.metavar]  # a new kind of argument: say above what to give
        elif in_argv and "HPO_STORAGE" in (param.envvar or ()):
            args += ["--storage", url]
    return args + OPTIONS.get(name, [])


def test_the_commands_are_found() -> None:
    assert {"run", "worker", "list", "status", "delete", "dashboard"} <= set(COMMANDS)


@pytest.fixture(params=["postgresql", "mysql"])
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def login(kind: str, url: str, request: pytest.FixtureRequest) -> sa.URL:
    """A real server's URL for a user whose password is SECRET; without it."""
    if kind == "mysql":
        found: sa.URL = request.getfixturevalue("mariadb").with_login(url, "eve", SECRET)
        return found
    return with_login(request.getfixturevalue("postgres"), url, "eve", SECRET)


@pytest.fixture
def urls(login: sa.URL, kind: str, request: pytest.FixtureRequest) -> dict[str, str]:
    """Six URLs with SECRET in them, and what a command that meets them says."""
    scheme = login.drivername
    escaped = quote(SECRET, safe="")
    name = {"postgresql": "password", "mysql": "passwd"}[kind]
    if kind == "mysql":
        other = request.getfixturevalue("mariadb").with_login(str(login), "bob", "another")
    else:
        other = with_login(request.getfixturevalue("postgres"), str(login), "bob", "another")
    return {
        "unescaped": f"{scheme}://eve:{SECRET}@127.0.0.1:1/hpo",
        "escaped": login.set(password=SECRET).render_as_string(hide_password=False),
        "query": login.update_query_dict({name: SECRET}).render_as_string(hide_password=False),
        "dead": f"{scheme}://eve:{escaped}@127.0.0.1:1/hpo",
        "driver": f"oracle+nosuch://eve:{escaped}@127.0.0.1:1/hpo",
        "wrong": other.set(password=SECRET).render_as_string(hide_password=False),
    }


SAYS = {
    "unescaped": "%40",
    "escaped": None,
    "query": None,
    "dead": "refused",
    "driver": "no driver for 'oracle+nosuch'",
    "wrong": "bob",
}
"""What a command says that is given such a URL; None: it works."""
AWAY = StorageUnavailable.exit_code


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a study file."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["hpo"])
    return folder


@pytest.fixture
def taken_port() -> Iterator[int]:
    """`hpo dashboard` ends at once that asks for it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        found.listen()
        yield found.getsockname()[1]


@pytest.mark.parametrize(
    ("kind", "in_argv"), [("postgresql", False), ("postgresql", True), ("mysql", False)]
)
def test_no_command_prints_a_password(
    urls: dict[str, str],
    work: Path,
    taken_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    in_argv: bool,
) -> None:
    database = connect(urls["escaped"])
    file = study_file(trials=len(MIXED))
    fill(database, file, MIXED)
    database.dispose()
    (work / "toy.toml").write_text(file.text)
    monkeypatch.setitem(OPTIONS, "dashboard", ["--port", str(taken_port)])
    wrong = {}
    for kind_of_url, url in urls.items():
        monkeypatch.setenv("HPO_STORAGE", "" if in_argv else url)
        for name in COMMANDS:
            capfd.readouterr()
            with pytest.raises(SystemExit) as end:
                entry.main(typed(name, url, in_argv=in_argv))
            said = "".join(capfd.readouterr())
            says = SAYS[kind_of_url]
            if name == "manifest" and kind_of_url == "dead":
                says = "the pod itself"  # it tells that before it asks the database anything
            code = AWAY if says == SAYS["dead"] else InputError.exit_code
            assert says is None or (end.value.code, says in said) == (code, True), (name, said)
            assert says is not None or "Traceback" not in said, (name, said)
            if in_argv and kind_of_url != "driver":
                given = 2 if name == "storage copy" else 1
                assert said.count("warning: every user of this machine") == given, (name, said)
            if traces_in(said):
                wrong[kind_of_url, name] = said
    assert not wrong
    assert not traces_in_files(tmp_path)


def test_an_internal_error_that_quotes_the_url_is_redacted(
    urls: dict[str, str],
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fails(self: Database) -> None:
        raise RuntimeError(f"{self.secret_url} {self.url.password!r} {vars(self)}")

    (work / "toy.toml").write_text(study_file().text)
    monkeypatch.setattr(Database, "read", fails)
    for url in (urls["escaped"], urls["query"], urls["dead"]):
        monkeypatch.setenv("HPO_STORAGE", url)
        for name in COMMANDS:
            capfd.readouterr()
            with pytest.raises(SystemExit) as end:
                entry.main(typed(name, url, in_argv=False))
            said = "".join(capfd.readouterr())
            if name == "manifest":  # to a pod our host is another: refused, before anything is read
                assert "the pod itself" in said
            else:
                assert end.value.code == 1, (name, said)
                assert "RuntimeError" in said, (name, said)
            assert not traces_in(said), (name, said)


def test_no_traceback_shows_local_variables() -> None:
    assert entry.app.pretty_exceptions_enable is False
    assert "pretty_exceptions_enable=False" in inspect.getsource(entry)
