"""What comes after a search: export, train, evaluate, report; `hpo.cli.predict` has the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpo.cli.options import (
    Device,
    Overrides,
    RunPath,
    Storage,
    StudyName,
    console,
    database,
    program,
    tell_note,
)
from hpo.errors import InputError, Interrupted
from hpo.paths import Home
from hpo.workers.devices import first_device

if TYPE_CHECKING:
    from rich.console import Console

    from hpo.definition.config import TrainConfig

KeepValidation = Annotated[
    bool,
    typer.Option(
        "--keep-validation",
        help="Do not train on the validation images: choose the best epoch by them.",
    ),
]
Onnx = Annotated[
    bool,
    typer.Option(
        "--onnx",
        help="Also write each seed as model.onnx, checked against torch; needs the extra onnx.",
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
        typer.Option(metavar="N", min=0, help="This trial.", show_default="the best one"),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            metavar="K", min=1, help="The best K trials, a file each.", show_default="only the best"
        ),
    ] = None,
    pareto: Annotated[
        bool,
        typer.Option(
            "--pareto",
            help="Of several metrics: every trial that none beats in all of them, a file each.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="File, or with --top and --pareto a folder.",
            show_default="STUDY.best.toml, STUDY.trial-N.toml, or the folder STUDY.top or "
            "STUDY.pareto",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also copy the weights of its best epoch there, from this host or the artifacts: "
            "the best three trials have them, or the whole front of several metrics; of folds "
            "all, with fold0., fold1., ... before the names.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    storage: Storage = None,
) -> None:
    """Write a trial's complete configuration, with where it comes from, for `hpo train`.

    Example: hpo export digits -o best.toml
    """
    from hpo.results import export as exports
    from hpo.search.status import read_status

    if (trial is not None) + (top is not None) + pareto > 1:
        raise InputError("--trial, --top and --pareto exclude each other")
    if weights is not None and (pareto or top is not None):
        raise InputError("--weights: of one trial; not with --top or --pareto")
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
    if weights is not None:
        typer.echo(f"{weights}: its weights")
    for path, (_, provenance) in zip(paths, chosen, strict=True):
        typer.echo(f"{path}: trial {provenance['trial']}")
    if note:
        typer.echo(note)
    typer.echo(f"next: {program()} train {' '.join(map(str, paths))} --seeds 3")


def train(
    configs: Annotated[
        list[Path],
        typer.Argument(
            metavar="CONFIG.toml...",
            help="Configurations, exported or written by hand; a run for each.",
            show_default=False,
        ),
    ],
    seeds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Train with so many seeds, one after another.")
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="The run's folder; with several files, a folder of runs.",
            show_default="hpo_runs/trained/CONFIG",
        ),
    ] = None,
    keep_validation: KeepValidation = False,
    onnx: Onnx = False,
    quantize: Quantize = [],  # noqa: B006
    device: Device = None,
    set_: Overrides = [],  # noqa: B006
) -> None:
    """Train on training and validation images over the full schedule, then open the test set.

    The test set is opened once per seed. The run's folder has weights (safetensors), curves,
    metrics per class, the confusion matrix, and report.html. Interrupted, the same command goes on.
    Several seeds are also tested as an ensemble: the mean of their probabilities.

    Example: hpo train best.toml --seeds 3 --set epochs=100
    """
    from hpo.definition.studyfile import load_config
    from hpo.definition.toml import assignments

    overrides = assignments(set_)
    jobs = [
        (folder, *load_config(path, overrides))
        for path, folder in zip(configs, _run_folders(configs, output), strict=True)
    ]
    asked = {"seeds": seeds, "keep_validation": keep_validation, "onnx": onnx, "quantize": quantize}
    _train(jobs, first_device(device), asked)


def _train(
    jobs: list[tuple[Path, TrainConfig, dict[str, Any]]], device: str, asked: dict[str, Any]
) -> None:
    """A run for each (folder, configuration, provenance), `asked` of all, then the table of all."""
    from hpo import api
    from hpo.cli.tables import networks_table, run_notes, runs_table

    out = console()
    runs = []
    with _progress(out) as (tell, control):
        for folder, config, provenance in jobs:
            run = api.train(
                config,
                provenance=provenance,
                out=folder,
                device=device,
                **asked,
                control=control,
                progress=tell,
            )
            runs.append(run)
    out.print(runs_table(runs))
    for run in runs:
        networks = networks_table(run)
        if networks.row_count:
            out.print(f"\n{run.path}", markup=False, soft_wrap=True)
            out.print(networks)
    for line in run_notes(runs):
        out.print(line, markup=False, soft_wrap=True)


def _run_folders(configs: Sequence[Path], output: Path | None) -> list[Path]:
    """Where each configuration's run goes; raises InputError where two would share a folder."""
    if len(configs) == 1 and output is not None:
        return [output]
    folders = [output / path.stem if output else Home.default().trained(path.stem)
               for path in configs]  # fmt: skip
    if len(set(folders)) < len(folders):
        raise InputError("two configurations of the same file name: rename one")
    return folders


class _UntilStopped:
    """Training goes on until a signal comes."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def step(self, *, epoch: int, images: int) -> None:
        if self.stop.is_set():
            raise Interrupted("stopped by a signal; type the same command again, it goes on")


@contextmanager
def _progress(out: Console) -> Iterator[tuple[Callable[[str], None], _UntilStopped]]:
    """Where lines of progress go (one that changes on a terminal), and what a signal stops."""
    from hpo.workers.signals import stop_on_signal

    with stop_on_signal() as stop:
        if not out.is_terminal:
            yield lambda line: out.print(line, markup=False, soft_wrap=True), _UntilStopped(stop)
            return
        from hpo.cli.safe import Text

        with out.status("preparing the images", spinner="line") as status:
            yield lambda line: status.update(Text(line)), _UntilStopped(stop)


def evaluate(
    run: RunPath,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Folder of images by class, its test/ or itself; or a CSV file (file, label).",
            show_default="the test split of the run's own data",
        ),
    ] = None,
    device: Device = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything as JSON, confusion matrices too.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also a folder with images that the run was trained on."),
    ] = False,
) -> None:
    """Measure a trained run: top-1, top-5, loss, and precision, recall, F1 of each class; several
    seeds also as an ensemble, the mean of their probabilities.

    A folder with images that the run was trained on is refused, also under other names or stored
    anew without loss; with --force the result names them.

    Example: hpo evaluate hpo_runs/trained/best --data new_photos/
    """
    from hpo.cli.tables import evaluation_page, to_json
    from hpo.results.evaluate import evaluate_run
    from hpo.results.runs import load_run

    found = evaluate_run(
        load_run(run), data=data, home=Home.default(), device=first_device(device), force=force
    )
    tell_note(found.note)
    if as_json:
        scores = {"seeds": found.scores(), "ensemble": found.ensemble, "summary": found.summary}
        about = {"data": found.data, "images": found.images, "trained_on": found.trained_on}
        typer.echo(to_json({**about, **scores}))
    else:
        console().print(evaluation_page(found))


def report(
    study: StudyName,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Where to.", show_default="STUDY.report.html"
        ),
    ] = None,
    storage: Storage = None,
) -> None:
    """Write the whole search as one page that opens without network.

    History, intermediate values, importances, parallel coordinates, a slice plot per parameter, the
    best trial's curves, and a table of the trials. A study with artifacts has it there, too.

    Example: hpo report digits -o report.html
    """
    from hpo.results.page import write_report
    from hpo.results.report import share_report, study_report

    path = output or Path(f"{study}.report.html")
    with database(storage) as found:
        write_report(path, study_report(found, study))
        typer.echo(f"{path} written: open it in a browser")
        shared = share_report(found, study, path)
    if shared:
        typer.echo(f"also at {shared}")
