"""`hpo storage`: upgrade, copy, check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpo.api.creation import make_home
from hpo.cli.options import Json, Storage, database, program, say, warn_of_password
from hpo.errors import NotFound
from hpo.formatting import printable
from hpo.paths import Home

if TYPE_CHECKING:
    from hpo.doctor.rules import Finding
    from hpo.doctor.scan import CheckResult, Counts


def output_lines(
    checked: CheckResult, repaired: Sequence[Finding], *, repair: bool
) -> Iterator[str]:
    """Yield lines: what was repaired, what is wrong, what only looks wrong, and the sum."""
    for one in repaired:
        yield f"repaired: {line(one)}"
        yield f"    {one.repair}"
    for one in checked.faults:
        yield line(one)
        if one.repair is None:
            yield f"    left to you: {one.advice}"
        elif repair:
            yield "    not repaired: it has just changed, check again"
        else:
            yield f"    --repair: {one.repair}"
    for one in checked.notes:
        yield f"no fault: {line(one)}"
    summary = counted(checked.counts) if checked.readable else "nothing else was checked"
    yield f"{summary}: {verdict(checked, repair=repair)}"


def line(one: Finding) -> str:
    """Return `attempt without end: digits, trial 3, attempt 1: it is ...`."""
    return ": ".join(part for part in (one.kind, one.where, one.message) if part)


def counted(counts: Counts) -> str:
    """Return `3 studies, 120 trials, ...`."""
    ones = {"studies": "study"}
    return ", ".join(
        f"{count} {name if count != 1 else ones.get(name, name.removesuffix('s'))}"
        for name, count in asdict(counts).items()
    )


def verdict(checked: CheckResult, *, repair: bool) -> str:
    """Return how many faults there are, and how many can be repaired."""
    count = len(checked.faults)
    if not count:
        return "no faults"
    repairable = sum(one.repair is not None for one in checked.faults)
    faults = "1 fault" if count == 1 else f"{count} faults"
    return faults if repair or not repairable else f"{faults}, --repair repairs {repairable}"


def as_data(checked: CheckResult, repaired: Sequence[Finding]) -> dict[str, Any]:
    """Return the same for `--json`."""
    return {
        "counts": asdict(checked.counts),
        "faults": [one.to_dict() for one in checked.faults],
        "notes": [one.to_dict() for one in checked.notes],
        "mended": [one.to_dict() for one in repaired],
    }


def storage() -> None:
    """Set up a database, upgrade it, copy its studies elsewhere, check it for faults.

    Example: hpo storage upgrade
    """


def upgrade(as_json: Json = False, storage: Storage = None) -> None:
    """Create the tables, or upgrade those of an older hpo or Optuna: the first step of a
    deployment, and the first one after an upgrade of hpo.

    Does nothing if the tables are up to date, so it may run at every start, also from several hosts
    at once. Stop the workers of an older hpo first, and back up the database.

    Example: HPO_STORAGE=postgresql+psycopg://me@server/hpo hpo storage upgrade
    """
    from hpo.storage.schema import upgrade_schema

    with database(storage) as found:
        make_home(found)
        done = upgrade_schema(found)
        say(as_json, {"database": found.shown, "done": done}, f"{found.shown}: {done}")


def copy(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="URL of the database to copy from.", callback=warn_of_password
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="DST",
            help="URL of the database to copy to; its tables are created if they are missing.",
            callback=warn_of_password,
        ),
    ],
    study: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only this study.", show_default="all of hpo's studies"),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also while workers run: copy a snapshot."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Copy studies with everything in them to another database of any kind.

    Each study is copied completely or not at all, and never over one of the same name. The copy can
    be continued: files stay where they are, under the study's uuid. Continue only one of the two;
    remove the other with hpo delete --keep-files.

    Example: hpo storage copy sqlite:///hpo_runs/hpo.db postgresql+psycopg://me@server/hpo
    """
    from hpo.storage import records, transfer
    from hpo.storage.schema import create_schema

    with database(source) as old, database(target) as new:
        rows = [records.get_study(old, study)] if study else records.list_studies(old)
        if not rows:
            raise NotFound(f"no studies in {old.shown}")
        make_home(new)
        create_schema(new)
        transfer.refuse(old, new, rows, force=force)
        copied = {}
        for row in rows:
            copied[row.name] = transfer.copy_study(old, new, row)
            if not as_json:
                typer.echo(f"{row.name}: {copied[row.name]} trials copied")
        say(
            as_json,
            {"copied": copied, "from": old.shown, "to": new.shown},
            f"both use the same files; continue only one, and remove the other: {program()} "
            "delete STUDY --keep-files --storage URL",
        )


def check(
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Repair what can be repaired safely; list the rest."),
    ] = False,
    artifacts: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="HPO_ARTIFACTS",
            help="Another folder or store of artifacts to check, besides those of the studies.",
            show_default="none",
        ),
    ] = None,
    files: Annotated[
        bool,
        typer.Option(
            "--files",
            help="Also read all checkpoints, weights, caches and trained runs, to find damage.",
        ),
    ] = False,
    as_json: Json = False,
    storage: Storage = None,
) -> None:
    """Check for faults: trials without attempts, attempts without end, orphaned rows and files,
    contradictions with Optuna's tables, a damaged or an old database. Exit code 1 if there are any.

    It may run while workers do. --repair never touches a trial that a worker holds, results, the
    weights of finished trials, or studies that another tool made. Files are those under HPO_HOME
    on this host and in the artifacts of each study. With --files each is verified against its
    checksum; --repair then removes damaged caches, and checkpoints that no worker uses.

    Example: hpo storage check --files
    """
    from hpo.cli.tables import to_json
    from hpo.doctor.scan import check_all, repair_all

    with database(storage) as found:
        home = Home.default()
        checked = check_all(found, home, artifacts, files=files)
        repaired = repair_all(found, checked) if repair else []
        if repaired:
            checked = check_all(found, home, artifacts, files=files)
    if as_json:
        typer.echo(to_json(as_data(checked, repaired)))
    else:
        for line in output_lines(checked, repaired, repair=repair):
            typer.echo(printable(line))
    if checked.faults:
        raise typer.Exit(1)


COMMANDS: dict[str, Callable[..., Any]] = {"upgrade": upgrade, "copy": copy, "check": check}
