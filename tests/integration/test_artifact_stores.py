"""What every artifact store does: folders, object stores, and what else fsspec knows."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from hpo.errors import InputError, NotFound, StorageError
from hpo.storage.artifacts import Folder, Remote, Store, normal, open_store


class Tree(LocalFileSystem):
    """Stands for a server with folders (sftp, smb, ...): a file that is being written is seen."""

    protocol = ("tree",)


fsspec.register_implementation("tree", Tree, clobber=True)


@pytest.fixture(params=["folder", "file", "tree", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store."""
    kinds: dict[str, Callable[[], str]] = {
        "folder": lambda: str(tmp_path / "store"),
        "file": lambda: f"file://{tmp_path}/store",
        "tree": lambda: f"tree://{tmp_path}/store",
        "s3": lambda: f"{request.getfixturevalue('s3')}/in/here",
    }
    return kinds[request.param]()


@pytest.fixture
def store(place: str) -> Store:
    found = open_store(place)
    found.check()
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"weights" * 1000)
    return path


def test_what_is_put_can_be_got(store: Store, file: Path, tmp_path: Path) -> None:
    store.put(file, "a/trials/1/x.ckpt")
    back = tmp_path / "new folder" / "back"
    store.get("a/trials/1/x.ckpt", back)
    assert back.read_bytes() == file.read_bytes()
    assert list(back.parent.iterdir()) == [back]


def test_a_key_is_replaced(store: Store, file: Path, tmp_path: Path) -> None:
    store.put(file, "a/x")
    file.write_bytes(b"other")
    store.put(file, "a/x")
    store.get("a/x", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"other"
    assert store.list("a") == ["a/x"]


def test_keys_of_a_folder_are_listed(store: Store, file: Path) -> None:
    for key in ("a/b/2", "a/b/1", "a/c", "ab/d"):
        store.put(file, key)
    assert store.list("a") == ["a/b/1", "a/b/2", "a/c"]
    assert store.list("a/b") == ["a/b/1", "a/b/2"]
    assert store.list("nothing") == []


def test_what_is_removed_is_gone(store: Store, file: Path, tmp_path: Path) -> None:
    for key in ("a/b/1", "a/b/2"):
        store.put(file, key)
    assert store.list("a/b") == ["a/b/1", "a/b/2"]
    store.remove("a/b/1")
    store.remove("a/b/1")
    assert store.list("a/b") == ["a/b/2"]  # not what was listed before
    with pytest.raises(NotFound, match="a/b/1 is not there"):
        store.get("a/b/1", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_somebody_is_told_while_a_file_moves(store: Store, file: Path) -> None:
    moved: list[int] = []
    store.put(file, "a/x", lambda: moved.append(1))
    assert moved


@pytest.mark.parametrize(
    "key", ["../x", "a/../../x", "/etc/x", "a//x", "a/./x", "", "a\\..\\x", "a/\n", "\x00"]
)
def test_a_key_never_leads_out(store: Store, file: Path, key: str, tmp_path: Path) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: store.put(file, key),
        lambda: store.get(key, tmp_path / "back"),
        lambda: store.remove(key),
        lambda: store.list(key),
    ]
    for call in calls:
        with pytest.raises(StorageError, match="is no name of an artifact"):
            call()


def test_half_a_file_is_never_seen(
    store: Store, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several write the same key, others read it: whatever is read is whole."""
    contents = [bytes([one]) * 3_000_000 for one in range(3)]
    folder = file.parent
    for one, content in enumerate(contents):
        (folder / f"{one}").write_bytes(content)
    store.put(folder / "0", "a/x")
    done = threading.Event()

    def write(one: int) -> None:
        while not done.is_set():
            store.put(folder / f"{one}", "a/x")

    writers = [threading.Thread(target=write, args=(one,)) for one in range(3)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(10):
            store.get("a/x", folder / "back")
            assert (folder / "back").read_bytes() in contents
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert store.list("a") == ["a/x"]


class TestFolders:
    def test_a_folder_is_made_one_level_deep_by_the_check_alone(
        self, tmp_path: Path, file: Path
    ) -> None:
        store = open_store(str(tmp_path / "store"))
        with pytest.raises(StorageError, match="no such folder on this host"):
            store.put(file, "a/x")
        store.check()
        store.put(file, "a/x")
        with pytest.raises(StorageError, match="typo is not there"):
            open_store(str(tmp_path / "typo" / "store")).check()
        assert not (tmp_path / "typo").exists()

    def test_a_failed_write_leaves_nothing(
        self, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = open_store(str(tmp_path / "store"))
        store.check()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("hpo.storage.artifacts.os.fsync", full)
        with pytest.raises(StorageError, match="a/x cannot be written: No space left on device"):
            store.put(file, "a/x")
        assert store.list("a") == []

    def test_empty_folders_go_with_their_last_file(self, tmp_path: Path, file: Path) -> None:
        store = open_store(str(tmp_path / "store"))
        store.check()
        for key in ("a/b/c/1", "a/2"):
            store.put(file, key)
        store.remove("a/b/c/1")
        assert [path.name for path in (tmp_path / "store").rglob("*")] == ["a", "2"]
        store.remove("a/2")
        assert list((tmp_path / "store").iterdir()) == []


class TestUrls:
    def test_forms(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert normal("shared/../store/") == f"{tmp_path}/store"
        assert normal("file:///mnt/store/") == "/mnt/store"
        assert normal("s3://bucket/folder/") == "s3://bucket/folder"
        assert normal("abfs://box@account.dfs.core.windows.net/x").startswith("abfs://box@")
        assert normal("sftp://me@host:22/x") == "sftp://me@host:22/x"
        assert isinstance(open_store("x"), Folder)
        assert isinstance(open_store("tree://x"), Remote)

    @pytest.mark.parametrize(
        "url",
        [
            "s3://AKIA:topsecret@bucket/x",
            "s3://AKIA:topsecret",
            "s3://AKIA:top/secret@bucket/x",
            "s3://AKIA:1/topsecret@bucket/x",
            "sftp://me:topsecret@host/x",
            "sftp://me:top@secret@host/x",
            "s3://bucket/x?token=topsecret",
            "gs://bucket/x#topsecret",
            "sftp://me:topsecret@[::1/x",
        ],
    )
    def test_a_secret_is_refused_and_not_shown(self, url: str) -> None:
        with pytest.raises(InputError) as caught:
            open_store(url)
        assert "secret" not in str(caught.value)
        assert "its text is not shown" in str(caught.value)

    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("", "give a folder or a URL"),
            ("a\nb", "give a folder or a URL"),
            ("s3://", "give a folder or a URL"),
            ("zip::s3://bucket/x", "give a folder or a URL"),
            ("file://host/x", "three slashes"),
            ("memory://x", "the memory of one process"),
            ("nonsense://x", "Protocol not known"),
        ],
    )
    def test_what_is_no_url(self, url: str, expected: str) -> None:
        with pytest.raises(InputError, match=expected):
            open_store(url)

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "s3fs", None)
        known = sys.modules["fsspec.registry"]._registry
        monkeypatch.delitem(known, "s3", raising=False)
        with pytest.raises(InputError, match=r"needs a package: .*install .*\[s3\]'"):
            open_store("s3://bucket/x")
        with pytest.raises(InputError, match="gcsfs"):
            open_store("gs://bucket/x")


class TestS3:
    def test_a_bucket_that_is_not_there_is_told_and_not_made(self, s3: str, file: Path) -> None:
        other = f"{s3}-typo"
        with pytest.raises(StorageError, match=r"artifacts s3://.*-typo.* cannot be written"):
            open_store(other).check()
        with pytest.raises(StorageError):
            open_store(other).check()  # still not

    def test_what_another_host_has_put_is_listed(self, s3: str, file: Path) -> None:
        import boto3

        store = open_store(f"{s3}/in")
        store.put(file, "a/1")
        assert store.list("a") == ["a/1"]
        boto3.client("s3").put_object(Bucket=s3.removeprefix("s3://"), Key="in/a/2", Body=b"")
        assert store.list("a") == ["a/1", "a/2"]

    @pytest.mark.slow
    def test_a_store_that_cannot_be_reached(
        self, monkeypatch: pytest.MonkeyPatch, file: Path
    ) -> None:
        pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
        with pytest.raises(StorageError, match="cannot be written") as caught:
            open_store("s3://unreachable/x").put(file, "a/x")
        assert "topsecret" not in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_without_credentials(
        self, s3: str, monkeypatch: pytest.MonkeyPatch, file: Path, tmp_path: Path
    ) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(StorageError, match="credentials"):
            open_store(f"{s3}/no-credentials").put(file, "a/x")
