"""Digests of the images that a run was trained on, and which other images are among them."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpo.engine.images import Images
from hpo.errors import InputError
from hpo.files import write_whole

SIZE = 16
"""Bytes of a digest."""
SHOWN = 10
"""Names that a line tells of."""

UNKNOWN = (
    "whether these images were trained on is unknown: the run keeps no digests of its training "
    "images (it was made by an earlier version)"
)


@dataclass(frozen=True)
class TrainedOn:
    """Of each training image two digests: of its file's content, and of its pixels at the size of
    the run. A copy under another name has both, one stored anew without loss the second."""

    digests: bytes
    """Sorted, SIZE bytes each, without repetition."""

    @classmethod
    def of(cls, images: Images) -> TrainedOn:
        found = {bytes.fromhex(one) for one in (*images.identities, *images.files)}
        return cls(b"".join(sorted(found)))

    @classmethod
    def load(cls, path: Path) -> TrainedOn | None:
        """None where there is no file: the run is of an earlier version. Raises InputError for one
        that is not what `save` wrote."""
        if not path.exists():
            return None
        data = path.read_bytes()
        if data[:SIZE] != _checksum(data[SIZE:]):
            raise InputError(
                f"{path}: damaged; remove it, and type the same `hpo train` again to have it "
                "written anew"
            )
        return cls(data[SIZE:])

    def save(self, path: Path) -> None:
        """Complete or not there; a checksum first. Raises DiskFull."""
        write_whole(path, lambda file: file.write(_checksum(self.digests) + self.digests))

    def __contains__(self, digest: str) -> bool:
        """Whether a digest of 32 hex digits is among them."""
        wanted = bytes.fromhex(digest)
        count = len(self.digests) // SIZE
        place = bisect_left(range(count), wanted, key=self._at)
        return place < count and self._at(place) == wanted

    def _at(self, place: int) -> bytes:
        return self.digests[place * SIZE : (place + 1) * SIZE]

    def marks(self, images: Images) -> list[bool]:
        """Of each of `images`, whether it was trained on."""
        pixels = [one in self for one in images.identities]
        return [a or b in self for a, b in zip(pixels, images.files, strict=True)]

    def among(self, images: Images) -> list[str]:
        """Names of those of `images` that were trained on."""
        return [name for name, seen in zip(images.names, self.marks(images), strict=True) if seen]


def overlap_text(names: Sequence[str], images: int, what: str = "images") -> str:
    """`3 of 15 images were trained on: a.jpg, b.jpg, c.jpg`; the first SHOWN are named."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    verb = "was" if len(names) == 1 else "were"
    shown = ", ".join(names[:SHOWN])
    return f"{len(names):,} of {images:,} {what} {verb} trained on: {shown}{more}"


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=SIZE).digest()
