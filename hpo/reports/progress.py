"""Progress of a search as plain lines, one for each trial that pauses or is finished."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from hpo.config.study import StudyFile
from hpo.errors import StorageGone, StorageUnavailable
from hpo.formatting import duration, exact_duration, number, plural
from hpo.search.status import StudyStatus
from hpo.storage.records import (
    FINAL,
    WORTHLESS,
    Attempt,
    Outcome,
    Ranking,
    Trial,
    WorkerRow,
)

READ_S = 1.0
"""Shortest time between two reads of the database, which take a tenth of the time at most."""
AGAIN_S = 10.0
"""Plain lines tell so often how far a worker is that prepares a trial."""


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


def and_paused(status: StudyStatus) -> str:
    """Return `, 9 paused` where trials are."""
    paused = status.count(Outcome.PAUSED)
    return f", {paused} paused" if paused else ""


def trial_line(status: StudyStatus, trial: Trial, told: int) -> str:
    """Return one line of a log about a trial that is finished or paused, the `told`-th one."""
    line = f"{_counted(status, told)} trial {trial.number} {trial.state}"
    if trial.value is not None:
        line += f"  {status.file.metric} {number(trial.value)}"
    if trial.best_epoch:
        line += f" (epoch {trial.best_epoch})"
    if trial.epochs:
        line += f"  {plural(len(trial.epochs), 'epoch')}  {duration(trial.seconds)}"
    return line + (f": {trial.reason}" if trial.reason else "")


def last_ended(status: StudyStatus, most: int) -> list[Trial]:
    """Return the trials that paused or finished last, as they were then, the latest first."""
    paused = [_when_it_paused(status, trial, one) for trial, one in _pauses(status)]
    finished = [one for one in status.trials if one.state in FINAL and not _paused_before(one)]
    return sorted([*paused, *finished], key=_ended, reverse=True)[:most]


def best_by_trial(status: StudyStatus) -> list[float]:
    """Return the best value so far, each time a trial paused or finished with one."""
    ranking = Ranking({status.file.metric: status.file.direction})
    best: list[float] = []
    for trial in reversed(last_ended(status, len(status.trials) * 9)):
        if trial.value is not None and trial.state not in WORTHLESS:
            better = not best or ranking.beats((trial.value,), (best[-1],))
            best.append(trial.value if better else best[-1])
    return best


def ended_line(status: StudyStatus, trial: Trial) -> str:
    """Return what a trial came to and why it ended, short enough for a line of the live view."""
    line = f"trial {trial.number} {trial.state}"
    if trial.value is not None:
        line += f"  {status.file.metric} {number(trial.value)}"
    if trial.epochs:
        line += f"  {plural(len(trial.epochs), 'epoch')}"
    return line + (f": {trial.reason}" if trial.reason else "")


def starting(devices: Sequence[str]) -> str:
    """Return a line that says that workers are on their way."""
    return f"starting {plural(len(devices), 'worker')}: loading torch"


def _counted(status: StudyStatus, told: int) -> str:
    return f"[{told}]" if status.budget is None else f"[{told}/{status.budget}]"


def _when_it_paused(status: StudyStatus, trial: Trial, attempt: Attempt) -> Trial:
    """Return the trial as it was when `attempt` ended."""
    epochs = tuple(row for row in trial.epochs if row.attempt <= attempt.k)
    best = status.ranking.best_epoch(epochs)
    return replace(
        trial,
        state=Outcome.PAUSED,
        attempts=tuple(one for one in trial.attempts if one.k <= attempt.k),
        epochs=epochs,
        value=best.metrics[status.file.metric] if best else None,
        best_epoch=best.epoch if best else None,
        reason=attempt.reason,
    )


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
    """Prints a line for each trial that pauses or finishes, and for each worker that begins to
    wait. Trials that paused and are pruned at the end get one line together."""

    def __init__(
        self,
        read: Callable[[], StudyStatus],
        tell: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(read, tell, clock)
        self.seen = {trial.number for trial in self.status.trials if trial.state in FINAL}
        self.pauses = {(one.number, one.k) for _, one in _pauses(self.status)}
        known = range(self.status.file.known_trials)  # which were taken over
        self.told = self.seen - {*known} | {number for number, _ in self.pauses}
        self.pruned: list[Trial] = []
        """Paused trials that were pruned and have not been told yet."""
        self.reported: set[tuple[str, str]] = set()
        self.phases: dict[str, tuple[str, float]] = {}
        """The last phase that was told of each worker, and when."""
        self.warm: set[str] = set()
        """Workers that have finished an epoch: how they begin a trial is not told any more."""
        self.was_unavailable = False

    def show(self) -> None:
        """Print what is new since the last call."""
        if bool(self.problem) != self.was_unavailable:
            self.was_unavailable = not self.was_unavailable
            self.say(self.problem or "database available again")
        for worker in self.status.live_workers:
            if worker.value is not None:
                self.warm.add(worker.id)
            if worker.reason:
                self._tell_worker(worker, worker.reason)
        for trial in sorted(self._fresh(), key=_ended):
            self._tell(trial)
        if self.pruned and not self.status.count(Outcome.PAUSED):
            self.say(self._together(self.pruned))
            self.pruned = []

    def _tell_worker(self, worker: WorkerRow, reason: str) -> None:
        """Print why a worker waits, once; or what it does until its first epoch is finished, each
        phase once, and every AGAIN_S how far it is."""
        if worker.number is None and (worker.id, reason) not in self.reported:
            self.reported.add((worker.id, reason))
            self.say(f"{worker.id}: {reason}")
        if worker.number is None or worker.id in self.warm:
            return
        phase, now = f"trial {worker.number} {reason.partition(' ')[0]}", self.clock()
        told, when = self.phases.get(worker.id, ("", now))
        if phase != told or now - when >= AGAIN_S:
            self.phases[worker.id] = (phase, now)
            self.say(f"{worker.id}: trial {worker.number}: {reason}")

    def _fresh(self) -> Iterator[Trial]:
        """Yield trials that paused or finished since the last call, as they were then."""
        for trial, one in _pauses(self.status):
            if (one.number, one.k) not in self.pauses:
                self.pauses.add((one.number, one.k))
                yield _when_it_paused(self.status, trial, one)
        yield from (
            trial
            for trial in self.status.trials
            if trial.state in FINAL and trial.number not in self.seen
        )

    def _tell(self, trial: Trial) -> None:
        self.told.add(trial.number)
        if trial.state in FINAL:
            self.seen.add(trial.number)
        if trial.state == Outcome.PRUNED and _paused_before(trial):
            self.pruned.append(trial)
            return
        self.say(trial_line(self.status, trial, len(self.told)))

    def _together(self, trials: Sequence[Trial]) -> str:
        """Return a line on paused trials that were pruned at the end."""
        reason = (trials[-1].reason or "").removeprefix("paused, and ")
        pruned = f"{plural(len(trials), 'paused trial')} pruned: {reason}"
        return f"{_counted(self.status, len(self.told))} {pruned}"


def _pauses(status: StudyStatus) -> Iterator[tuple[Trial, Attempt]]:
    """Yield the attempts that paused, each with its trial."""
    for trial in status.trials:
        for attempt in trial.attempts:
            if attempt.outcome == Outcome.PAUSED:
                yield trial, attempt


def _paused_before(trial: Trial) -> bool:
    """Return whether the last attempt ended a paused trial and trained nothing."""
    if not trial.attempts:  # another tool may have made it
        return False
    *before, last = trial.attempts
    paused = bool(before) and before[-1].outcome == Outcome.PAUSED
    return paused and all(row.attempt != last.k for row in trial.epochs)


def _ended(trial: Trial) -> float:
    return max((one.ended or 0.0 for one in trial.attempts), default=0.0)
