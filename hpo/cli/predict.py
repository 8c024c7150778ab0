"""`hpo predict`: what a trained run sees in files and folders, as a table, JSON or CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli.options import Device, RunPath, console, tell_note
from hpo.errors import DataError, InputError
from hpo.files import Sink, write_whole
from hpo.results.table import count as amount
from hpo.workers.devices import first_device

if TYPE_CHECKING:
    from hpo.results.predict import Prediction
    from hpo.results.retrieval import Lookup

    Answer = Prediction | Lookup


def predict(
    run: RunPath,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE|FOLDER...",
            help='Image files; folders, with all below them; patterns such as "shots/**/*.jpg".',
            show_default=False,
        ),
    ],
    top: Annotated[
        int, typer.Option(metavar="K", min=1, help="Classes, or nearest images, to show.")
    ] = 5,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    csv_: Annotated[
        str | None,
        typer.Option(
            "--csv",
            metavar="FILE",
            help="A row for each image into a file that is complete or not there; - prints them.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """What a trained run sees in images: the most likely classes with their probabilities, means
    over the run's seeds; of a retrieval the nearest training images, by its first seed. Images are
    taken whole, also where the run was trained on images cropped to their boxes.

    A file that cannot be read is a row with the reason; the exit code is 2 only where none can be.
    Images that the run was trained on, also copies, are marked.

    Example: hpo predict hpo_runs/trained/best cat.jpg holiday/ --csv holiday.csv
    """
    from hpo.cli.tables import answers_csv, answers_json, answers_table
    from hpo.results.evaluate import whole_note
    from hpo.results.predict import predictions, select
    from hpo.results.retrieval import lookups
    from hpo.results.runs import load_run

    if as_json and csv_ is not None:
        raise InputError("--json and --csv exclude each other")
    if csv_ is not None and Path(csv_).is_dir():
        raise InputError(f"--csv {csv_}: is a folder; name a file")
    trained, chosen = load_run(run), first_device(device)
    found = select(images)
    for note in (whole_note(trained.config), found.note):
        tell_note(note)
    retrieval = trained.config.task == "retrieval"
    look = lookups if retrieval else predictions
    columns = ("nearest", "class", "distance") if retrieval else ("class", "probability")
    shown = top if retrieval else min(top, len(trained.classes))
    count = _Count(len(found.files))
    with _progress(len(found.files)) as tell:
        answers = count.counted(look(trained, found.files, device=chosen, k=top), tell)
        if csv_ is not None:
            _write_csv(csv_, answers_csv(answers, columns, shown))
        elif as_json:
            for part in answers_json(answers):
                typer.echo(part, nl=False)
        else:
            console().print(answers_table(answers, columns))
    count.report()
    if csv_ not in (None, "-"):
        typer.echo(f"{csv_}: {amount(len(found.files), 'image')}")


@dataclass
class _Count:
    """What became of the images."""

    images: int
    trained_on: int = 0
    known: bool = True
    """Whether the run knows what it was trained on."""
    failed: list[Answer] = field(default_factory=list)

    def counted(self, answers: Iterable[Answer], tell: Callable[[int], None]) -> Iterator[Answer]:
        """`answers`, each counted and told of before it is passed on."""
        for done, one in enumerate(answers, 1):
            if one.error is not None:
                self.failed.append(one)
            else:
                self.trained_on += bool(one.trained_on)
                self.known = one.trained_on is not None
            tell(done)
            yield one

    def report(self) -> None:
        """Tell of what is odd. Raises DataError where no image could be read."""
        from hpo.results.trained_on import UNKNOWN

        if len(self.failed) == self.images:
            first = f"{self.failed[0].path}: {self.failed[0].error}"
            raise DataError(
                f"none of {self.images:,} files can be read; the first: {first}"
                if self.images > 1
                else first
            )
        if self.failed:
            tell_note(f"{len(self.failed):,} of {self.images:,} files cannot be read")
        if not self.known:
            tell_note(UNKNOWN)
        elif self.trained_on:
            tell_note(f"the run was trained on {self.trained_on:,} of {self.images:,} images")


@contextmanager
def _progress(images: int) -> Iterator[Callable[[int], None]]:
    """Takes how many images are done, and shows it on a terminal beside the output."""
    from hpo.cli.safe import SafeConsole

    out = SafeConsole(stderr=True)
    if not out.is_terminal:
        yield lambda done: None
        return
    with out.status("loading the networks", spinner="line") as status:
        yield lambda done: status.update(f"{done:,} of {images:,} images")


def _write_csv(file: str, rows: Iterable[str]) -> None:
    """To the file, or to standard output for `-`."""
    if file == "-":
        for row in rows:
            typer.echo(row, nl=False)
        return

    def write(sink: Sink) -> None:
        for row in rows:
            sink.write(row.encode())

    write_whole(Path(file), write)
