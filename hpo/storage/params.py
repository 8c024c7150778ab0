"""Parameters of Optuna's trials, read from its tables in one query."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import sqlalchemy as sa
from optuna.distributions import json_to_distribution

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
            rows[number][name] = json_to_distribution(distribution).to_external_repr(value)
    return dict(rows)
