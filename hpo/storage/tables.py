"""Tables of hpo, beside Optuna's twelve in the same database, and their versions.

They hold what Optuna's cannot: the study file itself, who runs which trial, every metric of every
epoch, the workers. Times are seconds since 1970 by the database's clock. Rows go with their study:
foreign keys cascade, also when the study is deleted in the dashboard.

`hpo_schema` has a row for the version that a database was made with and one for each that it was
upgraded to; the highest is the one it has. A new schema of Optuna's comes with a version of ours.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import (
    BigInteger,
    Column,
    Enum,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)

from hpo.errors import StorageError
from hpo.storage.database import Database
from hpo.storage.url import option, usual

VERSION = 3
"""Version of our schema; `migrations` leads to it from the ones before."""

OPEN_ENDED = 2**31 - 1
"""The budget of a study that time or epochs end, not a number of trials."""

TAKEN_OVER = 0
"""The attempt `k` of a trial that was taken over from an earlier study; workers' are from 1."""


class LongText(TypeDecorator[str]):
    """Text of any length that occurs; MySQL's TEXT ends at 64 KiB, shorter than some study
    files."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> Any:
        """Return the type of a database; that of MySQL is imported only there."""
        if dialect.name != "mysql":
            return self.impl_instance
        from sqlalchemy.dialects.mysql import MEDIUMTEXT

        return dialect.type_descriptor(MEDIUMTEXT())


metadata = MetaData()

# Optuna's own tables, never created or changed through these: only the columns that claims and
# status read. A test compares them with Optuna's models.
optuna_studies = Table(
    "studies",
    metadata,
    Column("study_id", Integer, primary_key=True),
    Column("study_name", String(512)),
)
optuna_trials = Table(
    "trials",
    metadata,
    Column("trial_id", Integer, primary_key=True),
    Column("number", Integer),
    Column("study_id", Integer),
    Column("state", Enum("RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING", name="trialstate")),
)

optuna_params = Table(
    "trial_params",
    metadata,
    Column("param_id", Integer, primary_key=True),
    Column("trial_id", Integer),
    Column("param_name", String(512)),
    Column("param_value", Float(53)),
    Column("distribution_json", Text),
)


def _trial_id() -> Column[int]:
    """Return a key that is a trial's, and goes with it."""
    owner = ForeignKey("trials.trial_id", ondelete="CASCADE")
    return Column("trial_id", Integer, owner, primary_key=True, autoincrement=False)


schema = Table("hpo_schema", metadata, Column("version", Integer, primary_key=True))

studies = Table(
    "hpo_studies",
    metadata,
    # SQLite gives a study_id out again after a delete; the uuid is never seen twice.
    Column("uuid", String(32), primary_key=True),
    Column(
        "study_id",
        Integer,
        ForeignKey("studies.study_id", ondelete="CASCADE"),
        nullable=False,
        unique=True,
    ),
    Column("name", String(64), nullable=False, unique=True),
    Column("definition", LongText, nullable=False),  # JSON, as created
    Column("source", LongText, nullable=False),  # the study file's text
    Column("created", Float(53), nullable=False),
    Column("trials", Integer, nullable=False),  # the budget
    Column("timeout_s", Float(53)),  # of all workers together
    Column("target", Float(53)),
    Column("patience_trials", Integer),
    Column("lease_s", Float(53), nullable=False),
    Column("stop", String(8)),  # NULL, 'user' (hand back) or 'rule' (drain)
    Column("stop_reason", LongText),
    Column("resumed", Float(53), nullable=False),  # failures before this do not count
    Column("filler", String(64)),
    Column("filler_until", Float(53)),
    Column("max_time_s", Float(53)),  # by the clock
    Column("max_full_trainings", Float(53)),
)

attempts = Table(
    "hpo_attempts",
    metadata,
    _trial_id(),
    Column("k", Integer, primary_key=True, autoincrement=False),  # from 1; see TAKEN_OVER
    Column("study", String(32), ForeignKey("hpo_studies.uuid", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("token", String(32), nullable=False),
    Column("worker", String(64), nullable=False),
    Column("started", Float(53), nullable=False),
    Column("until", Float(53), nullable=False),  # the lease's end
    Column("ended", Float(53)),
    # NULL while it is the owner; complete, pruned, failed, diverged and infeasible end the
    # trial; handed_back and lost permit a successor.
    Column("outcome", String(16)),
    Column("reason", LongText),
    Column("value", Float(53)),  # of the first objective
    Column("objectives", LongText),  # JSON: the values of all, in order; NULL where there is one
    Column("first_epoch", Integer),  # the first epoch that this attempt began
    Column("epoch", Integer),  # the last one
    Column("runtime", LongText),  # JSON: threads, precision, ... that the trial keeps
    Index("ix_hpo_attempts_study", "study", "outcome"),
)

epochs = Table(
    "hpo_epochs",
    metadata,
    _trial_id(),
    Column("epoch", Integer, primary_key=True, autoincrement=False),  # from 1, as Optuna's steps
    Column("study", String(32), ForeignKey("hpo_studies.uuid", ondelete="CASCADE"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("finished", Float(53), nullable=False),
    Column("metrics", LongText, nullable=False),  # JSON
    Column("checkpoint", Integer),  # the attempt under whose path it lies; NULL: none
    Index("ix_hpo_epochs_study", "study"),
)

enqueued = Table(
    "hpo_enqueued",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("study", String(32), ForeignKey("hpo_studies.uuid", ondelete="CASCADE"), nullable=False),
    Column("params", LongText, nullable=False),  # JSON, config values by dotted path
    Column("number", Integer),  # the trial that took it
    Index("ix_hpo_enqueued_study", "study"),
)

resolved = Table(
    "hpo_resolved",
    metadata,
    # What the first worker found and all others keep: data fingerprint, precision, layout.
    Column(
        "study", String(32), ForeignKey("hpo_studies.uuid", ondelete="CASCADE"), primary_key=True
    ),
    Column("key", String(255), primary_key=True),
    Column("value", LongText, nullable=False),
)

workers = Table(
    "hpo_workers",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("study", String(32), ForeignKey("hpo_studies.uuid", ondelete="CASCADE"), nullable=False),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("device", String(64), nullable=False),
    Column("versions", LongText, nullable=False),  # JSON
    Column("started", Float(53), nullable=False),
    Column("seen", Float(53), nullable=False),
    Column("ended", Float(53)),
    Column("reason", LongText),
    Column("number", Integer),  # the trial in hand
    Column("epoch", Integer),
    Column("epochs", Integer),
    Column("value", Float(53)),  # the trial's metric so far
    Column("images_per_s", Float(53)),
    Index("ix_hpo_workers_study", "study"),
)

OURS = (schema, studies, attempts, epochs, enqueued, resolved, workers)


def version(database: Database) -> int | None:
    """Return the version of our tables in a database, None where there are none. Raises
    StorageError for one that a newer hpo has written."""
    with database.read() as connection:
        if not sa.inspect(connection).has_table(schema.name):
            return None
        found: int | None = connection.scalar(sa.select(sa.func.max(schema.c.version)))
    if found is not None and found > VERSION:
        raise StorageError(
            f"{database.shown}: written by a newer hpo (schema {found}, this one knows "
            f"{VERSION}); upgrade hpo"
        )
    return found


def is_current(database: Database) -> bool:
    """Return whether our tables are there; raises StorageError for those of an older or newer
    hpo."""
    found = version(database)
    if found is not None and found < VERSION:
        what = f"made by an older hpo (schema {found}, this one needs {VERSION})"
        raise needs_upgrade(database, what)
    return found is not None


def needs_upgrade(database: Database, what: str) -> StorageError:
    """Return the error for a database of an older hpo, with the command that upgrades it."""
    flag = option(database.url, usual())
    return StorageError(
        f"{database.shown}: {what}; stop its workers, then: hpo storage upgrade{flag}"
    )
