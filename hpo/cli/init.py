"""`hpo init`, and the study file that `hpo run` writes for a folder of images."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli.options import console, program, require_there, working
from hpo.errors import Conflict, DataError, InputError
from hpo.io import atomic_write, same_place
from hpo.paths import Home
from hpo.workers.process import threads_for, visible_gpus

if TYPE_CHECKING:
    from hpo.api.trained import Progress
    from hpo.config.starter import FolderSummary, Wish

MAX_INSPECTED = 2_000
"""Images that `hpo init` decodes at most; `hpo check` decodes all."""
TABLES = (".csv", ".tsv")
"""Extensions by which `hpo run` knows a file of labels."""

Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help="Of a folder of images: a small search that takes minutes (8 trials of a few epochs, "
        "small images, at most some hundred of them).",
    ),
]
FromScratch = Annotated[
    bool,
    typer.Option(
        "--from-scratch", help="Of a folder of images: random weights instead of pretrained ones."
    ),
]


def init(
    data_dir: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="Folder of images: train/ and optionally val/ and test/, with a folder per class; "
            "or just a folder per class; or with a metadata.csv in it or in train/, as of Hugging "
            "Face's image folders; or a CSV file with columns file and label (optionally split, "
            "group).",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write.",
            show_default="the folder's name",
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help="Time for the whole search, such as 30m or 1h30m: image size, architectures and "
            "epochs are chosen to fit.",
            show_default="no limit; 50 trials",
        ),
    ] = None,
    quick: Quick = False,
    from_scratch: FromScratch = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a commented study file for your own images, ready to run; hpo run DATA does it too.

    Photographs start from weights that were pretrained on ImageNet; images of up to 64 pixels from
    random ones.

    Example: hpo init photos/ --time 1h
    """
    from hpo.config.study import parse_study
    from hpo.config.template import starter_file
    from hpo.data.dataset import examine_data
    from hpo.training.weights import look, weights_of_study

    require_there(data_dir)
    wish, folder = wished(time, None, quick, from_scratch, None), summary_of(data_dir)
    text = starter_file(data_dir, folder, output, wish)
    file, out = parse_study(text, str(data_dir)), console()
    path = output or Path(f"{file.name}.toml")
    if path.exists() and not force:
        raise Conflict(f"{path} exists: choose another name with -o, or overwrite it with --force")
    write(path, text)
    config = file.config(file.baselines[0])
    hpo, quoted, cache = program(), shlex.quote(str(path)), Home.default().cache
    try:
        with working("reading the images"):
            report = examine_data(config.data, cache, remember=False, looked=MAX_INSPECTED)
            weights = look(weights_of_study(file))
    except DataError as error:
        raise DataError(f"{error}\n{path} was written; then: {hpo} check {quoted}") from None
    lines = [*report.lines(), proposal(folder, wish), *weights]
    out.print("\n".join(lines), markup=False, soft_wrap=True)
    typer.echo(f"{path} written. Next:\n  {hpo} check {quoted}\n  {hpo} run {quoted}")


def wished(
    time: str | None, trials: int | None, quick: bool, from_scratch: bool, device: str | None
) -> Wish:
    """Return what options ask of a first study on this machine. Raises InputError for a time that
    is none."""
    from hpo.config.starter import Wish
    from hpo.formatting import parse_duration

    wish = Wish(quick=quick, from_scratch=from_scratch, trials=trials, cores=threads_for(1),
                gpu=device != "cpu" and bool(visible_gpus()))  # fmt: skip
    if time is None:
        return wish
    try:
        return wish.within(time, parse_duration(time))
    except ValueError as error:
        raise InputError(f"--time {time!r}: {error}") from None


def summary_of(data: Path) -> FolderSummary:
    """Return what a look at a folder, or at a file of labels, tells. Raises DataError."""
    from hpo.data import csv_labels, folders

    data = data.expanduser()
    listed = data.is_file() or (data.is_dir() and csv_labels.has_metadata(data))
    return csv_labels.summarize_csv(data) if listed else folders.summarize_folder(data)


def proposal(folder: FolderSummary, wish: Wish) -> str:
    """Return in a line what was chosen, and when the search ends."""
    from hpo.config.starter import choose

    return f"chosen: {choose(folder, wish).said}"


def write(path: Path, text: str) -> None:
    """Write a study file."""
    atomic_write(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def is_data(path: Path) -> bool:
    """Return whether `path` is a folder of images or a file of labels, not a study file."""
    return path.is_dir() or (path.suffix.lower() in TABLES and path.is_file())


def study_file_of(data: Path, wish: Wish, say: Progress) -> Path:
    """Return the study file for the images of `data`, in the working directory, which is written
    unless it is there; `say` is told which, and what was chosen.

    Raises Conflict where a file of that name is of other images or was written with other options,
    DataError for images that cannot be used and weights that cannot be had; then nothing is
    written.
    """
    from hpo.api.creation import fetch_weights
    from hpo.config.study import parse_study
    from hpo.config.template import name_of, starter_file

    path = Path(f"{name_of(data.expanduser().absolute())}.toml")
    if path.exists():
        _require_own(path, data, wish)
        say(f"{path} is there and is used as it is")
        return path
    folder = summary_of(data)
    text = starter_file(data, folder, wish=wish)
    fetch_weights(parse_study(text, str(data)), say)
    write(path, text)
    say(f"{path} written, to be changed as you like; {proposal(folder, wish)}")
    return path


def _require_own(path: Path, data: Path, wish: Wish) -> None:
    """Raise Conflict unless the study file `path` is of `data`, and of the options of `wish` where
    there are any."""
    from hpo.config.study import StudyFile
    from hpo.config.template import command_of

    config = StudyFile.load(path).train.get("data", {})
    other = f"{program()} init {shlex.quote(str(data))} -o OTHER.toml"
    if not any(same_place(config.get(key), str(data)) for key in ("root", "labels")):
        raise Conflict(f"{path} is there and is not of {data}: {other} writes one beside it")
    written = f"\n# Written by: {command_of(wish)}\n"
    if wish.options and written not in path.read_text(encoding="utf-8"):
        raise Conflict(
            f"{path} is there and was not written with {wish.options}: remove it, or "
            f"{other} {wish.options}"
        )
