"""Retries while the database is unavailable: every storage call of a retrying thread is repeated.

A thread retries inside `Database.retrying(pause)`: a worker's main thread is, a plain command is
not. A call is one transaction, repeated whole until the database answers. The answer to a commit
may be lost with the connection, so that what is repeated was done already; each call is harmless
then:

    call                              done before, and repeated
    --------------------------------  ------------------------------------------------------------
    leases.claim                      finds its own token: the trial is ours, once
    leases.renew, keep_runtime,       set the same columns again
      begin_epoch
    leases.record_epochs              replaces the same epochs by themselves
    leases.release, release_worker    find nothing left to end, and say so
    leases.claim_enqueuer             the lease is ours still
    leases.release_enqueuer           finds nothing to end
    optuna.add_waiting                one more waiting trial, which is used, or never taken because
                                      its number is not below the budget
    records.add_worker                finds its own row
    records.update_worker, end_worker set the same columns again
    records.stop_study                finds the study stopped
    records.resolve_once              reads its own value back
    Optuna: system and user           set the same value again
      attributes, reports
    Optuna: a parameter               refused by its unique key, which Optuna ignores; the stored
                                      value is read back anyhow
    Optuna: the start of a trial      the trial runs already: False, which nobody asks for
    Optuna: the end of a trial        the lease holds no more, and our own attempt ended as was
                                      wanted: it is told

Everything else reads. A lease that is not ours any more is refused as ever, however late: `Fenced`
ends the waiting.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from hpo.errors import Fenced, StorageUnavailable
from hpo.storage.database import Database, Pause

log = logging.getLogger(__name__)

FIRST_DELAY_S = 0.2
LARGEST_DELAY_S = 5.0
JITTER = random.Random()
"""Python's own is seeded alike in all workers while they train."""
REMINDER_S = 60.0

P = ParamSpec("P")
R = TypeVar("R")


def delays() -> Iterator[float]:
    """Yield the seconds between two tries: doubled each time, jittered, so that the workers of a
    study do not all come back in the same instant."""
    delay = FIRST_DELAY_S
    while True:
        yield delay * JITTER.uniform(0.5, 1.0)
        delay = min(2 * delay, LARGEST_DELAY_S)


class Outage:
    """Log a database outage of one thread: at its start, every minute, at recovery.

    `consequence` says in words what this thread does meanwhile.
    """

    def __init__(self, consequence: str) -> None:
        self.consequence = consequence
        self.began: float | None = None
        self._said = self._due = 0.0

    @property
    def is_due(self) -> bool:
        """True if it is time to try again: a try may take a minute to fail, and no more than half
        of the time is to go into tries."""
        return time.monotonic() >= self._due

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Log StorageUnavailable that is raised inside, and suppress it."""
        tried = time.monotonic()
        try:
            yield
        except StorageUnavailable as error:
            now = time.monotonic()
            self._due = now + (now - tried)
            self._goes_on(error, now)
        except Fenced:
            self._is_over()  # that was an answer
            raise
        else:
            self._is_over()

    def _goes_on(self, error: StorageUnavailable, now: float) -> None:
        if self.began is None:
            self.began = self._said = now
            log.warning("database unavailable, retrying; %s: %s", self.consequence, error)
        elif now - self._said >= REMINDER_S:
            self._said = now
            log.warning("database unavailable for %.0f s, retrying: %s", now - self.began, error)

    def _is_over(self) -> None:
        if self.began is not None:
            log.warning("database available again after %.1f s", time.monotonic() - self.began)
            self.began = None


def retry_while_unavailable(pause: Pause | None, call: Callable[[], R]) -> R:
    """Return what `call` returns; repeat it while it raises StorageUnavailable, if `pause` is
    given.

    Raises what `pause` raises to give up.
    """
    if pause is None:
        return call()
    outage, waits = Outage("waiting for it"), delays()
    while True:
        with outage.noted():
            return call()
        pause(next(waits))


def storage_call(
    call: Callable[Concatenate[Database, P], R],
) -> Callable[Concatenate[Database, P], R]:
    """Repeat a function, whose first argument is the database, while its thread retries."""

    @wraps(call)
    def repeated(database: Database, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return retry_while_unavailable(database.pause, lambda: call(database, *args, **kwargs))

    return repeated
