"""Files that lie about, on this host and in artifact stores: of no study, of no trial, or of trials
that are over.

No file of a live search is taken for one. What is there before the database is read, and what no
row stands for afterwards, is no newcomer's; and a study that somebody works on is tidied by its
workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from hpo.errors import StorageError
from hpo.files import size_text
from hpo.paths import WEIGHTS, Home, files_in, is_uuid
from hpo.search import keeping, mirror
from hpo.search import study as studies
from hpo.search.mirror import Mirror
from hpo.search.status import is_alive
from hpo.search.study import Study
from hpo.storage import leases, records
from hpo.storage.artifacts import Store, normal, open_store
from hpo.storage.db import Database
from hpo.storage.findings import STRAY, SURPLUS, UNREAD, Finding, many

SHOWN = 3
"""Names of files that a finding tells."""


@dataclass(frozen=True)
class Place:
    """Where files of studies lie: in a store, or under HPO_HOME. Methods raise StorageError."""

    home: Home
    store: Store | None = None

    def at(self, uuid: str) -> str:
        """Where a study's files are, for people."""
        return str(self.home.study(uuid).root) if self.store is None else f"{self.store.url}/{uuid}"

    def uuids(self) -> list[str]:
        """Of all studies that have files here."""
        if self.store is None:
            return [directory.uuid for directory in self.home.studies()]
        return [name for name in self.store.folders() if is_uuid(name)]

    def names(self, uuid: str) -> list[str]:
        """Of a study's files below trials/, within the study."""
        directory = self.home.study(uuid)
        if self.store is not None:
            return Mirror(self.store, directory).names()
        return [directory.name_of(path) for path in files_in(directory.trials)]

    def amount(self, uuid: str) -> str:
        """How much there is of a study, in words."""
        if self.store is not None:
            return many(len(self.store.list(uuid)), "file")
        files, size = files_in(self.home.study(uuid).root), 0
        for path in files:
            with suppress(FileNotFoundError):  # a worker has just removed it
                size += path.stat().st_size
        return f"{many(len(files), 'file')}, {size_text(size)}"

    def remove(self, uuid: str, names: Sequence[str]) -> None:
        directory = self.home.study(uuid)
        if self.store is not None:
            mirror.removed(Mirror(self.store, directory), names)
            return
        for name in names:
            (directory.root / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class RemoveSurplus:
    """For files of trials that are over; weights stay."""

    study: Study
    place: Place

    def __str__(self) -> str:
        return "they are removed"

    def apply(self, database: Database) -> bool:
        names = surplus(self.study, self.place)
        self.place.remove(self.study.uuid, names)
        return bool(names)


def look(database: Database, home: Home, artifacts: str | None) -> Iterator[Finding]:
    """What lies about under `home`, and in the stores of all studies and `artifacts`."""
    yield from _in_place(database, Place(home))
    for url in stores(database, artifacts):
        try:
            yield from list(_in_place(database, Place(home, open_store(url))))
        except StorageError as error:
            left = "check that this host reaches it, with the same account as the workers"
            yield Finding(UNREAD, str(error), left=left)


def stores(database: Database, artifacts: str | None) -> list[str]:
    """Return the URLs of the stores of all studies, and `artifacts`, each once."""
    urls = [] if artifacts is None else [normal(artifacts)]
    for row in records.list_studies(database):
        found = records.read_resolved(database, row.uuid, mirror.KEY)
        urls += [str(found[mirror.KEY])] if mirror.KEY in found else []
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
    """A fault only beside its own database: other places may be shared."""
    is_own = place.store is None and database.url.database == str(place.home.database)
    means = f"{place.at(uuid)}: {place.amount(uuid)} of a study that is not in this database"
    left = "remove it, unless another database has the study (hpo storage copy)"
    return Finding(STRAY, means, left=left, fault=is_own)


def _of_study(study: Study, place: Place, names: Sequence[str]) -> Iterator[Finding]:
    numbers = records.read_states(study.database, study.row.study_id)
    if stray := [name for name in names if keeping.trial_of(name) not in numbers]:
        means = f"{_shown(stray)}: of no trial of the study, in {place.at(study.uuid)}"
        left = "remove them, unless a copy of the study goes on with them (hpo storage copy)"
        yield Finding(STRAY, means, study.row.name, left=left)
    if over := surplus(study, place):
        means = f"{_shown(over)}: not needed any more, in {place.at(study.uuid)}"
        trials = {keeping.trial_of(name) for name in over}
        number = trials.pop() if len(trials) == 1 else None
        yield Finding(SURPLUS, means, study.row.name, number, cure=RemoveSurplus(study, place))


def surplus(study: Study, place: Place) -> list[str]:
    """Files of trials that are over and need not stay; no weights, and none while somebody works
    on the study, who tidies up before signing off."""
    if is_busy(study):
        return []
    attempts = records.read_attempts(study.database, study.uuid)
    best = keeping.best_of_all(study, attempts)
    found = keeping.surplus(place.names(study.uuid), attempts, best)
    return [name for name in found if not WEIGHTS.fullmatch(name)]


def is_busy(study: Study) -> bool:
    """Whether a worker lives, or may."""
    now = records.clock(study.database)
    workers = records.read_workers(study.database, study.uuid)
    lives = any(is_alive(worker, study.row, now) for worker in workers)
    return lives or bool(leases.live_leases(study.database, study.uuid))


def _shown(names: Sequence[str]) -> str:
    """`5 files: a, b, c, ...`."""
    some = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{many(len(names), 'file')}: {some}"
