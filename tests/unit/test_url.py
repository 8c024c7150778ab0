"""Storage URLs: what is accepted, where passwords come from, what is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from optuna.study import StudyDirection
from sqlalchemy.engine import make_url

from hpo.errors import StorageError
from hpo.paths import Home
from hpo.storage.database import connect, connect_args
from hpo.storage.optuna import FencedStorage
from hpo.storage.schema import create_schema, upgrade_schema
from hpo.storage.url import has_password, option, parse, show

SERVER = "postgresql+psycopg://me@server/hpo"


@pytest.mark.parametrize(
    ("text", "driver", "password", "database"),
    [
        ("sqlite:////data/a@b.db", "sqlite", None, "/data/a@b.db"),
        ("sqlite+pysqlite:////data/x.db", "sqlite", None, "/data/x.db"),
        ("postgres://me@server/hpo", "postgresql+psycopg", None, "hpo"),
        ("postgresql://me:secret@server/hpo", "postgresql+psycopg", "secret", "hpo"),
        ("mariadb://me:p%40s%2Fs@server:3306/hpo", "mysql+pymysql", "p@s/s", "hpo"),
        ("mysql://me:a/b?c#d:e@server/hpo", "mysql+pymysql", "a/b?c#d:e", "hpo"),
        ("mysql+pymysql://me@corp:secret@server/hpo", "mysql+pymysql", "secret", "hpo"),
        ("postgresql://me@server/hpo?password=s%40t", "postgresql+psycopg", "s@t", "hpo"),
        ("mysql://me@server/hpo?passwd=secret&charset=utf8mb4", "mysql+pymysql", "secret", "hpo"),
    ],
)
def test_what_is_accepted(text: str, driver: str, password: str | None, database: str) -> None:
    url = parse(text)
    assert (url.drivername, url.password, url.database) == (driver, password, database)
    assert not {"password", "passwd"} & set(url.query)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nonsense:secret", "is not one"),
        ("mysql://me:secret", "is not one"),  # where a port would stand
        ("sqlite://", "in memory"),
        ("oracle://me:secret@server/hpo", "no driver for 'oracle'"),
        ("postgresql+asyncpg://me:secret@server/hpo", "no driver for 'postgresql.asyncpg'"),
        ("postgresql://me:sec@ret@server/hpo", "%40"),
        ("postgresql://me:se/c@ret@server/hpo", "%40"),
        ("postgresql://me:sec@ret?x@server/hpo", "%40"),
        ("postgresql://m/e:secret@server/hpo", "%40"),
    ],
)
def test_what_is_refused_without_being_shown(text: str, says: str) -> None:
    with pytest.raises(StorageError, match=says) as caught:
        parse(text)
    for part in ("secret", "sec@", "ret@", "ret?"):
        assert part not in str(caught.value)


@pytest.mark.parametrize(("value", "told"), [("none", None), ("0", 0), ("7", 7)])
def test_when_statements_are_prepared(value: str, told: int | None) -> None:
    url = parse(f"{SERVER}?prepare_threshold={value}")
    assert connect_args(url)["prepare_threshold"] == told
    assert show(url).endswith(f"?prepare_threshold={value}")
    assert "prepare_threshold" not in connect_args(parse(SERVER))


@pytest.mark.parametrize("value", ["never", "-1", "1.5"])
def test_what_says_nothing_about_when_statements_are_prepared(value: str) -> None:
    with pytest.raises(StorageError, match=f"prepare_threshold={value} .* allowed are none"):
        parse(f"{SERVER}?prepare_threshold={value}")


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_password_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    path = tmp_path / "password"
    path.write_bytes(b" p@ss/%\xc3\xa4 " + end.encode())
    monkeypatch.setenv("HPO_STORAGE_PASSWORD_FILE", str(path))
    assert parse(SERVER).password == " p@ss/%ä "
    assert parse("mysql://me@server/hpo").password == " p@ss/%ä "
    assert parse("mysql://me:mine@server/hpo").password == "mine"
    assert parse("sqlite:///x.db").password is None


@pytest.mark.parametrize(("content", "says"), [(None, "No such file"), (b"\n", "empty"),
                                               (b"\xff", "UTF-8")])  # fmt: skip
def test_a_password_file_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, says: str
) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("HPO_STORAGE_PASSWORD_FILE", str(path))
    with pytest.raises(StorageError, match=f"HPO_STORAGE_PASSWORD_FILE={path}.*{says}"):
        parse(SERVER)


def test_what_is_shown_holds_no_secret() -> None:
    url = parse("postgresql://me:secret@server/hpo?sslmode=require&sslpassword=hidden&new=hidden")
    assert show(url) == "postgresql+psycopg://me:***@server/hpo?new=...&sslmode=require&" + (
        "sslpassword=..."
    )
    socket = "mysql+pymysql://me@/hpo?unix_socket=%2Frun%2Fmysqld.sock"
    assert show(parse(socket)) == socket


def test_a_printed_command_reaches_the_same_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Home.default().storage
    assert option(parse(usual), usual) == ""
    assert option(parse("postgres://me:secret@server/hpo"), SERVER) == " --storage URL"
    assert option(parse(SERVER), "broken:secret") == f" --storage {SERVER}"
    assert option(parse(SERVER), "postgres://me@server/hpo") == ""
    assert option(parse("sqlite:////data/my hpo.db"), usual) == (
        " --storage 'sqlite:////data/my hpo.db'"
    )
    path = tmp_path / "password"
    path.write_text("secret")
    monkeypatch.setenv("HPO_STORAGE_PASSWORD_FILE", str(path))
    assert option(parse(SERVER), usual) == f" --storage {SERVER}"


def test_whether_a_text_holds_a_password() -> None:
    assert has_password("mysql://me:secret@server/hpo")
    assert has_password("mysql://me@server/hpo?passwd=secret")
    assert not has_password(SERVER)
    assert not has_password("nonsense")
    assert make_url(SERVER).password is None


# SQLite's paths


@pytest.mark.parametrize("name", ["bar%baz.db", "100%.db", "a%20b.db", "a b.db", "%", "50%25.db",
                                  "日本.db", "a#b.db", "file.db", "a&b=c.db", "@.db"])  # fmt: skip
def test_a_path_is_the_file_that_it_names(tmp_path: Path, name: str) -> None:
    database = connect(f"sqlite:///{tmp_path / name}")
    create_schema(database)
    assert database.url.database == str(tmp_path / name)
    made = {one.name for one in tmp_path.iterdir()}
    assert name in made
    assert made <= {name, f"{name}-wal", f"{name}-shm", f"{name}.lock"}
    storage = FencedStorage(database)  # Optuna finds the same file
    storage.create_new_study([StudyDirection.MAXIMIZE], "s")
    for text in (database.shown, database.secret_url):
        again = connect(text)
        assert again.url == database.url
        assert [one.study_name for one in FencedStorage(again).get_all_studies()] == ["s"]
        again.dispose()
    assert option(database.url, f"sqlite:///{tmp_path / name}") == ""
    assert upgrade_schema(database).endswith("already")
    database.dispose()


@pytest.mark.parametrize(
    ("text", "write"),
    [
        ("hpo.db", "sqlite:///hpo.db"),
        ("./runs/hpo.db", "sqlite:///./runs/hpo.db"),
        ("../hpo.sqlite3", "sqlite:///../hpo.sqlite3"),
        ("/data/hpo.db", "sqlite:////data/hpo.db"),
        ("/data/a%b.db", "sqlite:////data/a%b.db"),
        ("sqlite:hpo.db", "sqlite:///hpo.db"),
        ("sqlite:/data/hpo.db", "sqlite:////data/hpo.db"),
        ("file:hpo.db", "sqlite:///hpo.db"),
        (r"C:\runs\hpo.db", r"sqlite:///C:\runs\hpo.db"),
        ("sqlite://hpo.db", "sqlite:///hpo.db"),
        ("sqlite://runs/hpo.db", "sqlite:///runs/hpo.db"),
        ("sqlite3:///hpo.db", "sqlite://..."),
        ("sqllite:///hpo.db", "sqlite://..."),
        ("postgresql+psycopg2://me@server/hpo", "postgresql+psycopg://..."),
        ("postgre://me@server/hpo", "postgres://..."),
        ("mysql+mysqldb://me@server/hpo", "mysql+pymysql://..."),
        ("sqlite:///file:/x/hpo.db", "sqlite:////x/hpo.db"),
        ("sqlite:///file:hpo.db?mode=ro", "sqlite:///hpo.db"),
    ],
)
def test_near_misses_are_told_what_to_write(text: str, write: str) -> None:
    with pytest.raises(StorageError) as caught:
        parse(text)
    assert f"write {write}" in str(caught.value)


def test_a_home_folder_is_a_shells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for text in ("~/hpo.db", "sqlite:///~/hpo.db"):
        with pytest.raises(StorageError, match=r"write sqlite:////home/me/hpo\.db"):
            parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (r"sqlite:///C:\x\hpo.db", "a path of Windows"),
        ("sqlite:///C:/x/hpo.db", "a path of Windows"),
        ("sqlite:////tmp/", "a folder; name a file, such as sqlite:////tmp/hpo.db"),
        ("sqlite:////tmp", "a folder"),
        ("sqlite:///hpo.db?cache=shared", "unknown option 'cache'; allowed: timeout, mode"),
        ("sqlite:///hpo.db?mode=readonly", "mode=readonly: allowed: ro, rw, rwc"),
        ("sqlite:///hpo.db?timeout=long", "seconds are needed"),
        ("sqlite:///file::memory:?uri=true", "in memory"),
        ("sqlite:///file:x?mode=memory&uri=true", "in memory"),
        ("sqlite://me:secret@server/hpo", "no host"),
        ("me:secret@server", "its text is not shown"),
        ("", "is not one"),
        ("secret", "is not one"),
        ("secret/word", "is not one"),
    ],
)
def test_what_names_no_file_here(text: str, says: str) -> None:
    with pytest.raises(StorageError, match=re.escape(says)) as caught:
        parse(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["file:", "file://", "file://localhost"])
def test_a_uri_of_sqlites(tmp_path: Path, prefix: str) -> None:
    url = parse(f"sqlite:///{prefix}{tmp_path}/a%20b.db?mode=ro&uri=true")
    assert url.database == f"{tmp_path}/a b.db"
    assert dict(url.query) == {"mode": "ro"}
