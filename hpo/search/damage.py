"""Damaged files: those that are not what was written, on this host and in artifact stores.

Everything that bears a checksum is read through, whoever works on it: a file that is replaced
meanwhile is whole before and after. What has no checksum, of an hpo before, counts as sound unless
its end is missing.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpo.checksums import find_damage, stamp_of
from hpo.engine.arrays import HEADER
from hpo.engine.cache import Index, locked
from hpo.errors import DataError, NotFound, StorageError
from hpo.paths import CHECKPOINT, WEIGHTS, Home, files_in
from hpo.search import keeping
from hpo.search import study as studies
from hpo.search.leftovers import Place, is_busy, stores
from hpo.search.study import Study
from hpo.storage import records
from hpo.storage.artifacts import open_store
from hpo.storage.db import Database
from hpo.storage.findings import SPOILED, UNREAD, Finding

CUT = "its end is missing"
UNREAD_FILE = "it cannot be read"
"""A reason that says nothing of the content: what has it is never removed."""
_ARCHIVES = (".ckpt", ".npz")


def look(database: Database, home: Home, artifacts: str | None) -> Iterator[Finding]:
    """Yield a finding for each damaged file: of the studies of `database` here and in their stores,
    in the cache, and of trained runs under `home`."""
    rows = records.list_studies(database)
    places = [Place(home)]
    for url in stores(database, artifacts):
        try:
            places.append(Place(home, open_store(url)))
        except StorageError:
            continue  # `leftovers` tells of it
    for row in rows:
        study = studies.load(database, row.name)
        for place in places:
            try:
                yield from _of_study(study, place)
            except StorageError as error:
                yield Finding(UNREAD, str(error), row.name, left="check that this host reaches it")
    yield from _of_cache(home.cache)
    yield from _of_runs(home)


def damage_of(path: Path, *, sealed: bool = False) -> str | None:
    """Say how a file differs from what was written; None where it does not, or is gone. A `sealed`
    one has a checksum, unless it lost it."""
    try:
        return find_damage(path, sealed=sealed) or _cut(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{UNREAD_FILE}: {error.strerror or error}"
    except (ValueError, KeyError, TypeError) as error:
        return f"it is not what its name says: {error}"


def _cut(path: Path) -> str | None:
    """Say whether the end of a file is missing that bears no checksum: it may have lost it."""
    if path.suffix in _ARCHIVES:
        return None if zipfile.is_zipfile(path) else CUT
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length < path.stat().st_size else None
        if header is None:
            return CUT
        ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
        return None if 8 + length + max(ends, default=0) == path.stat().st_size else CUT
    return None


# Studies


@dataclass(frozen=True)
class RemoveCheckpoint:
    """For a checkpoint that nobody works on: the trial goes back without it all the same."""

    study: Study
    place: Place
    name: str

    def __str__(self) -> str:
        return "it is removed"

    def apply(self, database: Database) -> bool:
        reason = _damage_at(self.study, self.place, self.name)
        if is_busy(self.study) or reason is None or reason.startswith(UNREAD_FILE):
            return False
        self.place.remove(self.study.uuid, [self.name])
        return True


def _of_study(study: Study, place: Place) -> Iterator[Finding]:
    for name in place.names(study.uuid):
        is_checkpoint = CHECKPOINT.fullmatch(name) is not None
        if not is_checkpoint and not WEIGHTS.fullmatch(name):
            continue
        reason = _damage_at(study, place, name)
        if reason is None:
            continue
        means = f"{place.at(study.uuid)}/{name}: {reason}"
        number = keeping.trial_of(name)
        if reason.startswith(UNREAD_FILE):
            left = "check its disk and its permissions"
            yield Finding(SPOILED, means, study.row.name, number, left=left)
            continue
        if not is_checkpoint:
            left = (
                "remove it; where the artifacts or another host have the weights they are taken "
                f"from there, else train them again (hpo export {study.row.name} --trial {number})"
            )
            yield Finding(SPOILED, means, study.row.name, number, left=left)
            continue
        means += "; a trial that needs it goes back to an earlier one, a copy, or epoch 1"
        cure = RemoveCheckpoint(study, place, name)
        yield Finding(SPOILED, means, study.row.name, number, cure=cure)


def _damage_at(study: Study, place: Place, name: str) -> str | None:
    if place.store is None:
        return damage_of(place.home.study(study.uuid).root / name)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / Path(name).name
        try:
            place.store.get(f"{study.uuid}/{name}", copy)
        except NotFound:
            return None  # removed meanwhile
        return damage_of(copy)


# Caches


@dataclass(frozen=True)
class RemoveCached:
    """For a cache: whoever needs it next makes it anew."""

    path: Path
    """The folder of decoded images, or the file."""

    def __str__(self) -> str:
        return "it is removed"

    def apply(self, database: Database) -> bool:
        with locked(self.path):
            if _damage_of_cached(self.path) is None:
                return False
            if self.path.is_dir():
                shutil.rmtree(self.path)
            else:
                self.path.unlink(missing_ok=True)
                stamp_of(self.path).unlink(missing_ok=True)
        return True


def _of_cache(cache: Path) -> Iterator[Finding]:
    entries = sorted(cache.iterdir()) if cache.is_dir() else []
    for folder in (path for path in entries if path.is_dir()):
        images = (folder / "index.npz").exists()
        for path in [folder] if images else files_in(folder):
            if path.suffix in (".lock", ".verified") or path.name.startswith("."):
                continue
            if reason := _damage_of_cached(path):
                means = f"{path}: {reason}; it is made anew when it is needed"
                kept = reason.startswith(UNREAD_FILE)
                left = "check its disk and its permissions" if kept else ""
                cure = None if kept else RemoveCached(path)
                yield Finding(SPOILED, means, cure=cure, left=left)


def _damage_of_cached(path: Path) -> str | None:
    if not path.is_dir():
        features = path.parent.name == "features"
        return damage_of(path, sealed=features) or (_short_features(path) if features else None)
    index, pixels = path / "index.npz", path / "pixels"
    try:
        size = Index.load(index).size
    except DataError as error:
        return str(error)
    except FileNotFoundError:
        return None
    if not pixels.exists():
        return None
    return damage_of(pixels, sealed=True) or (CUT if pixels.stat().st_size < size else None)


def _short_features(path: Path) -> str | None:
    """Say whether the outputs of frozen layers in a file are fewer than its header tells."""
    try:
        with path.open("rb") as file:
            shape = json.loads(file.read(HEADER))["shape"]
        return None if path.stat().st_size >= HEADER + math.prod(shape) else CUT
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return CUT


# Trained runs


def _of_runs(home: Home) -> Iterator[Finding]:
    root = home.trained("x").parent
    for path in files_in(root) if root.is_dir() else []:
        if path.name.startswith("."):
            continue
        if reason := damage_of(path):
            left = "remove it: hpo evaluate tests the weights, hpo train -o DIR makes it anew"
            yield Finding(SPOILED, f"{path}: {reason}", left=left)
