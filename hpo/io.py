"""Files that are written whole or not at all, with checksums; free space and full disks.

when they are read.

CRC-32 finds every flipped bit and every burst of up to 32, and any other damage but one in four
billion; zlib computes it at several GB/s, about four times as fast as BLAKE2b. ZIP archives (those
of torch and NumPy) and files that are mapped into memory bear a last line; safetensors may not, and
have it in their header. Files without one, of an hpo before, are taken as they are.

A cache is mapped by all workers of a host and may be large: it is read through once after each
start of the host and each change of the file, under the lock of its builder, and a stamp beside it
says so. What a disk does to it later is found at the next start, or by `hpo storage check --files`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Protocol, Self

import psutil

from hpo.errors import (
    DiskFull,
    InputError,
)
from hpo.formatting import file_size

MARK = b"\nhpo crc32 "
LENGTH = len(MARK) + 9
"""Bytes of the last line."""
KEY = "hpo_crc32"
"""In the metadata of safetensors."""
DIFFERS = "its checksum differs"
MISSING = "its checksum is missing"
_CHUNK = 2**24
_BLANK = "0" * 8


def last_line(crc: int) -> bytes:
    """The last line of a file whose other bytes have this CRC-32."""
    return MARK + f"{crc:08x}\n".encode()


def find_damage(
    path: Path, tick: Callable[[], None] = lambda: None, *, sealed: bool = False
) -> str | None:
    """Say how a file differs from what was written; None where it does not, or has no checksum,
    unless it is `sealed`: then it has lost one. `tick()` is called now and then. Raises OSError
    where it cannot be read."""
    if path.suffix == ".safetensors":
        return _damage_of_safetensors(path.read_bytes())
    with path.open("rb") as file:
        rest = os.fstat(file.fileno()).st_size - LENGTH
        if rest < 0:
            return MISSING if sealed else None
        file.seek(rest)
        wanted = file.read(LENGTH)
        if not wanted.startswith(MARK):
            return MISSING if sealed else None
        file.seek(0)
        crc = 0
        while rest > 0 and (data := file.read(min(rest, _CHUNK))):
            crc, rest = zlib.crc32(data, crc), rest - len(data)
            tick()
    return None if wanted == last_line(crc) else DIFFERS


def is_sound(path: Path, tick: Callable[[], None] = lambda: None) -> bool:
    """Whether a cache is as it was written; read through only where its stamp is not of this start
    of the host and this state of the file. The caller holds its lock."""
    stamp, state = stamp_of(path), _state(path)
    with suppress(OSError):
        if stamp.read_text() == state:
            return True
    if find_damage(path, tick, sealed=True) is not None:
        return False
    with suppress(OSError):  # a full disk: it is read through again
        stamp.write_text(state)
    return True


def stamp_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.verified")


def _state(path: Path) -> str:
    found = path.stat()
    times = (found.st_mtime_ns, found.st_ctime_ns)  # the latter tells of every write
    return json.dumps([psutil.boot_time(), found.st_ino, found.st_size, *times])


def with_checksum(content: bytes) -> bytes:
    """The bytes of a safetensors file that has KEY = _BLANK in its metadata, that filled in."""
    return _field(content).sub(lambda found: found[1] + _crc(content), content, count=1)


def blank() -> dict[str, str]:
    """Metadata that `with_checksum` fills in."""
    return {KEY: _BLANK}


def _field(content: bytes) -> re.Pattern[bytes]:
    return re.compile(rb'("%s":")[0-9a-f]{8}' % KEY.encode())


def _crc(content: bytes) -> bytes:
    return f"{zlib.crc32(content):08x}".encode()


def _damage_of_safetensors(content: bytes) -> str | None:
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    found = _field(header).search(header)
    if found is None:
        return None
    start, end = found.end() - 8, found.end()
    blanked = content[:start] + _BLANK.encode() + content[end:]
    return None if content[start:end] == _crc(blanked) else DIFFERS


FULL = (errno.ENOSPC, errno.EDQUOT)


class Sink(Protocol):
    """Takes the content of a file, in parts."""

    def write(self, data: bytes | memoryview, /) -> int: ...

    def flush(self) -> None: ...


class Counting:
    """A file that, once its disk is full, goes on counting: how much room the whole of it takes is
    what must be free before it is worth another try."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._crc = 0
        self.size = 0
        self.full: OSError | None = None
        """What the first write that did not fit gave."""

    def write(self, data: bytes | memoryview, /) -> int:
        rest = memoryview(data).cast("B")
        length = len(rest)
        self.size += length
        self._crc = zlib.crc32(rest, self._crc)
        with self._noted():
            while rest and self.full is None:
                rest = rest[self._file.write(rest) :]
        return length

    def flush(self) -> None:
        """Nothing is buffered here."""

    def seal(self) -> None:
        """Write the checksum of what was written as the last line."""
        self.write(last_line(self._crc))

    def sync(self) -> None:
        """To the disk; some file systems tell only now that they are full."""
        with self._noted():
            os.fsync(self._file.fileno())

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not is_full(error):
                raise
            self.full = self.full or error


def same_place(one: object, other: object) -> bool:
    """Whether two paths name the same file or folder: through `..`, links, and other mounts."""
    if not isinstance(one, str) or not isinstance(other, str):
        return one == other
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return Path(one).samefile(other)
    except OSError:  # one is not there
        return False


class Standing:
    """A folder and those `above` it as they stand now, made where they are not there. They are held
    open, so that no other folder gets the inode number of one that is removed."""

    def __init__(self, path: Path, above: Iterable[Path] = ()) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._held = {one: os.open(one, os.O_RDONLY) for one in (path, *above)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for held in self._held.values():
            os.close(held)

    def clear_remade(self) -> None:
        """Where the folder was removed or moved and stands there again, remove it with what was
        written into it; and those above, likewise, that are empty. Everything else stays."""
        remade = [path for path, held in self._held.items() if path.exists()
                  and not os.path.samestat(path.stat(), os.fstat(held))]  # fmt: skip
        for path in remade:
            if path == next(iter(self._held)):
                discard(path)
            else:
                with suppress(OSError):  # not empty: somebody else's
                    path.rmdir()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, which is made. At the end the file there is
    synced and moved to `path`, which is complete or as it was; after an error it is removed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # some file systems tell only now that they are full
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, write: Callable[[Counting], object], *, sealed: bool = False) -> None:
    """Let `write` make the file `path`, which is complete or as it was; `sealed` with a checksum as
    its last line. Where its folder is removed meanwhile it is made once more. Raises DiskFull."""
    try:
        _write(path, write, sealed=sealed)
    except FileNotFoundError:
        _write(path, write, sealed=sealed)


def _write(path: Path, write: Callable[[Counting], object], *, sealed: bool) -> None:
    size = 0
    try:
        with atomic_path(path) as temporary, FileIO(temporary, "w") as file:
            sink = Counting(file)
            write(sink)
            if sealed:
                sink.seal()
            size = sink.size
            if sink.full is not None:
                raise sink.full
    except OSError as error:
        if not is_full(error):
            raise
        raise disk_full(path, size) from error  # the temporary file is gone: its room counts


def write_text(path: Path, text: str) -> None:
    """Make the file `path` of `text`, complete or as it was. Raises InputError where it cannot be
    written, DiskFull where it does not fit."""
    try:
        atomic_write(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; choose another") from error


def discard(path: Path) -> None:
    """Remove what stands at `path`, be it a file or a folder; nothing where that is not allowed."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def is_full(error: BaseException) -> bool:
    """Whether this is what a full disk, or a quota that is used up, gives."""
    return isinstance(error, OSError) and error.errno in FULL


@contextmanager
def raising_disk_full(path: Path) -> Iterator[None]:
    """A full disk under whatever is written inside as DiskFull; `path` where it names no file."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise disk_full(Path(error.filename or path)) from error


def disk_full(path: Path, needed: int = 0) -> DiskFull:
    """The error for `path`, of `needed` bytes where that is known, with what its disk has now."""
    wanted = f", {file_size(needed)} are needed" if needed else ""
    message = (
        f"{path} does not fit: {disk_of(path)}{wanted}; free space there (or raise your quota), or "
        "use another disk (HPO_HOME, for what hpo keeps)"
    )
    return DiskFull(message, path=path, needed=needed)


def disk_of(path: Path) -> str:
    """Which disk `path` is on, or would be, and what it has now, in words."""
    there = _existing(path)
    usage = shutil.disk_usage(there)
    return (
        f"the disk mounted at {mount_of(there)} has {file_size(usage.free)} of "
        f"{file_size(usage.total)} free"
    )


def has_room(error: DiskFull) -> bool:
    """Whether the file would fit now, found out by reserving as much beside it: a quota does not
    show in what is free."""
    folder = _existing(error.path)
    if shutil.disk_usage(folder).free < max(error.needed, 1):
        return False
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(error.needed, 1))
            else:
                file.write(bytes(1))
                file.flush()
    except OSError as reason:
        if is_full(reason):
            return False
        raise
    return True


def mount_of(path: Path) -> Path:
    """Where the disk of an existing `path` is mounted."""
    resolved = path.resolve()
    return next(one for one in (resolved, *resolved.parents) if one.is_mount())


def _existing(path: Path) -> Path:
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
