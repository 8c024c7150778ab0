"""Optuna's own storage, fenced and cached.

Optuna's private names are known here, in `schema` and in `studies` alone.

Optuna reads trials through its ORM: every question to a pruner, and most samplers, read all trials
that are not finished, so with many workers this is what their processors do. Plain rows cost a
fraction of it; a test holds the result against Optuna's own.

Three things are added to `RDBStorage`, all proved necessary by experiment:

- whatever writes begins its transaction as a writer (see `database`);
- inside `guarded(lease)`, a write first reads our attempt row in the *same* transaction, locked. A
  worker that was stopped past its lease and has a successor is refused with `Fenced`, instead of
  overwriting its successor's report, parameter or result. The write that ends a trial closes the
  attempt in that transaction too: there is no moment between the two;
- every call is repeated while the database is unavailable and its thread retries (see `retry`).
"""

from __future__ import annotations

import copy
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import lru_cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import orm

from hpo.errors import Fenced, NotFound
from hpo.storage import database as faults
from hpo.storage import tables
from hpo.storage.database import Database, bare, engine_options
from hpo.storage.leases import Ending, Lease
from hpo.storage.retry import retry_while_unavailable
from hpo.storage.tables import attempts

TRIALS = models.TrialModel.__table__
PARTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "params": (models.TrialParamModel, ("param_name", "param_value", "distribution_json")),
    "values": (models.TrialValueModel, ("objective", "value", "value_type")),
    "user": (models.TrialUserAttributeModel, ("key", "value_json")),
    "system": (models.TrialSystemAttributeModel, ("key", "value_json")),
    "steps": (
        models.TrialIntermediateValueModel,
        ("step", "intermediate_value", "intermediate_value_type"),
    ),
}
"""Tables with rows of each trial, and the columns that matter."""

Rows = Mapping[int, list[Any]]


def read_trials(
    c: sa.Connection, *wanted: sa.ColumnElement[bool], bare: Collection[TrialState] = ()
) -> list[FrozenTrial]:
    """Return the trials that fulfil all of `wanted`, conditions on columns of TRIALS, by their ids.
    Those in a state of `bare` are without parameters, values and attributes."""
    trials = c.execute(sa.select(TRIALS).where(*wanted).order_by(TRIALS.c.trial_id)).all()
    if all(row.state in bare for row in trials):
        parts: dict[str, Rows] = {name: defaultdict(list) for name in PARTS}
        return [_frozen(row, parts) for row in trials]
    if bare:
        wanted = (*wanted, TRIALS.c.state.not_in(bare))
    parts = {name: _rows(c, part[0].__table__, part[1], wanted) for name, part in PARTS.items()}
    return [_frozen(row, parts) for row in trials]


def _rows(c: sa.Connection, table: Any, columns: tuple[str, ...], wanted: Any) -> Rows:
    """Return those of `table`, in the order in which they were written, by trial."""
    query = (
        sa.select(table.c.trial_id, *(table.c[name] for name in columns))
        .join(TRIALS, TRIALS.c.trial_id == table.c.trial_id)
        .where(*wanted)
        .order_by(*table.primary_key.columns)
    )
    found: Rows = defaultdict(list)
    for trial_id, *row in c.execute(query):
        found[trial_id].append(row)
    return found


@lru_cache(maxsize=4096)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


def _frozen(trial: Any, parts: Mapping[str, Rows]) -> FrozenTrial:
    of = {name: rows[trial.trial_id] for name, rows in parts.items()}
    value_of = models.TrialValueModel.stored_repr_to_value
    step_of = models.TrialIntermediateValueModel.stored_repr_to_intermediate_value
    distributions = {name: _distribution(text) for name, _, text in of["params"]}
    return FrozenTrial(
        number=trial.number,
        state=trial.state,
        value=None,
        values=[value_of(value, kind) for _, value, kind in sorted(of["values"])] or None,
        datetime_start=_local(trial.datetime_start),
        datetime_complete=_local(trial.datetime_complete),
        params={n: distributions[n].to_external_repr(value) for n, value, _ in of["params"]},
        distributions=distributions,
        user_attrs={key: json.loads(text) for key, text in of["user"]},
        system_attrs={key: json.loads(text) for key, text in of["system"]},
        intermediate_values={step: step_of(value, kind) for step, value, kind in of["steps"]},
        trial_id=trial.trial_id,
    )


def _local(stored: datetime | None) -> datetime | None:
    """Return a time as Optuna's trials have it: local, where its tables have UTC."""
    return stored and stored.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def translated(database: Database) -> Iterator[None]:
    """Raise faults of the database in Optuna's code as StorageError, as in our own."""
    try:
        with database.translated():
            yield
    except optuna.exceptions.StorageInternalError as error:
        fault = faults.in_chain(error)
        if fault is None:
            raise
        raise faults.as_storage_error(fault, database.url) from error


def _call(
    method: Callable[Concatenate[FencedStorage, P], R], *, writes: bool
) -> Callable[Concatenate[FencedStorage, P], R]:
    @wraps(method)
    def once(self: FencedStorage, /, *args: P.args, **kwargs: P.kwargs) -> R:
        mode = self.database.writing() if writes else nullcontext()
        with translated(self.database), mode:
            return method(self, *args, **kwargs)

    @wraps(method)
    def repeated(self: FencedStorage, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return retry_while_unavailable(self.database.pause, lambda: once(self, *args, **kwargs))

    return repeated


def _write(
    method: Callable[Concatenate[FencedStorage, P], R],
) -> Callable[Concatenate[FencedStorage, P], R]:
    """Return a storage method whose transactions write."""
    return _call(method, writes=True)


def _read(
    method: Callable[Concatenate[FencedStorage, P], R],
) -> Callable[Concatenate[FencedStorage, P], R]:
    """Return a storage method that only reads."""
    return _call(method, writes=False)


class FencedStorage(RDBStorage):
    """Optuna's storage over a prepared Database; its tables must exist (`create_schema`).

    Optuna looks at its version in the database at once: raises StorageError, StorageUnavailable."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._guard = threading.local()
        options = {"poolclass": sa.NullPool, **engine_options(database.url)}
        with translated(database):
            super().__init__(
                optuna_url(database),
                engine_kwargs=options,
                skip_table_creation=True,
                skip_compatibility_check=True,
            )
        self.engine.dispose()
        self.engine = database.engine
        self.scoped_session = orm.scoped_session(orm.sessionmaker(bind=database.engine))
        sa.event.listen(self.scoped_session, "after_begin", self._check)

    @contextmanager
    def guarded(self, lease: Lease, ending: Ending | None = None) -> Iterator[None]:
        """Refuse every write of this thread with Fenced unless `lease` still holds; the write that
        finishes the trial closes the attempt with `ending`."""
        before = getattr(self._guard, "lease", None), getattr(self._guard, "ending", None)
        self._guard.lease, self._guard.ending = lease, ending
        try:
            yield
        finally:
            self._guard.lease, self._guard.ending = before

    def _check(self, _session: orm.Session, _transaction: Any, connection: sa.Connection) -> None:
        lease: Lease | None = getattr(self._guard, "lease", None)
        if lease is None or not self.database.is_writing:
            return
        held = sa.select(attempts.c.k).where(lease.holds()).with_for_update()
        if connection.execute(held).first() is None:
            raise lease.lost()
        ending: Ending | None = getattr(self._guard, "ending", None)
        if ending is not None and getattr(self._guard, "finishing", False):
            connection.execute(
                sa.update(attempts)
                .where(lease.holds())
                .values(ended=self.database.now(), **ending.row())
            )

    def _is_told(self) -> bool:
        """Return whether this thread's attempt has ended already, and just as it is to end."""
        lease: Lease | None = getattr(self._guard, "lease", None)
        ending: Ending | None = getattr(self._guard, "ending", None)
        if lease is None or ending is None:
            return False
        wanted = {"trial_id": lease.trial_id, "k": lease.k, "token": lease.token} | ending.row()
        same = [attempts.c[name].is_not_distinct_from(value) for name, value in wanted.items()]
        with self.database.read() as c:
            return c.execute(sa.select(attempts.c.k).where(*same)).first() is not None

    @_write
    def set_trial_state_values(
        self,
        trial_id: int,
        state: TrialState,
        values: Any = None,
    ) -> bool:
        """Start or end a trial, under the thread's lease."""
        self._guard.finishing = state.is_finished()
        try:
            return super().set_trial_state_values(trial_id, state, values)
        except Fenced:
            if state.is_finished() and self._is_told():
                return True  # by an earlier call whose answer was lost with the connection
            raise
        finally:
            self._guard.finishing = False

    @_read
    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[optuna.trial.FrozenTrial]:
        """Return those after `trial_id_greater_than`, and those `included_trial_ids`, in one of
        `states`. Raises KeyError where the study is gone."""
        column = TRIALS.c
        later = column.trial_id > trial_id_greater_than
        wanted = later | column.trial_id.in_(included_trial_ids) if included_trial_ids else later
        bare = getattr(self._guard, "bare", ())
        with self.database.read() as c:
            if not c.scalar(
                sa.select(sa.exists().where(tables.optuna_studies.c.study_id == study_id))
            ):
                raise KeyError(f"no study has the id {study_id}")
            found = read_trials(c, column.study_id == study_id, wanted, bare=bare)
        return [one for one in found if states is None or one.state in states]

    @contextmanager
    def transaction(self) -> Iterator[orm.Session]:
        """Yield Optuna's session in a transaction that writes, for rows of ours and Optuna's that
        are to be there, or gone, together."""
        scoped = optuna.storages._rdb.storage._create_scoped_session(self.scoped_session)
        with translated(self.database), self.database.writing(), scoped as session:
            yield session

    @contextmanager
    def unfinished_bare(self) -> Iterator[None]:
        """Let this thread read no more of trials that are not finished than that they are."""
        self._guard.bare = tuple(state for state in TrialState if not state.is_finished())
        try:
            yield
        finally:
            self._guard.bare = ()

    @_read
    def get_trial(self, trial_id: int) -> optuna.trial.FrozenTrial:
        """Return a trial; raise KeyError if it is gone."""
        with self.database.read() as c:
            found = read_trials(c, TRIALS.c.trial_id == trial_id)
        if not found:
            raise KeyError(f"no trial has the id {trial_id}")
        return found[0]

    create_new_study = _write(RDBStorage.create_new_study)
    delete_study = _write(RDBStorage.delete_study)
    set_study_user_attr = _write(RDBStorage.set_study_user_attr)
    set_study_system_attr = _write(RDBStorage.set_study_system_attr)
    create_new_trial = _write(RDBStorage.create_new_trial)
    _create_new_trial = _write(RDBStorage._create_new_trial)
    set_trial_param = _write(RDBStorage.set_trial_param)
    _set_trial_param = _write(RDBStorage._set_trial_param)
    set_trial_intermediate_value = _write(RDBStorage.set_trial_intermediate_value)
    set_trial_user_attr = _write(RDBStorage.set_trial_user_attr)
    set_trial_system_attr = _write(RDBStorage.set_trial_system_attr)
    record_heartbeat = _write(RDBStorage.record_heartbeat)
    _get_stale_trial_ids = _write(RDBStorage._get_stale_trial_ids)

    get_study_id_from_name = _read(RDBStorage.get_study_id_from_name)
    get_study_name_from_id = _read(RDBStorage.get_study_name_from_id)
    get_study_directions = _read(RDBStorage.get_study_directions)
    get_study_user_attrs = _read(RDBStorage.get_study_user_attrs)
    get_study_system_attrs = _read(RDBStorage.get_study_system_attrs)
    get_trial_user_attrs = _read(RDBStorage.get_trial_user_attrs)
    get_trial_system_attrs = _read(RDBStorage.get_trial_system_attrs)
    get_all_studies = _read(RDBStorage.get_all_studies)
    get_trial_param = _read(RDBStorage.get_trial_param)
    get_trial_id_from_study_id_trial_number = _read(
        RDBStorage.get_trial_id_from_study_id_trial_number
    )
    get_all_trials = _read(RDBStorage.get_all_trials)
    get_best_trial = _read(RDBStorage.get_best_trial)
    _get_best_trial_id = _read(RDBStorage._get_best_trial_id)


def add_waiting(storage: FencedStorage, study_id: int) -> None:
    """Add one empty waiting trial; the database counts its number. Raises NotFound where the study
    was deleted."""
    try:
        storage.create_new_trial(study_id, optuna.trial.create_trial(state=TrialState.WAITING))
    except KeyError:
        raise NotFound("the study was deleted") from None


NOTE_VERSION, NOTE_PART, NOTE_LENGTH = "dashboard:note_ver", "dashboard:note_str:{}", 2045
"""Where optuna-dashboard keeps a study's note: attributes of the study, in parts of this length."""


def keep_note(storage: FencedStorage, study_id: int, text: str) -> None:
    """Give a study a note that optuna-dashboard shows, as Markdown, unless it has one. Written as
    that writes it, which takes a second and more to import."""
    if NOTE_VERSION in storage.get_study_system_attrs(study_id):
        return
    for part, start in enumerate(range(0, len(text), NOTE_LENGTH)):
        body = text[start : start + NOTE_LENGTH]
        storage.set_study_system_attr(study_id, NOTE_PART.format(part), body)
    storage.set_study_system_attr(study_id, NOTE_VERSION, 1)


def change_note(storage: FencedStorage, study_id: int, before: str, after: str) -> None:
    """Replace a text in a study's note, if that has it."""
    for name, body in storage.get_study_system_attrs(study_id).items():
        if name.startswith(NOTE_PART.format("")) and before in body:
            storage.set_study_system_attr(study_id, name, body.replace(before, after))


def read_again(study: optuna.Study, trial_id: int) -> None:
    """Let the cache of `study` read a trial once more that it has as finished."""
    storage = study._storage
    if not isinstance(storage, Cached) or storage._get_cached_trial(trial_id) is None:
        return
    with storage._lock:
        storage._studies[study._study_id].unfinished_trial_ids.add(trial_id)
    study.get_trials(deepcopy=False)


def sampling_view(
    study: optuna.Study, trial: optuna.trial.FrozenTrial, paused: Collection[int] = ()
) -> optuna.Study:
    """Return the study as samplers see it for `trial`: under Hyperband the trials of its bracket
    only; the trials `paused` as pruned ones, since TPE keeps away from what is running."""
    if not paused:
        return optuna.pruners._filter_study(study, trial)
    view = copy.copy(study)  # with a cache of its own
    view._storage = cast(optuna.storages.BaseStorage, _PausedAsPruned(study._storage, paused))
    return view


class _PausedAsPruned:
    """A storage in which paused trials, which run, are pruned; else the storage behind."""

    def __init__(self, storage: optuna.storages.BaseStorage, paused: Collection[int]) -> None:
        self._behind, self._paused = storage, frozenset(paused)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Any = None
    ) -> list[FrozenTrial]:
        """Return trials as Optuna's storages do."""
        found = [
            self._seen(trial) for trial in self._behind.get_all_trials(study_id, deepcopy=deepcopy)
        ]
        return [trial for trial in found if states is None or trial.state in states]

    def _seen(self, trial: FrozenTrial) -> FrozenTrial:
        if trial.number not in self._paused or trial.state != TrialState.RUNNING:
            return trial
        seen = copy.copy(trial)  # the original belongs to the cache
        seen.state = TrialState.PRUNED
        return seen


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silence Optuna's own messages inside: hpo reports its studies and trials."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def optuna_url(database: Database) -> str:
    """Return the URL with its password, as SQLAlchemy reads it again: its newer versions take % for
    an escape also in a path."""
    return bare(database.url).render_as_string(hide_password=False)


def find_optuna_study(storage: FencedStorage, name: str) -> tuple[int | None, int]:
    """Return Optuna's id of the study `name` and its number of trials, or (None, 0)."""
    for study in storage.get_all_studies():
        if study.study_name == name:
            return study._study_id, len(storage.get_all_trials(study._study_id, deepcopy=False))
    return None, 0


class Cached(_CachedStorage):
    """Finished trials are kept in memory; of the others only what is asked for is read. A pruner
    asks after each epoch for finished ones, and so each worker would read what all others do."""

    _backend: FencedStorage

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Any = None
    ) -> list[optuna.trial.FrozenTrial]:
        """Return trials; finished ones are kept in memory."""
        is_finished = states is not None and all(
            state.is_finished() for state in TrialState if state in states
        )
        with self._backend.unfinished_bare() if is_finished else nullcontext():
            return super().get_all_trials(study_id, deepcopy=deepcopy, states=states)


def cached(storage: FencedStorage) -> optuna.storages.BaseStorage:
    """Return the storage as samplers and the dashboard read it."""
    return Cached(storage)


class FirstObjective(Cached):
    """A study of several objectives as if it had the first alone, for pruners: Optuna's refuse any
    other. `curves()` gives its value after each epoch by trial number; Optuna stores none of them.
    Writes go to the storage behind."""

    def __init__(
        self, storage: FencedStorage, curves: Callable[[], Mapping[int, Mapping[int, float]]]
    ) -> None:
        super().__init__(storage)
        self._curves = curves

    def get_study_directions(self, study_id: int) -> list[optuna.study.StudyDirection]:
        """Return the direction of the first objective."""
        return super().get_study_directions(study_id)[:1]

    def get_trial(self, trial_id: int) -> optuna.trial.FrozenTrial:
        """Return a trial with its curve."""
        return _with_curve(super().get_trial(trial_id), self._curves())

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Any = None
    ) -> list[optuna.trial.FrozenTrial]:
        """Return trials with their curves."""
        curves = self._curves()
        found = super().get_all_trials(study_id, deepcopy=deepcopy, states=states)
        return [_with_curve(trial, curves) for trial in found]


def _with_curve(
    trial: optuna.trial.FrozenTrial, curves: Mapping[int, Mapping[int, float]]
) -> optuna.trial.FrozenTrial:
    seen = copy.copy(trial)  # the original belongs to the cache
    seen.intermediate_values = dict(curves.get(trial.number, {}))
    seen.values = trial.values and trial.values[:1]
    return seen
