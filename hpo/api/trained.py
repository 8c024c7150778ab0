"""Training a configuration with several seeds, and testing it once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from hpo.formatting import printable
from hpo.paths import Home

if TYPE_CHECKING:
    from hpo.config.train import TrainConfig
    from hpo.control import Control
    from hpo.trained.inference import TrainedModel

Progress = Callable[[str], object]
"""Takes each line of progress."""


def print_line(line: str) -> None:
    """Print a line at once; control codes in it are shown, not obeyed."""
    print(printable(line), flush=True)


def as_names(given: Sequence[str] | str) -> Sequence[str]:
    """Return names, also of one that is given alone: it would be taken for its letters."""
    return [given] if isinstance(given, str) else given


class TrainOptions(TypedDict, total=False):
    """Options of `train`, as `Study.retrain` takes them, too."""

    seeds: int
    keep_validation: bool
    onnx: bool
    quantize: Sequence[str] | str
    log: Sequence[str] | str
    device: str | None
    control: Control | None
    progress: Progress | None


def train(
    config: TrainConfig | Mapping[str, Any] | str | os.PathLike[str],
    *,
    provenance: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str],
    seeds: int = 1,
    keep_validation: bool = False,
    onnx: bool = False,
    quantize: Sequence[str] | str = (),
    log: Sequence[str] | str = (),
    device: str | None = None,
    control: Control | None = None,
    progress: Progress | None = print_line,
) -> TrainedModel:
    """Train a configuration (or its file, or its fields as a dict) on training and validation
    images over its full schedule, with `seeds` seeds, then open the test set, once per seed.

    The folder `out` gets weights (safetensors), curves, metrics, the confusion matrix and
    report.html; interrupted, the same call goes on. `keep_validation` trains on the training images
    alone and chooses the best epoch by validation. `onnx` and `quantize` ("dynamic", "static") also
    write ONNX. `log` names trackers that get every epoch: "tensorboard", "mlflow", "wandb".
    `device` is by default the first GPU, else the CPU. `provenance` is that of an exported trial; a
    file has its own. `control` can stop the training between batches.

    Raises ConfigError for a configuration that is wrong, Conflict where `out` holds the run of
    another one, TrialFailed for a loss that is not finite.

    >>> import hpo
    >>> model = hpo.train({"epochs": 1, "batch_size": 64, "data": {"dataset": "digits"},
    ...                    "model": {"cnn": {"filters": [4]}}}, out="small", progress=None)
    >>> 0.0 <= model.summary["test"]["top1"]["mean"] <= 1.0
    True
    """
    from hpo.config.study import load_config
    from hpo.config.train import TrainConfig
    from hpo.reports.page import write_report
    from hpo.reports.training import training_report
    from hpo.trained.inference import TrainedModel
    from hpo.trained.retrain import retrain
    from hpo.training.device import torch_device
    from hpo.workers.process import first_device

    if isinstance(config, Mapping):
        config = TrainConfig.parse(config)
    elif not isinstance(config, TrainConfig):
        config, provenance = load_config(Path(config))
    place = first_device(device)
    run = retrain(
        config,
        provenance or {},
        seeds=seeds,
        out=Path(out),
        home=Home.default(),
        device=place,
        keep_validation=keep_validation,
        onnx=onnx,
        quantize=as_names(quantize),
        log=as_names(log),
        control=control,
        progress=progress or (lambda line: None),
    )
    write_report(run.files.root / "report.html", training_report(run))
    return TrainedModel.of_run(run, torch_device(place))
