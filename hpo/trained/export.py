"""Export of trials: complete configurations with their provenance, for `hpo train`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpo.config.study import dump_config
from hpo.config.train import RuntimeConfig, TrainConfig
from hpo.errors import Conflict, InputError, NotFound
from hpo.formatting import plural, plus_minus
from hpo.io import write_text
from hpo.paths import Home
from hpo.search import sync, verification
from hpo.search.fingerprints import IMAGES, read_code
from hpo.search.status import StudyStatus, read_status
from hpo.search.verification import Verification
from hpo.storage import records
from hpo.storage.database import Database
from hpo.storage.records import FINAL, WORTHLESS, Trial

GIT_TIMEOUT_S = 10
MOST_TIES = 5
"""Most tied trials that a note names."""


def describe_trial(
    database: Database, status: StudyStatus, trial: Trial, config: TrainConfig
) -> dict[str, Any]:
    """Return the [provenance] table of a trial's configuration; unknown values are None.

    `interval` is the 95 % interval of the value, `rates` the learning rate of each epoch,
    `stopped_epoch` the one after which early stopping ended the trial.
    """
    images = records.read_resolved(database, status.row.uuid, IMAGES)
    code = read_code(database, status.row.uuid)
    worker = next((w for w in status.workers if w.id == trial.attempts[-1].worker), None)
    trained = len(trial.epochs)
    stopped = trial.state == "complete" and trained < config.epochs
    interval = status.noise.interval(trial)
    return {
        "study": status.row.name,
        "trial": trial.number,
        "state": trial.state,
        "origin": trial.origin,
        "metric": status.file.metric,
        "value": trial.value,
        "values": trial.values or None,
        "interval": None if interval is None else [interval.low, interval.high],
        "validation_images": sum(status.validated.values()) or None,
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
    """Return the comment lines at the top of an exported configuration."""
    value = f"{provenance['metric']} = {provenance['value']:.4f} (validation)"
    verified = verified_line(provenance)
    return [
        f"Trial {provenance['trial']} of study {provenance['study']}: {value}, best in epoch "
        f"{provenance['best_epoch']} of {provenance['epochs_trained']}.",
        *([f"{verified}."] if verified else []),
        *provenance["notes"],
    ]


def verified_line(provenance: Mapping[str, Any]) -> str | None:
    """Say what the verification found of an exported trial; None where it was not verified."""
    found = provenance.get("verified")
    if not found:
        return None
    low, high = found["interval"]
    tied = ", ".join(map(str, found["tied_with"]))
    mean = plus_minus(found["mean"], (high - low) / 2)
    return (
        f"Verified with {plural(len(found['seeds']), 'other seed')}: mean {provenance['metric']} = "
        f"{mean} (95 %)" + (f"; not distinguishable from trial {tied}" if tied else "")
    )


def _verified(found: Verification | None, trial: Trial) -> dict[str, Any] | None:
    """Return what the verification says of `trial`: with which seeds, mean and interval, and from
    which trials it cannot be told where it is the winner; None before all are trained."""
    if found is None or found.pending:
        return None
    rows = [one for one in found.candidates if one.trial == trial.number]
    if not rows or rows[0].interval is None:
        return None
    interval, winner = rows[0].interval, found.winner
    tied = found.tied if winner is not None and winner.trial == trial.number else ()
    return {
        "study": found.name,
        "seeds": list(rows[0].values),
        "mean": rows[0].mean,
        "interval": [interval.low, interval.high],
        "tied_with": [one.trial for one in tied],
    }


def _notes(status: StudyStatus, trial: Trial) -> list[str]:
    """Return what makes the value of the trial uncertain."""
    finished = status.finished + status.file.known_trials
    notes = [
        f"The value is the best of {len(trial.epochs)} epochs, from one seed and a study of "
        f"{finished} finished trials: new images will give a little less."
    ]
    if trial.state == "pruned":
        reason = f" ({trial.reason})" if trial.reason else ""
        notes.append(f"This trial was pruned{reason}: its full schedule was never run.")
    if trial.state == "paused":
        last = status.file.config(trial.params).epochs
        notes.append(f"This trial is paused after epoch {len(trial.epochs)} of {last}: it has not "
                     "run to its end.")  # fmt: skip
    if status.pruned_note and trial.state == "complete":
        notes.append(f"{status.pruned_note}.")
    used = {attempt.worker for attempt in trial.attempts}
    versions = [worker.versions for worker in status.workers if worker.id in used]
    notes += [f"A worker was forced to work with {one}." for one in status.forced
              if one.worker in used]  # fmt: skip
    if any(one != versions[0] for one in versions):
        notes.append("Workers with different versions trained parts of this trial.")
    return [*notes, *_noise_notes(status, trial)]


def _noise_notes(status: StudyStatus, trial: Trial) -> Iterator[str]:
    """Yield the interval of a trial's value, the trials that tie with it if it is the best, and
    that its curve still rises."""
    if interval := status.noise.describe(trial):
        yield f"Interval of the value: {interval}."
    best = status.best
    if best is not None and best.number == trial.number and status.ties:
        numbers = ", ".join(str(one.number) for one in status.ties[:MOST_TIES])
        more = ", ..." if len(status.ties) > MOST_TIES else ""
        tied = f"{len(status.ties)} other trials are" if status.ties[1:] else "another trial is"
        yield f"Not distinguishable from it: {tied} within noise ({numbers}{more})."
    if status.noise.still_rises(trial):
        yield "Its curve still rose in the last epoch: more epochs may give more."


def git_commit() -> str | None:
    """Return the commit of the working directory, with `-dirty` if files were changed; None outside
    of git."""
    tool = shutil.which("git")
    if tool is None:
        return None
    command = [tool, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=GIT_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:  # a huge work tree: do without the commit
        return None
    return result.stdout.strip() or None


Export = tuple[TrainConfig, dict[str, Any]]
"""A configuration and its provenance."""


def export(database: Database, name: str, *, number: int | None = None) -> Export:
    """Return the configuration of the best trial of study `name`, once it is verified of the
    winner (`hpo.search.verification`), or of trial `number`: every field, the runtime of the trial,
    and its provenance (see `describe_trial`).

    Raises NotFound for an unknown study or trial, or if no trial is complete yet; InputError for a
    trial that runs or has no result, and for the best one of a verification, which is a lucky seed.
    A pruned or paused one is exported, with a note.
    """
    status, found = read_status(database, name), verification.read(database, name)
    if number is not None:
        return _exported(database, status, _numbered(status, number), found)
    if (verified := status.file.verifies) is not None:
        raise InputError(
            f"{name!r} verifies {verified.study!r}, and its best trial is a lucky seed: hpo export "
            f"{verified.study} takes the winner"
        )
    winner = None if found is None else found.winner
    best = best_trials(status, 1)[0] if winner is None else _numbered(status, winner.trial)
    return _exported(database, status, best, found)


def export_top(database: Database, name: str, k: int) -> list[Export]:
    """Return the `k` best complete trials, best first, or all if there are fewer.

    Raises NotFound as `export` does, InputError for k below 1.
    """
    if k < 1:
        raise InputError(f"--top {k}: at least 1")
    status, found = read_status(database, name), verification.read(database, name)
    return [_exported(database, status, trial, found) for trial in best_trials(status, k)]


def export_front(database: Database, name: str) -> list[Export]:
    """Return the Pareto front, sorted by the first objective.

    Raises NotFound as `export` does, InputError for a study of a single metric.
    """
    status, found = read_status(database, name), verification.read(database, name)
    if len(status.file.objectives) == 1:
        raise InputError(
            f"study {name!r} has one metric, {status.file.metric}: its best trial is all of its "
            f"front; hpo export {name} writes it"
        )
    best_trials(status, 1)
    return [_exported(database, status, trial, found) for trial in status.front()]


def write_export(
    path: Path, config: TrainConfig, provenance: Mapping[str, Any], *, force: bool = False
) -> None:
    """Write a configuration as TOML that `load_config` reads. Raises Conflict if the file exists,
    unless `force`."""
    _require_absent([path], force)
    write_text(path, dump_config(config, provenance, comments(provenance)))


def write_weights(
    database: Database, name: str, number: int, path: Path, home: Home, *, force: bool = False
) -> None:
    """Copy the kept weights of trial `number` to `path`. Raises Conflict if the file exists,
    unless `force`; NotFound if none were kept, or only on another host."""
    _require_absent([path], force)
    row = records.get_study(database, name)
    last = records.read_attempts(database, row.uuid)[number][-1]
    if not sync.fetch_weights(database, home, row.uuid, last, path):
        raise NotFound(
            f"there are no weights of trial {number} of {name!r} on this host or in artifacts; "
            "those of the best three trials are kept (of several metrics: of the front), on the "
            "host that trained them and where `hpo run --artifacts` says"
        )


def write_top(folder: Path, exports: Sequence[Export], *, force: bool = False) -> list[Path]:
    """Write a file for each export into `folder`, named by rank and trial; return their paths.
    Raises Conflict if one of them exists, unless `force`; then none is written."""
    digits = len(str(len(exports)))
    paths = [
        folder / f"{rank:0{digits}}-trial-{provenance['trial']}.toml"
        for rank, (_, provenance) in enumerate(exports, 1)
    ]
    _require_absent(paths, force)
    for path, (config, provenance) in zip(paths, exports, strict=True):
        write_export(path, config, provenance, force=True)
    return paths


def _require_absent(paths: Sequence[Path], force: bool) -> None:
    existing = [str(path) for path in paths if path.exists()]
    if existing and not force:
        raise Conflict(f"{', '.join(existing)} exists; choose another name, or --force replaces it")


def best_trials(status: StudyStatus, k: int) -> list[Trial]:
    """Return the `k` best complete trials, best first. Raises NotFound if there is none."""
    ranked = status.ranked()
    if not ranked:
        name = status.row.name
        states = ("waiting", "running", "paused", "interrupted", *FINAL)
        there = [f"{status.count(one)} {one}" for one in states if status.count(one)]
        advice = status.pruned_note or (
            f"hpo trials {name} says why, hpo extend {name} gives it more"
            if status.state == "finished"
            else f"hpo run or hpo worker {name} goes on with it"
        )
        paused = next(iter(status.ranked("paused")), None)
        if paused is not None and not status.pruned_note:
            advice += f"; hpo export {name} --trial {paused.number} takes the best paused one"
        raise NotFound(
            f"study {name!r} has no complete trial yet ({', '.join(there) or 'none at all'}). "
            f"{advice}"
        )
    return ranked[:k]


def _numbered(status: StudyStatus, number: int) -> Trial:
    name = status.row.name
    trial = next((one for one in status.trials if one.number == number), None)
    if trial is None:
        numbers = [one.number for one in status.trials]
        have = f"0 to {max(numbers)}" if numbers else "none yet"
        raise NotFound(f"study {name!r} has no trial {number}; its trials: {have}")
    reason = f" ({trial.reason})" if trial.reason else ""
    if trial.state in ("failed", *WORTHLESS):
        raise InputError(
            f"trial {number} of {name!r} ended as {trial.state}{reason}: there is nothing "
            f"worth training again; hpo trials {name} shows the others"
        )
    if trial.state not in (*FINAL, "paused"):
        raise InputError(f"trial {number} of {name!r} is {trial.state}; export it when it is over")
    if not trial.epochs:
        raise InputError(f"trial {number} of {name!r} ended before its first epoch{reason}")
    return trial


def _exported(
    database: Database, status: StudyStatus, trial: Trial, found: Verification | None
) -> Export:
    config = status.file.config(trial.params)
    runtimes = [one.runtime for one in trial.attempts if one.runtime is not None]
    if runtimes:
        runtime = RuntimeConfig.recorded(runtimes[-1])
        config = config.model_copy(update={"runtime": runtime})
    described = describe_trial(database, status, trial, config)
    return config, described | {"verified": _verified(found, trial)}
