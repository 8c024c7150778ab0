"""Supervisor of a host's workers: reap, start what is missing, look for stalls, sleep.

Imports neither torch nor Optuna. A worker that it saw die has no heartbeat left, so its trials are
set free at once instead of when their lease runs out; so are those of workers of this machine that
died with an earlier run. While the database is unavailable this waits; the rest continues.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hpo.errors import HpoError, InputError, Interrupted, StorageGone, StorageUnavailable
from hpo.io import HeldFolders, disk_full, is_full
from hpo.paths import StudyDir
from hpo.storage import leases, records
from hpo.storage.database import Database
from hpo.storage.retry import Outage
from hpo.workers.process import Process, ProcessSpawner, Watchdog, is_gone, new_worker_id, no_step

log = logging.getLogger(__name__)

TICK_S = 0.25
FIRST_BACK_OFF_S = 1.0
LARGEST_BACK_OFF_S = 30.0
HEALTHY_S = 60.0
"""A worker that lived this long resets its back-off."""
QUICK_DEATHS = 5
GRACE_S = 60.0
"""Seconds for workers to hand back after SIGTERM, before they are killed."""


def back_off(deaths: int) -> float:
    """Return the seconds to wait before the next start after `deaths` crashes in a row."""
    return min(LARGEST_BACK_OFF_S, FIRST_BACK_OFF_S * 2.0 ** (deaths - 1)) if deaths else 0.0


def last_sign(alive: Path) -> int | None:
    """Return the time (ns) of a worker's last step; None before its first one, and at its end."""
    try:
        return alive.stat().st_mtime_ns
    except FileNotFoundError:
        return None


@dataclass
class Slot:
    """One wanted worker: its device, and the process that fills it now."""

    device: str
    worker: str = ""
    process: Process | None = None
    started: float = 0.0
    deaths: int = 0
    turned_away: int = 0
    """Starts in a row at which the database was unavailable."""
    not_before: float = 0.0
    done: bool = False
    watchdog: Watchdog = field(default_factory=Watchdog)
    killed: str = ""
    """Why we ended the process ourselves."""


@dataclass
class Supervisor:
    """Workers of one study on this host."""

    database: Database
    uuid: str
    directory: StudyDir
    spawner: ProcessSpawner
    devices: Sequence[str]
    stall_timeout_s: float
    slots: list[Slot] = field(init=False)
    dead: dict[str, str] = field(default_factory=dict)
    """Workers that are dead, with the reason, and may still hold trials."""

    def __post_init__(self) -> None:
        self.slots = [Slot(device) for device in self.devices]
        self.outage = Outage("workers continue, the trials of dead ones wait")

    def run(self, stop: threading.Event, tick: Callable[[], object] = lambda: None) -> None:
        """Keep workers alive until the study is over or `stop` is set; `tick` is called a few times
        a second.

        Raises HpoError where workers cannot start, with the end of the last one's log; StorageGone
        where the database's file was removed: its workers have ended then, and no file of the study
        is left that was written since.
        """
        with HeldFolders(self.directory.root, self.directory.above) as folders:
            try:
                self._run(stop, tick)
            except StorageGone:
                folders.remove_recreated()
                raise

    def _run(self, stop: threading.Event, tick: Callable[[], object]) -> None:
        self._find_left_behind()
        try:
            while not stop.is_set() and not all(slot.done for slot in self.slots):
                for slot in self.slots:
                    self._tend(slot)
                if self.outage.is_due:
                    self._set_free()
                tick()
                stop.wait(TICK_S)
        finally:
            self._end(tick)

    def _tend(self, slot: Slot) -> None:
        now = time.monotonic()
        if slot.done:
            return
        self.database.require_file()
        if slot.process is None:
            if now >= slot.not_before:
                self._start(slot)
            return
        code = slot.process.poll()
        if code is not None:
            self._reap(slot, code, now)
        elif not slot.killed:
            idle_s = slot.watchdog.look(last_sign(self.directory.alive(slot.worker)), now)
            if idle_s > self.stall_timeout_s:
                slot.killed = no_step(self.stall_timeout_s)
                slot.process.kill()

    def _start(self, slot: Slot) -> None:
        slot.worker, slot.started = new_worker_id(), time.monotonic()
        try:
            slot.process = self.spawner.start(slot.worker, slot.device)
        except OSError as error:
            if not is_full(error):
                raise
            slot.not_before = slot.started + LARGEST_BACK_OFF_S
            log.warning("no worker can be started: %s", disk_full(self.directory.logs))
        slot.watchdog, slot.killed = Watchdog(), ""

    def _reap(self, slot: Slot, code: int, now: float) -> None:
        assert slot.process is not None
        slot.process.kill()  # whatever it started must not outlive it
        slot.process = None
        self.directory.alive(slot.worker).unlink(missing_ok=True)
        if code == 0:
            slot.done = True
            return
        if code == InputError.exit_code:
            raise HpoError(f"worker {slot.worker} cannot work:\n{self._last_words(slot)}")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        reason = slot.killed or f"worker died: {how}"
        self.dead[slot.worker] = reason
        log.warning("%s ended (%s)", slot.worker, reason)
        if code < 0 or code == Interrupted.exit_code:
            return  # a signal comes from outside: start the next one at once
        if code == StorageUnavailable.exit_code:
            slot.turned_away += 1  # not its fault
            slot.not_before = now + back_off(slot.turned_away)
            return
        slot.turned_away = 0
        useful = now - slot.started > HEALTHY_S or self._has_epochs(slot.worker)
        slot.deaths = 1 if useful else slot.deaths + 1
        if slot.deaths > QUICK_DEATHS:
            raise HpoError(
                f"workers die again and again ({how}); the last one's log "
                f"{self.directory.log(slot.worker)} ends:\n{self._last_words(slot)}"
            )
        slot.not_before = now + back_off(slot.deaths)

    def _find_left_behind(self) -> None:
        """Note workers of this machine that were killed together with their supervisor."""
        with self.outage.noted():
            for row in records.read_workers(self.database, self.uuid):
                if row.ended is None and is_gone(row.process):
                    self.dead[row.id] = "worker died with its run"

    def _set_free(self) -> None:
        """Release the trials of dead workers, if the database is available."""
        if not self.dead:
            return
        with self.outage.noted():
            for worker, reason in list(self.dead.items()):
                freed = leases.release_worker(self.database, worker, reason)
                if freed:
                    log.warning("%s: %s; %d trial(s) set free", worker, reason, freed)
                del self.dead[worker]

    def _has_epochs(self, worker: str) -> bool:
        """Return whether it has begun an epoch; True where the database is unavailable."""
        try:
            rows = records.read_attempts(self.database, self.uuid).values()
        except StorageUnavailable:
            return True
        return any(row.worker == worker and row.epoch for attempts in rows for row in attempts)

    def _last_words(self, slot: Slot) -> str:
        path = self.directory.log(slot.worker)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(lines[-8:])

    def _end(self, tick: Callable[[], object]) -> None:
        """Ask every worker to hand back, wait for it, kill what does not; free what they held."""
        running = [slot for slot in self.slots if slot.process is not None]
        for slot in running:
            if slot.process is not None and slot.process.poll() is None:
                slot.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        for slot in running:
            while slot.process is not None and slot.process.poll() is None:
                if time.monotonic() > deadline:
                    slot.process.kill()
                    slot.process.wait()
                tick()
                time.sleep(TICK_S / 2)
            if slot.process is not None:
                slot.process.kill()  # what it started
            self.dead[slot.worker] = "worker ended"
            self.directory.alive(slot.worker).unlink(missing_ok=True)
        with suppress(StorageGone):  # it is what ends this
            self._set_free()
