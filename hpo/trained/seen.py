"""Images that a run has seen: trained on, or used for validation, which chose the epoch."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpo.data.dataset import Data, open_data
from hpo.data.images import Images, concat
from hpo.errors import DataError, HpoError, InputError
from hpo.io import atomic_write
from hpo.trained.run import Overlap, RunDir, TrainedRun

SIZE = 16
"""Bytes of a digest."""

UNKNOWN = (
    "whether the run was trained on these images is unknown: an earlier version made it, without "
    "digests"
)


@dataclass(frozen=True)
class Digests:
    """Two digests of each of some images: of its file's content, and of its pixels at the size of
    the run. A copy under another name matches both, a lossless re-encoding the second."""

    digests: bytes = b""
    """Sorted, SIZE bytes each, without repetition."""

    @classmethod
    def of(cls, images: Images) -> Digests:
        """Collect the digests of `images`."""
        digests = {bytes.fromhex(one) for one in (*images.identities, *images.files)}
        return cls(b"".join(sorted(digests)))

    @classmethod
    def load(cls, path: Path) -> Digests:
        """Read a file. Raises InputError for a damaged one."""
        data = path.read_bytes()
        if data[:SIZE] != _checksum(data[SIZE:]):
            raise InputError(
                f"{path}: damaged; remove it, and type the same `hpo train` again to have it "
                "written anew"
            )
        return cls(data[SIZE:])

    def save(self, path: Path) -> None:
        """Write a checksum and the digests atomically. Raises DiskFull."""
        atomic_write(path, lambda file: file.write(_checksum(self.digests) + self.digests))

    def __contains__(self, digest: str) -> bool:
        """Return whether a digest of 32 hex digits is among them."""
        wanted = bytes.fromhex(digest)
        count = len(self.digests) // SIZE
        place = bisect_left(range(count), wanted, key=self._at)
        return place < count and self._at(place) == wanted

    def _at(self, place: int) -> bytes:
        return self.digests[place * SIZE : (place + 1) * SIZE]

    def marks(self, images: Images) -> list[bool]:
        """Return whether each of `images` is among them."""
        pixels = [one in self for one in images.identities]
        return [a or b in self for a, b in zip(pixels, images.files, strict=True)]


@dataclass(frozen=True)
class Seen:
    """Digests of the images that a run has seen."""

    trained: Digests
    validated: Digests | None
    """Those that chose the epoch; none where the validation images were trained on. None if
    unknown."""

    @classmethod
    def of(cls, data: Data, keep_validation: bool) -> Seen:
        """Collect the digests of the images of a run."""
        if keep_validation:
            return cls(Digests.of(data.train), Digests.of(data.val))
        return cls(Digests.of(concat(data.train, data.val)), Digests())

    def save(self, files: RunDir) -> None:
        """Write the digests into the directory of a run. Raises DiskFull."""
        self.trained.save(files.trained_on)
        if self.validated and self.validated.digests:
            self.validated.save(files.validated_on)

    def among(self, images: Images) -> Overlap:
        """Return the names of those of `images` that the run has seen."""
        trained = {i for i, mark in enumerate(self.trained.marks(images)) if mark}
        chose = enumerate(self.validated.marks(images) if self.validated is not None else [])
        validated = tuple(images.names[i] for i, mark in chose if mark and i not in trained)
        return Overlap(
            tuple(images.names[i] for i in sorted(trained)),
            validated if self.validated is not None else None,
            len(images),
        )


def seen_by(run: TrainedRun, cache: Path) -> Seen | str:
    """Return the images that a run has seen, or why that is unknown. A run of an earlier version
    lacks the digests: they are made from its data, if these are unchanged, and kept with it.

    Raises InputError for a damaged file.
    """
    files, kept = run.files, run.metadata.keep_validation
    trained = Digests.load(files.trained_on) if files.trained_on.exists() else None
    if trained is not None and (files.validated_on.exists() or not kept):
        return Seen(trained, Digests.load(files.validated_on) if kept else Digests())
    seen = _from_data(run, cache)
    if isinstance(seen, str):
        return seen if trained is None else Seen(trained, None)
    with suppress(OSError, HpoError):  # not writable: they are made again the next time
        seen.save(files)
    return seen


def _from_data(run: TrainedRun, cache: Path) -> Seen | str:
    config = run.config.data.model_copy(update={"download": False})
    try:
        data = open_data(config, cache)
    except (DataError, OSError) as error:
        return f"{UNKNOWN}, and its data cannot be read: {error}"
    if data.fingerprint != run.metadata.fingerprint:
        return f"{UNKNOWN}, and {config.title} has changed since"
    return Seen.of(data, run.metadata.keep_validation)


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=SIZE).digest()
