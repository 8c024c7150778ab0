"""What a study is doing, as plain data: for `hpo status`, the live view, reports and exports.

Reads the database alone, without Optuna's storage: `hpo status` answers in a fraction of a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from hpo.config.constraints import to_relax
from hpo.config.study import StudyFile
from hpo.errors import ConfigError, NotFound
from hpo.formatting import plural
from hpo.search import noise, promotion, scheduling
from hpo.search.eta import SAMPLED, lengths_of, pace_of, time_left
from hpo.search.fingerprints import Override, read_overrides, read_report
from hpo.search.promotion import CHANCE, Place, RungCount, Rungs, Standing, rungs_of, standings_of
from hpo.search.scheduling import budget_parts
from hpo.storage import records
from hpo.storage.database import Database
from hpo.storage.records import (
    ALIVE_S,
    FINAL,
    WORTHLESS,
    Attempt,
    Epoch,
    Outcome,
    Ranking,
    StudyRow,
    Trial,
    WorkerRow,
    read_params,
)
from hpo.storage.snapshot import Spending

STATES = ("waiting", "running", "paused", "interrupted", *map(str, FINAL))
"""All states of a trial."""
VERIFY, LONGEST_NAME = ".verify", 64
"""How the name of a verification ends, and the most characters of a study's."""


@dataclass(frozen=True)
class StudyStatus:
    """A whole study at one moment."""

    row: StudyRow
    file: StudyFile
    now: float
    trials: tuple[Trial, ...]
    workers: tuple[WorkerRow, ...]
    live_workers: tuple[WorkerRow, ...]
    forced: tuple[Override, ...] = ()
    """Workers that were made to work with other code or images than the study began with."""
    chance: float | None = None
    """What guessing reaches, if known: a rung where no trial beats it decides nothing."""
    validated: Mapping[str, int] = field(default_factory=dict)
    """Validation images of each class, of all folds together; empty if unknown."""

    @cached_property
    def own_trials(self) -> tuple[Trial, ...]:
        """Its trials but for those that it took over from an earlier study."""
        return tuple(one for one in self.trials if one.number >= self.file.known_trials)

    def count(self, *states: str) -> int:
        """Count its own trials in any of `states`."""
        return sum(self._counts[state] for state in states)

    @cached_property
    def _counts(self) -> Counter[str]:
        return Counter(trial.state for trial in self.own_trials)

    @property
    def taken_note(self) -> str | None:
        """A word on the trials that it took over; None where there are none."""
        taken = self.file.taken_over
        if taken is None:
            return None
        return (
            f"{plural(len(taken.trials), 'trial')} of {taken.study} taken over, outside the budget"
        )

    @property
    def finished(self) -> int:
        """Number of its own trials that have a final outcome."""
        return self.count(*FINAL)

    @cached_property
    def noise(self) -> noise.Noise:
        """How much of the values is noise."""
        maximize = self.file.direction == "maximize"
        return noise.Noise(self.file.metric, maximize, self.validated, _folds(self.file))

    @cached_property
    def ties(self) -> list[Trial] | None:
        """The complete trials that cannot be told from the best one; None where that is unknown."""
        ranked = self.ranked()
        return self.noise.ties(ranked[0], ranked) if ranked else None

    @property
    def reference(self) -> Trial | None:
        """The trial that the best one is compared with: a baseline, or a recommended one."""
        return noise.reference(self.trials)

    @property
    def best(self) -> Trial | None:
        """The best complete trial."""
        return next(iter(self.ranked()), None)

    @property
    def best_so_far(self) -> Trial | None:
        """The best complete trial; while none is, the best of those that have not ended."""
        return self.best or next(iter(self.ranked("running", "interrupted", "paused")), None)

    @property
    def best_pruned(self) -> Trial | None:
        """The best pruned trial, where its best epoch beats every complete trial: pruning cost the
        study its best value. Of several metrics by the first one."""
        pruned, best = next(iter(self.ranked(Outcome.PRUNED)), None), self.best
        if pruned is None or best is None:
            return pruned
        first = Ranking({self.file.metric: self.file.direction})
        return pruned if first.beats((pruned.value or 0.0,), (best.value or 0.0,)) else None

    @property
    def pruned_note(self) -> str | None:
        """A word on `best_pruned`; None where there is none."""
        trial, best = self.best_pruned, self.best
        if trial is None:
            return None
        side = "above" if self.file.direction == "maximize" else "below"
        than = f", {side} the best complete one" if best else ", and no trial is complete"
        return (
            f"Pruned trial {trial.number} reached {self.file.metric} {trial.value:.4g} in epoch "
            f"{trial.best_epoch}{than}: its full schedule was never run; hpo export "
            f"{self.row.name} --trial {trial.number} takes it"
        )

    @property
    def no_best(self) -> str | None:
        """Why finished trials have no best one, in words; None where they have one, or are none."""
        if self.best is not None or not self.finished:
            return None
        told = [one for one in (self._why_diverged(), self._why_infeasible()) if one]
        return "; ".join(told) or "no trial was completed"

    def _why_infeasible(self) -> str | None:
        reasons = [t.reason or "" for t in self.trials if t.state == Outcome.INFEASIBLE]
        if not reasons:
            return None
        advice = to_relax(self.file.study.limits, reasons)
        return (
            f"{len(reasons)} of {self.finished} trials are infeasible, and no other was completed; "
            f"under another study.name relax in study.constraints: {advice}"
        )

    def _why_diverged(self) -> str | None:
        diverged = self.count(Outcome.DIVERGED)
        if not diverged:
            return None
        rates = [t.params["optimizer.lr"] for t in self.trials if "optimizer.lr" in t.params]
        tried = f" (tried: {min(rates):.3g} to {max(rates):.3g})" if rates else ""
        return (
            f"{diverged} of {self.finished} trials diverged, their loss was not finite, and no "
            "other was completed: they count as worse than anything, and none of them is best; "
            f"try a smaller optimizer.lr{tried}, or clip_grad_norm"
        )

    @property
    def ranking(self) -> Ranking:
        """Order of trials by the study's objectives."""
        return Ranking(self.file.directions)

    def ranked(self, *states: str) -> list[Trial]:
        """Return the complete trials, or those in `states`, best value first; of equals the earlier
        one."""
        wanted = states or (Outcome.COMPLETE,)
        trials = {t.number: t for t in self.trials if t.state in wanted}
        scores = {n: (t.value,) for n, t in trials.items() if t.value is not None}
        return [trials[number] for number in self.ranking.order(scores)]

    def front(self) -> list[Trial]:
        """Return complete trials that no other beats in all objectives, best first objective first;
        of a single objective the best."""
        ranked = self.ranked()
        if not self.ranking.has_several:
            return ranked[:1]
        done = {trial.number: trial for trial in ranked if trial.values}
        scores = {number: tuple(trial.values.values()) for number, trial in done.items()}
        return [done[number] for number in self.ranking.front(scores)]

    @property
    def state(self) -> str:
        """running, waiting (no worker), stopped, or finished."""
        if self.row.stop == "user":
            return "stopped"
        left = self.row.trials - self.file.known_trials - self.finished
        if not self.count("running") and (self.row.stop or left <= 0):
            return "finished"
        return "running" if self.live_workers else "waiting"

    @property
    def active_s(self) -> float:
        """Summed time of all attempts."""
        return sum(end - start for start, end in self._spans())

    @property
    def elapsed_s(self) -> float:
        """Time in which anything ran, by the clock: pauses between two runs do not count."""
        elapsed = reached = 0.0
        for start, end in sorted(self._spans()):
            elapsed += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return elapsed

    def end_of(self, attempt: Attempt) -> float:
        """Return when an attempt ended; of one without an end now, or the end of its lease."""
        return attempt.ended or (self.now if attempt.live else attempt.until)

    def _spans(self) -> Iterator[tuple[float, float]]:
        """Yield when each attempt began and ended."""
        for trial in self.trials:
            for one in trial.attempts:
                yield one.started, self.end_of(one)

    @cached_property
    def spending(self) -> Spending:
        """What is spent of its budgets of time and epochs."""
        return Spending(
            timeout_s=self.row.timeout_s,
            active_s=self.active_s,
            max_time_s=self.row.max_time_s,
            elapsed_s=self.elapsed_s,
            max_full_trainings=self.row.max_full_trainings,
            max_epochs=self.file.max_epochs,
            spent_epochs=sum(len(trial.epochs) for trial in self.own_trials),
        )

    @property
    def budget(self) -> int | None:
        """The number of trials that it ends with; None without a limit on them."""
        return self.row.budget

    @property
    def finished_of(self) -> str:
        """The number of finished trials, and of how many: `3/40 trials`, `3 trials, no limit`."""
        if self.budget is None:
            return f"{plural(self.finished, 'trial')}, no limit"
        return f"{self.finished}/{self.budget} trials"

    @property
    def begun(self) -> int:
        """Number of trials that were begun."""
        return len(self.own_trials) - self.count("waiting")

    @property
    def progress(self) -> str:
        """How far it is: `finished_of`; under a scheduler, where trials finish late, how many were
        begun, and the epochs: `31/50 begun, 87/~174 epochs`."""
        if self.rungs is None or self.state == "finished":
            return self.finished_of
        if self.expected_epochs is None:
            return f"{plural(self.begun, 'trial')} begun, no limit"
        epochs = f"{self.spending.spent_epochs}/~{self.expected_epochs} epochs"
        return f"{self.begun}/{self.budget} begun, {epochs}"

    @property
    def done(self) -> float:
        """Which part of the study is over, 0 to 1, by the budget of which most is spent; of trials
        under a scheduler by their epochs."""
        parts = list(budget_parts(self.spending).values())
        if self.budget is not None:
            parts.append(self.finished / max(1, self.budget))
        if self.expected_epochs:
            parts.append(self.spending.spent_epochs / self.expected_epochs)
        return min(1.0, max(parts, default=0.0))

    @cached_property
    def rungs(self) -> Rungs | None:
        """Where trials pause; None without a scheduler."""
        return None if self.file.study.scheduler is None else rungs_of(self.file, self.chance)

    @cached_property
    def _standings(self) -> list[Standing]:
        return [] if self.rungs is None else standings_of(self.rungs, self.file.metric, self.trials)

    def count_rungs(self) -> list[RungCount]:
        """Return the rungs with their trials, the first one first; none without a scheduler."""
        return [] if self.rungs is None else promotion.count_rungs(self.rungs, self._standings)

    def place_of(self, trial: Trial) -> Place | None:
        """Return where a paused trial stands among those of its rung; None for another trial."""
        if self.rungs is None or trial.state != Outcome.PAUSED:
            return None
        return promotion.place(self.rungs, self._standings, trial.number)

    @cached_property
    def expected_epochs(self) -> int | None:
        """The epochs that all trials will have had at the end, about; None without a scheduler or a
        number of trials."""
        if self.rungs is None or self.budget is None:
            return None
        lost = [t for t in self.trials if t.state in ("failed", *WORTHLESS)]
        trials, last = max(0, self.row.trials - len(lost)), self.file.max_epochs
        first = {one.number for one in self.own_trials if one.origin not in SAMPLED}
        expected = promotion.expected_epochs(self.rungs, last, trials, self._standings, first)
        gone = sum(len(t.epochs) for t in lost)
        known = sum(len(t.epochs) for t in self.trials if t.number < self.file.known_trials)
        return max(round(expected) + gone - known, self.spending.spent_epochs)

    @property
    def eta_s(self) -> float | None:
        """Time left until the first of its budgets is spent, at the pace so far with the workers of
        now; None if unknown."""
        if self.state in ("finished", "stopped"):
            return 0.0
        known = [
            left for left in (self._trials_eta_s(), *self._budget_etas_s()) if left is not None
        ]
        return max(0.0, min(known)) if known and self.live_workers else None

    def _trials_eta_s(self) -> float | None:
        """Time left by what trials took and how long they are, under a scheduler by the epochs."""
        if self.expected_epochs is not None:
            return self._epochs_eta_s(self.expected_epochs)
        pace, workers = pace_of(self.own_trials), len(self.live_workers)
        if self.budget is None or pace is None or not workers:
            return None
        first = sum(one.origin not in SAMPLED for one in self.own_trials)
        most, pruner = self.file.max_epochs, self.file.study.pruner.name
        lengths = lengths_of(self.own_trials, self.budget, first, most, pruner)
        open_ = [one for one in self.own_trials if one.state not in FINAL and one.attempts]
        rests = [lengths.rest(one, most) for one in open_]
        new = self.budget - self.finished - len(open_)
        whole = sum(one.origin not in SAMPLED and not one.attempts for one in self.own_trials)
        epochs = sum(rests) + whole * lengths.whole + (new - whole) * lengths.pruned
        workers = min(workers, new + len(open_))
        return time_left(pace, epochs, new, workers=workers, longest=max(rests, default=0.0))

    def _epochs_eta_s(self, expected: int) -> float | None:
        """Time left until `expected` epochs are done. Those in progress count as half done."""
        spent, busy = self.spending.spent_epochs, self.count("running")
        pace = pace_of(self.own_trials)
        workers = min(len(self.live_workers), max(busy, (self.budget or 0) - self.finished))
        if pace is None or not workers:
            return None
        attempts = sum(len(one.attempts) for one in self.own_trials)
        per_epoch = attempts / max(1, spent)
        left = max(0.0, expected - spent - busy / 2)
        return time_left(pace, left, left * per_epoch, workers=workers)

    def _budget_etas_s(self) -> Iterator[float]:
        """Yield the time left of each budget of time or epochs."""
        spent, workers = self.spending, len(self.live_workers)
        if spent.max_time_s is not None:
            yield spent.max_time_s - spent.elapsed_s
        if spent.timeout_s is not None and workers:
            yield (spent.timeout_s - spent.active_s) / workers
        if spent.max_full_trainings is not None and workers and spent.spent_epochs:
            left = spent.max_full_trainings * spent.max_epochs - spent.spent_epochs
            yield left * spent.active_s / spent.spent_epochs / workers

    @property
    def images_per_s(self) -> float:
        """Summed over the workers that train now."""
        return sum(w.images_per_s or 0.0 for w in self.live_workers if w.number is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return it for `hpo status --json`; times in seconds, also since 1970."""
        best = self.best
        return {
            "study": self.row.name,
            "state": self.state,
            "stop_reason": self.row.stop_reason,
            "metric": self.file.metric,
            "direction": self.file.direction,
            **self._front_dict(),
            "budget": self.budget,
            "finished": self.finished,
            "begun": self.begun,
            "epochs": self.spending.spent_epochs,
            "expected_epochs": self.expected_epochs,
            "full_trainings": self.spending.full_trainings,
            "max_full_trainings": self.row.max_full_trainings,
            "max_time_s": self.row.max_time_s,
            "timeout_s": self.row.timeout_s,
            "trials": {name: self.count(name) for name in STATES},
            "best": None if best is None else {
                "number": best.number,
                "value": best.value,
                "epoch": best.best_epoch,
                "params": best.params,
                "origin": best.origin,
                "interval": noise.as_dict(self.noise.interval(best)),
                "ties": None if self.ties is None else [one.number for one in self.ties],
                "still_rises": self.noise.still_rises(best),
            },
            "validation_images": sum(self.validated.values()) or None,
            "reference": self._reference_dict(),
            "best_so_far": self._so_far_dict(),
            "rungs": [asdict(rung) for rung in self.count_rungs()],
            "taken_over": None if self.file.taken_over is None else {
                "study": self.file.taken_over.study, "trials": self.file.known_trials,
            },
            "best_pruned": None if self.best_pruned is None else self.best_pruned.number,
            "elapsed_s": self.elapsed_s,
            "active_s": self.active_s,
            "eta_s": self.eta_s,
            "images_per_s": self.images_per_s,
            "workers": [asdict(worker) for worker in self.live_workers],
            "forced": [asdict(one) for one in self.forced],
        }  # fmt: skip

    def _reference_dict(self) -> dict[str, Any] | None:
        one = self.reference
        if one is None:
            return None
        found = {name: getattr(one, name) for name in ("number", "value", "state", "origin")}
        return found | {"interval": noise.as_dict(self.noise.interval(one))}

    def _so_far_dict(self) -> dict[str, Any] | None:
        one = self.best_so_far
        if one is None:
            return None
        found = {name: getattr(one, name) for name in ("number", "value", "state")}
        return found | {"epochs": len(one.epochs)}

    def trial_rows(self) -> tuple[list[str], list[list[Any]]]:
        """Return names of columns, and a row for each trial: numbers in full, times in seconds."""
        names, costs = list(self.file.space), self.file.objectives[1:]
        head = ["number", "state", *self.file.objectives, "best_epoch", "epochs", "seconds"]
        rows = [
            [one.number, one.state, one.value, *(one.values.get(name) for name in costs),
             one.best_epoch, len(one.epochs), one.seconds, len(one.attempts), one.reason,
             one.origin, *(one.params.get(name) for name in names)]
            for one in self.trials
        ]  # fmt: skip
        return [*head, "attempts", "reason", "origin", *names], rows

    def _front_dict(self) -> dict[str, Any]:
        if not self.ranking.has_several:
            return {}
        front = [{"number": t.number, "values": t.values, "params": t.params} for t in self.front()]
        return {"metrics": self.file.directions, "front": front}


def file_of(row: StudyRow, text: str = "") -> StudyFile:
    """Return the study file of a row, with its `text`. Raises ConfigError, which names the study,
    for one that this version does not understand."""
    try:
        return StudyFile.from_definition(row.definition, text)
    except ConfigError as error:
        where = f"study {row.name!r} is of a newer hpo: use that version here, too"
        raise error.at(where) from None


def read_studies(database: Database) -> tuple[list[StudyStatus], list[str]]:
    """Read the status of each study, the oldest first, and why there are others that cannot be
    read."""
    found, problems = [], []
    for row in records.list_studies(database):
        try:
            found.append(read_status(database, row.name))
        except NotFound:
            continue  # deleted meanwhile
        except ConfigError as error:
            problems.append(str(error))
    return found, problems


def verification_name(study: str) -> str:
    """Return the name of the verification of a study."""
    return f"{study[: LONGEST_NAME - len(VERIFY)]}{VERIFY}"


def find_verification(database: Database, row: StudyRow) -> StudyRow | None:
    """Return the verification of the study of `row`; None where there is none."""
    found = records.find_study(database, verification_name(row.name))
    verified = found and found.definition.get("verifies")
    return found if verified and verified["uuid"] == row.uuid else None


def read_status(database: Database, name: str) -> StudyStatus:
    """Read a study's status. Raises NotFound, naming the nearest studies, and ConfigError for a
    study that this version does not understand."""
    row = records.get_study(database, name)
    file = file_of(row, row.source)
    # In this order: of a trial that ends meanwhile, what was written before its end is read after.
    states = records.read_states(database, row.study_id)
    attempts = records.read_attempts(database, row.uuid)
    epochs = records.read_epochs(database, row.uuid)
    params = read_params(database, row.study_id)
    enqueued = [number for _, number in records.read_enqueued(database, row.uuid)]
    origin = _origins(file, enqueued)
    rest = "grid" if file.study.sampler.name == "grid" else "sampled"
    hidden = row.stop == "rule"
    trials = [
        replace(_trial(file, number, state, params.get(number, {}), epochs.get(number, []),
                       attempts.get(number, [])), origin=origin.get(number, rest))
        for number, state in states.items()
        # Surplus waiting trials are never taken; after a stop rule none of the waiting ones is.
        if state != "WAITING" or (number < row.trials and not hidden)
    ]  # fmt: skip
    now = records.clock(database)
    workers = records.read_workers(database, row.uuid)
    live = [one for one in workers if is_alive(one, row, now)]
    forced = read_overrides(database, row.uuid)
    chance = records.read_resolved(database, row.uuid, CHANCE).get(CHANCE)
    validated = _validated(database, row.uuid, file)
    return StudyStatus(
        row, file, now, tuple(trials), tuple(workers), tuple(live), forced, chance, validated
    )


def _validated(database: Database, uuid: str, file: StudyFile) -> dict[str, int]:
    """Return the validation images of each class: as the first worker opened them, else as the
    report on the data counted them."""
    found = records.read_resolved(database, uuid, noise.VALIDATED).get(noise.VALIDATED)
    if found is not None:
        return dict(found)
    report = read_report(database, uuid)
    if report is None:
        return {}
    # In a cross-validation each image is in one fold, and validates there.
    parts = [report.parts.get(name, {}) for name in ("val", "train")[: 2 if _folds(file) else 1]]
    return {name: sum(part.get(name, 0) for part in parts) for name in report.classes}


def _folds(file: StudyFile) -> int | None:
    """Return the number of folds of a cross-validation, which is never searched; None without."""
    found: int | None = file.train.get("data", {}).get("folds")
    return found


def _origins(file: StudyFile, enqueued: Collection[int | None]) -> dict[int, str]:
    """Return where the configurations of trials come from that are neither sampled nor of a grid,
    by number; `enqueued`: the trials that took an enqueued configuration."""
    first = {number: one.origin for number, one in scheduling.first_trials(file, enqueued)}
    if (taken := file.taken_over) is not None:
        first |= {number: taken.origin(number) for number in range(file.known_trials)}
    return first | {number: "enqueued" for number in enqueued if number is not None}


def is_alive(worker: WorkerRow, row: StudyRow, now: float) -> bool:
    """Return whether a worker of the study of `row` has not ended, and was heard of lately."""
    return worker.ended is None and now - worker.seen < ALIVE_S + row.lease_s


def words_of(attempt: Attempt) -> str:
    """Return how an attempt ended; of one without an end whether its lease still runs."""
    if attempt.outcome is not None:
        return attempt.outcome.words
    return "running" if attempt.live else "interrupted"


def _unfinished(last: Attempt | None) -> str:
    """Return the state of a trial that runs for Optuna, by its last attempt."""
    if last is None:
        return "interrupted"
    if last.outcome == Outcome.PAUSED:
        return "paused"
    return "running" if last.live else "interrupted"


def _trial(
    file: StudyFile,
    number: int,
    state: str,
    params: dict[str, Any],
    epochs: Sequence[Epoch],
    attempts: Sequence[Attempt],
) -> Trial:
    last = attempts[-1] if attempts else None
    shown = {"WAITING": "waiting", "COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    if last is not None and last.outcome is not None and last.outcome.is_final:
        name: str = last.outcome  # told in one transaction with the state, and read later
    elif state == "RUNNING":
        name = _unfinished(last)
    else:
        name = shown[state]
    worthless = name in WORTHLESS
    best = None if worthless else Ranking(file.directions).best_epoch(epochs)
    values = last.objectives if last and last.objectives and not worthless else ()
    return Trial(
        number=number,
        state=name,
        params=file.space.decode(params),
        value=best.metrics[file.metric] if best else None,
        best_epoch=best.epoch if best else None,
        epochs=tuple(epochs),
        attempts=tuple(attempts),
        reason=last.reason if last else None,
        values=dict(zip(file.objectives, values, strict=False)),
    )
