"""Samplers and schedulers replayed over learning curves: epochs spent, and how good the best is.

    python -m benchmarks.replay --curves FOLDER [--kinds lcbench,taskset,digits] [--only ARM ...]
                                [--trials 20,50,32x6@2,200@4,12full] [--tasks 8] [--seeds 4]
                                [--jobs 2] [--stress] [--against ARM]
                                [--out FILE] [--tables]

The product's own code decides: its samplers draft each trial, which becomes the nearest
configuration of the table (`benchmarks.curves`) that no trial had; its pruners end trials, its rule
of promotion pauses them and lets them go on. Workers take turns by a clock on which an epoch is one
unit, 10 % more or less; the cost is epochs.

`--trials` are N, NxE (E epochs, evenly from the curves), N@W (W workers), or Ffull: any number of
trials within F full trainings, of which the last third begins no new one under promote. An arm is
`[3+]SAMPLER+RULE[:option=value...]`: `3+` puts three configurations first that did best on the
*other* tasks, as recommended ones; the rule is auto (what the product takes for so many trials), a
pruner or promote, with their options by their names or those of SHORT.

Regret is 0 for the best configuration of the table and 1 for its median one: that of the best
complete trial, and of the best epoch seen. Ratios of epochs and differences of regret are against
`--against` (tpe+median) on the same (task, seed), with 95 % intervals of a bootstrap over those
pairs: for a new *kind* of task they are too narrow. Each run is a line of `--out`; what stands
there already is not run again, and `--tables` prints the tables of it alone.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from benchmarks.curves import KINDS, Floats, Table, load, recommend
from benchmarks.host import machine, versions
from hpo.config.space import Space
from hpo.config.strategies import StudyConfig
from hpo.config.study import StudyFile
from hpo.search.promotion import Rungs, Standing, geometric, may_go_on, promotable
from hpo.search.sampling import derive_seed, draft_params, make_pruner, make_sampler
from hpo.search.scheduling import CLOSING, is_protected

TRIALS = "20,50,32x6@2,200@4,12full"
ARMS = (
    "random+none",
    "tpe+none",
    "tpe+median",
    "tpe+hyperband",
    "tpe+asha",
    "tpe+auto",
    "tpe+promote",
    "tpe+promote:first=1",
    "tpe+promote:random=0",
    "tpe+promote:finish=0",
    "tpe+promote:finish=3",
    "tpe+promote:eta=4",
    "random+promote",
    "3+tpe+median",
    "3+tpe+hyperband",
    "3+tpe+promote",
    "3+tpe+promote:protect=0",
)
REFERENCE = "tpe+median"
ALL = "all kinds"
SHORT = {"first": "first_epochs", "eta": "reduction_factor", "random": "random_fraction"}
FULL_TRAININGS = (2, 4, 6, 12)
RESAMPLES = 2000


@dataclass(frozen=True)
class Setup:
    """What a user asks for."""

    name: str
    trials: int | None
    epochs: int | None = None
    """Of a curve; None: all that it has."""
    workers: int = 1
    full: float | None = None
    """Epochs of so many full trainings, with any number of trials."""

    @classmethod
    def parse(cls, text: str) -> Setup:
        found = re.fullmatch(r"(?:(\d+)(?:x(\d+))?|(\d+)full)(?:@(\d+))?", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text!r}: allowed: N, NxE, Ffull, each with @W")
        trials, epochs, full, workers = (one and int(one) for one in found.groups())
        return cls(text, trials, epochs, workers or 1, full)


@dataclass(frozen=True)
class Arm:
    """A sampler with a pruner or a scheduler."""

    name: str
    sampler: str
    rule: str
    recommended: int
    protect: bool
    """Whether recommended ones go on at first although others are better."""
    options: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> Arm:
        found = re.fullmatch(r"(?:(\d+)\+)?(\w+)\+(\w+)((?::\w+=[\d.]+)*)", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text!r}: allowed: [N+]SAMPLER+RULE[:option=value]")
        recommended, sampler, rule, rest = found.groups()
        pairs = (one.split("=") for one in rest.split(":")[1:])
        options = {SHORT.get(name, name): json.loads(value) for name, value in pairs}
        protect = bool(options.pop("protect", True))
        return cls(text, sampler, rule, int(recommended or 0), protect, options)

    def file(self, epochs: int, seed: int, trials: int | None) -> StudyFile:
        """A study of the product with this sampler and rule."""
        data: dict[str, Any] = {"name": "replay", "sampler": self.sampler, "seed": seed}
        if trials is not None:
            data["trials"] = trials
        if self.rule != "auto":
            table = "scheduler" if self.rule == "promote" else "pruner"
            data[table] = {"name": self.rule, **self.options}
        train = {"epochs": epochs, "data": {"dataset": "digits"}}
        return StudyFile(StudyConfig.parse(data), train, Space({}))


def rungs_of(file: StudyFile, table: Table) -> Rungs | None:
    """Those of the study's scheduler; None where it has a pruner."""
    if (scheduler := file.study.scheduler) is None:
        return None
    eta = file.reduction_factor
    epochs = geometric(file.first_rung, eta, table.epochs)
    return Rungs(epochs, eta, scheduler.finish, chance=table.chance)


@dataclass
class Trial:
    number: int
    curve: list[float]
    """Its whole curve, which it unfolds."""
    optuna: optuna.Trial
    is_recommended: bool
    epochs: int = 0
    state: str = "running"


class Search:
    """One study over `table`."""

    def __init__(
        self, table: Table, setup: Setup, arm: Arm, seed: int, first: Sequence[int]
    ) -> None:
        self.table, self.setup, self.arm = table, setup, arm
        self.seed = derive_seed(table.kind, table.name, seed)
        self.file = arm.file(table.epochs, self.seed, setup.trials)
        self.rungs = rungs_of(self.file, table)
        self.first = first
        self.storage = InMemoryStorage()
        self.study = optuna.create_study(
            study_name=str(self.seed),
            storage=self.storage,
            direction="maximize",
            pruner=make_pruner(self.file),
        )
        self.rng = np.random.default_rng(self.seed)
        self.trials: list[Trial] = []
        self.standings: list[Standing] = []
        self.taken: set[int] = set()
        self.spent = 0
        self.seen: list[tuple[int, float]] = []
        """(epochs spent, best value) whenever it got better."""

    def run(self) -> None:
        """Let workers take turns until nobody has anything to do, or all is spent."""
        clock: list[tuple[float, int, Trial]] = []
        now, free = 0.0, list(range(self.setup.workers))
        while not self._spent_all:
            idle = []
            for worker in free:
                if (trial := self._next()) is None:
                    idle.append(worker)  # until another one's epoch may have work for it
                else:
                    heapq.heappush(clock, (now + self._epoch_units(), worker, trial))
            if not clock:
                break
            now, worker, trial = heapq.heappop(clock)
            self._epoch(trial)
            if trial.state == "running":
                heapq.heappush(clock, (now + self._epoch_units(), worker, trial))
                free = idle
            else:
                free = [worker, *idle]

    def _epoch_units(self) -> float:
        return float(self.rng.uniform(0.9, 1.1))

    @property
    def _spent_all(self) -> bool:
        limit = self.setup.full
        return limit is not None and self.spent >= limit * self.table.epochs

    @property
    def _all_begun(self) -> bool:
        settings = len(self.table.params)
        return len(self.trials) >= min(self.setup.trials or settings, settings)

    @property
    def _closing(self) -> bool:
        """Whether no new trial is to begin, or only once enough are complete."""
        complete = sum(one.state == "complete" for one in self.trials)
        limit = (self.setup.full or np.inf) * self.table.epochs
        short = self.rungs is not None and complete < self.rungs.finish
        return self._all_begun or (short and self.spent >= CLOSING * limit)

    def _next(self) -> Trial | None:
        """What a worker that is free does: a paused trial, a new one, or nothing."""
        if self.rungs is not None:
            for number in promotable(self.rungs, self.standings, closing=self._closing):
                self._set(self.trials[number], "running")
                return self.trials[number]
            if self._closing:
                return None
        return None if self._all_begun else self._begin()

    def _begin(self) -> Trial:
        number = len(self.trials)
        trial_id = self.storage.create_new_trial(self.study._study_id)
        row = self._row(number, self.storage.get_trial(trial_id))
        self.taken.add(row)
        distributions = self.table.space.distributions()
        for name, value in self.table.params[row].items():
            inner = distributions[name].to_internal_repr(value)
            self.storage.set_trial_param(trial_id, name, inner, distributions[name])
        is_recommended = number < len(self.first)
        self.study.sampler = optuna.samplers.RandomSampler()  # asked for nothing: all is stored
        handle = optuna.Trial(self.study, trial_id)
        trial = Trial(number, self.table.values[row].tolist(), handle, is_recommended)
        self.trials.append(trial)
        if self.rungs is not None:
            self.standings.append(self.rungs.standing(number, "running", ()))
        return trial

    def _row(self, number: int, frozen: FrozenTrial) -> int:
        if number < len(self.first):
            return self.first[number]
        params = draft_params(
            self.study,
            self.table.space,
            frozen,
            {},
            lambda draw: make_sampler(self.file, number, 0, draw),
            [one.number for one in self.trials if one.state == "paused"],
        )
        return self.table.nearest(params, self.taken)

    def _epoch(self, trial: Trial) -> None:
        """Let a trial train one epoch, then decide on it."""
        value = trial.curve[trial.epochs]
        trial.epochs += 1
        self.spent += 1
        if not self.seen or value > self.seen[-1][1]:
            self.seen.append((self.spent, value))
        trial.optuna.report(value, trial.epochs)
        self._set(trial, "running")
        if trial.epochs == self.table.epochs:
            self._tell(trial, "complete", TrialState.COMPLETE)
        elif self.rungs is not None:
            if not self._may_go_on(trial, self.rungs):
                self._set(trial, "paused")
        elif not self._is_protected(trial) and trial.optuna.should_prune():
            self._tell(trial, "over", TrialState.PRUNED)

    def _may_go_on(self, trial: Trial, rungs: Rungs) -> bool:
        closing = self._closing
        ranked = may_go_on(rungs, self.standings, trial.number, closing=closing)
        return ranked or self._is_protected(trial)

    def _is_protected(self, trial: Trial) -> bool:
        if not trial.is_recommended or not self.arm.protect:
            return False
        lengths = {one.number: one.epochs for one in self.trials if one.epochs}
        return is_protected(trial.epochs, lengths, range(len(self.first)))

    def _tell(self, trial: Trial, state: str, told: TrialState) -> None:
        self._set(trial, state)
        value = max(trial.curve) if told == TrialState.COMPLETE else None
        self.study.tell(trial.optuna, value, told)

    def _set(self, trial: Trial, state: Any) -> None:
        trial.state = state
        if self.rungs is not None:
            values = trial.curve[: trial.epochs]
            self.standings[trial.number] = self.rungs.standing(trial.number, state, values)

    def result(self) -> dict[str, Any]:
        whole = [max(one.curve) for one in self.trials if one.state == "complete"]
        epochs = self.table.epochs
        seen = [(round(at / epochs, 3), self.table.regret(value)) for at, value in self.seen]
        return {
            "epochs": self.spent,
            "full": self.spent / epochs,
            "begun": len(self.trials),
            "complete": len(whole),
            "regret": self.table.regret(max(whole)) if whole else None,
            "seen": [[at, round(float(value), 4)] for at, value in seen],
        }


@dataclass(frozen=True)
class Job:
    kind: str
    task: int
    seed: int
    setup: Setup
    arm: Arm
    stress: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.setup.name, self.arm.name, self.kind, self.task, self.seed, self.stress)


_tables: dict[str, list[Table]] = {}
"""Of this process; read once."""


def _prepare(folder: Path, kinds: Sequence[str]) -> None:
    _tables.update(load(folder, kinds))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")


def replay(job: Job) -> dict[str, Any]:
    began = time.process_time()
    tables = _tables[job.kind]
    others = [one for i, one in enumerate(tables) if i != job.task]
    first = recommend(others, job.arm.recommended) if job.arm.recommended else []
    table = tables[job.task]
    if job.setup.epochs:
        table = table.shortened(job.setup.epochs)
    if job.stress:
        table = table.stressed()
    search = Search(table, job.setup, job.arm, job.seed, first)
    search.run()
    key = dict(zip(("setup", "arm", "kind", "task", "seed", "stress"), job.key, strict=True))
    return {**key, **search.result(), "seconds": round(time.process_time() - began, 2)}


Run = Mapping[str, Any]


def key_of(run: Run) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("setup", "arm", "kind", "task", "seed", "stress"))


def jobs_of(options: argparse.Namespace, counts: Mapping[str, int]) -> Iterator[Job]:
    """Seed by seed, so that a stop in the middle leaves whole comparisons."""
    for seed, setup in itertools.product(range(options.seeds), options.trials):
        for kind, count in counts.items():
            tasks = np.linspace(0, count - 1, min(options.tasks, count)).round().astype(int)
            for task, arm in itertools.product(tasks.tolist(), options.only):
                if count > 1 or not arm.recommended:  # of a single task nothing can be learned
                    yield Job(kind, task, seed, setup, arm, options.stress)


def read(path: Path | None) -> list[Run]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def seen_after(run: Run, full: float) -> float:
    """Regret of the best epoch seen within `full` full trainings; 2 before the first."""
    return next((value for at, value in reversed(run["seen"]) if at <= full), 2.0)


def regret(run: Run) -> float:
    """That of the best complete trial, or of what was seen where none is complete."""
    return float(run["regret"] if run["regret"] is not None else run["seen"][-1][1])


def interval(values: Callable[[Any], Floats], count: int) -> tuple[float, float]:
    """95 % of `values(picks)` over resamples, `picks` (RESAMPLES, count) indices of pairs."""
    picks = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    low, high = np.nanpercentile(values(picks), [2.5, 97.5])
    return float(low), float(high)


def against(runs: Sequence[Run], reference: Sequence[Run]) -> dict[str, Any]:
    """Cost and regret of an arm against the reference on the same pairs, with intervals."""
    cost, base = (np.array([one["epochs"] for one in many]) for many in (runs, reference))
    loss = np.array([regret(one) for one in runs]) - [regret(one) for one in reference]
    return {
        "ratio": base.sum() / cost.sum(),
        "ratio_in": interval(lambda at: base[at].sum(1) / cost[at].sum(1), len(cost)),
        "difference": loss.mean(),
        "difference_in": interval(lambda at: loss[at].mean(1), len(cost)),
    }


def paired(runs: Sequence[Run], others: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Those of both that have the same task and seed."""
    by_pair = {pair_of(one): one for one in others}
    both = [one for one in runs if pair_of(one) in by_pair]
    return both, [by_pair[pair_of(one)] for one in both]


def pair_of(run: Run) -> tuple[Any, ...]:
    return run["kind"], run["task"], run["seed"]


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def tables(runs: Sequence[Run], reference: str = REFERENCE) -> Iterator[str]:
    """Lines of Markdown: a table for each setup and kind of curves, and for all kinds together."""
    groups: dict[tuple[Any, ...], dict[str, list[Run]]] = {}
    for run in runs:
        for kind in (run["kind"], ALL):
            group = groups.setdefault((run["setup"], kind, run["stress"]), {})
            group.setdefault(run["arm"], []).append(run)
    for (setup, kind, stress), arms in groups.items():
        if kind == ALL and len({run["kind"] for many in arms.values() for run in many}) == 1:
            continue
        yield f"\n### {setup}, {kind}{', an epoch before training first' if stress else ''}\n"
        yield from (any_time if "full" in setup else equal_trials)(arms, reference)


def equal_trials(arms: Mapping[str, Sequence[Run]], reference: str) -> Iterator[str]:
    columns = "epochs | full trainings | complete | regret | seen | fewer epochs | difference"
    yield f"| arm | n | {columns} |"
    yield "|---" * 9 + "|"
    for name, runs in arms.items():
        cells = [
            name,
            f"{len(runs)}",
            f"{mean(one['epochs'] for one in runs):.0f}",
            f"{mean(one['full'] for one in runs):.1f}",
            f"{mean(one['complete'] for one in runs):.1f}",
            f"{mean(map(regret, runs)):.3f}",
            f"{mean(one['seen'][-1][1] for one in runs):.3f}",
        ]
        both, others = paired(runs, arms.get(reference, ()))
        if both and name != reference:
            one = against(both, others)
            ratio, difference = one["ratio_in"], one["difference_in"]
            cells += [
                f"{one['ratio']:.2f} [{ratio[0]:.2f}, {ratio[1]:.2f}]",
                f"{one['difference']:+.3f} [{difference[0]:+.3f}, {difference[1]:+.3f}]",
            ]
        yield "| " + " | ".join(cells) + " |"


def sooner(runs: Sequence[Run], reference: Sequence[Run], full: float) -> Callable[[Any], Floats]:
    """How many times sooner the mean regret is where the reference's is after `full` full
    trainings, by resample; 0 where it never is."""
    grid = np.linspace(0.1, full, int(full * 10))
    ours = np.array([[seen_after(one, at) for at in grid] for one in runs])
    goal = np.array([seen_after(one, full) for one in reference])

    def values(picks: Any) -> Floats:
        there = ours[picks].mean(1) <= goal[picks].mean(1)[:, None]
        return np.where(there.any(1), full / grid[there.argmax(1)], 0.0)

    return values


def any_time(arms: Mapping[str, Sequence[Run]], reference: str) -> Iterator[str]:
    columns = " | ".join(f"regret at {one}" for one in FULL_TRAININGS)
    yield f"| arm | n | trials | {columns} | sooner |"
    yield "|---" * (len(FULL_TRAININGS) + 4) + "|"
    for name, runs in arms.items():
        cells = [name, f"{len(runs)}", f"{mean(one['begun'] for one in runs):.0f}"]
        cells += [f"{mean(seen_after(one, at) for one in runs):.3f}" for at in FULL_TRAININGS]
        both, others = paired(runs, arms.get(reference, ()))
        if both and name != reference:
            values = sooner(both, others, FULL_TRAININGS[-1])
            low, high = interval(values, len(both))
            (point,) = values(np.arange(len(both))[None])
            cells.append(f"{point:.1f} [{low:.1f}, {high:.1f}]")
        yield "| " + " | ".join(cells) + " |"


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def listed(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [parse(one) for one in text.split(",")]

    parser.add_argument("--curves", type=Path, metavar="FOLDER")
    parser.add_argument("--trials", type=listed(Setup.parse), default=TRIALS, metavar="SETUP,...")
    parser.add_argument("--only", type=Arm.parse, nargs="+", metavar="ARM",
                        default=[Arm.parse(one) for one in ARMS])  # fmt: skip
    parser.add_argument("--kinds", type=listed(str), default=",".join(KINDS), metavar="KIND,...")
    parser.add_argument("--tasks", type=int, default=8, help="of each kind, evenly spread")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--stress", action="store_true", help="put an epoch before training first")
    parser.add_argument("--against", default=REFERENCE, metavar="ARM")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--tables", action="store_true", help="print those of --out, run nothing")
    options = parser.parse_args(arguments)
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"--kinds {', '.join(sorted(unknown))}: allowed: {', '.join(KINDS)}")
    if options.curves is None and not options.tables:
        parser.error("--curves: the folder with the curves")
    return options


def run(options: argparse.Namespace) -> list[Run]:
    """Replay what `--out` does not have yet."""
    runs = read(options.out)
    done = {key_of(one) for one in runs}
    counts = {kind: len(many) for kind, many in load(options.curves, options.kinds).items()}
    todo = [one for one in jobs_of(options, counts) if one.key not in done]
    began = time.monotonic()
    with multiprocessing.Pool(options.jobs, _prepare, (options.curves, options.kinds)) as pool:
        for count, one in enumerate(pool.imap_unordered(replay, todo), 1):
            runs.append(one)
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(one) + "\n")
            if count % 50 == 0 or count == len(todo):
                left = (time.monotonic() - began) / count * (len(todo) - count)
                print(f"{count} of {len(todo)}, {left / 60:.0f} min left", file=sys.stderr)
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    runs = read(options.out) if options.tables else run(options)
    print(f"{machine()}; {versions('optuna', 'numpy')}")
    print("\n".join(tables(runs, options.against)))


if __name__ == "__main__":
    main()
