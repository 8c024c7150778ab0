"""`hpo storage`: upgrade, copy, check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpo.api.study import make_home
from hpo.cli.options import (
    Storage,
    database,
    program,
    warn_of_password,
)
from hpo.errors import NotFound
from hpo.formatting import printable
from hpo.paths import Home

if TYPE_CHECKING:
    from hpo.doctor.rules import Finding
    from hpo.doctor.scan import CheckResult, Counts


def output_lines(checked: CheckResult, mended: Sequence[Finding], *, repair: bool) -> Iterator[str]:
    """The lines: what was mended, what is wrong, what only looks so, and the sum."""
    for one in mended:
        yield f"mended: {line(one)}"
        yield f"    {one.repair}"
    for one in checked.faults:
        yield line(one)
        if one.repair is None:
            yield f"    left to you: {one.advice}"
        elif repair:
            yield "    left as it is: it has changed in this moment, check again"
        else:
            yield f"    --repair: {one.repair}"
    for one in checked.notes:
        yield f"no fault: {line(one)}"
    looked_at = counted(checked.counts) if checked.readable else "nothing else was looked at"
    yield f"{looked_at}: {verdict(checked, repair=repair)}"


def line(one: Finding) -> str:
    """`attempt without end: digits, trial 3, attempt 1: it is ...`."""
    return ": ".join(part for part in (one.kind, one.where, one.message) if part)


def counted(counts: Counts) -> str:
    """`3 studies, 120 trials, ...`."""
    ones = {"studies": "study"}
    return ", ".join(
        f"{count} {name if count != 1 else ones.get(name, name.removesuffix('s'))}"
        for name, count in asdict(counts).items()
    )


def verdict(checked: CheckResult, *, repair: bool) -> str:
    count = len(checked.faults)
    if not count:
        return "nothing wrong"
    mendable = sum(one.repair is not None for one in checked.faults)
    faults = "1 fault" if count == 1 else f"{count} faults"
    return faults if repair or not mendable else f"{faults}, --repair mends {mendable}"


def as_data(checked: CheckResult, mended: Sequence[Finding]) -> dict[str, Any]:
    """The same for `--json`."""
    return {
        "counts": asdict(checked.counts),
        "faults": [one.to_dict() for one in checked.faults],
        "notes": [one.to_dict() for one in checked.notes],
        "mended": [one.to_dict() for one in mended],
    }


def storage() -> None:
    """Set up a database, bring it up to date, copy its studies elsewhere, look for what is wrong.

    Example: hpo storage upgrade
    """


def upgrade(storage: Storage = None) -> None:
    """Make the tables, or bring those of an older hpo or Optuna up to date: the first step of a
    deployment, and the first one after an upgrade of hpo.

    Nothing happens where all is up to date, so it may run at every start, also from several hosts
    at once. Stop the workers of an older hpo first; a copy of the database is a good idea.

    Example: HPO_STORAGE=postgresql+psycopg://me@server/hpo hpo storage upgrade
    """
    from hpo.storage.optuna import upgrade_schema

    with database(storage) as found:
        make_home(found)
        typer.echo(f"{found.shown}: {upgrade_schema(found)}")


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
            help="URL of the database to copy to; its tables are made if they are missing.",
            callback=warn_of_password,
        ),
    ],
    study: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only this study.", show_default="all of hpo's"),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also while workers are at it, as of one moment."),
    ] = False,
) -> None:
    """Copy studies to another database of any kind: trials, curves, attempts, workers, all of it.

    Each study is copied whole or not at all, and never onto one of the same name. It can go on in
    the copy: files stay where they are, under the study's uuid. So only one of the two should go
    on; remove the other with hpo delete --keep-files.

    Example: hpo storage copy sqlite:///hpo_runs/hpo.db postgresql+psycopg://me@server/hpo
    """
    from hpo.storage import (
        records,
        transfer,
    )
    from hpo.storage.optuna import create_schema

    with database(source) as old, database(target) as new:
        rows = [records.get_study(old, study)] if study else records.list_studies(old)
        if not rows:
            raise NotFound(f"no studies in {old.shown}")
        make_home(new)
        create_schema(new)
        transfer.refuse(old, new, rows, force=force)
        for row in rows:
            count = transfer.copy_study(old, new, row)
            typer.echo(f"{row.name}: {count} trials copied")
        typer.echo(
            f"both use the same files; go on with one alone, and remove the other: {program()} "
            "delete STUDY --keep-files --storage URL"
        )


def check(
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Mend what can be mended safely; tell what is left to you."),
    ] = False,
    artifacts: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="HPO_ARTIFACTS",
            help="A folder or store of artifacts to look into, beside those that the studies name.",
            show_default="none",
        ),
    ] = None,
    files: Annotated[
        bool,
        typer.Option(
            "--files",
            help="Also read checkpoints, weights, caches and trained runs through, for damage.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    storage: Storage = None,
) -> None:
    """Look for what is wrong: trials without attempts, attempts without end, rows and files of no
    trial, what contradicts Optuna's tables, a damaged or an old database. Exit code 1 if there is
    something.

    It may run while workers do. --repair never touches a trial that a worker holds, results, the
    weights of finished trials, or studies that another tool made. Files are those under HPO_HOME
    on this host and in the artifacts of each study. With --files each of them is held against its
    checksum; --repair then removes damaged caches, and checkpoints that nobody works on.

    Example: hpo storage check --files
    """

    from hpo.cli.tables import to_json
    from hpo.doctor.scan import check_all, repair_all

    with database(storage) as found:
        home = Home.default()
        checked = check_all(found, home, artifacts, files=files)
        mended = repair_all(found, checked) if repair else []
        if mended:
            checked = check_all(found, home, artifacts, files=files)
    if as_json:
        typer.echo(to_json(as_data(checked, mended)))
    else:
        for line in output_lines(checked, mended, repair=repair):
            typer.echo(printable(line))
    if checked.faults:
        raise typer.Exit(1)


COMMANDS: dict[str, Callable[..., Any]] = {"upgrade": upgrade, "copy": copy, "check": check}
