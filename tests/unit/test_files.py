"""What is written whole or not at all, and full disks."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.errors import DiskFull
from hpo.io import CountingFile, HeldFolders, atomic_write, disk_full, has_room, raising_disk_full


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"

    def write(file: object) -> None:
        file.write(b"one")  # type: ignore[attr-defined]
        assert not path.exists()
        file.write(memoryview(b" two"))  # type: ignore[attr-defined]

    atomic_write(path, write)
    assert path.read_bytes() == b"one two"
    assert list(path.parent.iterdir()) == [path]


def test_the_whole_size_is_told_of_what_does_not_fit(
    tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    small_files(10)
    with pytest.raises(DiskFull) as caught:
        atomic_write(path, lambda file: [file.write(b"x" * 400_000) for _ in range(3)])
    assert (caught.value.path, caught.value.needed) == (path, 1_200_000)
    told = str(caught.value)
    mount = next(one for one in path.parents if one.is_mount())
    assert told.startswith(f"{path} does not fit: the disk mounted at {mount} has ")
    assert "free, 1.2 MB are needed; free space there" in told
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_other_faults_are_what_they_are(tmp_path: Path) -> None:
    def broken(_file: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        atomic_write(tmp_path / "file", broken)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_whatever_finds_the_disk_full_says_so(tmp_path: Path, code: int) -> None:
    with pytest.raises(DiskFull, match=f"{tmp_path}/a does not fit"), raising_disk_full(tmp_path):
        raise OSError(code, os.strerror(code), str(tmp_path / "a"))
    with pytest.raises(DiskFull, match=f"{tmp_path} does not fit"), raising_disk_full(tmp_path):
        raise OSError(code, os.strerror(code))


def test_room_is_looked_for_where_the_file_was_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = disk_full(tmp_path / "not" / "there" / "file", 1000)
    assert has_room(error)
    assert list(tmp_path.iterdir()) == []
    usage = shutil.disk_usage(tmp_path)
    assert not has_room(disk_full(tmp_path / "file", usage.total + 1))

    def used_up(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", used_up, raising=False)
    assert not has_room(error)


def test_a_folder_that_was_made_again_is_cleared_and_what_others_made_stays(tmp_path: Path) -> None:
    study, other = tmp_path / "runs" / "studies" / "old", tmp_path / "runs" / "studies" / "new"
    with HeldFolders(study, study.parents[:2]) as standing:
        (study / "kept").touch()
        standing.remove_recreated()
        assert (study / "kept").exists()  # it is the one that stood

        shutil.rmtree(study.parents[1])
        standing.remove_recreated()
        assert not study.parents[1].exists()

        study.mkdir(parents=True)
        (study / "late").touch()
        standing.remove_recreated()
        assert not study.parents[1].exists()

        study.mkdir(parents=True)
        other.mkdir()
        standing.remove_recreated()
        assert not study.exists()
        assert other.exists()


def test_a_file_whose_folder_is_removed_while_it_is_written_is_written_again(
    tmp_path: Path,
) -> None:
    path, tries = tmp_path / "study" / "epoch-1.ckpt", []

    def write(file: CountingFile) -> None:
        tries.append(1)
        file.write(b"content")
        if len(tries) == 1:
            shutil.rmtree(path.parent)

    atomic_write(path, write)
    assert path.read_bytes() == b"content"
    assert [one.name for one in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["pipe", "link"])
def test_what_is_no_file_is_written_to_and_stays(tmp_path: Path, name: str) -> None:
    """/dev/stdout is such a link; put in its place, a file would be the output of all programs."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        atomic_write(tmp_path / name, lambda file: file.write(b"page"))
        assert os.read(reader, 100) == b"page"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert (tmp_path / "link").is_symlink()


def test_an_error_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        atomic_write(tmp_path, lambda file: file.write(b"page"))
    assert caught.value.filename == str(tmp_path)
