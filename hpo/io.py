"""Atomic writes, checksums that tell damaged files when they are read, and full disks.

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
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from io import FileIO
from pathlib import Path
from typing import Protocol, Self

from hpo.errors import DiskFull, InputError
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


def short_hash(value: object) -> str:
    """Return 32 hex digits that identify any JSON-serialisable value."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def last_line(crc: int) -> bytes:
    """Return the last line of a file whose other bytes have this CRC-32."""
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
    """Return whether a cache is as it was written; it is read through only where its stamp is not
    of this start of the host and this state of the file. The caller holds its lock."""
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
    """Return the path of the stamp that says when a cache was verified."""
    return path.with_name(f"{path.name}.verified")


def _state(path: Path) -> str:
    import psutil  # most commands look at no cache

    stat = path.stat()
    times = (stat.st_mtime_ns, stat.st_ctime_ns)  # the latter changes with every write
    return json.dumps([psutil.boot_time(), stat.st_ino, stat.st_size, *times])


def with_checksum(content: bytes) -> bytes:
    """Return the bytes of a safetensors file whose metadata has KEY = _BLANK, with its checksum."""
    return _field(content).sub(lambda match: match[1] + _crc(content), content, count=1)


def blank() -> dict[str, str]:
    """Return metadata that `with_checksum` fills in."""
    return {KEY: _BLANK}


def _field(content: bytes) -> re.Pattern[bytes]:
    return re.compile(rb'("%s":")[0-9a-f]{8}' % KEY.encode())


def _crc(content: bytes) -> bytes:
    return f"{zlib.crc32(content):08x}".encode()


def _damage_of_safetensors(content: bytes) -> str | None:
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    field = _field(header).search(header)
    if field is None:
        return None
    start, end = field.end() - 8, field.end()
    blanked = content[:start] + _BLANK.encode() + content[end:]
    return None if content[start:end] == _crc(blanked) else DIFFERS


FULL = (errno.ENOSPC, errno.EDQUOT)


class Sink(Protocol):
    """Takes the content of a file, in parts."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Take the next part; return its length in bytes."""

    def flush(self) -> None:
        """Pass on what is buffered."""


class CountingFile:
    """A file that keeps counting once its disk is full: its whole size must be free before another
    try is worth it."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._crc = 0
        self.size = 0
        self.full: OSError | None = None
        """The error of the first write that did not fit."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Write what fits; return the length of `data` in bytes."""
        rest = memoryview(data).cast("B")
        length = len(rest)
        self.size += length
        self._crc = zlib.crc32(rest, self._crc)
        with self._noted():
            while rest and self.full is None:
                rest = rest[self._file.write(rest) :]
        return length

    def flush(self) -> None:
        """Do nothing: there is no buffer."""

    def seal(self) -> None:
        """Write the checksum of what was written as the last line."""
        self.write(last_line(self._crc))

    def sync(self) -> None:
        """Sync to the disk; some file systems tell only now that they are full."""
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
    """Return whether two paths name the same file or folder: through `..`, links, and other
    mounts."""
    if not isinstance(one, str) or not isinstance(other, str):
        return one == other
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return Path(one).samefile(other)
    except OSError:  # one is not there
        return False


class HeldFolders:
    """A folder, made if need be, and those `above` it. They are held open, so that no other folder
    gets the inode number of one that is removed."""

    def __init__(self, path: Path, above: Iterable[Path] = ()) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._held = {folder: os.open(folder, os.O_RDONLY) for folder in (path, *above)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)

    def remove_recreated(self) -> None:
        """Remove the folder where it was removed or moved and then made again, with what was
        written into it, and likewise those above that are empty. Everything else stays."""
        recreated = [
            path
            for path, descriptor in self._held.items()
            if path.exists() and not os.path.samestat(path.stat(), os.fstat(descriptor))
        ]
        for path in recreated:
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
    except OSError as error:
        if error.filename == str(temporary):  # which nobody knows
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(
    path: Path, write: Callable[[CountingFile], object], *, sealed: bool = False
) -> None:
    """Let `write` make the file `path`, which is complete or as it was; `sealed` with a checksum as
    its last line. Where its folder is removed meanwhile it is made once more. A device or a pipe,
    such as /dev/stdout, is written to as it is. Raises DiskFull."""
    try:
        _write(path, write, sealed=sealed)
    except FileNotFoundError:
        _write(path, write, sealed=sealed)


def _write(path: Path, write: Callable[[CountingFile], object], *, sealed: bool) -> None:
    size = 0
    try:
        with _written_at(path) as place, FileIO(place, "w") as file:
            sink = CountingFile(file)
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


def _written_at(path: Path) -> AbstractContextManager[Path]:
    """Return where `path` is written: beside it, or at it where it must not be replaced."""
    is_stream = path.exists() and not path.is_file() and not path.is_dir()
    names_stream = path.is_symlink() and path.parent == Path("/dev")  # of this process: /dev/stdout
    return nullcontext(path) if is_stream or names_stream else atomic_path(path)


def write_text(path: Path, text: str) -> None:
    """Make the file `path` of `text`, complete or as it was. Raises InputError where it cannot be
    written, DiskFull where it does not fit."""
    try:
        atomic_write(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; choose another") from error


def discard(path: Path) -> None:
    """Remove the file or folder `path`; nothing where that is not allowed."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def is_full(error: BaseException) -> bool:
    """Return whether this is the error of a full disk or of a quota that is used up."""
    return isinstance(error, OSError) and error.errno in FULL


@contextmanager
def raising_disk_full(path: Path) -> Iterator[None]:
    """Raise the OSError of a full disk as DiskFull; of `path` where the error names no file."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise disk_full(Path(error.filename or path)) from error


def disk_full(path: Path, needed: int = 0) -> DiskFull:
    """Return the error for `path`, of `needed` bytes if known, with the space that its disk has."""
    wanted = f", {file_size(needed)} are needed" if needed else ""
    message = (
        f"{path} does not fit: {disk_of(path)}{wanted}; free space there (or raise your quota), or "
        "use another disk (HPO_HOME, for what hpo keeps)"
    )
    return DiskFull(message, path=path, needed=needed)


def disk_of(path: Path) -> str:
    """Return the disk that `path` is on, or would be, and its free space, in words."""
    there = _existing(path)
    usage = shutil.disk_usage(there)
    return (
        f"the disk mounted at {mount_of(there)} has {file_size(usage.free)} of "
        f"{file_size(usage.total)} free"
    )


def has_room(error: DiskFull) -> bool:
    """Return whether the file would fit now, found out by reserving as much in its folder: a quota
    does not show in what is free."""
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
    """Return where the disk of an existing `path` is mounted."""
    resolved = path.resolve()
    return next(folder for folder in (resolved, *resolved.parents) if folder.is_mount())


def _existing(path: Path) -> Path:
    absolute = path.absolute()
    return next(place for place in (absolute, *absolute.parents) if place.exists())
