"""Damaged, orphaned and superfluous files, on this host and in artifact stores.

No file of a live search is taken for one. What is there before the database is read, and what no
row stands for afterwards, is no newcomer's; and a study that somebody works on is tidied by its
workers.

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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpo.data.arrays import HEADER
from hpo.data.cache import Index, locked
from hpo.doctor.rules import DAMAGED_FILE, ORPHAN_FILES, SURPLUS_FILES, UNREAD_ARTIFACTS, Finding
from hpo.errors import DataError, NotFound, StorageError
from hpo.formatting import file_size, plural
from hpo.io import find_damage, stamp_of
from hpo.paths import CHECKPOINT, PREDICTIONS, WEIGHTS, Home, files_in, is_uuid
from hpo.search import retention, sync
from hpo.search import study as studies
from hpo.search.status import is_alive
from hpo.search.study import Study
from hpo.search.sync import Mirror
from hpo.storage import leases, records
from hpo.storage.artifacts import Store, normal, open_store
from hpo.storage.database import Database

SHOWN = 3
"""Names of files that a finding tells."""


@dataclass(frozen=True)
class Place:
    """Where files of studies lie: in a store, or under HPO_HOME. Methods raise StorageError."""

    home: Home
    store: Store | None = None

    def at(self, uuid: str) -> str:
        """Return where a study's files are, for messages."""
        return str(self.home.study(uuid).root) if self.store is None else f"{self.store.url}/{uuid}"

    def uuids(self) -> list[str]:
        """Return the studies that have files here."""
        if self.store is None:
            return [directory.uuid for directory in self.home.studies()]
        return [name for name in self.store.folders() if is_uuid(name)]

    def names(self, uuid: str) -> list[str]:
        """Return the names of a study's files below trials/, within the study."""
        directory = self.home.study(uuid)
        if self.store is not None:
            return Mirror(self.store, directory).names()
        return [directory.name_of(path) for path in files_in(directory.trials)]

    def amount(self, uuid: str) -> str:
        """Return the number and size of a study's files, in words."""
        if self.store is not None:
            return plural(len(self.store.list(uuid)), "file")
        files, size = files_in(self.home.study(uuid).root), 0
        for path in files:
            with suppress(FileNotFoundError):  # a worker has just removed it
                size += path.stat().st_size
        return f"{plural(len(files), 'file')}, {file_size(size)}"

    def remove(self, uuid: str, names: Sequence[str]) -> None:
        """Remove files of a study."""
        directory = self.home.study(uuid)
        if self.store is not None:
            sync.removed(Mirror(self.store, directory), names)
            return
        for name in names:
            (directory.root / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class RemoveSurplus:
    """Remove surplus files of finished trials; weights stay."""

    study: Study
    place: Place

    def __str__(self) -> str:
        return "they are removed"

    def apply(self, database: Database) -> bool:
        """Apply it; see `Repair`."""
        names = surplus(self.study, self.place)
        self.place.remove(self.study.uuid, names)
        return bool(names)


def find_leftovers(database: Database, home: Home, artifacts: str | None) -> Iterator[Finding]:
    """Yield orphaned and surplus files under `home`, in all studies' stores and in `artifacts`."""
    yield from _in_place(database, Place(home))
    for url in stores(database, artifacts):
        try:
            yield from list(_in_place(database, Place(home, open_store(url))))
        except StorageError as error:
            advice = "check that this host reaches it, with the same account as the workers"
            yield Finding(UNREAD_ARTIFACTS, str(error), advice=advice)


def stores(database: Database, artifacts: str | None) -> list[str]:
    """Return the URLs of the stores of all studies, and `artifacts`, each once."""
    urls = [] if artifacts is None else [normal(artifacts)]
    for row in records.list_studies(database):
        found = records.read_resolved(database, row.uuid, sync.KEY)
        urls += [str(found[sync.KEY])] if sync.KEY in found else []
    return list(dict.fromkeys(urls))


def _in_place(database: Database, place: Place) -> Iterator[Finding]:
    files = {uuid: place.names(uuid) for uuid in place.uuids()}  # before the rows are read
    names = {row.uuid: row.name for row in records.list_studies(database)}
    for uuid, there in files.items():
        if uuid in names:
            yield from _of_study(studies.load(database, names[uuid]), place, there)
        else:
            yield _of_no_study(database, place, uuid)


def _of_no_study(database: Database, place: Place, uuid: str) -> Finding:
    """Report files of an unknown study: a fault in the database's own home alone."""
    is_own = place.store is None and database.url.database == str(place.home.database)
    message = f"{place.at(uuid)}: {place.amount(uuid)} of a study that is not in this database"
    advice = "remove it, unless another database has the study (hpo storage copy)"
    return Finding(ORPHAN_FILES, message, advice=advice, fault=is_own)


def _of_study(study: Study, place: Place, names: Sequence[str]) -> Iterator[Finding]:
    numbers = records.read_states(study.database, study.row.study_id)
    if stray := [name for name in names if retention.trial_of(name) not in numbers]:
        message = f"{_shown(stray)}: of no trial of the study, in {place.at(study.uuid)}"
        advice = "remove them, unless a copy of the study goes on with them (hpo storage copy)"
        yield Finding(ORPHAN_FILES, message, study.row.name, advice=advice)
    if over := surplus(study, place):
        message = f"{_shown(over)}: not needed any more, in {place.at(study.uuid)}"
        trials = {retention.trial_of(name) for name in over}
        number = trials.pop() if len(trials) == 1 else None
        yield Finding(
            SURPLUS_FILES, message, study.row.name, number, repair=RemoveSurplus(study, place)
        )


def surplus(study: Study, place: Place) -> list[str]:
    """Return files of finished trials that need not stay; no weights, nothing of a paused trial,
    and none while a worker is busy with the study: it applies the retention before it ends."""
    if is_busy(study):
        return []
    attempts = records.read_attempts(study.database, study.uuid)
    best = retention.best_of_all(study, attempts)
    found = retention.surplus(place.names(study.uuid), attempts, best)
    return [
        name
        for name in found
        if not WEIGHTS.fullmatch(name) and not retention.is_paused(attempts, name)
    ]


def is_busy(study: Study) -> bool:
    """Return True if a worker of the study is alive, or may be."""
    now = records.clock(study.database)
    workers = records.read_workers(study.database, study.uuid)
    lives = any(is_alive(worker, study.row, now) for worker in workers)
    return lives or bool(leases.live_leases(study.database, study.uuid))


def _shown(names: Sequence[str]) -> str:
    """Return `5 files: a, b, c, ...`."""
    some = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{plural(len(names), 'file')}: {some}"


CUT = "its end is missing"
UNREAD_FILE = "it cannot be read"
"""A reason that says nothing of the content: what has it is never removed."""
_ARCHIVES = (".ckpt", ".npz")


def find_damaged(database: Database, home: Home, artifacts: str | None) -> Iterator[Finding]:
    """Yield a finding for each damaged file: of the studies of `database` here and in their stores,
    in the cache, and of trained runs under `home`."""
    rows = records.list_studies(database)
    places = [Place(home)]
    for url in stores(database, artifacts):
        try:
            places.append(Place(home, open_store(url)))
        except StorageError:
            continue  # find_leftovers reports it
    for row in rows:
        study = studies.load(database, row.name)
        for place in places:
            try:
                yield from _damage_of_study(study, place)
            except StorageError as error:
                yield Finding(
                    UNREAD_ARTIFACTS, str(error), row.name, advice="check that this host reaches it"
                )
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
class RemoveDamaged:
    """Remove a damaged checkpoint of a study without workers, whose trial goes back anyway, or
    damaged predictions, which only a report shows."""

    study: Study
    place: Place
    name: str

    def __str__(self) -> str:
        return "it is removed"

    def apply(self, database: Database) -> bool:
        """Apply it; see `Repair`."""
        reason = _damage_at(self.study, self.place, self.name)
        if is_busy(self.study) or reason is None or reason.startswith(UNREAD_FILE):
            return False
        self.place.remove(self.study.uuid, [self.name])
        return True


def _damage_of_study(study: Study, place: Place) -> Iterator[Finding]:
    for name in place.names(study.uuid):
        is_weights = WEIGHTS.fullmatch(name) is not None
        if not is_weights and not CHECKPOINT.fullmatch(name) and not PREDICTIONS.fullmatch(name):
            continue
        reason = _damage_at(study, place, name)
        if reason is None:
            continue
        message = f"{place.at(study.uuid)}/{name}: {reason}"
        number = retention.trial_of(name)
        if reason.startswith(UNREAD_FILE):
            advice = "check its disk and its permissions"
            yield Finding(DAMAGED_FILE, message, study.row.name, number, advice=advice)
            continue
        if is_weights:
            advice = (
                "remove it; where the artifacts or another host have the weights they are taken "
                f"from there, else train them again (hpo export {study.row.name} --trial {number})"
            )
            yield Finding(DAMAGED_FILE, message, study.row.name, number, advice=advice)
            continue
        message += (
            "; the report shows no mistakes of the trial"
            if PREDICTIONS.fullmatch(name)
            else "; a trial that needs it goes back to an earlier one, a copy, or epoch 1"
        )
        repair = RemoveDamaged(study, place, name)
        yield Finding(DAMAGED_FILE, message, study.row.name, number, repair=repair)


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
    """Remove a damaged cache: it is built again when it is needed."""

    path: Path
    """The folder of decoded images, or the file."""

    def __str__(self) -> str:
        return "it is removed"

    def apply(self, database: Database) -> bool:
        """Apply it; see `Repair`."""
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
                message = f"{path}: {reason}; it is rebuilt when it is needed"
                kept = reason.startswith(UNREAD_FILE)
                advice = "check its disk and its permissions" if kept else ""
                repair = None if kept else RemoveCached(path)
                yield Finding(DAMAGED_FILE, message, repair=repair, advice=advice)


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
            advice = "remove it: hpo evaluate tests the weights, hpo train -o DIR makes it anew"
            yield Finding(DAMAGED_FILE, f"{path}: {reason}", advice=advice)
