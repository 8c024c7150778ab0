"""Progress of a search as plain lines, one for each finished trial."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from hpo.config.study import StudyFile
from hpo.errors import StorageGone, StorageUnavailable
from hpo.formatting import duration, exact_duration, number, plural
from hpo.search.status import StudyStatus
from hpo.storage.records import FINAL, Trial

READ_S = 1.0
"""Shortest time between two reads of the database, which take a tenth of the time at most."""


def headline(status: StudyStatus, storage: str, devices: Sequence[str]) -> str:
    """Return the first line of a log: study, budget, workers, storage."""
    return (
        f"{status.row.name}: {', '.join((status.finished_of, *time_and_epochs(status)))}; "
        f"{plural(len(devices), 'worker')} on {', '.join(dict.fromkeys(devices))}; {storage}"
    )


def time_and_epochs(status: StudyStatus) -> Iterator[str]:
    """Yield the budgets of time and epochs, in words."""
    row = status.row
    if row.max_time_s is not None:
        yield f"at most {exact_duration(row.max_time_s)}"
    if row.max_full_trainings is not None:
        yield f"at most {row.max_full_trainings:g} full trainings"
    if row.timeout_s is not None:
        yield f"at most {exact_duration(row.timeout_s)} of work"


def finished_trials(status: StudyStatus) -> str:
    """Return `3 of 40 trials`; without a limit on them `3 trials`."""
    if status.budget is None:
        return plural(status.finished, "trial")
    return f"{status.finished} of {status.budget} trials"


def first_lines(file: StudyFile) -> list[str]:
    """Return lines that say what a new study of `file` tries before it searches, and where each
    comes from; none where that is nothing but baselines."""
    if not file.proposals:
        return []
    count = len(file.baselines)
    after = f" after {plural(count, 'baseline')}" if count else ""
    return [f"tried first{after}:", *(f"  {one}" for one in file.proposals)]


def trial_line(status: StudyStatus, trial: Trial, finished: int) -> str:
    """Return one line of a log about a finished trial."""
    of = "" if status.budget is None else f"/{status.budget}"
    line = f"[{finished}{of}] trial {trial.number} {trial.state}"
    if trial.value is not None:
        line += f"  {status.file.metric} {number(trial.value)}"
    if trial.best_epoch:
        line += f" (epoch {trial.best_epoch})"
    if trial.epochs:
        line += f"  {plural(len(trial.epochs), 'epoch')}  {duration(trial.seconds)}"
    return line + (f": {trial.reason}" if trial.reason else "")


STOPPING = "stopping: running trials are handed back after their current step; again: stop now"


class View:
    """Reads a study's status and shows nothing but messages; `tick` may be called at any pace."""

    def __init__(
        self,
        read: Callable[[], StudyStatus],
        tell: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.read, self.tell, self.clock = read, tell, clock
        self.status = read()
        self.due = clock() + READ_S
        self.note = ""
        self.problem = ""
        """Why the database cannot be read now; the status is an earlier one."""

    def tick(self) -> StudyStatus:
        """Read and show the status again if it is due; return the latest."""
        began = self.clock()
        if began >= self.due:
            self.finish()
            ended = self.clock()
            self.due = ended + max(READ_S, 10 * (ended - began))
        return self.status

    def follow(self, stop: threading.Event) -> None:
        """Tick; once `stop` is set, say that the workers hand their trials back."""
        if stop.is_set() and self.note != STOPPING:
            self.say(STOPPING)
        self.tick()

    def finish(self) -> None:
        """Read and show the status now, or that the database is unavailable. That it was removed is
        reported by the supervisor, which ends the workers."""
        try:
            self.status = self.read()
        except StorageGone:
            return
        except StorageUnavailable as error:
            self.problem = f"database unavailable, retrying; workers keep training: {error}"
        else:
            self.problem = ""
        self.show()

    def show(self) -> None:
        """Show `status`."""

    def say(self, note: str) -> None:
        """Show a message."""
        self.note = note
        self.tell(note)


class PlainView(View):
    """Prints a line for each trial that finishes, and for each worker that begins to wait."""

    def __init__(
        self,
        read: Callable[[], StudyStatus],
        tell: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(read, tell, clock)
        self.seen = {trial.number for trial in self.status.trials if trial.state in FINAL}
        self.reported: set[tuple[str, str]] = set()
        self.was_unavailable = False

    def show(self) -> None:
        """Print what is new since the last call."""
        if bool(self.problem) != self.was_unavailable:
            self.was_unavailable = not self.was_unavailable
            self.say(self.problem or "database available again")
        for worker in self.status.live_workers:
            if worker.reason and (worker.id, worker.reason) not in self.reported:
                self.reported.add((worker.id, worker.reason))
                self.say(f"{worker.id}: {worker.reason}")
        fresh = [t for t in self.status.trials if t.state in FINAL and t.number not in self.seen]
        for trial in sorted(fresh, key=_ended):
            self.seen.add(trial.number)
            self.say(trial_line(self.status, trial, len(self.seen)))


def _ended(trial: Trial) -> float:
    return max((one.ended or 0.0 for one in trial.attempts), default=0.0)
