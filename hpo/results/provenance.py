"""Where a configuration comes from: the table that is exported beside it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from hpo.definition.config import TrainConfig
from hpo.search.agreement import IMAGES, read_code
from hpo.search.status import StudyStatus, TrialStatus
from hpo.storage import records
from hpo.storage.db import Database

GIT_TIMEOUT_S = 10


def describe_trial(
    database: Database, status: StudyStatus, trial: TrialStatus, config: TrainConfig
) -> dict[str, Any]:
    """The [provenance] table of a trial's configuration; what is unknown is None.

    `rates` is the learning rate of each epoch, `stopped_epoch` the one after which early stopping
    ended the trial.
    """
    images = records.read_resolved(database, status.row.uuid, IMAGES)
    code = read_code(database, status.row.uuid)
    worker = next((w for w in status.workers if w.id == trial.attempts[-1].worker), None)
    trained = len(trial.epochs)
    stopped = trial.state == "complete" and trained < config.epochs
    return {
        "study": status.row.name,
        "trial": trial.number,
        "state": trial.state,
        "metric": status.file.metric,
        "value": trial.value,
        "values": trial.values or None,
        "best_epoch": trial.best_epoch,
        "epochs": config.epochs,
        "epochs_trained": trained,
        "stopped_epoch": trained if stopped else None,
        "rates": [row.metrics["lr"] for row in trial.epochs if "lr" in row.metrics],
        "data_fingerprints": sorted({str(value) for value in images.values()}),
        "code_fingerprint": code.fingerprint if code else None,
        "device": worker.device if worker else None,
        "versions": worker.versions if worker else None,
        "git_commit": git_commit(),
        "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "notes": _notes(status, trial),
    }


def comments(provenance: Mapping[str, Any]) -> list[str]:
    """What stands above an exported configuration, for whoever opens the file."""
    value = f"{provenance['metric']} = {provenance['value']:.4f} (validation)"
    return [
        f"Trial {provenance['trial']} of study {provenance['study']}: {value}, best in epoch "
        f"{provenance['best_epoch']} of {provenance['epochs_trained']}.",
        *provenance["notes"],
    ]


def _notes(status: StudyStatus, trial: TrialStatus) -> list[str]:
    """What makes the value uncertain."""
    notes = [
        f"The value is the best of {len(trial.epochs)} epochs, from one seed and a study of "
        f"{status.finished} finished trials: new images will give a little less."
    ]
    if trial.state == "pruned":
        reason = f" ({trial.reason})" if trial.reason else ""
        notes.append(f"This trial was pruned{reason}: its full schedule was never run.")
    if status.pruned_note and trial.state == "complete":
        notes.append(f"{status.pruned_note}.")
    used = {attempt.worker for attempt in trial.attempts}
    versions = [worker.versions for worker in status.workers if worker.id in used]
    notes += [f"A worker was forced to work with {one}." for one in status.forced
              if one.worker in used]  # fmt: skip
    if any(one != versions[0] for one in versions):
        notes.append("Workers with different versions trained parts of this trial.")
    return notes


def git_commit() -> str | None:
    """Commit of the working directory, `-dirty` behind it where files were changed; None outside
    of git."""
    tool = shutil.which("git")
    if tool is None:
        return None
    command = [tool, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=GIT_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:  # a huge work tree; the commit is nice to have, no more
        return None
    return found.stdout.strip() or None
