"""A study in the database: create, load, extend, stop, enqueue, delete."""

from __future__ import annotations

import json
import math
import shutil
import uuid as uuids
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import optuna

from hpo.config.recommended import recommend
from hpo.config.study import Proposal, StudyFile, difference
from hpo.errors import (
    ConfigError,
    Conflict,
    InputError,
    LimitsRaised,
    NotFound,
    StorageError,
)
from hpo.formatting import exact_duration, parse_duration, plural
from hpo.paths import Home, StudyDir
from hpo.search import scheduling, sync
from hpo.search.promotion import study_note, where_rungs_are
from hpo.search.sampling import make_pruner
from hpo.search.scheduling import option
from hpo.search.status import file_of, find_verification
from hpo.search.takeover import NOTHING, TakeOver
from hpo.search.warm_start import LearnFrom, learn
from hpo.storage import leases, records
from hpo.storage.database import Database
from hpo.storage.optuna import (
    FencedStorage,
    cached,
    change_note,
    find_optuna_study,
    keep_note,
)
from hpo.storage.records import StudyRow
from hpo.storage.schema import create_schema
from hpo.storage.snapshot import (
    StudySnapshot,
    read_definition,
    read_snapshot,
    read_spending,
)
from hpo.storage.studies import delete_unbegun, extend_study, has_begun, insert_study
from hpo.storage.tables import OPEN_ENDED


@dataclass(frozen=True)
class Study:
    """One study of a database: its row, its study file, and Optuna's view of it."""

    database: Database
    row: StudyRow
    file: StudyFile

    @property
    def uuid(self) -> str:
        """Its uuid."""
        return self.row.uuid

    @property
    def maximize(self) -> bool:
        """True if the first objective is maximized."""
        return self.file.direction == "maximize"

    def directory(self, home: Home) -> StudyDir:
        """Return its directory on this host."""
        return home.study(self.uuid)

    def snapshot(self, *, whole: bool = False) -> StudySnapshot:
        """Read the snapshot that decisions are made from; `whole`: with what is spent also where
        nothing limits it."""
        epochs = self.file.max_epochs
        return read_snapshot(
            self.database, self.uuid, maximize=self.maximize, max_epochs=epochs, whole=whole
        )

    def rule(self, snapshot: StudySnapshot) -> str | None:
        """Return the stop rule that has fired; record it if this caller saw it first."""
        if snapshot.stop == "rule":
            return snapshot.stop_reason or "a stop rule fired"
        if snapshot.stop is not None:
            return None
        fired = scheduling.stop_rule(
            snapshot, maximize=self.maximize, max_failures=self.file.study.max_failures
        )
        return None if fired is None or self.is_outdated() else self._stop(fired)

    def spent(self) -> str | None:
        """Return which budget of time or epochs is spent, in words, and record that it stops the
        study; None while something is left. Cheaper than a snapshot: asked after each epoch."""
        spending = read_spending(self.database, self.uuid, max_epochs=self.file.max_epochs)
        fired = scheduling.spent_budget(spending)
        return None if fired is None else self._stop(fired)

    def _stop(self, fired: scheduling.StopRule) -> str:
        records.stop_study(self.database, self.uuid, "rule", fired.reason)
        return fired.reason

    def is_outdated(self) -> bool:
        """Return whether the study has more epochs since this was read."""
        now = read_definition(self.database, self.uuid)["train"]
        return bool(now != self.row.definition["train"])

    def optuna_study(self, storage: FencedStorage) -> optuna.Study:
        """Return Optuna's study with this study's pruner, over `storage`. Raises NotFound where it
        was deleted."""
        try:
            return optuna.load_study(
                study_name=self.row.name, storage=cached(storage), pruner=make_pruner(self.file)
            )
        except KeyError:
            raise NotFound("the study was deleted") from None


def load(database: Database, name: str) -> Study:
    """Return a study by name; raise NotFound naming the nearest studies."""
    row = records.get_study(database, name)
    return Study(database, row, file_of(row))


def create(
    database: Database,
    file: StudyFile,
    learn_from: LearnFrom | None = None,
    learn_storage: Database | None = None,
    *,
    trials: int | None = None,
    take: TakeOver | None = None,
) -> tuple[Study, bool]:
    """Create the study of `file` if it is new, with what it tries first: configurations learned
    from studies of `learn_storage`, by default of `database` (`learn_from`, by default as the file
    says), and recommended ones; none of these with the trials of an earlier study (`take`). Return
    it, and whether it was new. `trials` is its budget to begin with, where that is not the file's.

    Raises Conflict, showing the difference, where a study of that name has another definition, and
    NotFound or InputError where nothing can be learned or taken over from a study that is named.
    Safe to call from many processes at once, and after a crash at any point of itself.
    """
    create_schema(database)
    row = records.find_study(database, file.name)
    if row is not None:
        if (conflict := conflict_with(database, row, file)) is not None:
            raise conflict
        return _with_trackers(database, row, file), False
    if take is not None:
        _register(database, replace(file, taken_over=take.record), trials, take)
        return load(database, file.name), True
    learned: tuple[Proposal, ...] = ()
    if source := learn_from or file.study.learn_from:
        other = learn_storage is not None and learn_storage.url != database.url
        learned = learn(file, source, learn_storage or database, elsewhere=other)
    proposals = (*learned, *recommend(file, learned))
    _register(database, replace(file, proposals=proposals), trials)
    return load(database, file.name), True


def _with_trackers(database: Database, row: StudyRow, file: StudyFile) -> Study:
    """Return the study that exists, with the trackers of `file`: for workers that start from now
    on."""
    stored = StudyFile.from_definition(row.definition)
    if stored.study.log == file.study.log:
        return Study(database, row, stored)
    kept = {key: value for key, value in row.definition["study"].items() if key != "log"}
    new = {"log": list(file.study.log)} if file.study.log else {}
    definition = {**row.definition, "study": {**kept, **new}}
    records.update_study(database, row.uuid, definition=json.dumps(definition, sort_keys=True))
    return load(database, row.name)


def _register(
    database: Database, file: StudyFile, budget: int | None = None, take: TakeOver = NOTHING
) -> None:
    """Create Optuna's study, then our row, with the trials that are taken over; a process that died
    between the two left an empty study."""
    storage = FencedStorage(database)
    with database.alone():
        if records.find_study(database, file.name) is not None:
            return
        records.purge_orphans(database)
        study_id, trials = find_optuna_study(storage, file.name)
        if trials:
            raise Conflict(
                f"{database.shown} holds a study {file.name!r} with {trials} trials that was not "
                "made by hpo; choose another study.name"
            )
        if study_id is None:
            ways = [direction.upper() for direction in file.directions.values()]
            directions = [optuna.study.StudyDirection[way] for way in ways]
            study_id = storage.create_new_study(directions, file.name)
        uuid = uuids.uuid4().hex
        storage.set_study_user_attr(study_id, "hpo:uuid", uuid)
        storage.set_study_system_attr(study_id, "study:metric_names", list(file.objectives))
        keep_note(storage, study_id, study_note(file))
        values = _row_values(file, uuid, study_id)
        if budget is not None:
            values["trials"] = budget
        if not insert_study(storage, values, take.trials, take.resolved):
            raise Conflict(f"study {file.name!r} was being made elsewhere; run it again")


def _row_values(file: StudyFile, uuid: str, study_id: int) -> dict[str, Any]:
    limits = file.study
    return {
        "uuid": uuid,
        "study_id": study_id,
        "name": file.name,
        "definition": json.dumps(file.definition(), sort_keys=True),
        "source": file.text,
        "trials": OPEN_ENDED if limits.trials is None else limits.trials + file.known_trials,
        "max_time_s": limits.max_time,
        "max_full_trainings": limits.max_full_trainings,
        "timeout_s": limits.timeout_s,
        "target": limits.target,
        "patience_trials": limits.patience_trials,
        "lease_s": limits.lease_s,
    }


LIMITS = {
    "trials": "trials",
    "max_time": "max_time_s",
    "max_full_trainings": "max_full_trainings",
    "timeout_s": "timeout_s",
    "target": "target",
    "patience_trials": "patience_trials",
}
"""Limits of a study that `extend` raises: fields of `[study]`, and their columns. The number of
epochs is one, too; it is in the definition."""


class Limits(TypedDict, total=False):
    """New limits of a study; those that are None, or not there, stay as they are."""

    epochs: int | None
    trials: int | None
    max_time: str | float | None
    """Seconds, also as "30m" or "1h30m"."""
    max_full_trainings: float | None
    timeout_s: str | float | None
    target: float | None
    patience_trials: int | None


NEWER = frozenset({"defaults"})
"""Fields of [study] that decide on a new study alone: one that was made before them has none."""


def conflict_with(database: Database, row: StudyRow, file: StudyFile) -> Conflict | None:
    """Return why a study that exists is not that of `file`, and what helps; None where it is."""
    stored = StudyFile.from_definition(row.definition)  # with fields that are newer than the study
    before, now = _with_limits_now(stored, row, file), file.definition()
    if file.automatic:  # the study keeps what was chosen when it was created
        for field in ("scheduler", "pruner"):
            now["study"].pop(field, None)
            before["study"].pop(field, None)
    for field in NEWER - row.definition["study"].keys():
        before["study"][field] = now["study"][field]  # it has none, and keeps that
    changed = difference(before, now)
    if not changed:
        return None
    paths = [line.partition(":")[0] for line in changed]
    names = ["epochs" if one == "train.epochs" else one.removeprefix("study.") for one in paths]
    if all(_is_limit(name, stored, now) for name in names):
        return _other_limits(Study(database, row, stored), file, names)
    lines = "".join(f"\n  {line}" for line in changed)
    return Conflict(
        f"study {file.name!r} exists with another definition (database -> file):{lines}\n"
        "To go on: choose another study.name (--set study.name=...), or restore the values; "
        f"without a change, hpo resume {file.name} continues it"
    )


def _is_limit(name: str, stored: StudyFile, now: Mapping[str, Any]) -> bool:
    """Return whether a field that differs is a limit, which `extend` may raise."""
    if name == "epochs":
        return stored.tied_to_length is None
    return name in LIMITS and name in now["study"]


def _other_limits(study: Study, file: StudyFile, names: Sequence[str]) -> Conflict:
    """Return the conflict with a study that differs from `file` in the limits `names` alone."""
    name, row = file.name, study.row
    limits = {
        one: file.max_epochs if one == "epochs" else getattr(file.study, one) for one in names
    }
    try:
        for one, value in limits.items():
            _require_larger(row, one, value)
    except InputError as error:
        begun = plural(study.snapshot().begun - row.taken_over, "trial")
        return Conflict(
            f"{error}. The limits of a study are only raised, and {begun} of it were begun "
            f"already: to end it here, hpo stop {name}; to go on as it is, leave this limit out"
        )
    options = " ".join(f"{option(one)} {_shown(one, value)}" for one, value in limits.items())
    lines = "".join(
        f"\n  {_path(one)}: {_limit_now(row, one)} -> {_shown(one, value)}"
        for one, value in limits.items()
    )
    return LimitsRaised(
        f"study {name!r} exists with lower limits (database -> file):{lines}\n"
        f"To go on: hpo extend {name} {options}",
        limits,
    )


def _path(name: str) -> str:
    return f"train.{name}" if name == "epochs" else f"study.{name}"


def _limit_now(row: StudyRow, name: str) -> str:
    now = limit_of(row, name)
    return "(none)" if now is None else _shown(name, now)


def limit_of(row: StudyRow, name: str) -> Any:
    """Return a limit of a study by its name, as it is now; None where there is none. Trials that
    were taken over are none of its `trials`."""
    if name == "epochs":
        return row.definition["train"].get(name)
    return row.budget if name == "trials" else getattr(row, LIMITS[name])


def _with_limits_now(stored: StudyFile, row: StudyRow, file: StudyFile) -> dict[str, Any]:
    """Return the definition of a study, with each limit that `extend` has raised to what the file
    says now."""
    definition, given = stored.definition(), file.definition()["study"]
    for name in LIMITS:
        if name in given and getattr(file.study, name) == limit_of(row, name):
            definition["study"][name] = given[name]
    if stored.began_with is not None and stored.began_with == file.max_epochs:
        definition["train"]["epochs"] = stored.began_with
    return definition


def extend(study: Study, *, retry_failed: bool = False, **limits: Unpack[Limits]) -> int:
    """Raise the limits of a study and let it go on; returns how many failed configurations were
    enqueued again (within the budget). Under a scheduler the trials that were told pruned at the
    end are paused again, and go on where they are among the best of more trials. With more `epochs`
    complete trials that had all of them go on: each is then what it had been with so many from its
    start. Raises InputError, and changes nothing, for a limit that is not larger, where a stop rule
    would fire at once, and for `epochs` on which those that were trained depend; Conflict for
    `epochs` while a worker is at a trial.
    """
    _require_search(study)
    raised: dict[str, Any] = {name: one for name, one in limits.items() if one is not None}
    for name in raised.keys() & {"max_time", "timeout_s"}:
        raised[name] = _seconds(name, raised[name])
    for name, value in raised.items():
        _require_larger(study.row, name, value)
    epochs = raised.pop("epochs", None)
    _require_possible(study.row, raised)
    definition = None if epochs is None else _longer(study, epochs)
    file = study.file if definition is None else StudyFile.from_definition(definition)
    new = {LIMITS[name]: value for name, value in raised.items()}
    if "trials" in new:
        new["trials"] += study.row.taken_over
    _require_going_on(study, replace(study.snapshot(whole=True), max_epochs=file.max_epochs, **new))
    promotes = file.study.scheduler is not None
    if definition is None:
        extend_study(study.database, study.row, new, promotes=promotes and bool(new))
    else:
        new["definition"] = json.dumps(definition, sort_keys=True)
        length, rungs = study.file.max_epochs, (where_rungs_are(study.file), where_rungs_are(file))
        extend_study(study.database, study.row, new, promotes=promotes, length=length)
        change_note(FencedStorage(study.database), study.row.study_id, *rungs)
    return _enqueue_failed(study) if retry_failed else 0


def _longer(study: Study, epochs: int) -> dict[str, Any]:
    """Return the study's definition with more epochs. Raises InputError where its trials cannot go
    on with it, saying what helps."""
    file, name = study.file, study.row.name
    if file.tied_to_length is not None:
        raise InputError(
            f"--epochs {epochs}: {file.tied_to_length}: trials of {name!r} cannot go on with more. "
            f"A new study can try its best configurations first: hpo run STUDY.toml --set "
            f"epochs={epochs} --set study.name={name}-{epochs} --learn-from {name}"
        )
    verified = find_verification(study.database, study.row)
    if verified is not None:
        raise InputError(
            f"--epochs {epochs}: {verified.name!r} verified {name!r} as it is: hpo delete "
            f"{verified.name} first"
        )
    stored = study.row.definition
    train, began = {**stored["train"], "epochs": epochs}, file.planned_epochs
    definition = {**stored, "train": train, "began_with": began}
    try:
        StudyFile.from_definition(definition)
    except ConfigError as error:
        raise InputError(f"--epochs {error.message}") from None
    return definition


def _seconds(name: str, value: str | float) -> float:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise InputError(f"{option(name)} {value}: {error}") from None


def _require_larger(row: StudyRow, name: str, value: Any) -> None:
    """Raise InputError unless `value` is a limit, and larger than the one that the study has."""
    if name == "target":
        return
    given, now = f"{option(name)} {_shown(name, value)}", limit_of(row, name)
    if now is None and name == "trials":
        raise InputError(f"{given}: study {row.name!r} has no limit on trials")
    if not value > 0 or not math.isfinite(value):
        raise InputError(f"{given}: give a number above 0")
    if now is not None and value <= now:
        has = f"study {row.name!r} has {_shown(name, now)} already; give more"
        raise InputError(f"{given}: {has}")


def _require_possible(row: StudyRow, limits: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the study's file could have these limits: a grid has no more points,
    promotion knows no patience, and each has its range."""
    given = {**row.definition["study"], **limits}
    try:
        StudyFile.from_definition({**row.definition, "study": given})
    except ConfigError as error:
        raise error.at(f"hpo extend {row.name}") from None


def _shown(name: str, value: float) -> str:
    if name in ("max_time", "timeout_s"):
        return exact_duration(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _enqueue_failed(study: Study) -> int:
    """Enqueue the configurations of failed trials again, each once; return their number. None that
    is queued, or was tried again without failing."""
    storage = FencedStorage(study.database)
    states = [optuna.trial.TrialState.FAIL]
    failed = {
        trial.number: study.file.space.decode(trial.params)
        for trial in study.optuna_study(storage).get_trials(deepcopy=False, states=states)
    }
    queued = records.read_enqueued(study.database, study.uuid)
    known = [values for values, number in queued if number not in failed]
    count = 0
    for values in failed.values():
        if values and values not in known:
            records.enqueue(study.database, study.uuid, values)
            known.append(values)
            count += 1
    return count


def enqueue(study: Study, values: Mapping[str, Any]) -> None:
    """Queue `values` for the next trial that starts (the rest is sampled), within the budget.

    Raises ConfigError for values outside the space or a configuration that cannot be, InputError
    where no trial is left or a grid plans it anyway.
    """
    _require_search(study)
    try:
        study.file.space.check(values)
        if study.file.space.around(values) == dict(values):
            study.file.config(values)  # nothing of it is sampled, so it can be judged now
    except ConfigError as error:
        raise error.at("enqueue") from None
    snapshot = study.snapshot()
    waiting = sum(
        1 for _, number in records.read_enqueued(study.database, study.uuid) if number is None
    )
    if snapshot.begun + waiting >= snapshot.trials:
        budget, used = (
            count - study.row.taken_over for count in (snapshot.trials, snapshot.begun + waiting)
        )
        raise InputError(
            f"no budget left ({used} of {budget} trials used or "
            f"queued). Add one: hpo extend {study.row.name} --trials +1"
        )
    if study.file.study.sampler.name == "grid" and values in study.file.space.grid():
        raise InputError("the grid holds this configuration already; it will be tried once")
    records.enqueue(study.database, study.uuid, values)


def _require_search(study: Study) -> None:
    """Raise InputError for a verification: what it trains is decided by `hpo verify` alone."""
    verified = study.file.verifies
    if verified is not None:
        raise InputError(
            f"{study.row.name!r} verifies {verified.study!r}: hpo verify {verified.study} with a "
            "larger --top or --seeds adds to it"
        )


def _require_going_on(study: Study, snapshot: StudySnapshot) -> None:
    """Raise InputError where a stop rule would fire at once, with the option that raises its
    limit."""
    fired = scheduling.stop_rule(snapshot, maximize=study.maximize, max_failures=10**9)
    if fired is not None:
        option = f"hpo extend {study.row.name} {fired.option} ..."
        raise InputError(
            f"{study.row.name!r} would stop at once: {fired.reason}; raise the limit: {option}"
        )


def stop(study: Study) -> None:
    """Stop the study: running trials are handed back after their step; `resume` continues them."""
    records.stop_study(study.database, study.uuid, "user", "stopped by hpo stop")


def resume(study: Study) -> None:
    """Lift a stop. Raises InputError where its rule would fire again at once."""
    snapshot = study.snapshot()
    _require_going_on(study, snapshot)
    records.resume_study(study.database, study.uuid)


def is_replaceable(database: Database, row: StudyRow, file: StudyFile) -> bool:
    """Return whether the study of `row` may make room for that of `file`: it is another one, and
    nothing of it was trained, nothing is queued, and no worker is alive."""
    return conflict_with(database, row, file) is not None and not has_begun(database, row)


def replace_unbegun(database: Database, row: StudyRow, home: Home) -> bool:
    """Remove a study of which nothing was trained, with its files; False, and nothing is changed,
    where meanwhile a worker or an epoch is there."""
    artifacts = sync.find(database, row.uuid, home)
    if not delete_unbegun(FencedStorage(database), row):
        return False
    shutil.rmtree(home.study(row.uuid).root, ignore_errors=True)
    if artifacts is not None:
        with suppress(StorageError):
            artifacts.clear()
    return True


def delete(study: Study, home: Home, *, force: bool = False, keep_files: bool = False) -> None:
    """Remove the study, its trials and, unless a copy of it elsewhere uses them (`keep_files`), its
    files and its artifacts. Raises Conflict while a worker holds a lease; with `force` the leases
    are ended first, so that every later write of those workers is refused. Raises StorageError
    where the artifacts cannot be removed; the rest is gone.
    """
    name, directory = study.row.name, study.directory(home)
    holders = leases.live_leases(study.database, study.uuid)
    if holders and not force:
        raise Conflict(
            f"study {name!r} is being worked on by {', '.join(holders)}; "
            f"hpo stop {name} first, or hpo delete {name} --force"
        )
    records.stop_study(study.database, study.uuid, "user", "deleted")
    for worker in holders:
        leases.release_worker(study.database, worker, "its study was deleted")
    artifacts = sync.find(study.database, study.uuid, home)
    FencedStorage(study.database).delete_study(study.row.study_id)
    if keep_files:
        return
    shutil.rmtree(directory.root, ignore_errors=True)
    if artifacts is not None:
        try:
            artifacts.clear()
        except StorageError as error:
            raise StorageError(
                f"study {name!r} was deleted, but not its artifacts ({error}); remove "
                f"{artifacts.url} by hand"
            ) from error
