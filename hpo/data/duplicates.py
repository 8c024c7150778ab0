"""Near-duplicate images: a perceptual hash of each, and groups of similar hashes.

The hash is pHash: the signs of the low frequencies of a small grey image relative to their median
(Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, section 3.2.1).
Copies that were encoded again, resized, or made a little brighter differ in few of its 64 bits.
"""

from __future__ import annotations

import json
import logging
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpo.control import ProgressCallback, no_progress
from hpo.data.cache import map_threaded, try_read
from hpo.data.images import ImageReader, Numbers, Sizing, decode
from hpo.errors import DiskFull
from hpo.io import atomic_write, short_hash

log = logging.getLogger(__name__)

Hashes = NDArray[np.uint64]

SIDE, LOW = 32, 8
"""Side of the grey image in pixels; frequencies used on each axis, from the second one."""
FLAT = 2.0
"""Standard deviation, in grey levels, below which an image has no structure to compare."""
ROWS = 1024
"""Hashes compared with a bucket at once."""
_FORMAT = 1


def find_near_duplicates(
    reader: ImageReader,
    digests: dict[str, str],
    max_bits: int,
    *,
    sizing: Sizing,
    cache: Path | None,
    tick: ProgressCallback = no_progress,
) -> dict[str, str]:
    """Return {name: group} of the images in `digests` ({name: content digest}) that are
    near-duplicates: their hashes differ in at most `max_bits` bits, directly or through a chain of
    other images.

    `sizing` gives orientation and background. Hashes are remembered below `cache`. Images that are
    unreadable or flat have no near-duplicates.
    """
    hashes = image_hashes(reader, digests, sizing=sizing, cache=cache, tick=tick)
    names = [name for name, digest in digests.items() if hashes[digest] is not None]
    values = np.array([hashes[digests[name]] for name in names], np.uint64)
    labels = cluster_hashes(values, max_bits, tick)
    alone = np.bincount(labels, minlength=len(values)) == 1
    return {name: str(label) for name, label in zip(names, labels.tolist(), strict=True)
            if not alone[label]}  # fmt: skip


def image_hashes(
    reader: ImageReader,
    digests: dict[str, str],
    *,
    sizing: Sizing,
    cache: Path | None,
    tick: ProgressCallback = no_progress,
) -> dict[str, int | None]:
    """Return {content digest: hash} of the images in `digests`, {name: content digest}; None for an
    image that is unreadable or flat. Images remembered in `cache` are not decoded again."""
    names = {digest: name for name, digest in digests.items()}
    small = replace(sizing, squash=True, image_size=SIDE, resize_size=SIDE)
    memo = cache / "near" / f"{short_hash([_FORMAT, repr(small)])}.json" if cache else None
    known = _remembered(memo) if memo else {}
    new = [digest for digest in names if digest not in known]
    look = partial(try_read, _hash_of, _Drafts(reader), small)
    computed = map_threaded(look, [names[digest] for digest in new], tick, "comparing")
    fresh = {
        digest: one if isinstance(one, int) else None
        for digest, one in zip(new, computed, strict=True)
    }
    hashes = known | fresh
    if memo and fresh:
        text = json.dumps({"checksum": short_hash(hashes), "hashes": hashes})
        with suppress(DiskFull):  # they will be computed again
            atomic_write(memo, lambda file: file.write(text.encode()))
    return {digest: hashes[digest] for digest in names}


def _remembered(memo: Path) -> dict[str, int | None]:
    """Return the hashes that `image_hashes` wrote; empty if the file is damaged."""
    try:
        stored = json.loads(memo.read_bytes())
        hashes: dict[str, int | None] = stored["hashes"]
        if stored["checksum"] == short_hash(hashes):
            return hashes
    except FileNotFoundError:
        return {}
    except (ValueError, LookupError, TypeError):
        pass
    log.warning("%s is damaged; the hashes of images are computed again", memo)
    return {}


@dataclass(frozen=True)
class _Drafts:
    """A reader that decodes JPEGs at the smallest sufficient scale."""

    reader: ImageReader

    def open(self, name: str) -> Image.Image:
        """Return the image, not decoded yet."""
        image = self.reader.open(name)
        image.draft(None, (2 * SIDE, 2 * SIDE))
        return image


def _hash_of(reader: ImageReader, name: str, sizing: Sizing) -> int | None:
    grey = np.asarray(decode(reader, name, sizing).convert("L"), np.float64)
    return perceptual_hash(grey)


def perceptual_hash(grey: NDArray[np.float64]) -> int | None:
    """Return the 64-bit hash of a grey image, (32, 32) of 0..255; None if it is flat."""
    if grey.std() < FLAT:
        return None
    low = (_COSINES @ grey @ _COSINES.T).ravel()
    bits = np.packbits(low > np.median(low))
    return int.from_bytes(bits.tobytes(), "big")


def _cosines() -> NDArray[np.float64]:
    """Return rows 1 to LOW of the discrete cosine transform (type II) of SIDE values."""
    frequency, place = np.arange(1, LOW + 1)[:, None], np.arange(SIDE)
    return np.cos(math.pi * frequency * (2 * place + 1) / (2 * SIDE))


_COSINES = _cosines()


def cluster_hashes(hashes: Hashes, max_bits: int, tick: ProgressCallback = no_progress) -> Numbers:
    """Return (N,) labels, equal for `hashes` (N,) that are connected by pairs which differ in at
    most `max_bits` bits.

    Of `max_bits` + 1 bands of bits such a pair has at least one in common, so only hashes with an
    equal band are compared, each with all others at once.
    """
    different, back = np.unique(hashes, return_inverse=True)
    labels = np.arange(len(different))
    ends = [64 * i // (max_bits + 1) for i in range(max_bits + 2)]
    for start, end in pairwise(ends) if max_bits else ():
        tick()
        band = (different >> np.uint64(start)) & np.uint64(2 ** (end - start) - 1)
        order = np.argsort(band, kind="stable")
        edges = np.flatnonzero(np.diff(band[order])) + 1
        for bucket in np.split(order, edges):
            if len(bucket) > 1:
                _connect(labels, different, bucket, max_bits)
    clusters: Numbers = labels[back]
    return clusters


def _connect(labels: Numbers, hashes: Hashes, bucket: Numbers, max_bits: int) -> None:
    """Give the hashes of `bucket` (indices into `hashes`) that are near to one another the same
    label."""
    values = hashes[bucket]
    for start in range(0, len(bucket), ROWS):
        rows = values[start : start + ROWS, None]
        close = _bits(rows ^ values[None]) <= max_bits
        for row in np.flatnonzero(close.sum(1) > 1):
            joined = np.unique(labels[bucket[close[row]]])
            if len(joined) > 1:
                labels[np.isin(labels, joined)] = joined[0]


def _bits(words: Hashes) -> Hashes:
    """Count the set bits of each word by halves, quarters and so on (numpy 1 has no popcount)."""
    words = words - ((words >> np.uint64(1)) & np.uint64(0x5555555555555555))
    fours = np.uint64(0x3333333333333333)
    words = (words & fours) + ((words >> np.uint64(2)) & fours)
    words = (words + (words >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (words * np.uint64(0x0101010101010101)) >> np.uint64(56)
