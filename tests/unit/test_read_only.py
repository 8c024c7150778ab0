"""A study whose database may only be read: by a user who may write neither file nor folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa

from hpo.errors import StorageError
from hpo.search import study as studies
from hpo.storage import database as db
from hpo.storage.database import connect
from tests.harness.fakes import study_file
from tests.harness.filled import MIXED, fill

DROPPED = "-dac_override,-dac_read_search"
AS_MODES_SAY = ["setpriv", f"--inh-caps={DROPPED}", f"--bounding-set={DROPPED}"]
"""In front of a child of root, who may else write whatever the modes say."""
CALLS = """
import json, sys, traceback
from hpo.cli.main import main
codes = []
for args in json.load(sys.stdin):
    print("##", *args, file=sys.stderr)
    try:
        main(args)
    except SystemExit as end:
        codes.append(end.code)
print(json.dumps(codes), file=open("codes", "w"))
"""
READING = (
    ["list"],
    ["status", "toy", "--json"],
    ["trials", "toy", "--format", "csv"],
    ["trials", "toy", "--by", "optimizer.lr"],
    ["trial", "toy", "0"],
    ["workers", "toy", "--all"],
    ["report", "toy", "-o", "report.html"],
    ["export", "toy", "-o", "best.toml"],
    ["compare", "toy"],
    ["storage", "check"],
)
WRITING = (
    ["stop", "toy"],
    ["extend", "toy", "--trials", "99"],
    ["delete", "toy", "--yes"],
    ["worker", "toy"],
    ["storage", "upgrade"],
)


@pytest.fixture
def share() -> Iterator[Path]:
    """A folder that other users may enter, with hpo.db in it."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        (place / "share").mkdir()
        (place / "own").mkdir(mode=0o777)
        (place / "own").chmod(0o777)
        database = connect(f"sqlite:///{place / 'share' / 'hpo.db'}")
        fill(database, study_file(trials=len(MIXED)), MIXED)
        database.dispose()
        yield place
        (place / "share").chmod(0o755)


def close(share: Path) -> None:
    for file in (share / "share").iterdir():
        file.chmod(0o444)
    (share / "share").chmod(0o555)


def call(share: Path, calls: Sequence[Sequence[str]]) -> tuple[list[int], str]:
    """Exit codes and errors of `hpo` for a user who may only read, in a folder of its own."""
    before = AS_MODES_SAY if os.geteuid() == 0 else []
    if before and shutil.which("setpriv") is None:
        pytest.skip("root may write whatever the modes say, and there is no setpriv")
    found = subprocess.run(
        [*before, sys.executable, "-c", CALLS],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        cwd=share / "own",
        check=False,
        env={
            **os.environ,
            "HPO_STORAGE": f"sqlite:///{share / 'share' / 'hpo.db'}",
            "HPO_HOME": str(share / "own" / "runs"),
            "HOME": str(share / "own"),
        },
    )
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
    codes: list[int] = json.loads((share / "own" / "codes").read_text())
    return codes, found.stderr


def test_reading_needs_no_writing_and_writing_says_so(share: Path) -> None:
    close(share)
    before = {one.name: one.read_bytes() for one in (share / "share").iterdir()}
    codes, errors = call(share, [*READING, *WRITING])
    assert codes[: len(READING)] == [0] * len(READING), errors
    assert codes[len(READING) :] == [2] * len(WRITING), errors
    assert errors.count("hpo.db: may only be read here") == len(WRITING)
    assert {one.name: one.read_bytes() for one in (share / "share").iterdir()} == before
    assert (share / "own" / "report.html").exists()
    assert (share / "own" / "best.toml").exists()


def test_a_file_that_may_be_written_in_a_folder_that_may_not(share: Path) -> None:
    close(share)
    (share / "share" / "hpo.db").chmod(0o666)
    assert call(share, [["list"], ["stop", "toy"]])[0] == [0, 2]


def test_what_a_live_writer_has_not_moved_into_the_file_is_seen(share: Path) -> None:
    writer = connect(f"sqlite:///{share / 'share' / 'hpo.db'}")
    try:
        with writer.engine.connect() as held:  # it is open, so -wal and -shm stay
            held.exec_driver_sql("SELECT count(*) FROM hpo_studies")
            studies.create(writer, study_file(name="new"))
            assert (share / "share" / "hpo.db-wal").stat().st_size > 0
            close(share)
            assert call(share, [["status", "new"], ["stop", "new"]])[0] == [0, 2]
    finally:
        writer.dispose()


def test_changes_that_cannot_be_read_are_not_passed_over(share: Path) -> None:
    writer = connect(f"sqlite:///{share / 'share' / 'hpo.db'}")
    with writer.engine.connect() as held:
        held.exec_driver_sql("SELECT count(*) FROM hpo_studies")
        studies.create(writer, study_file(name="new"))
        shutil.copytree(share / "share", share / "copy")
    writer.dispose()
    (share / "copy" / "hpo.db-shm").unlink()
    shutil.rmtree(share / "share")
    (share / "copy").rename(share / "share")
    close(share)
    codes, errors = call(share, [["status", "new"]])
    assert codes == [2]
    assert "hpo.db-wal, which cannot be read without writing; copy both files" in errors


def test_a_url_may_say_that_it_is_only_read(share: Path) -> None:
    path = share / "share" / "hpo.db"
    for text in (f"sqlite:///{path}?mode=ro", f"sqlite:///file:{path}?mode=ro&uri=true",
                 f"sqlite:///{path}?immutable=1"):  # fmt: skip
        database = connect(text)
        assert database.is_read_only
        assert studies.load(database, "toy").row.name == "toy"
        with pytest.raises(StorageError, match="may only be read here"), database.write():
            pass
        with pytest.raises(StorageError, match="may only be read here"), database.alone():
            pass
        assert connect(database.secret_url).url == database.url
        with database.read() as c:
            assert c.scalar(sa.text("SELECT count(*) FROM hpo_studies")) == 1
    absent = connect(f"sqlite:///{share / 'none.db'}?mode=ro")
    with pytest.raises(StorageError, match="unable to open"), absent.read():
        pass
    assert not (share / "none.db").exists()


def test_a_network_file_system_may_be_read_where_nobody_writes(
    share: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = share / "share" / "hpo.db"

    class Mount:
        mountpoint, fstype = str(share), "nfs4"

    monkeypatch.setattr(db.psutil, "disk_partitions", lambda all: [Mount])
    with pytest.raises(StorageError, match="network file system"):
        connect(f"sqlite:///{path}")
    database = connect(f"sqlite:///{path}?mode=ro")
    assert studies.load(database, "toy").row.name == "toy"
    path.with_name("hpo.db-wal").write_bytes(b"a writer's")
    with pytest.raises(StorageError, match="network file system"):
        connect(f"sqlite:///{path}?mode=ro")
