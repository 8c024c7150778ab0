"""`hpo export`, `evaluate`, `predict`, `report` and `compare`: what came out."""

from __future__ import annotations

import glob
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli.options import (
    Device,
    Json,
    RunPath,
    Storage,
    StudyName,
    console,
    database,
    program,
    require_there,
    say,
    storage_flag,
    tell_note,
    working,
)
from hpo.errors import DataError, InputError
from hpo.formatting import plural
from hpo.io import Sink, atomic_write
from hpo.paths import Home
from hpo.workers.process import first_device

if TYPE_CHECKING:
    from hpo.search.verification import Verification
    from hpo.trained.inference import Prediction


def export(
    study: StudyName,
    trial: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Number of the trial.",
            show_default="the best trial; after hpo verify its winner",
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="Export the best K trials, a file each.",
            show_default="only the best",
        ),
    ] = None,
    pareto: Annotated[
        bool,
        typer.Option(
            "--pareto",
            help="With several metrics: export every trial of the Pareto front, a file each.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="File, or folder with --top and --pareto.",
            show_default="STUDY.best.toml, STUDY.trial-N.toml, or the folder STUDY.top or "
            "STUDY.pareto",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also copy the weights of its best epoch to FILE, from here or the artifacts. "
            "They are kept for the best three trials, or for the Pareto front; with folds, all of "
            "them are copied, their names prefixed with fold0., fold1., ...",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    as_json: Json = False,
    storage: Storage = None,
) -> None:
    """Write a trial's complete configuration and its provenance, for `hpo train`.

    That is the winner of `hpo verify`, if the study was verified, else its best trial.

    Example: hpo export digits -o best.toml
    """
    from hpo.search import verification
    from hpo.search.status import read_status
    from hpo.trained import export as exports

    if (trial is not None) + (top is not None) + pareto > 1:
        raise InputError("--trial, --top and --pareto exclude each other")
    if weights is not None and (pareto or top is not None):
        raise InputError("--weights is for one trial, not for --top or --pareto")
    with database(storage) as found:
        if pareto or top is not None:
            chosen = (
                exports.export_front(found, study)
                if top is None
                else exports.export_top(found, study, top)
            )
            folder = output or Path(f"{study}.{'pareto' if pareto else 'top'}")
            paths = exports.write_top(folder, chosen, force=force)
        else:
            chosen = [exports.export(found, study, number=trial)]
            which = "best" if trial is None else f"trial-{trial}"
            paths = [output or Path(f"{study}.{which}.toml")]
            if weights is not None:
                number = int(chosen[0][1]["trial"])
                exports.write_weights(found, study, number, weights, Home.default(), force=force)
            exports.write_export(paths[0], *chosen[0], force=force)
        note = None if trial is not None else read_status(found, study).pruned_note
        verified = verification.read(found, study)
        flag = storage_flag(found)
    if as_json:
        files = [
            {"file": str(path), "weights": weights and str(weights), **provenance}
            for path, (_, provenance) in zip(paths, chosen, strict=True)
        ]
        say(as_json, {"study": study, "exported": files, "note": note})
        return
    if weights is not None:
        typer.echo(f"{weights}: its weights")
    for path, (_, provenance) in zip(paths, chosen, strict=True):
        line = exports.verified_line(provenance)
        typer.echo(f"{path}: trial {provenance['trial']}" + (f". {line}" if line else ""))
    if trial is None and verified is not None:
        typer.echo(f"{verified.name}: {verified.verdict}")
    if note:
        typer.echo(note)
    for line in _next_steps(study, paths, verified, flag, pareto=pareto, is_best=trial is None):
        typer.echo(line)


def _next_steps(
    study: str,
    paths: Sequence[Path],
    verified: Verification | None,
    flag: str,
    *,
    pareto: bool,
    is_best: bool,
) -> Iterator[str]:
    """Yield the commands that go on from exported files; `is_best`: no trial was named."""
    verify = f"{program()} verify {study}"
    if pareto:
        yield f"next: choose one by its metrics, then: {program()} train FILE --seeds 3"
    elif len(paths) > 1 and (verified is None or verified.winner is None):
        yield (
            f"next: {verify} --top {len(paths)}{flag} compares them with other seeds, on "
            "validation; to train each and take the one of the best test would be to choose on the "
            "test set"
        )
    elif len(paths) > 1:
        yield f"next: {program()} export {study}{flag} takes the winner"
    else:
        if is_best and verified is None:
            yield f"one seed's result; to compare the best with other seeds: {verify}{flag}"
        yield f"next: {program()} train {shlex.quote(str(paths[0]))} --seeds 3"


def evaluate(
    run: RunPath,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Folder of images by class (or with test/ in it), or a CSV file (file, label).",
            show_default="the test split of the run's own data",
        ),
    ] = None,
    device: Device = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything as JSON, confusion matrices included.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Accept images that the run has seen."),
    ] = False,
) -> None:
    """Evaluate a trained run: top-1, top-5, loss, and precision, recall, F1 of each class; several
    seeds also as an ensemble, by the mean of their probabilities.

    A folder with images that the run was trained on, or that chose its epoch, is refused, even if
    they were renamed or losslessly re-encoded; with --force the result lists them.

    Example: hpo evaluate hpo_runs/trained/best --data new_photos/
    """
    from hpo.cli.tables import evaluation_page, to_json

    if data is not None:
        require_there(data)
    with working("loading networks", shown=not as_json):
        from hpo.trained.inference import evaluate_run
        from hpo.trained.run import load_run

        place = first_device(device)
        found = evaluate_run(
            load_run(run), data=data, home=Home.default(), device=place, force=force
        )
    tell_note(found.note)
    if as_json:
        scores = {"seeds": found.scores(), "ensemble": found.ensemble, "summary": found.summary}
        about = {"data": found.data, "images": found.images, "overlap": found.overlap}
        about |= {"trained_on": found.trained_on, "validated_on": found.validated_on}
        certainty = {"certainty": [one.to_dict() for one in found.certainties]}
        typer.echo(to_json({**about, **scores, **certainty}))
    else:
        console().print(evaluation_page(found))


def report(
    study: StudyName,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write.",
            show_default="STUDY.report.html",
        ),
    ] = None,
    as_json: Json = False,
    storage: Storage = None,
) -> None:
    """Write the whole search as one HTML page that works offline.

    A summary in plain language and what to try next; optimization history, intermediate values,
    parameter importances, parallel coordinates, a slice plot per parameter; the best trial's worst
    mistakes on validation, its confusion matrix and its curves; a table of the trials. It prints on
    A4. If the study has artifacts, the page is also stored there.

    Example: hpo report digits -o report.html
    """
    path = output or Path(f"{study}.report.html")
    with database(storage) as found, working("drawing the report", shown=not as_json):
        from hpo.reports.page import write_report
        from hpo.reports.study import share_report, study_report

        write_report(path, study_report(found, study))
        shared = share_report(found, study, path)
    lines = [f"{path} written; open it in a browser", *([f"also at {shared}"] if shared else [])]
    say(as_json, {"study": study, "file": str(path), "shared": shared}, *lines)


def predict(
    run: RunPath,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE|FOLDER...",
            help='Image files, folders (with subfolders), or patterns such as "shots/**/*.jpg".',
            show_default=False,
        ),
    ],
    top: Annotated[
        int,
        typer.Option(metavar="K", min=1, help="Number of classes, or of nearest images, to show."),
    ] = 5,
    device: Device = None,
    as_json: Json = False,
    csv_: Annotated[
        str | None,
        typer.Option(
            "--csv",
            metavar="FILE",
            help="Write a row per image to FILE, completely or not at all; - prints them.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Predict images with a trained run: the most likely classes with their probabilities (means
    over the run's seeds); for retrieval, the nearest training images (by the first seed). Images
    are used whole, even if the run was trained on images cropped to their boxes.

    An unreadable file gets a row with the reason; the exit code is 2 only if none can be read.
    Images that the run was trained on, or that chose its epoch, are marked, copies included.

    Example: hpo predict hpo_runs/trained/best cat.jpg holiday/ --csv holiday.csv
    """
    from hpo.cli.tables import answers_csv, answers_json, answers_table

    if as_json and csv_ is not None:
        raise InputError("--json and --csv exclude each other")
    if csv_ is not None and Path(csv_).is_dir():
        raise InputError(f"--csv {csv_} is a folder; name a file")
    with working("loading networks", shown=not as_json):
        from hpo.trained.inference import TrainedModel, predictions, whole_note

        model, found = TrainedModel.load(run, device=first_device(device)), select(images)
    for note in (whole_note(model.config), found.note):
        tell_note(note)
    task = model.task
    columns, shown = task.columns, task.answers(top, len(model.classes))
    count = _Count(len(found.files))
    with _prediction_progress(len(found.files), shown=not as_json) as tell:
        answers = count.counted(predictions(model, found.files, k=top), tell)
        if csv_ is not None:
            _write_csv(csv_, answers_csv(answers, columns, shown))
        elif as_json:
            for part in answers_json(answers):
                typer.echo(part, nl=False)
        else:
            console().print(answers_table(answers, columns))
    count.report()
    if isinstance(model.seen, str):
        tell_note(model.seen)
    if csv_ not in (None, "-"):
        typer.echo(f"{csv_}: {plural(len(found.files), 'image')}")


@dataclass(frozen=True)
class Selection:
    """Image files to predict."""

    files: tuple[Path, ...]
    left_out: Counter[str] = field(default_factory=Counter)
    """Files in folders that are no images by their extension: count by extension."""

    @property
    def note(self) -> str | None:
        """Return a line on the files that were left out, if any."""
        if not self.left_out:
            return None
        kinds = ", ".join(f"{kind or 'without'} {n:,}" for kind, n in self.left_out.most_common(8))
        return f"files of other extensions in these folders are left out: {kinds}"


def select(paths: Sequence[Path]) -> Selection:
    """Expand `paths` in their order: files as they are, even unreadable ones; folders to the images
    below them, by the rules of `data.root`; patterns (`*`, `?`, `[`; `**` for any folders) that are
    no files to what they match.

    Raises InputError if no image is left.
    """
    from hpo.data.folders import images_below

    files: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in _matched(paths):
        if not path.is_dir():
            files.append(path)
            continue
        images, others = images_below(path)
        files += map(Path, images)
        left_out.update(PurePath(one).suffix.lower() for one in others)
    found = Selection(tuple(files), left_out)
    if not files:
        given = ", ".join(map(str, paths))
        why = f"; {found.note}" if found.note else ""
        raise InputError(f"no images in {given}{why}" if paths else "no images: give a file")
    return found


def _matched(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.exists() or not glob.has_magic(str(path)):
            yield path
        else:
            yield from map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207


@dataclass
class _Count:
    """Counts of predicted, unreadable and training images."""

    images: int
    trained_on: int = 0
    validated_on: int = 0
    failed: list[Prediction] = field(default_factory=list)

    def counted(
        self, answers: Iterable[Prediction], tell: Callable[[int], None]
    ) -> Iterator[Prediction]:
        """Yield `answers`, each counted and reported to `tell`."""
        for done, one in enumerate(answers, 1):
            if one.error is not None:
                self.failed.append(one)
            else:
                self.trained_on += bool(one.trained_on)
                self.validated_on += bool(one.validated_on)
            tell(done)
            yield one

    def report(self) -> None:
        """Print notes on the counts. Raises DataError if no image could be read."""
        if len(self.failed) == self.images:
            first = f"{self.failed[0].path}: {self.failed[0].error}"
            raise DataError(
                f"none of {self.images:,} files can be read; the first one: {first}"
                if self.images > 1
                else first
            )
        if self.failed:
            tell_note(f"{len(self.failed):,} of {self.images:,} files cannot be read")
        for count, use in ((self.trained_on, "trained on"), (self.validated_on, "validated on")):
            if count:
                tell_note(f"the run was {use} {count:,} of {self.images:,} images")


@contextmanager
def _prediction_progress(images: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function of the number of images done, which a terminal shows on standard error."""
    from hpo.cli.console import SafeConsole

    out = SafeConsole(stderr=True)
    if not shown or not out.is_terminal:
        yield lambda done: None
        return
    with out.status("loading networks", spinner="line") as status:
        yield lambda done: status.update(f"{done:,} of {images:,} images")


def _write_csv(file: str, rows: Iterable[str]) -> None:
    """Write to the file, or to standard output for `-`."""
    if file == "-":
        for row in rows:
            typer.echo(row, nl=False)
        return

    def write(sink: Sink) -> None:
        for row in rows:
            sink.write(row.encode())

    atomic_write(Path(file), write)


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY|RUN...",
            help="Names of studies, and folders that `hpo train` wrote.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Also write a page with figures.",
            show_default="none",
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(metavar="K", min=1, help="Number of best trials in the mean.")
    ] = 5,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency", help="Time one image here if a study has no latency_ms of its own."
        ),
    ] = False,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, curves included.")] = False,
    storage: Storage = None,
) -> None:
    """Compare studies, the architectures in them, and trained runs.

    For studies: best trial, mean of the best trials, epochs and time spent, and the cost of the
    best network; for runs: top-1, top-5, precision, recall and F1, for example before and after
    tuning. The page plots best values and scores with 95 % intervals, accuracy against costs that
    differ, overlaid curves, and F1 of the 20 most frequent classes.

    Example: hpo compare resnet mobilenet -o compare.html
    """
    from hpo.cli.tables import cells_table, to_json

    with database(storage) as found, working("comparing", shown=not as_json):
        from hpo.reports import compare as comparing
        from hpo.reports.compare import entries_table, runs_table

        result = comparing.compare(
            found, names, top=top, device=first_device(device), latency=latency
        )
        if output is not None:
            from hpo.reports.compare_page import comparison_report
            from hpo.reports.page import write_report

            write_report(output, comparison_report(result, " · ".join(names)))
    if as_json:
        typer.echo(to_json(result.to_dict()))
        return
    out = console()
    for table in (entries_table(result), runs_table(result)):
        if table.rows:
            out.print(cells_table(table))
    for note in result.notes:
        out.print(note, markup=False, soft_wrap=True)
    if output is not None:
        typer.echo(f"{output} written; open it in a browser")
