"""`hpo export`, `train`, `evaluate`, `predict`, `report`, `compare`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpo.cli.options import (
    Device,
    Json,
    Overrides,
    RunPath,
    Storage,
    StudyName,
    console,
    database,
    program,
    say,
    storage_flag,
    tell_note,
    tell_warning,
    working,
)
from hpo.errors import DataError, InputError, Interrupted
from hpo.formatting import plural
from hpo.io import Sink, atomic_write
from hpo.paths import Home
from hpo.workers.process import first_device

if TYPE_CHECKING:
    from rich.console import Console

    from hpo.config.train import TrainConfig
    from hpo.trained.inference import Prediction


KeepValidation = Annotated[
    bool,
    typer.Option(
        "--keep-validation",
        help="Hold out the validation set and use it to pick the best epoch.",
    ),
]
Onnx = Annotated[
    bool,
    typer.Option(
        "--onnx",
        help="Also write each seed as model.onnx, verified against torch; needs the extra onnx.",
    ),
]
Quantize = Annotated[
    list[str],
    typer.Option(
        metavar="KIND",
        help="Also write int8 ONNX: dynamic (linear layers) or static (convolutions too, "
        "calibrated on training images); repeatable. Implies --onnx.",
        show_default=False,
    ),
]


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
    verify = f"{program()} verify {study}"
    if pareto:
        typer.echo(f"next: choose one by its metrics, then: {program()} train FILE --seeds 3")
        return
    if len(paths) > 1 and (verified is None or verified.winner is None):
        typer.echo(
            f"next: {verify} --top {len(paths)}{flag} compares them with other seeds, on "
            "validation; to train each and take the one of the best test would be to choose on the "
            "test set"
        )
        return
    if len(paths) > 1:
        typer.echo(f"next: {program()} export {study}{flag} takes the winner")
        return
    if trial is None and verified is None:
        typer.echo(f"one seed's result; to compare the best with other seeds: {verify}{flag}")
    typer.echo(f"next: {program()} train {paths[0]} --seeds 3")


def train(
    configs: Annotated[
        list[Path],
        typer.Argument(
            metavar="CONFIG.toml...",
            help="Configurations, exported or written by hand; one run each.",
            show_default=False,
        ),
    ],
    seeds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of seeds to train, one after another.")
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder of the run; with several files, parent folder of the runs.",
            show_default="hpo_runs/trained/CONFIG",
        ),
    ] = None,
    keep_validation: KeepValidation = False,
    onnx: Onnx = False,
    quantize: Quantize = [],  # noqa: B006
    device: Device = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print only the scores, as JSON; progress on stderr.")
    ] = False,
    set_: Overrides = [],  # noqa: B006
) -> None:
    """Retrain on training and validation images over the full schedule, then evaluate once on the
    test set.

    The test set is opened once per seed. The run's folder has weights (safetensors), curves,
    metrics per class, the confusion matrix, and report.html. After an interruption the same command
    resumes. Several seeds are also tested as an ensemble, by the mean of their probabilities.

    Of several configurations each opens the test set. To choose between them by what they reach
    there is to choose on the test set; hpo verify chooses on validation.

    Example: hpo train best.toml --seeds 3 --set epochs=100
    """
    from hpo.config.study import load_config
    from hpo.config.toml import parse_assignments

    overrides = parse_assignments(set_)
    jobs = [
        (folder, *load_config(path, overrides))
        for path, folder in zip(configs, _run_folders(configs, output), strict=True)
    ]
    if len(jobs) > 1:
        tell_warning(_on_choosing([provenance for *_, provenance in jobs]))
    options = {
        "seeds": seeds,
        "keep_validation": keep_validation,
        "onnx": onnx,
        "quantize": quantize,
    }
    _train(jobs, first_device(device), options, as_json=as_json)


def _on_choosing(provenances: Sequence[Mapping[str, Any]]) -> str:
    """Warn of a choice between trained configurations, of `provenances`, by the test set."""
    studies = {str(one.get("study", "")) for one in provenances}
    name = studies.pop() if len(studies) == 1 else ""
    return (
        f"{len(provenances)} configurations will be tested: to choose between them by these "
        "results is to choose on the test set, and the best one's will be too good. To choose on "
        f"validation, with several seeds: {program()} verify {name or 'STUDY'}, then "
        f"{program()} export {name or 'STUDY'}"
    )


def _train(
    jobs: list[tuple[Path, TrainConfig, dict[str, Any]]],
    device: str,
    options: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Train each (folder, configuration, provenance) with the same `options`; print a table."""
    from hpo.api import trained
    from hpo.cli.console import nearby
    from hpo.cli.tables import networks_table, run_notes, runs_table
    from hpo.trained.plain import use_lines
    from hpo.trained.score import score_line

    out = console(stderr=as_json)
    runs = []
    with training_progress(out) as (tell, control):
        for folder, config, provenance in jobs:
            model = trained.train(
                config,
                provenance=provenance,
                out=folder,
                device=device,
                **options,
                control=control,
                progress=tell,
            )
            runs.append(model.loaded)
    if as_json:
        say(as_json, {"runs": [{"folder": str(run.path), **run.summary} for run in runs]})
        return
    out.print(runs_table(runs))
    for run in runs:
        networks = networks_table(run)
        if networks.row_count:
            out.print(f"\n{nearby(run.path)}", markup=False, soft_wrap=True)
            out.print(networks)
    scores = [f"{nearby(run.path)}: {line}" for run in runs if (line := score_line(run))]
    for line in (*scores, *run_notes(runs), *use_lines(runs[0])):
        out.print(line, markup=False, soft_wrap=True)


def _run_folders(configs: Sequence[Path], output: Path | None) -> list[Path]:
    """Return the folder of each configuration's run; raise InputError if two would share one."""
    if len(configs) == 1 and output is not None:
        return [output]
    folders = [output / path.stem if output else Home.default().trained(path.stem)
               for path in configs]  # fmt: skip
    if len(set(folders)) < len(folders):
        raise InputError("two configurations have the same file name: rename one")
    return folders


class _UntilStopped:
    """Control of a training that runs until a signal arrives."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def step(self, *, epoch: int, images: int) -> None:
        if self.stop.is_set():
            raise Interrupted("stopped by a signal; the same command resumes")


@contextmanager
def training_progress(out: Console) -> Iterator[tuple[Callable[[str], None], _UntilStopped]]:
    """Yield a function for progress lines (a status line on a terminal), and a control."""
    from hpo.workers.process import stop_on_signal

    with stop_on_signal() as stop:
        if not out.is_terminal:
            yield lambda line: out.print(line, markup=False, soft_wrap=True), _UntilStopped(stop)
            return
        from hpo.cli.console import Text
        from hpo.control import phases_heard

        told: list[str] = []  # phases are shown until the first line: decoding, downloading

        def tell(line: str) -> None:
            told.append(line)
            status.update(Text(line))

        with (
            out.status("preparing images", spinner="line") as status,
            phases_heard(lambda phase: None if told else status.update(Text(phase))),
        ):
            yield tell, _UntilStopped(stop)


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
        from hpo.trained.selection import select

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
