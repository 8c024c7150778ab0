"""The cache of decoded images: each part of a data set becomes one file that all workers of a host
map.

    cache/
    ├── digests/<root>.json   content digests of a folder's files, by size and modification time
    ├── looks/<set>.json      format and size of each readable file, by content
    ├── <key>.lock            one builder at a time; others wait
    └── <key>/                one part (train, val or test) at one size
        ├── index.npz         sizes, pixel digests, channel sums, formats of the files, and
        │                     which cannot be read
        └── pixels            uint8, image after image (H, W, 3); absent if streamed

The key depends on the contents of the files, so a changed file makes a new part. A part that would
not fit is streamed: the same images, decoded again at every access.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import FileIO
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL
from filelock import FileLock, Timeout

from hpo.control import ProgressCallback, enter_phase, no_progress
from hpo.data.arrays import read_arrays, write_arrays
from hpo.data.images import (
    Form,
    ImageInfo,
    ImageReader,
    Images,
    MemmapImages,
    Numbers,
    Pixels,
    Sizing,
    StreamedImages,
    array_digest,
    decode_with_form,
    inspect_image,
    require_size,
    upright_size,
)
from hpo.errors import DataError, DiskFull
from hpo.io import (
    CountingFile,
    Sink,
    atomic_write,
    disk_full,
    is_sound,
    raising_disk_full,
    short_hash,
)

log = logging.getLogger(__name__)

_FORMAT = 3
_POLL_S = 1.0
_THREADS = min(8, os.cpu_count() or 1)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Index:
    """Metadata of a part, complete once every image of it was decoded."""

    good: Numbers
    """(G,): positions of the readable images."""
    sizes: Numbers
    """(G, 2): height and width after resizing."""
    moments: Numbers
    """(2, 3): sums of each channel's values 0..255, and of their squares."""
    identities: tuple[str, ...]
    """Digest of the pixels of each readable image, as `Images.identities`."""
    bad: dict[int, str]
    """Position of each unreadable file, and the reason."""
    forms: tuple[Form, ...] = ()
    """Format of the file of each readable image."""

    @property
    def size(self) -> int:
        """Size of all pixels in bytes."""
        return int(self.sizes.prod(1).sum()) * 3

    def save(self, file: Path) -> None:
        """Write the index to `file`, atomically. Raises DiskFull."""
        write_arrays(
            file,
            good=self.good,
            sizes=self.sizes,
            moments=self.moments,
            identities=np.array(self.identities, np.bytes_),
            bad=np.array(json.dumps(list(self.bad.items()))),
            forms=np.array(json.dumps(_in_runs(self.forms))),
        )

    @classmethod
    def load(cls, file: Path) -> Index:
        """Read the index that `save` wrote. Raises DataError if the file is damaged."""
        arrays = read_arrays(file, "it is rebuilt")
        bad = {int(k): str(v) for k, v in json.loads(str(arrays["bad"]))}
        identities = tuple(one.decode() for one in arrays["identities"].tolist())
        runs = json.loads(str(arrays["forms"]))
        forms = tuple(Form(*form) for form, count in runs for _ in range(count))
        return cls(arrays["good"], arrays["sizes"], arrays["moments"], identities, bad, forms)


def _in_runs(forms: Iterable[Form]) -> list[tuple[Form, int]]:
    """Run-length encode `forms`: most data sets have a single one."""
    return [(form, len(list(same))) for form, same in groupby(forms)]


def mean_std(*parts: Index) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel over all `parts`, in 0..1. The
    deviation of a constant channel is that of one grey level."""
    moments = np.sum([one.moments for one in parts], axis=0)
    first, second = moments / (sum(one.size for one in parts) / 3)
    std = np.sqrt(np.maximum(second - first**2, 1.0))
    return tuple((first / 255).tolist()), tuple((std / 255).tolist())


@dataclass(frozen=True)
class ImageCache:
    """The image cache of one host. A part of more than `limit` bytes is streamed instead. `tick` is
    called while images are decoded, or while another process does so."""

    root: Path
    limit: float
    tick: ProgressCallback = no_progress

    def has_room(self, size: int) -> bool:
        """Return whether `size` bytes are within the limit and fit on the disk."""
        return size <= self.limit and size <= shutil.disk_usage(self.root).free

    def open(
        self,
        reader: ImageReader,
        names: Sequence[str],
        labels: Sequence[int],
        digests: Sequence[str],
        sizing: Sizing,
    ) -> tuple[Images, Index]:
        """Open the readable images among `names`, building the part if necessary; `index.bad` lists
        the others.

        Raises DiskFull if not even the index fits.
        """
        folder = self.root / _key(digests, sizing)
        with raising_disk_full(folder), locked(folder, self.tick):
            index = self._ready(folder) or self._build(folder, reader, names, sizing)
            good_names = tuple(names[i] for i in index.good)
            good_labels = np.array([labels[i] for i in index.good], np.int64)
            pixels = folder / "pixels"
            if 0 < index.size <= self.limit and pixels.exists():
                images: Images = MemmapImages(pixels, index.sizes, good_labels, good_names)
            else:
                images = StreamedImages(reader, sizing, index.sizes, good_labels, good_names)
        images.content, images.identities = folder.name, index.identities
        return images, index

    def _ready(self, folder: Path) -> Index | None:
        """Return the index of a part that need not be built: its pixels exist, or there is no room
        for them."""
        if not (folder / "index.npz").exists():
            return None
        try:
            index = Index.load(folder / "index.npz")
        except DataError as error:
            log.warning("%s", error)
            return None
        pixels = folder / "pixels"
        if pixels.exists() and not (
            pixels.stat().st_size >= index.size and is_sound(pixels, self.tick)
        ):
            log.warning("%s is damaged: it is rebuilt", pixels)
            return None
        if pixels.exists() or not self.has_room(index.size):
            return index
        return None

    def _build(
        self, folder: Path, reader: ImageReader, names: Sequence[str], sizing: Sizing
    ) -> Index:
        beside = folder.with_name(f".{folder.name}")
        shutil.rmtree(beside, ignore_errors=True)  # left by a builder that was killed
        shutil.rmtree(folder, ignore_errors=True)  # one without pixels
        beside.mkdir()
        try:
            index = self._fill(beside, reader, names, sizing)
            beside.replace(folder)
        except BaseException:
            shutil.rmtree(beside)
            raise
        return index

    def _fill(
        self, folder: Path, reader: ImageReader, names: Sequence[str], sizing: Sizing
    ) -> Index:
        with warnings.catch_warnings():
            # Unusual metadata does not matter here; pool threads share this filter.
            warnings.simplefilter("ignore")
            judge = partial(try_read, _target, reader, sizing)
            headers = list(map_threaded(judge, names, self.tick, "reading sizes"))
            size = sum(w * h for w, h in (one for one in headers if not isinstance(one, str))) * 3
            todo = [i for i, one in enumerate(headers) if not isinstance(one, str)]
            bad = {i: one for i, one in enumerate(headers) if isinstance(one, str)}
            look = partial(try_read, _decoded, reader, sizing)
            decoded = map_threaded(look, [names[i] for i in todo], self.tick, "decoding")
            with FileIO(folder / "pixels", "w") as file:
                keep = CountingFile(file) if self.has_room(size) else None
                index = _collect(zip(todo, decoded, strict=True), bad, keep)
                if keep:
                    keep.seal()
                    keep.sync()
        if keep is None or keep.full:
            (folder / "pixels").unlink()
        if keep and keep.full:  # others filled it meanwhile
            log.warning("%s. Images are decoded again in every epoch", disk_full(folder, size))
        index.save(folder / "index.npz")
        return index


def _collect(
    images: Iterable[tuple[int, _Decoded | str]], bad: dict[int, str], file: Sink | None
) -> Index:
    good, sizes, identities, forms = [], [], [], []
    moments = np.zeros((2, 3), np.int64)
    for i, image in images:
        if isinstance(image, str):
            bad[i] = image
            continue
        good.append(i)
        sizes.append(image.pixels.shape[:2])
        identities.append(image.identity)
        forms.append(image.form)
        moments += image.moments
        if file:
            file.write(image.pixels.data)
    shape = np.array(sizes, np.int64).reshape(-1, 2)
    rest = dict(sorted(bad.items()))
    return Index(np.array(good, np.int64), shape, moments, tuple(identities), rest, tuple(forms))


def try_read(function: Callable[[ImageReader, str, Sizing], R], *args: Any) -> R | str:
    """Call `function` on one file and return its result, or the reason why the file cannot be
    read."""
    reader, sizing, name = args
    try:
        return function(reader, name, sizing)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything; the reason is kept and named
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return "not an image" if isinstance(error, PIL.UnidentifiedImageError) else reason


def _target(reader: ImageReader, name: str, sizing: Sizing) -> tuple[int, int]:
    """Return (width, height) after resizing, from the header alone."""
    with reader.open(name) as image:
        require_size(image, sizing)
        return sizing.target(*upright_size(image, sizing.orientation))


class _Decoded(NamedTuple):
    """A decoded image: pixels (H, W, 3), moments (2, 3), digest of the pixels, and format of its
    file."""

    pixels: Pixels
    moments: Numbers
    identity: str
    form: Form


def _decoded(reader: ImageReader, name: str, sizing: Sizing) -> _Decoded:
    image, form = decode_with_form(reader, name, sizing)
    counts = np.array(image.histogram(), np.int64).reshape(3, 256)
    values = np.arange(256)
    pixels = np.asarray(image)
    moments = np.stack([counts @ values, counts @ values**2])
    return _Decoded(pixels, moments, array_digest(pixels), form)


def map_threaded(
    function: Callable[[T], R],
    items: Collection[T],
    tick: ProgressCallback = no_progress,
    phase: str = "",
) -> Iterator[R]:
    """Map `function` over `items` in a thread pool, preserving the order; between chunks `tick` is
    called, and said how far the `phase` is. Pillow releases the GIL while it decodes."""
    rest, done = iter(items), 0
    with ThreadPoolExecutor(_THREADS) as pool:
        while chunk := list(islice(rest, 8 * _THREADS)):
            if phase:
                enter_phase(f"{phase} {done}/{len(items)}")
            tick()
            yield from pool.map(function, chunk)
            done += len(chunk)


@contextmanager
def locked(file: Path, tick: ProgressCallback = no_progress) -> Iterator[None]:
    """Hold the lock of `file`. While another process holds it, `tick` is called every second, and
    may raise to stop waiting."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{file}.lock")
    while not lock.is_locked:
        try:
            lock.acquire(timeout=_POLL_S)
        except Timeout:
            enter_phase("waiting for another process")
            tick()
    try:
        yield
    finally:
        lock.release()


def _key(digests: Sequence[str], sizing: Sizing) -> str:
    facts = [_FORMAT, PIL.__version__, sizing.squash, sizing.resize_size, sizing.max_pixels]
    return short_hash([facts, sizing.orientation, sizing.background, list(digests)])


def file_digests(
    root: Path, names: Sequence[str], cache: Path | None, tick: ProgressCallback = no_progress
) -> dict[str, str]:
    """Return {name: content digest} of files below `root`. With `cache`, a file whose size and
    modification time have not changed is not read again."""
    memo = cache / "digests" / f"{short_hash(str(root.resolve()))}.json" if cache else None
    known: dict[str, list[Any]] = _remembered(memo) if memo else {}
    stamps = {name: _stamp(root, name) for name in names}
    entries = {name: known[name] for name in names if known.get(name, [])[:2] == stamps[name]}
    new = [name for name in names if name not in entries]
    digests = map_threaded(partial(_digest, root), new, tick, "reading")
    for name, digest in zip(new, digests, strict=True):
        if digest:
            entries[name] = [*stamps[name], digest]
    if memo and entries != known:
        with suppress(DiskFull):  # they will be read again
            atomic_write(memo, lambda file: file.write(json.dumps(entries).encode()))
    # What cannot be read is named, with the reason, when it is to be decoded.
    return {name: entries[name][2] if name in entries else f"unreadable {name}" for name in names}


def inspect_images(
    reader: ImageReader,
    names: Mapping[str, str],
    max_pixels: int,
    memo: Path,
    *,
    remember: bool,
    tick: ProgressCallback = no_progress,
) -> dict[str, ImageInfo | str]:
    """Return {name: format and size, or the reason why it cannot be read}, given {name: content
    digest}.

    Readable images are looked up in the file `memo`, which is updated if `remember`.
    """
    stored = _remembered(memo)
    known = {key: ImageInfo(Form(*form), *size) for key, (form, *size) in stored.items()}
    new = [name for name, digest in names.items() if digest not in known]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unusual metadata does not matter here
        look = partial(_try_inspect, reader, max_pixels)
        inspected = dict(zip(new, map_threaded(look, new, tick, "decoding"), strict=True))
    result = {
        name: inspected[name] if name in inspected else known[at] for name, at in names.items()
    }
    seen = {at: one for name, at in names.items() if isinstance(one := result[name], ImageInfo)}
    if remember and seen != known:
        with suppress(DiskFull):  # they will be looked at again
            atomic_write(memo, lambda file: file.write(json.dumps(seen).encode()))
    return result


def _remembered(memo: Path) -> dict[str, Any]:
    """Return the content of a JSON file of this cache; empty if it is missing or damaged."""
    try:
        found: dict[str, Any] = json.loads(memo.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        log.warning("%s is damaged: files are read again", memo)
        return {}
    return found


def _try_inspect(reader: ImageReader, max_pixels: int, name: str) -> ImageInfo | str:
    return try_read(
        lambda reader, name, _: inspect_image(reader, name, max_pixels), reader, None, name
    )


def inspection_file(cache: Path, *what: object) -> Path:
    """Return the file in which `inspect_images` remembers the data set identified by `what`."""
    return cache / "looks" / f"{short_hash([_FORMAT, PIL.__version__, *what])}.json"


def _stamp(root: Path, name: str) -> list[int]:
    """Return [size, modification time in ns] of a file; two zeros if it cannot be found."""
    try:
        stat = (root / name).stat()
    except OSError:
        return [0, 0]
    return [stat.st_size, stat.st_mtime_ns]


def _digest(root: Path, name: str) -> str | None:
    """Return the content digest of a file; None if it cannot be read."""
    try:
        return content_digest(root / name)
    except OSError:
        return None


def content_digest(path: Path) -> str:
    """Return 32 hex digits of a file's content. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
