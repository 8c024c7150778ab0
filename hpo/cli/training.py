"""`hpo train` and `reproduce`: trainings outside a search."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpo.cli.options import (
    Device,
    Json,
    Log,
    Overrides,
    RunPath,
    console,
    program,
    say,
    tell_warning,
)
from hpo.errors import InputError, Interrupted
from hpo.paths import Home
from hpo.workers.process import first_device

if TYPE_CHECKING:
    from rich.console import Console

    from hpo.config.train import TrainConfig


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
    log: Log = [],  # noqa: B006
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
        "log": log,
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
    from hpo.trained.run import score_line

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
    from hpo.cli.console import Text, is_drawn
    from hpo.workers.process import stop_on_signal

    with stop_on_signal() as stop:
        if not is_drawn(out):
            yield lambda line: out.print(line, markup=False, soft_wrap=True), _UntilStopped(stop)
            return
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


def reproduce(
    run: RunPath,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder of the second training.",
            show_default="RUN.again",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="cpu, cuda, cuda:1 or mps.",
            show_default="one of the run's kind, if there is any",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a run again as its run.json and config.toml say, and tell what is different.

    Seeds, images, precision, layout and threads are those of the run. The exit code is 0 if
    weights, curves and scores are equal bit by bit, or if another processor, GPU or version of
    torch explains other bits and the scores agree within the noise of the images; else 1.

    Example: hpo reproduce hpo_runs/trained/best
    """
    from hpo.cli.console import SafeConsole
    from hpo.cli.tables import to_json
    from hpo.trained.reproduce import reproduce as train_again

    out = console()
    with training_progress(out if not as_json else SafeConsole(stderr=True)) as (tell, control):
        found = train_again(
            run,
            out=output,
            home=Home.default(),
            device=device,
            control=control,
            progress=tell,
        )
    if as_json:
        typer.echo(to_json(found.to_dict()))
    else:
        for line in found.lines():
            out.print(line, markup=False, soft_wrap=True)
    if not found.reproduced:
        raise typer.Exit(1)
