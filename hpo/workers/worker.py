"""Worker: one process on one device that claims, runs and finishes trials until the study ends."""

from __future__ import annotations

import logging
import os
import platform
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from hpo import __version__
from hpo.control import phases_heard
from hpo.errors import (
    Damaged,
    DiskFull,
    Fenced,
    InputError,
    Interrupted,
    NotFound,
    StorageError,
    StorageGone,
)
from hpo.io import HeldFolders, has_room, raising_disk_full
from hpo.paths import Home
from hpo.search import retention, scheduling
from hpo.search.standings import Standings
from hpo.search.study import Study
from hpo.storage import leases, records
from hpo.storage.leases import NO_CONTACT, Claim, Lease
from hpo.storage.optuna import FencedStorage, add_waiting
from hpo.storage.records import Outcome
from hpo.storage.retry import Outage
from hpo.workers.process import Watchdog, new_worker_id, no_step, process_identity

log = logging.getLogger(__name__)

POLL_S = 0.5
BEATS_PER_LEASE = 4
LARGEST_BEAT_S = 5.0
LOOK_S = 1.0
"""Interval in which the heartbeat looks whether there is news, or repeats a failed beat: other
workers wait for that one, for one lease."""
ROOM_S = 5.0
"""Shortest wait of a worker whose disk was full."""
MISSING = (FileNotFoundError, NotFound, Damaged, KeyError)
"""Raised when another worker finished the trial and deleted its files, or somebody the study: by
Optuna a KeyError."""
DELETED = "the study was deleted"
GONE = "the database is gone"
LIBRARIES = ("torch", "torchvision", "optuna")


@dataclass
class News:
    """Decides which phases of a trial are shown before the next beat: those that last, and how far
    each is before the first step. Steps can wait for the beat, so that they cost no writes."""

    written: str = ""
    last: str = ""

    def look(self, phase: str) -> bool:
        """Return whether `phase` is worth a write of its own, a second after the last look."""
        kind, last = phase.partition(" ")[0], self.last
        self.last = kind
        known = self.written.partition(" ")[0] == kind
        return kind == last and phase != self.written and not (known and kind == "step")


@dataclass
class Progress:
    """Progress of the current trial, for the heartbeat; and the control that training asks.

    Every step touches the file `alive`, and so does whatever takes long before the first one
    (decoding images): by it the supervisor tells a training that hangs from one that is only slow
    to finish its epoch. A touch also calls `require`, which raises where the work is in vain.
    """

    stop: threading.Event
    alive: Path
    require: Callable[[], None] = lambda: None
    lease: Lease | None = None
    fenced: bool = False
    images: int = 0
    began: float = field(default_factory=time.monotonic)
    epoch: int = 0
    touched: float = 0.0
    phase: str = ""
    """What goes on now, in words."""

    def take(self, lease: Lease | None) -> None:
        """Note the lease of the current trial; None between trials."""
        self.lease, self.fenced, self.images, self.epoch, self.phase = lease, False, 0, 0, ""
        self.touch(time.monotonic())

    def enter(self, phase: str) -> None:
        """Note the phase that begins."""
        self.phase = phase

    def step(self, *, epoch: int, images: int) -> None:
        """Count the images of a step; raises where the trial is lost or the worker is stopped."""
        now = time.monotonic()
        if epoch != self.epoch:
            self.epoch, self.images, self.began = epoch, 0, now
        self.images += images
        self.touch(now)
        if self.fenced and self.lease is not None:
            raise self.lease.lost()
        if self.stop.is_set():
            raise Interrupted("stopped by a signal")

    def touch(self, now: float) -> None:
        """Leave a sign of life, at most once a second."""
        if now - self.touched > 1.0:
            self.touched = now
            self.require()
            with suppress(DiskFull), raising_disk_full(self.alive):
                self.alive.parent.mkdir(parents=True, exist_ok=True)
                self.alive.touch()

    def pause(self, seconds: float) -> None:
        """Wait for an unavailable database; a training that waits does not count as hanging."""
        self.touch(time.monotonic())
        if self.stop.wait(seconds):
            raise Interrupted("stopped by a signal while the database was away")

    def row(self, phase: str) -> dict[str, Any]:
        """Return what changed since the last epoch's row, for the worker's row in the database."""
        spent = time.monotonic() - self.began
        speed = {"images_per_s": self.images / spent} if self.images and spent > 1 else {}
        return speed | {"reason": phase or None}


class Runner(Protocol):
    """Runs the trials that a worker holds (`hpo.search.trial`)."""

    def run(self, claim: Claim, control: Progress) -> None:
        """Run it to its end; raise Interrupted or Fenced where that is not possible."""

    def drain(self, claim: Claim, reason: str, control: Progress) -> None:
        """End it without training: complete if it has all its epochs, else pruned."""

    def close(self) -> None:
        """Finish what goes on beside the trials."""


class Worker:
    """Pulls trials of one study until its budget is spent."""

    def __init__(
        self,
        study: Study,
        storage: FencedStorage,
        runner: Runner,
        *,
        home: Home,
        device: str = "cpu",
        worker_id: str | None = None,
    ) -> None:
        self.study, self.storage, self.runner = study, storage, runner
        self.database, self.home, self.device = study.database, home, device
        self.id = worker_id or new_worker_id()
        self.parent = os.getppid()
        self.full: DiskFull | None = None
        """The reason why this worker takes no trial now."""
        self.look_again = 0.0
        self.contact = NO_CONTACT
        self.standings = Standings(study)
        self.still_held = False
        """Whether a trial could not be handed back, because the database was unavailable."""

    def close(self) -> None:
        """Finish what goes on beside the trials."""
        self.runner.close()

    def run(self, stop: threading.Event, *, supervised: bool = False) -> str:
        """Work until the study is over or `stop` is set; return the reason of the end. Waits while
        the database is unavailable; raises StorageGone where it was removed, and leaves no file
        that was written after that."""
        directory = self.study.directory(self.home)
        with HeldFolders(directory.root, directory.above) as folders:
            try:
                reason = self._work(stop, directory.alive(self.id), supervised=supervised)
            except StorageGone:
                folders.remove_recreated()
                raise
            if reason == DELETED:
                folders.remove_recreated()
        return reason

    def _work(self, stop: threading.Event, alive: Path, *, supervised: bool) -> str:
        progress = Progress(stop, alive, self.database.require_file)
        progress.touch(time.monotonic())
        done = threading.Event()
        heart = threading.Thread(
            target=self._beat, args=(progress, done, supervised), name="heartbeat", daemon=True
        )
        reason = "failed"
        with self.database.retrying(progress.pause), phases_heard(progress.enter):
            try:
                records.add_worker(self.database, self.id, self.study.uuid, **self._about())
                heart.start()
                reason = self._loop(progress)
            except Interrupted as error:
                reason = str(error)
            except StorageGone:
                reason = GONE
                raise
            finally:
                done.set()
                if heart.ident is not None:
                    heart.join()
                self._sign_off(reason)
                alive.unlink(missing_ok=True)
        return reason

    def _sign_off(self, reason: str) -> None:
        if reason in (DELETED, GONE):
            return
        try:
            records.end_worker(self.database, self.id, reason)
        except (Interrupted, StorageError) as error:
            log.warning("could not sign off: %s", error)

    def _about(self) -> dict[str, Any]:
        versions = {"hpo": __version__} | {name: version(name) for name in LIBRARIES}
        versions["python"] = platform.python_version()
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": self.device,
            "versions": versions,
            "process": process_identity(),
        }

    def _loop(self, progress: Progress) -> str:
        retention.apply_retention(self.study, self.home, self.standings)
        while not progress.stop.is_set():
            try:
                reason = self._turn(progress)
            except Fenced as error:
                log.warning("%s: dropped", error)
            except Damaged as error:
                log.warning("%s: the trial goes back", error)
            except DiskFull as error:
                self._wait_for_room(error)
            except NotFound:
                return DELETED
            except Interrupted as error:
                if progress.stop.is_set():
                    return str(error)
            else:
                if reason is not None:
                    self._tidy_up()
                    return reason
        return "stopped by a signal"

    def _tidy_up(self) -> None:
        """Remove what a study that is over leaves: many trials ended since a trial last ran."""
        with suppress(NotFound):  # deleted meanwhile
            retention.apply_retention(self.study, self.home, self.standings)

    def _turn(self, progress: Progress) -> str | None:
        """Decide what to do next and do it; return a reason where nothing is left to do."""
        snapshot = self.study.snapshot()
        self._heard(snapshot.now)
        snapshot = scheduling.within_reach(snapshot, self.contact, self.study.row.lease_s)
        rule = self.study.rule(snapshot)
        decision = scheduling.decide(snapshot, rule, self.standings.prospects(snapshot))
        few = rule is None and snapshot.stop is None and len(snapshot.free) < 2
        filled = few and self._fill(snapshot)
        if isinstance(decision, scheduling.Over):
            return decision.reason
        if isinstance(decision, scheduling.Run) and self._has_room():
            free = scheduling.claim_order(decision.free, snapshot.running, random.randrange)
            self._try(free, progress, lambda claim: self._run(claim, progress))
        elif isinstance(decision, scheduling.Drain):
            self._try(
                decision.free,
                progress,
                lambda claim: self._run(claim, progress, drained=decision.reason),
            )
        elif not filled:
            progress.touch(time.monotonic())
            progress.stop.wait(POLL_S * random.uniform(0.5, 1.0))
        return None

    def _wait_for_room(self, error: DiskFull) -> None:
        """Take no trial until there is room; workers on other disks continue."""
        log.warning("waiting for room: %s", error)
        self.full, self.look_again = error, time.monotonic() + ROOM_S
        self._show_idle()

    def _has_room(self) -> bool:
        if self.full is None:
            return True
        if time.monotonic() < self.look_again or not has_room(self.full):
            return False
        log.info("there is room again")
        self.full = None
        self._show_idle()
        return True

    def _show_idle(self) -> None:
        """Show in the worker's row that it has no trial, and why it takes none."""
        idle = {"number": None, "epoch": None, "epochs": None}
        records.update_worker(self.database, self.id, reason=self._why_idle, **idle)

    @property
    def _why_idle(self) -> str | None:
        return None if self.full is None else f"waiting for room: {self.full}"

    def _heard(self, now: float) -> None:
        """Note that the database answered, at `now` by its clock."""
        self.contact = self.contact.heard(now, self.study.row.lease_s)

    def _fill(self, snapshot: Any) -> bool:
        """Add waiting trials if some are missing, and return whether there were any to add; they
        are counted again while it is our turn."""
        if not scheduling.missing(snapshot):
            return False
        if not leases.claim_enqueuer(self.database, self.study.uuid, self.id):
            return False
        count = scheduling.missing(self.study.snapshot())
        for _ in range(count):
            add_waiting(self.storage, self.study.row.study_id)
        leases.release_enqueuer(self.database, self.study.uuid, self.id)
        return count > 0

    def _try(self, free: Any, progress: Progress, work: Callable[[Claim], None]) -> None:
        for candidate in free:
            claim = leases.claim(self.database, self.study.uuid, candidate, self.id, self.contact)
            if claim is None:
                continue
            progress.take(claim.lease)
            try:
                work(claim)
            finally:
                progress.take(None)
            return

    def _run(self, claim: Claim, progress: Progress, drained: str | None = None) -> None:
        """Run a trial, or end it because the study is over, for the reason `drained`."""
        log.info("trial %d: attempt %d", claim.lease.number, claim.lease.k)
        try:
            with raising_disk_full(self.home.root):
                self._require_current(progress)
                if drained is None:
                    self.runner.run(claim, progress)
                else:
                    self.runner.drain(claim, drained, progress)
        except (Fenced, StorageGone):
            raise
        except Exception as error:
            # What happened here is no result of the trial: another worker may continue it.
            # An unexpected error counts against the trial.
            meant = isinstance(error, Interrupted | InputError | DiskFull)
            reason = str(error) if meant else f"{type(error).__name__}: {error}"
            outcome = Outcome.HANDED_BACK if meant else Outcome.LOST
            if not self._release(claim.lease, outcome, reason) and isinstance(error, MISSING):
                raise claim.lease.lost() from error
            raise
        self._show_idle()

    def _require_current(self, progress: Progress) -> None:
        """End, so that a new worker is started, where the study has more epochs since this one read
        its definition. Asked with a trial in hand: while it is held there are none more."""
        if self.study.is_outdated():
            progress.stop.set()
            raise Interrupted("the study has more epochs since this worker started")

    def _release(self, lease: Lease, outcome: Outcome, reason: str) -> bool:
        """Release the trial, and return whether it was still ours. Where the database is
        unavailable and we were asked to stop, the lease runs out instead."""
        try:
            if not leases.release(self.database, lease, outcome, reason):
                return False
        except StorageGone:
            raise
        except (Interrupted, StorageError) as error:
            log.warning("trial %d is held until its lease ends: %s", lease.number, error)
            self.still_held = True
            return True
        log.info("trial %d: %s (%s)", lease.number, outcome.words, reason)
        return True

    def _beat(self, progress: Progress, done: threading.Event, supervised: bool) -> None:
        """Renew the current lease; notice that it is lost, or that the supervisor is gone."""
        beat_s = min(self.study.row.lease_s / BEATS_PER_LEASE, LARGEST_BEAT_S)
        watchdog, limit_s = Watchdog(), self.study.file.study.stall_timeout_s
        outage, news, due = Outage("the heartbeat keeps trying"), News(), time.monotonic() + beat_s
        while not done.wait(min(beat_s, LOOK_S)):
            lease, phase = progress.lease, progress.phase
            if not news.look(phase) and time.monotonic() < due and outage.began is None:
                continue
            news.written, due = phase, time.monotonic() + beat_s
            stalled = watchdog.look(progress.touched, time.monotonic()) > limit_s
            try:
                with outage.noted():
                    if lease is not None and stalled:
                        self._give_up(lease, limit_s)
                    if lease is not None:
                        leases.renew(self.database, lease, progress.row(phase))
                    else:
                        records.update_worker(self.database, self.id, reason=self._why_idle)
                    self._heard(records.clock(self.database))
            except Fenced:
                progress.fenced = progress.lease is lease
            except StorageGone:
                return  # the main thread meets it at its next step
            except StorageError as error:
                # The owner writes on, however late; the training itself will meet the fault.
                log.warning("heartbeat: %s", error)
            if supervised and os.getppid() != self.parent:
                log.warning("the supervisor is gone: handing back and ending")
                progress.stop.set()

    def _give_up(self, lease: Lease, limit_s: float) -> None:
        """Release the trial of a training that hangs, perhaps with no supervisor to end it. Should
        it continue, its writes are refused."""
        if leases.release(self.database, lease, Outcome.LOST, no_step(limit_s)):
            log.warning("trial %d: lost (%s)", lease.number, no_step(limit_s))
