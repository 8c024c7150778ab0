"""The epochs of one trial: those that the database has, and those that wait on this host's disk.

While the database is unavailable training continues. A checkpoint holds the metrics of all epochs
before it, so the latest one on disk is all that is needed to deliver them: by this worker, or, if
it dies, by the worker that takes the trial over on this host.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hpo.config.train import TrainConfig
from hpo.errors import Damaged
from hpo.io import discard
from hpo.search.study import Study
from hpo.search.sync import Checkpoints
from hpo.storage import leases, records
from hpo.storage.artifacts import Moved, nothing
from hpo.storage.records import Epoch
from hpo.training.checkpoint import Checkpoint
from hpo.training.train import EpochResult

log = logging.getLogger(__name__)


class EpochJournal:
    """What is known of a trial's epochs, by the attempt that holds `lease`."""

    def __init__(self, study: Study, checkpoints: Checkpoints) -> None:
        self.study, self.checkpoints, self.lease = study, checkpoints, checkpoints.lease
        self.rows: list[Epoch] = []
        """All that are finished, in order, up to the checkpoint; then those computed since."""
        self.recorded: list[Epoch] = []
        """Those that the database had when this attempt began: more, where a checkpoint is damaged
        or not here, and they are computed again."""
        self.checkpoint: Path | None = None
        """The last one's, to go on from."""
        self.delivered = 0
        """So many rows are in the database."""
        self.micro_batch: int | None = None
        """Images computed at once in the last one, where this attempt knows."""

    @property
    def waiting(self) -> int:
        """So many rows are not in the database yet."""
        return len(self.rows) - self.delivered

    @property
    def is_behind(self) -> bool:
        """True if this attempt computes again what is recorded."""
        return len(self.rows) < len(self.recorded)

    @property
    def known(self) -> list[Epoch]:
        """Each epoch that is finished, be it by this attempt or recorded before."""
        return self.rows + self.recorded[len(self.rows) :]

    def read(self, config: TrainConfig, moved: Moved = nothing) -> None:
        """Read what predecessors finished, as far as a checkpoint can be had on this host."""
        stored = records.read_epochs(self.study.database, self.study.uuid, self.lease.trial_id)
        rows = stored.get(self.lease.number, [])
        self.recorded = rows
        self.rows, self.checkpoint = self.checkpoints.newest(rows, partial(_fault, config), moved)
        self.delivered = len(self.rows)
        self._find_later(rows, config)
        self._note_damage()

    def _note_damage(self) -> None:
        """Say of damaged checkpoints, in the log and in the records of who wrote them, what became
        of the trial."""
        done = len(self.rows)
        what = f"goes on after epoch {done}" if done else "begins again"
        for path, reason in self.checkpoints.damaged.items():
            log.warning("trial %d %s: %s", self.lease.number, what, reason)
            k = int(path.parent.name.removeprefix("attempt-"))
            text = f"{path.name} is damaged: attempt {self.lease.k} {what}"
            leases.note_damage(self.study.database, self.lease, k, text)

    def _find_later(self, rows: list[Epoch], config: TrainConfig) -> None:
        """Find the furthest checkpoint on disk that goes on from what the database has: its worker
        died before it could deliver."""
        found = self.checkpoints.directory.checkpoints(self.lease.number)
        for epoch, attempt, path in sorted(found, reverse=True):
            if epoch <= len(rows):
                return
            try:
                start = _load(path, config)
            except Damaged as error:
                self.checkpoints.damaged[path] = str(error)
                continue
            if not continues(start.metrics, rows):
                continue
            fresh = [
                Epoch(n, attempt, 0.0, metrics, attempt)
                for n, metrics in enumerate(start.metrics, 1)
                if n > len(rows)
            ]
            log.info("trial %d: %d epoch(s) of attempt %d that the database does not have are on "
                     "disk", self.lease.number, len(fresh), attempt)  # fmt: skip
            self.rows, self.checkpoint, self.delivered = rows + fresh, path, len(rows)
            self.micro_batch = start.micro_batch
            return

    def add(self, result: EpochResult) -> None:
        """Add an epoch, computed by this attempt; its predecessor's file is needed no more unless
        the database names it."""
        pointer = self.lease.k if result.checkpoint else None
        known = self.recorded[result.epoch - 1 : result.epoch]
        if known and not _is_same(known[0].metrics, result.metrics):
            log.warning(
                "trial %d: epoch %d, computed again, has other values than before; later ones go",
                *(self.lease.number, result.epoch),
            )
            self.recorded = self.recorded[: result.epoch - 1]
        self.rows.append(Epoch(result.epoch, self.lease.k, 0.0, dict(result.metrics), pointer))
        self.micro_batch = result.micro_batch
        before, self.checkpoint = self.checkpoint, result.checkpoint
        if before is not None and before != self.checkpoints.pointed:
            discard(before)

    def deliver(self, progress: dict[str, Any]) -> str | None:
        """Record what waits, in one transaction under the lease; how the study is to stop, or None.

        Raises Fenced and StorageUnavailable.
        """
        if not self.waiting:
            return None
        *earlier, last = self.rows[self.delivered :]
        rows = [*(replace(row, checkpoint=None) for row in earlier), last]
        stop = leases.record_epochs(
            self.study.database, self.lease, rows, progress=progress, keep=len(self.recorded)
        )
        self.delivered = len(self.rows)
        self.checkpoints.recorded(self.checkpoint)
        return stop


def continues(metrics: Sequence[dict[str, float]], rows: Sequence[Epoch]) -> bool:
    """Return whether a training with these metrics, epoch by epoch, began with exactly the epochs
    `rows`. They hold times in seconds, so that no other training has the same."""
    stored = [row.metrics for row in rows]
    return json.dumps(metrics[: len(rows)], sort_keys=True) == json.dumps(stored, sort_keys=True)


MEASURED = ("seconds", "images_per_s", "peak_memory_mb")
"""Metrics that another run of the same epoch has others of."""


def _is_same(one: dict[str, float], other: dict[str, float]) -> bool:
    """Return whether two runs of an epoch computed the same, bit for bit."""
    mine, theirs = ({k: v for k, v in x.items() if k not in MEASURED} for x in (one, other))
    return json.dumps(mine, sort_keys=True) == json.dumps(theirs, sort_keys=True)


def _load(path: Path, config: TrainConfig) -> Checkpoint:
    """Load a checkpoint. Raises Damaged for a file that cannot be used, or is gone."""
    start = Checkpoint.load(path)
    start.require(config)
    return start


def _fault(config: TrainConfig, path: Path, rows: Sequence[Epoch]) -> str | None:
    """Return why the file is not the checkpoint of the last of `rows`; None where it is."""
    try:
        start = _load(path, config)
    except Damaged as error:
        return str(error)
    # Its times in seconds are those of no other training.
    if start.epoch == len(rows) and continues(start.metrics[-1:], rows[-1:]):
        return None
    return f"checkpoint {path}: of other epochs than the database has"
