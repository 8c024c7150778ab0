"""`hpo mcp`: studies for assistants that speak the Model Context Protocol, on standard input and
output."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpo.cli.options import Storage, database, quiet_optuna
from hpo.errors import HpoError, InputError, NotFound
from hpo.redaction import redact

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer

    from hpo.api.study import Study
    from hpo.storage.database import Database

MOST_TRIALS = 200
"""Most trials of one answer: an assistant pays for each."""
MOST_EPOCHS = 100
Tool = Callable[..., Any]


def mcp(
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Offer only the tools that look.")
    ] = False,
    storage: Storage = None,
) -> None:
    """Serve studies to an assistant over the Model Context Protocol, on standard input and output.

    It can list studies, explain one and its trials, and, without --read-only, enqueue, stop, resume
    and extend. It starts no worker and deletes nothing. In an assistant's settings the command is
    `hpo mcp`, best with --storage or HPO_STORAGE, since its working directory may be another.

    Example: hpo mcp --read-only
    """
    try:
        import mcp.server.mcpserver  # noqa: F401
    except ImportError:
        from hpo.extras import install_command

        raise InputError(f"hpo mcp needs the package mcp: {install_command('mcp')}") from None
    from hpo.storage import records

    # The protocol writes bytes, which the command line's own stream does not take.
    with database(storage) as found, redirect_stdout(sys.__stdout__):
        records.list_studies(found)  # what is wrong with the database is told at once
        quiet_optuna()
        make_server(found, read_only=read_only).run("stdio")


def make_server(found: Database, *, read_only: bool) -> MCPServer[Any]:
    """Return the server over the studies of `found`."""
    from mcp.server.mcpserver import MCPServer
    from mcp.types import ToolAnnotations

    server: MCPServer[Any] = MCPServer("hpo", instructions=INSTRUCTIONS)
    for looks, tool in Tools(found).all():
        if looks or not read_only:
            hints = ToolAnnotations(
                read_only_hint=looks, destructive_hint=False, open_world_hint=False
            )
            server.tool(annotations=hints, structured_output=False)(_refusing(tool))
    return server


INSTRUCTIONS = (
    "Hyperparameter searches for image classifiers. A study runs trials; values are measured on "
    "validation images, and test images are for `hpo train`, once, after the search. Differences "
    "within the intervals that are given are noise."
)


def _refusing(tool: Tool) -> Tool:
    """Return `tool`, which answers as `--json` does, and whose errors reach the assistant with
    their own words, without passwords."""
    from mcp.server.mcpserver.exceptions import ToolError

    from hpo.cli.tables import to_json

    @functools.wraps(tool)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            answer = tool(*args, **kwargs)
            return answer if isinstance(answer, str) else to_json(answer)
        except HpoError as error:
            raise ToolError(redact(str(error))) from None
        except Exception as error:
            raise ToolError(redact(f"{type(error).__name__}: {error}")) from None

    return call


class Tools:
    """What an assistant may call; names, arguments and docstrings are what it sees."""

    def __init__(self, found: Database) -> None:
        self._database = found

    def all(self) -> Iterator[tuple[bool, Tool]]:
        """Yield each tool, and whether it only looks."""
        looks = (self.list_studies, self.explain_study, self.list_trials, self.explain_trial)
        writes = (self.enqueue, self.stop_study, self.resume_study, self.extend_study)
        yield from ((True, one) for one in looks)
        yield from ((False, one) for one in writes)

    def _study(self, name: str) -> Study:
        from hpo.api.study import Study

        study = Study(name, self._database)
        _ = study.row
        return study

    def list_studies(self) -> list[dict[str, Any]]:
        """List all studies: state, finished trials, budget, metric and best value."""
        from hpo.search.status import read_studies

        found: list[dict[str, Any]] = []
        studies, problems = read_studies(self._database)
        for status in studies:
            best = status.best
            found.append(
                {
                    "study": status.row.name,
                    "state": status.state,
                    "finished": status.finished,
                    "budget": status.budget,
                    "metric": status.file.metric,
                    "best": None if best is None else best.value,
                    "live_workers": len(status.live_workers),
                }
            )
        return [*found, *({"problem": one} for one in problems)]

    def explain_study(self, study: str) -> dict[str, Any]:
        """Explain one study: a summary in plain language (what was searched, what won, against what
        and by how much beyond noise, what mattered, what to try next), the searched space, and
        everything of its status."""
        from hpo.reports.importance import importances
        from hpo.reports.summary import as_dicts, summarize

        status = self._study(study).status()
        found = importances(self._database, study)
        space = {name: str(one) for name, one in status.file.space.items()}
        return {
            "summary": as_dicts(summarize(status, found)),
            "space": space,
            "status": status.to_dict(),
        }

    def list_trials(self, study: str, state: str | None = None, last: int = 50) -> dict[str, Any]:
        """List the newest trials of a study (at most `last`, 1 to 200), of one state such as
        complete, pruned, failed, running or paused if it is given: parameters, value, epochs, why
        each ended."""
        from hpo.search.status import STATES

        if state is not None and state not in STATES:
            raise InputError(f"state {state!r}; allowed: {', '.join(STATES)}")
        if not 1 <= last <= MOST_TRIALS:
            raise InputError(f"last {last}; allowed: 1 to {MOST_TRIALS}")
        trials = [one for one in self._study(study).trials if state in (None, one.state)]
        rows = [
            {
                "number": one.number,
                "state": one.state,
                "value": one.value,
                "best_epoch": one.best_epoch,
                "epochs": len(one.epochs),
                "seconds": round(one.seconds, 1),
                "origin": one.origin,
                "reason": one.reason,
                "params": one.params,
            }
            for one in trials[-last:]
        ]
        return {"trials": rows, "of": len(trials)}

    def explain_trial(self, study: str, number: int) -> dict[str, Any]:
        """Explain one trial: its parameters, the metrics of its epochs (all; of more than 100 an
        even selection), its attempts, why it ended."""
        trials = self._study(study).trials
        chosen = next((one for one in trials if one.number == number), None)
        if chosen is None:
            last = max((one.number for one in trials), default=None)
            have = "it has none yet" if last is None else f"allowed: 0 to {last}"
            raise NotFound(f"no trial {number} in study {study!r}; {have}")
        rows, step = chosen.epochs, -(-len(chosen.epochs) // MOST_EPOCHS)
        always = (1, chosen.best_epoch, len(rows))
        told = [asdict(row) for row in rows if row.epoch % step == 0 or row.epoch in always]
        return chosen.to_dict() | {"epochs": told, "of_epochs": len(rows)}

    def enqueue(self, study: str, values: dict[str, Any]) -> str:
        """Queue a configuration as the next trial; it counts toward the budget. `values` are
        searched parameters by dotted name, such as {"optimizer.lr": 0.003}; the rest is sampled."""
        self._study(study).enqueue(values)
        return f"the next trial of {study} will try it"

    def stop_study(self, study: str) -> str:
        """Pause a study: its workers save after the current epoch and exit; nothing is lost."""
        self._study(study).stop()
        return f"{study} is stopping"

    def resume_study(self, study: str) -> str:
        """Lift a stop. No worker is started: that takes `hpo resume` or `hpo worker` in a shell."""
        self._study(study).resume()
        return f"{study} may go on; workers: hpo worker {study}"

    def extend_study(
        self, study: str, trials: int | None = None, max_time: str | None = None
    ) -> str:
        """Raise a study's limits: `trials` in all, `max_time` in all, such as 90m or 2h."""
        if trials is None and max_time is None:
            raise InputError("give trials or max_time, the new limit in all")
        self._study(study).extend(trials=trials, max_time=max_time)
        return f"{study} is extended; workers: hpo worker {study}"
