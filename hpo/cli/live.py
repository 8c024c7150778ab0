"""The live view of a running study, or plain lines, and the summary at its end.

Drawn from `StudyStatus` alone, so that a test can draw any moment at any width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from hpo.cli.console import Text, is_drawn, tell
from hpo.cli.tables import STYLES, cells_table, counts, parameters_table, state_text
from hpo.formatting import duration, exact_duration, number, plural, setting, short_names, sparkline
from hpo.reports.groups import front_table
from hpo.reports.progress import (
    PlainView,
    View,
    best_by_trial,
    ended_line,
    finished_trials,
    last_ended,
)
from hpo.search.scheduling import budget_parts, option
from hpo.search.status import StudyStatus
from hpo.storage.database import Database
from hpo.storage.records import FINAL, Trial, WorkerRow

REFRESHES_PER_S = 4
NARROW = 76
"""Narrower terminals hide the host, and shorten the unit of throughput."""
MAX_WIDTH = 100
MAX_WORKERS = 24
HINTS = 3
"""Most sentences at the end on what to try next."""
OTHER_LINES = 15
"""Lines of the live view beside those of workers, at most."""
LAST = 3
"""Trials that ended last, in the live view."""
SPARKS = 48
PHASE = 11
"""Columns of what a worker does within an epoch: `step 12/31`."""


@dataclass
class Screen:
    """The live view of a status that was read at `read`, by `clock`."""

    status: StudyStatus
    note: str = ""
    read: float = field(default_factory=time.monotonic)
    clock: Callable[[], float] = time.monotonic
    problem: str = ""
    loading: Sequence[str] = ()
    """Devices of workers that were started and have not reported yet."""
    keys: str = ""
    """What keys do, in words."""

    def __post_init__(self) -> None:
        self.show(self.status, self.read)

    def show(self, status: StudyStatus, read: float) -> None:
        """Take over a status that was read at `read`."""
        self.status, self.read = status, read
        self.best, self.last = best_by_trial(status), last_ended(status, LAST)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        going = self.status.state in ("running", "waiting")
        age = self.clock() - self.read if self.status.state == "running" else 0.0
        width = min(options.max_width, MAX_WIDTH)
        yield study_lines(self.status, width, age, starting=bool(self.loading))
        yield from best_lines(self.status, self.best)
        if going:
            most = min(MAX_WORKERS, max(2, options.max_height - OTHER_LINES))
            yield worker_lines(self.status, width, loading=self.loading, most=most)
            yield from last_lines(self.status, self.last, width)
        for note in (self.problem, self.note):
            if note:
                yield Text(note, "yellow")
        if going and self.keys and not self.note:
            yield Text(self.keys, "dim")


def study_lines(
    status: StudyStatus, width: int, age_s: float = 0.0, *, starting: bool = False
) -> RenderableType:
    """Draw name, bar and counts; below them the best value, elapsed and remaining time. While its
    workers are `starting`, it is not said to wait for any."""
    head = Table.grid(padding=(0, 2, 0, 0))
    head.width = width
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True)
    head.add_row(
        Text(status.row.name, "bold"),
        ProgressBar(total=1.0, completed=status.done),
        Text(status.progress),
    )
    lines = [_outcomes(status, starting=starting), _best_and_time(status, age_s), _rungs(status)]
    return Group(head, *(row for line in lines for row in _rows(line, width)))


def _outcomes(status: StudyStatus, *, starting: bool) -> list[Text]:
    kinds = (*FINAL, "running", "paused", "interrupted")
    parts = [Text(f"{n} {kind}", STYLES[kind]) for kind in kinds if (n := status.count(kind))]
    if status.state != "running" and not (starting and status.state == "waiting"):
        parts.insert(0, state_text(status.state))
    parts = parts or [Text("no trial has started yet", "dim")]
    return [*parts, Text(status.taken_note, "dim")] if status.taken_note else parts


def _best_and_time(status: StudyStatus, age_s: float) -> list[Text]:
    best, eta = status.best, status.eta_s
    parts = [Text(text) for text in _spent(status, age_s)]
    if status.best_so_far is not None:
        parts.insert(0, Text(best_text(status, status.best_so_far), "green"))
    if len(status.file.objectives) > 1 and best is not None:
        parts.insert(1, Text(f"front {plural(len(status.front()), 'trial')}", "green"))
    if status.state == "running" and status.row.stop == "rule":
        parts.append(Text("last epochs"))
    elif status.state == "running" and eta is not None:
        parts.append(Text(f"~{duration(max(0.0, eta - age_s))} left"))
    return parts


def best_text(status: StudyStatus, best: Trial) -> str:
    """Return `best val_top1 0.91 (trial 7)`; of a trial that has not ended, `best so far`."""
    value = f"{status.file.metric} {number(best.value)}"
    if best.state == "complete":
        return f"best {value} (trial {best.number})"
    stands = f"{best.state} after epoch {len(best.epochs)}"
    return f"best so far {value} (trial {best.number}, {stands})"


def _rungs(status: StudyStatus) -> list[Text]:
    """Return how many trials reached each rung, and their end."""
    found = status.count_rungs()
    if not found or not status.begun or status.state == "finished":
        return []
    counts = [Text(f"epoch {one.epoch}: {one.reached}", "dim") for one in found]
    return [Text("reached", "dim"), *counts, Text(f"the end: {len(status.ranked())}", "dim")]


def _spent(status: StudyStatus, age_s: float) -> Iterator[str]:
    """Yield the time so far, and what is spent of each budget of time and epochs."""
    spent = status.spending
    of = "" if spent.max_time_s is None else f" of {exact_duration(spent.max_time_s)}"
    yield f"elapsed {duration(spent.elapsed_s + age_s)}{of}"
    if spent.max_full_trainings is not None:
        yield f"{spent.full_trainings:.1f} of {spent.max_full_trainings:g} full trainings"
    if spent.timeout_s is not None:
        yield f"{duration(spent.active_s)} of {exact_duration(spent.timeout_s)} of work"


def _rows(parts: list[Text], width: int) -> Iterator[RenderableType]:
    """Yield lines of as many parts as fit, none of them broken unless it is wider than a line."""
    row: list[Text] = []
    for part in parts:
        if row and sum(len(one) + 2 for one in row) + len(part) > width:
            yield Text("  ").join(row)
            row = []
        row.append(part)
    if row:
        yield Text("  ", overflow="fold").join(row)


def best_lines(status: StudyStatus, best: Sequence[float]) -> Iterator[RenderableType]:
    """Draw the best configuration, and how the best value rose from trial to trial."""
    if status.best_so_far is not None:
        params = status.best_so_far.params
        names = short_names(list(params))
        values = ", ".join(f"{names[name]} {setting(value)}" for name, value in params.items())
        yield Text(f"with {values}" if values else "", "green", no_wrap=True, overflow="ellipsis")
    if best and best[0] != best[-1]:
        step = max(1, math.ceil(len(best) / SPARKS))
        shown = best[::-1][::step][::-1]
        measured = sum(trial.value is not None for trial in status.trials)
        rose = f"{number(best[0])} to {number(best[-1])} over {plural(measured, 'trial')}"
        yield Text.assemble((sparkline(shown), "green"), f"  {rose}")


def last_lines(status: StudyStatus, last: Sequence[Trial], width: int) -> Iterator[RenderableType]:
    """Draw the trials that ended last and why, the latest first, a line each."""
    if last:
        yield Text()
    for trial in last:
        line = Text(ended_line(status, trial), STYLES[trial.state], overflow="ellipsis")
        line.truncate(width, overflow="ellipsis")
        yield line


def worker_lines(
    status: StudyStatus, width: int, *, loading: Sequence[str] = (), most: int = MAX_WORKERS
) -> RenderableType:
    """Draw a line for each live worker, of up to `most`: device, trial, epoch, what it does, last
    metric, images per second; and for each device where one is `loading`."""
    workers = status.live_workers
    if not workers and not loading:
        return Text("no live workers" if status.workers else "no worker has started yet", "dim")
    hosts = len({worker.host for worker in workers}) > 1
    wide = width >= NARROW
    table = Table.grid(padding=(0, 2, 0, 0))
    table.width = width
    for justify in ("left", "right"):
        table.add_column(justify=justify, no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(justify="right", no_wrap=True)
    if wide:
        table.add_column(no_wrap=True, min_width=PHASE)
    for _ in range(2):
        table.add_column(justify="right", no_wrap=True)
    heads = ["worker", "trial", "epoch", "", status.file.metric, "images/s" if wide else "img/s"]
    heads[4:4] = [""] * wide
    table.add_row(*(Text(head, "dim") for head in heads))
    for worker in workers[:most]:
        name = worker_name(worker, workers, with_host=hosts and wide)
        table.add_row(Text(name), *_work(worker, wide=wide))
    for device in loading[: max(0, most - len(workers))]:
        table.add_row(Text(device), Text("-", "dim"), Text("loading torch", "cyan"))
    if (more := len(workers) + len(loading) - most) > 0:
        table.add_row(Text(f"and {more} more", "dim"))
    return Group(Text(), table)


def worker_name(worker: WorkerRow, workers: Sequence[WorkerRow], *, with_host: bool) -> str:
    """Return the device of a worker, with the end of its id where another one has the same."""
    device = f"{worker.host}:{worker.device}" if with_host else worker.device
    same = [one for one in workers if (one.host, one.device) == (worker.host, worker.device)]
    return f"{device} {worker.id.rpartition('-')[2]}" if len(same) > 1 else device


def _work(worker: WorkerRow, *, wide: bool) -> list[RenderableType]:
    if worker.number is None:
        idle = Text(worker.reason, "yellow") if worker.reason else Text("waits for a trial", "dim")
        return [Text("-", "dim"), idle]
    if not worker.epochs:
        phase = worker.reason or "preparing the trial"
        return [Text(str(worker.number)), Text(phase, "cyan")]
    epoch = worker.epoch or 1
    speed = "-" if worker.images_per_s is None else f"{worker.images_per_s:,.0f}"
    return [
        Text(str(worker.number)),
        ProgressBar(total=worker.epochs, completed=epoch - 1),
        Text(f"{epoch}/{worker.epochs}"),
        *[Text(worker.reason or "", "dim")] * wide,
        Text(number(worker.value)),
        Text(speed),
    ]


class LiveView(View):
    """Progress view that is redrawn in place."""

    def __init__(
        self,
        console: Console,
        read: Callable[[], StudyStatus],
        clock: Callable[[], float] = time.monotonic,
        *,
        devices: Sequence[str] = (),
        stays: bool = False,
    ) -> None:
        super().__init__(read, console.print, clock)
        self.console, self.devices, self.began = console, devices, self.status.now
        self.screen = Screen(self.status, read=clock(), clock=clock, loading=devices)
        self.live = Live(
            self.screen,
            console=console,
            refresh_per_second=REFRESHES_PER_S,
            transient=not stays,
            vertical_overflow="crop",
        )

    def show(self) -> None:
        """Show the latest status."""
        self.screen.problem = self.problem
        if not self.problem:
            reported = sum(worker.started >= self.began for worker in self.status.workers)
            self.screen.loading = self.devices[reported:]
            self.screen.show(self.status, self.clock())

    def leave(self) -> None:
        """Draw nothing any more; the last frame stays."""
        self.screen.keys = ""
        self.live.transient = False
        self.live.stop()

    def say(self, note: str) -> None:
        """Show `note` below the workers."""
        self.note = self.screen.note = note
        self.console.show_cursor(True)  # a second signal ends the process without cleaning up


@contextmanager
def opened(
    console: Console,
    read: Callable[[], StudyStatus],
    *,
    plain: bool = False,
    quiet: bool = False,
    devices: Sequence[str] = (),
    stays: bool = False,
) -> Iterator[View]:
    """Open the view that suits `console`: live on a terminal, else (or if `plain`) lines. On each
    of `devices` a worker is about to start. The last frame is left where it `stays`."""
    say = partial(console.print, markup=False, soft_wrap=True)
    if quiet:
        yield View(read, say)
    elif plain or not is_drawn(console):
        yield PlainView(read, say)
    else:
        view = LiveView(console, read, devices=devices, stays=stays)
        with view.live:
            yield view


def print_over(status: StudyStatus, out: Console, *, hpo: str, flag: str) -> None:
    """Print a line that says that a study which was watched is over, and what to do next."""
    name = status.row.name
    if status.state == "stopped":
        line = f"{name} is stopped: {finished_trials(status)} finished. To resume: {hpo} resume "
    elif status.best is None:
        line = f"{name} is finished: {status.no_best}. Trial by trial: {hpo} trials "
    else:
        line = f"{name} is finished: {best_text(status, status.best)}. To take it: {hpo} export "
    out.print(f"{line}{name}{flag}", markup=False, soft_wrap=True)


def print_ending(
    database: Database, status: StudyStatus, out: Console, *, hpo: str, flag: str
) -> None:
    """Print the result of a finished study; `hpo` and `flag` are the start and the end of each
    command that is printed."""
    out.print()
    out.print(Text(f"{status.row.name} is finished", "bold"))
    tell(out, _summary(status))
    if status.row.stop_reason:
        tell(out, f"stopped: {status.row.stop_reason}")
        for more in _more(status):
            line = f"to go on: {hpo} extend {status.row.name} {more}{flag}"
            out.print(line, markup=False, soft_wrap=True)
    if status.best is None:
        why = f"{status.no_best}. Trial by trial: {hpo} trials {status.row.name}{flag}"
        out.print(why, markup=False, soft_wrap=True)
        _print_pruned(status, out)
        return
    _print_best(database, status, out)
    if len(status.file.objectives) > 1:
        _print_front(status, out)
    _print_next(status, out, hpo, flag)


def _more(status: StudyStatus) -> Iterator[str]:
    """Yield the options of `hpo extend` that give as much again of each budget that is spent."""
    row, parts = status.row, budget_parts(status.spending)
    again = {
        "max_time": exact_duration(row.max_time_s or 0.0),
        "max_full_trainings": f"{row.max_full_trainings or 0.0:g}",
        "timeout_s": exact_duration(row.timeout_s or 0.0),
    }
    spent = [f"{option(name)} +{again[name]}" for name, part in parts.items() if part >= 1]
    yield from [" ".join(spent)] if spent else []


def _summary(status: StudyStatus) -> str:
    elapsed = duration(status.elapsed_s)
    return f"{counts(status)}  |  {elapsed} elapsed, {duration(status.active_s)} active"


def _print_best(database: Database, status: StudyStatus, out: Console) -> None:
    from hpo.reports.importance import importances
    from hpo.reports.summary import Kind, summarize, texts

    best, told = status.best, summarize(status)
    assert best is not None
    out.print()
    value = f"{status.file.metric} {number(best.value)}"
    out.print(Text(f"best: trial {best.number}, {value} in epoch {best.best_epoch}", "bold green"))
    for line in (status.noise.describe(best), *texts(told, Kind.AGAINST, Kind.NOISE)):
        if line:
            tell(out, line)
    _print_pruned(status, out)
    out.print()
    found = importances(database, status.row.name)
    out.print(parameters_table(best.params, found))
    tell(out, found.verdict or found.basis, "dim")
    if hints := texts(told, Kind.NEXT)[:HINTS]:
        out.print(Text("\nto improve it", "bold"))
        for line in hints:
            tell(out, f"  {line}")


def _print_pruned(status: StudyStatus, out: Console) -> None:
    if status.pruned_note:
        tell(out, status.pruned_note, "yellow")


def _print_front(status: StudyStatus, out: Console) -> None:
    names = ", ".join(status.file.objectives)
    out.print()
    out.print(Text(f"Pareto front: trials that no other beats in all of {names}", "bold green"))
    out.print()
    out.print(cells_table(front_table(status)))


def _print_next(status: StudyStatus, out: Console, hpo: str, flag: str) -> None:
    name = status.row.name
    front = ((f"{hpo} export {name} --pareto{flag}", "every configuration on the Pareto front"),)
    steps = (
        (f"{hpo} verify {name}{flag}", "the best again with other seeds: which one is it?"),
        (f"{hpo} export {name}{flag}", "the best configuration, with its provenance"),
        *(front if len(status.file.objectives) > 1 else ()),
        (
            f"{hpo} train {name}.best.toml --seeds 3",
            "retrain it, then evaluate once on the test set",
        ),
        (f"{hpo} report {name}{flag}", "the whole search as one page"),
        (f"{hpo} dashboard{flag}", "browse the trials in optuna-dashboard"),
    )
    width = max(len(command) for command, _ in steps)
    out.print()
    out.print(Text("next", "bold"))
    for command, what in steps:
        line = Text.assemble("  ", (command.ljust(width), "cyan"), f"  {what}")
        out.print(line if out.width >= len(line) else Text(f"  {command}", "cyan"), soft_wrap=True)
