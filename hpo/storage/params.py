"""Parameters of Optuna's trials, read from its tables in one query and without loading Optuna."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import Any

import sqlalchemy as sa

from hpo.storage.db import Database
from hpo.storage.tables import optuna_params, optuna_trials


def read_params(database: Database, study_id: int) -> dict[int, dict[str, Any]]:
    """{trial number: {name: Optuna's value}} in the order in which they were suggested."""
    p, t = optuna_params.c, optuna_trials.c
    query = (
        sa.select(t.number, p.param_name, p.param_value, p.distribution_json)
        .join(optuna_trials, t.trial_id == p.trial_id)
        .where(t.study_id == study_id)
        .order_by(p.param_id)
    )
    rows: dict[int, dict[str, Any]] = defaultdict(dict)
    with database.read() as c:
        for number, name, value, distribution in c.execute(query):
            rows[number][name] = _external(value, json.loads(distribution))
    return dict(rows)


def _external(value: float, distribution: dict[str, Any]) -> Any:
    """As Optuna's `to_external_repr`: a choice is stored by its place in the list."""
    if distribution["name"] == "CategoricalDistribution":
        return distribution["attributes"]["choices"][int(value)]
    return int(value) if distribution["name"] == "IntDistribution" else value


def finite(value: object) -> object:
    """`value`; None for a metric that is no number, which a column of MySQL's cannot hold (the
    epoch's row has it as text)."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
