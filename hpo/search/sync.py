"""A study's files where other hosts reach them: trials/ of its directory, under the same names, in
its artifact store.

    <URL>/<uuid>/
    ├── study.toml       the study file; a worker that does not find it here is in the wrong place
    ├── report.html      what `hpo report` wrote last
    └── trials/...       as in `hpo.paths`
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpo.errors import Conflict, DiskFull, HpoError, InputError, NotFound, StorageError
from hpo.io import atomic_path, discard
from hpo.paths import Home, StudyDir
from hpo.storage import records
from hpo.storage.artifacts import Moved, Store, normal, nothing, open_store
from hpo.storage.database import Database
from hpo.storage.leases import Lease
from hpo.storage.records import Attempt, Epoch, StudyRow

log = logging.getLogger(__name__)

KEY = "artifacts"
"""Under which the URL stands with what a study has resolved."""
STUDY = "study.toml"
REPORT = "report.html"


@dataclass(frozen=True)
class Mirror:
    """The part of an artifact store that belongs to one study. Methods raise StorageError."""

    store: Store
    directory: StudyDir

    @property
    def url(self) -> str:
        """URL of the study's folder in the store."""
        return f"{self.store.url}/{self.directory.uuid}"

    def put(self, path: Path, name: str = "", moved: Moved = nothing) -> str:
        """Store the file `path` as `name`, by default its own within the study; returns its URL."""
        name = name or self.directory.name_of(path)
        self.store.put(path, f"{self.directory.uuid}/{name}", moved)
        return f"{self.url}/{name}"

    def get(self, path: Path, to: Path | None = None, moved: Moved = nothing) -> None:
        """Bring a file of the study to where it belongs on this host, or to the file `to`. Raises
        NotFound, DiskFull."""
        self.store.get(f"{self.directory.uuid}/{self.directory.name_of(path)}", to or path, moved)

    def remove(self, name: str) -> None:
        """Remove a file of the study."""
        self.store.remove(f"{self.directory.uuid}/{name}")

    def names(self, folder: str = "trials") -> list[str]:
        """Return the names of all files in `folder` of the study."""
        skipped = len(self.directory.uuid) + 1
        return [key[skipped:] for key in self.store.list(f"{self.directory.uuid}/{folder}")]

    def mark(self, source: str) -> None:
        """Leave the study file, by which workers know the place."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, STUDY)
            path.write_text(source, encoding="utf-8")
            self.put(path, STUDY)

    def verify(self) -> None:
        """Raise InputError unless this is where the study was begun; only warn where that cannot be
        told now."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.store.get(f"{self.directory.uuid}/{STUDY}", Path(folder, STUDY))
            except NotFound as error:
                raise InputError(
                    f"{error}: the study keeps its artifacts there; mount the folder at that path, "
                    "or give this host the same provider and account as the one that began it"
                ) from None
            except StorageError as error:
                log.warning("%s; checkpoints stay on this host until it can be reached", error)

    def clear(self) -> None:
        """Remove everything of the study."""
        keys = self.store.list(self.directory.uuid)
        for key in keys:
            self.store.remove(key)


def find(database: Database, uuid: str, home: Home) -> Mirror | None:
    """Return the mirror of a study; None where it has no artifacts. Touches the database alone."""
    url = records.read_resolved(database, uuid, KEY).get(KEY)
    return None if url is None else Mirror(open_store(str(url)), home.study(uuid))


def find_weights(database: Database, home: Home, uuid: str, last: Attempt) -> str | None:
    """Return where the weights are that a trial's `last` attempt left: a path, or a URL of the
    artifacts; None where none were kept. Raises StorageError."""
    path = home.study(uuid).weights(last.number, last.k)
    if path.exists():
        return str(path)
    mirror = find(database, uuid, home)
    name = home.study(uuid).name_of(path)
    if mirror is None or name not in mirror.names(str(Path(name).parent)):
        return None
    return f"{mirror.url}/{name}"


def fetch_weights(database: Database, home: Home, uuid: str, last: Attempt, to: Path) -> bool:
    """Copy those weights to the file `to`; False where none were kept. Raises StorageError."""
    return fetch(database, home, uuid, home.study(uuid).weights(last.number, last.k), to)


def fetch(database: Database, home: Home, uuid: str, path: Path, to: Path) -> bool:
    """Copy a file of a study, which belongs at `path`, from there or from the artifacts to the file
    `to`; False where neither has it. Raises StorageError."""
    mirror = find(database, uuid, home)
    if path.exists():
        with atomic_path(to) as temporary:
            shutil.copyfile(path, temporary)
        return True
    try:
        if mirror is not None:
            mirror.get(path, to)
    except NotFound:
        return False
    return mirror is not None


def check(url: str, row: StudyRow | None, database: Database) -> str:
    """Return `url` in its one form, after writing to it and reading from it. Raises InputError or
    StorageError where it cannot be used, Conflict where the study of `row` has another one."""
    url = normal(url)
    if row is not None:
        _refuse_another(row, url, records.read_resolved(database, row.uuid, KEY).get(KEY, url))
    open_store(url).check()
    return url


def keep(database: Database, row: StudyRow, url: str, home: Home) -> None:
    """Write down `url` (from `check`) as the place of the study's artifacts, once for all. Raises
    Conflict where it has another one."""
    _refuse_another(row, url, records.resolve_once(database, row.uuid, KEY, url))
    Mirror(open_store(url), home.study(row.uuid)).mark(row.source)


def _refuse_another(row: StudyRow, url: str, stands: str) -> None:
    if stands != url:
        raise Conflict(
            f"study {row.name!r} keeps its artifacts in {stands}, not in {url}; leave --artifacts "
            "and HPO_ARTIFACTS out to go on with it, or choose another study.name"
        )


@dataclass
class Checkpoints:
    """Those of one trial, here and in the mirror.

    A checkpoint goes to the mirror before the database points to it. Where that fails it stays on
    this host alone and the next one is tried: the database says which checkpoints there may be,
    the mirror which there are, and whoever takes the trial over goes on from the newest that it can
    get. A predecessor is removed once its successor is there and recorded.
    """

    directory: StudyDir
    mirror: Mirror | None
    lease: Lease
    pointed: Path | None = None
    """The file on this host that the database names."""
    damaged: dict[Path, str] = field(default_factory=dict)
    """Files that could not be gone on with, and why."""
    _there: set[str] = field(default_factory=set)
    """Names in the mirror."""
    _fresh: str | None = None
    """The one that was put there last, not recorded yet."""

    def path(self, epoch: int) -> Path:
        """Return the path of the checkpoint of `epoch` of this attempt."""
        return self.directory.checkpoint(self.lease.number, self.lease.k, epoch)

    def newest(
        self,
        rows: Sequence[Epoch],
        fault: Callable[[Path, Sequence[Epoch]], str | None],
        moved: Moved = nothing,
    ) -> tuple[list[Epoch], Path | None]:
        """Return the finished epochs to go on from, and their checkpoint on this host; nothing of
        both where no checkpoint can be had. `fault(path, rows)` says why a file is none of these
        epochs, or None where it is."""
        self._there = self._listed()
        for done in range(len(rows), 0, -1):
            row = rows[done - 1]
            if row.checkpoint is None:
                continue
            path = self.directory.checkpoint(self.lease.number, row.checkpoint, row.epoch)
            if path.exists() and (reason := fault(path, rows[:done])):
                self.damaged[path] = reason
            if (path.exists() and path not in self.damaged) or (
                self._fetched(path, moved) and self._is_sound(path, fault(path, rows[:done]))
            ):
                self.pointed = path
                return list(rows[:done]), path
        if rows and not self.damaged:
            place = "on another host" if self.mirror is None else f"neither here nor in {self._url}"
            log.warning(
                "trial %d: %d epochs are finished, their checkpoint is %s: it begins again",
                *(self.lease.number, len(rows), place),
            )
        return [], None

    def share(self, path: Path | None, moved: Moved = nothing) -> None:
        """Put a file of the trial into the mirror, a checkpoint before it is recorded. One that
        never was, because the database is unavailable, makes room for the next."""
        before, self._fresh = self._fresh, None
        if self.mirror is None or path is None or not self.put(path, moved):
            return
        self._fresh = self.directory.name_of(path)
        self._there.add(self._fresh)
        self._there -= removed(self.mirror, [before] if before else [])

    def put(self, path: Path, moved: Moved = nothing) -> bool:
        """Put a file of the trial into the mirror, where there is one; return whether it is
        there."""
        if self.mirror is None:
            return False
        try:
            self.mirror.put(path, moved=moved)
        except StorageError as error:
            log.warning(
                "trial %d: %s; %s is on this host alone, the next one is tried again",
                *(self.lease.number, error, path.name),
            )
            return False
        return True

    def recorded(self, path: Path | None) -> None:
        """Remove the checkpoints before `path`, to which the database now points."""
        if self.pointed is not None and self.pointed != path:
            discard(self.pointed)
        self.pointed = path
        if self._fresh is not None and self.mirror is not None:
            self._there -= removed(self.mirror, self._there - {self._fresh})
            self._fresh = None

    def _is_sound(self, path: Path, reason: str | None) -> bool:
        """Return whether what the mirror had can be gone on with."""
        if reason is not None:
            self.damaged[path] = f"{reason}; so is what {self._url} has"
        return reason is None

    @property
    def _url(self) -> str:
        return "" if self.mirror is None else self.mirror.url

    def _listed(self) -> set[str]:
        if self.mirror is None:
            return set()
        try:
            folder = self.directory.name_of(self.directory.trial(self.lease.number))
            return set(self.mirror.names(folder))
        except StorageError as error:
            log.warning("trial %d: %s", self.lease.number, error)
            return set()

    def _fetched(self, path: Path, moved: Moved) -> bool:
        """Return whether the mirror has `path`; then it is on this host, too."""
        if self.mirror is None or self.directory.name_of(path) not in self._there:
            return False
        try:
            if path.is_dir():
                discard(path)
            self.mirror.get(path, moved=moved)
        except DiskFull:
            raise
        except HpoError as error:
            log.warning("trial %d: %s", self.lease.number, error)
            return False
        log.info("trial %d: goes on from %s", self.lease.number, path.name)
        return True


def removed(mirror: Mirror, names: Iterable[str]) -> set[str]:
    """Remove files from the mirror; those that could be."""
    done = set()
    try:
        for name in names:
            mirror.remove(name)
            done.add(name)
    except StorageError as error:
        log.warning("%s; it is removed later", error)
    return done
