"""Creation of a study: its database, its data, what it learns from others and takes over."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from hpo.api.trained import Progress
from hpo.errors import InputError
from hpo.paths import Home

if TYPE_CHECKING:
    from hpo.config.study import StudyFile
    from hpo.data.report import DataReport
    from hpo.search import study as studies
    from hpo.search.takeover import TakeOver
    from hpo.storage.database import Database


def make_home(database: Database) -> None:
    """Make the run directory where the database is its own; other folders are the user's."""
    if _is_own(database):
        Home.default().root.mkdir(parents=True, exist_ok=True)


def _is_own(database: Database) -> bool:
    """Return whether a database is that of the run directory."""
    return database.url.database == str(Home.default().database)


def connect_to(storage: str | None) -> Database:
    """Connect to the database at the URL `storage`, by default HPO_STORAGE or that of the run
    directory."""
    from hpo.storage.database import connect

    return connect(storage or os.environ.get("HPO_STORAGE") or Home.default().storage)


class Opened(NamedTuple):
    """A study that was created or opened."""

    study: studies.Study
    is_new: bool
    replaced: bool = False
    """Whether it took the place of another one of its name, of which nothing was trained."""
    left: int = 0
    """Finished trials of the study that it took others over from without a place in its space."""


@dataclass(frozen=True)
class Learning:
    """From which studies a new one learns, and in which database they are."""

    studies: Sequence[str] | Literal["auto"] | None = None
    """None: as the study file says."""
    storage: str | None = None
    """URL; None: the new study's own database."""
    taken: str | None = None
    """A study of the new one's database whose trials it takes over."""
    force: bool = False
    """Take trials over although the code here is not that which they ran with."""


def open_study(
    found: Database,
    file: StudyFile,
    artifacts: str | None,
    learning: Learning | None = None,
    *,
    look: bool = True,
) -> Opened:
    """Create the study of `file` or open it; where another one of its name has not finished an
    epoch, and no worker is alive, that is replaced. Bad data, own modules that are not here and
    artifacts that cannot be used change nothing; without `look` images and modules are on other
    hosts, and the workers will tell."""
    from hpo.search import study as studies
    from hpo.search import sync
    from hpo.search.fingerprints import keep_report, require_modules
    from hpo.search.takeover import copy_weights
    from hpo.storage.database import require_folder
    from hpo.storage.optuna import quiet_optuna
    from hpo.storage.records import find_study

    old, learning = find_study(found, file.name), learning or Learning()
    replaced = old is not None and studies.is_replaceable(found, old, file)
    row = None if replaced else old
    take = _take_over(found, file, learning) if row is None else None
    place = sync.check(artifacts, row, found) if artifacts else None
    report = None
    if row is None and not _is_own(found):
        require_folder(found)
    if row is None and look:
        require_modules(file)
        report = check_data(file)
    make_home(found)
    source = connect_to(learning.storage) if learning.storage else None
    try:
        with quiet_optuna():
            if replaced and old is not None:
                replaced = studies.replace_unbegun(found, old, Home.default())
            study, is_new = studies.create(found, file, learning.studies, source, take=take)
    finally:
        if source is not None:
            source.dispose()
    if report:
        keep_report(found, study.uuid, report)
    if place:
        sync.keep(found, study.row, place, Home.default())
    if is_new and study.file.taken_over is not None:
        copy_weights(found, study.file.taken_over, study.uuid, Home.default())
    return Opened(study, is_new, replaced, take.left if take else 0)


def _take_over(found: Database, file: StudyFile, learning: Learning) -> TakeOver | None:
    """Return what a new study takes over, if it is to."""
    from hpo.search.takeover import take_over

    if learning.taken is None:
        return None
    if learning.studies:
        raise InputError(
            "--learn-from beside --from: trials that are taken over tell the sampler more than "
            "configurations to try first; give one of them"
        )
    return take_over(file, learning.taken, found, force=learning.force)


def fetch_weights(file: StudyFile, say: Progress) -> None:
    """Download the pretrained weights that trials of `file` start from, unless they are cached, so
    that workers need not; `say` is told. Raises DataError where they cannot be had."""
    from hpo.training.weights import fetch, weights_of_study

    fetch(weights_of_study(file), say)


def check_data(file: StudyFile) -> DataReport:
    """Look at every file of every data set in the space, test files included, and return what is
    known of the first; raises DataError, and ConfigError where they cannot measure what is
    optimized. Training and validation images are then in the cache of this host, for its workers;
    nothing else is written but downloads of torchvision's data sets."""
    from hpo.data.dataset import examine_data
    from hpo.training.metrics import asked, require_supported

    matters = {"dataset", "root", "labels", "val_fraction", "test_fraction", "split_seed",
               "limit_train", "skip_unreadable",
               "group_by", "near_duplicates", "folds", "orientation", "background", "max_pixels",
               "crop_to_box"}  # fmt: skip
    seen: dict[str, DataReport] = {}
    for config in map(file.config, file.space.corners()):
        key = config.data.model_dump_json(include=matters)
        if key not in seen:
            cache = Home.default().cache
            seen[key] = examine_data(config.data, cache, download=True, remember=False, fill=True)
        require_supported(asked(config, *file.objectives), seen[key].parts["val"])
    return next(iter(seen.values()))
