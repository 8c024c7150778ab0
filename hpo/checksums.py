"""Checksums of the files that hpo writes: a CRC-32 of all before it as their last line, looked at
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

import json
import os
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

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
