"""Many trials of Optuna's tables at once, as Optuna's own objects.

Optuna reads them through its ORM: every question to a pruner, and most samplers, read all trials
that are not finished, so with many workers this is what their processors do. Plain rows cost a
fraction of it; a test holds the result against Optuna's own.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

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
    """The trials that fulfil all of `wanted`, conditions on columns of TRIALS, by their ids. Those
    in a state of `bare` are without parameters, values and attributes."""
    trials = c.execute(sa.select(TRIALS).where(*wanted).order_by(TRIALS.c.trial_id)).all()
    if all(row.state in bare for row in trials):
        parts: dict[str, Rows] = {name: defaultdict(list) for name in PARTS}
        return [_frozen(row, parts) for row in trials]
    if bare:
        wanted = (*wanted, TRIALS.c.state.not_in(bare))
    parts = {name: _rows(c, part[0].__table__, part[1], wanted) for name, part in PARTS.items()}
    return [_frozen(row, parts) for row in trials]


def _rows(c: sa.Connection, table: Any, columns: tuple[str, ...], wanted: Any) -> Rows:
    """Those of `table`, in the order in which they were written, by trial."""
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
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_complete,
        params={n: distributions[n].to_external_repr(value) for n, value, _ in of["params"]},
        distributions=distributions,
        user_attrs={key: json.loads(text) for key, text in of["user"]},
        system_attrs={key: json.loads(text) for key, text in of["system"]},
        intermediate_values={step: step_of(value, kind) for step, value, kind in of["steps"]},
        trial_id=trial.trial_id,
    )
