"""What `hpo run` ends with: the best configuration, parameter importance, what to type next."""

from __future__ import annotations

from rich.console import Console

from hpo.cli.safe import Text
from hpo.cli.tables import cells_table, counts, parameters_table
from hpo.results.pareto import front_table
from hpo.results.table import duration, number
from hpo.search.status import StudyStatus
from hpo.storage.db import Database


def print_ending(
    database: Database, status: StudyStatus, out: Console, *, hpo: str, flag: str
) -> None:
    """Print the result of a study that is over; `hpo` and `flag` begin and end each command that
    is printed."""
    out.print()
    out.print(Text(f"{status.row.name} is finished", "bold"))
    out.print(_summary(status), markup=False, soft_wrap=True)
    if status.row.stop_reason:
        out.print(f"stopped early: {status.row.stop_reason}", markup=False, soft_wrap=True)
    if status.best is None:
        why = f"{status.no_best}. Trial by trial: {hpo} trials {status.row.name}{flag}"
        out.print(why, markup=False, soft_wrap=True)
        _print_pruned(status, out)
        return
    _print_best(database, status, out)
    if len(status.file.objectives) > 1:
        _print_front(status, out)
    _print_next(status, out, hpo, flag)


def _summary(status: StudyStatus) -> str:
    elapsed = duration(status.elapsed_s)
    return f"{counts(status)}  |  {elapsed} elapsed, {duration(status.active_s)} of work"


def _print_best(database: Database, status: StudyStatus, out: Console) -> None:
    from hpo.results.importance import importances

    best = status.best
    assert best is not None
    out.print()
    value = f"{status.file.metric} {number(best.value)}"
    out.print(Text(f"best: trial {best.number}, {value} in epoch {best.best_epoch}", "bold green"))
    _print_pruned(status, out)
    out.print()
    found = importances(database, status.row.name)
    out.print(parameters_table(best.params, found))
    if found.verdict:
        out.print(Text(found.verdict, "dim"))


def _print_pruned(status: StudyStatus, out: Console) -> None:
    if status.pruned_note:
        out.print(Text(status.pruned_note, "yellow"), soft_wrap=True)


def _print_front(status: StudyStatus, out: Console) -> None:
    names = ", ".join(status.file.objectives)
    out.print()
    out.print(Text(f"the front: trials that none beats in all of {names}", "bold green"))
    out.print()
    out.print(cells_table(front_table(status)))


def _print_next(status: StudyStatus, out: Console, hpo: str, flag: str) -> None:
    name = status.row.name
    front = ((f"{hpo} export {name} --pareto{flag}", "every configuration of the front"),)
    steps = (
        (f"{hpo} export {name}{flag}", "the best configuration, with its provenance"),
        *(front if len(status.file.objectives) > 1 else ()),
        (f"{hpo} train {name}.best.toml --seeds 3", "retrain it, then open the test set"),
        (f"{hpo} report {name}{flag}", "the whole search in one page"),
        (f"{hpo} dashboard{flag}", "browse the trials in optuna-dashboard"),
    )
    width = max(len(command) for command, _ in steps)
    out.print()
    out.print(Text("next", "bold"))
    for command, what in steps:
        line = Text.assemble("  ", (command.ljust(width), "cyan"), f"  {what}")
        out.print(line if out.width >= len(line) else Text(f"  {command}", "cyan"), soft_wrap=True)
