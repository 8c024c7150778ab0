"""What `hpo train` makes of a trained network beside its weights: ONNX files, also in int8."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from hpo.config.train import TrainConfig
from hpo.data.dataset import Data
from hpo.data.images import (
    Images,
    Pixels,
)
from hpo.errors import (
    InputError,
    nearest,
)
from hpo.io import (
    Sink,
    atomic_write,
    raising_disk_full,
)
from hpo.trained.inference import (
    eval_batches,
    load_network,
)
from hpo.trained.run import (
    About,
    SeedDir,
)
from hpo.training import (
    models,
)
from hpo.training import (
    onnx as onnx_files,
)
from hpo.training.device import torch_device
from hpo.training.onnx import OnnxNetwork

if TYPE_CHECKING:
    from torch import Tensor, nn

FLOAT = "float32"
KINDS = ("dynamic", "static")
CALIBRATION = 256
"""Training images, evenly spread, by which static quantisation finds its ranges."""
REHEARSED = 8
"""Of them, when an untrained network shows before the training whether it can be written."""


@dataclass(frozen=True)
class Wanted:
    """Which files to make: precision by name of the file."""

    files: Mapping[str, str]

    @classmethod
    def of(cls, task: str, *, onnx: bool = False, quantize: Sequence[str] = ()) -> Wanted:
        """model.onnx where `onnx`, or where anything is to be quantised from it, and a file for
        each of `quantize`. Raises InputError for another kind than KINDS, for a retrieval, and
        without the extra."""
        for kind in quantize:
            if kind not in KINDS:
                raise InputError(f"--quantize {kind}: {nearest(kind, KINDS)}")
        if not onnx and not quantize:
            return cls({})
        if task == "retrieval":
            raise InputError("a retrieval has no ONNX files: leave --onnx and --quantize out")
        onnx_files.require_packages()
        int8 = {f"model-int8-{kind}.onnx": f"int8 {kind}" for kind in dict.fromkeys(quantize)}
        return cls({"model.onnx": FLOAT, **int8})


def rehearse(config: TrainConfig, data: Data, wanted: Wanted) -> None:
    """Make the files of an untrained network, and drop them: what cannot be made is told before
    the training. Raises InputError or HpoError, as `write_files` does."""
    if not wanted.files:
        return
    size, classes = config.data.image_size, len(data.classes)
    network = models.build(config.model, classes=classes, image_size=size, pretrained=False)
    about = About(data.classes, data.mean, data.std, "", False, False, 0)
    batches = _calibration(config, about, data.train, REHEARSED)
    with TemporaryDirectory() as folder:
        _make(network.eval(), config, {}, batches, Path(folder), wanted)


def write_files(
    config: TrainConfig, about: About, files: SeedDir, train: Images, wanted: Wanted
) -> list[dict[str, Any]]:
    """Write the `wanted` files of a trained seed; each is complete or not there.

    Returns for each: file, precision, bytes, latency_ms (median of one image alone, onnxruntime on
    the CPU with runtime.threads), and of the float32 one max_difference (the largest of a logit to
    torch's, on training images). Raises HpoError where that is beyond the tolerance, InputError
    for a network that cannot be exported or has nothing to quantise.
    """
    if not wanted.files:
        return []
    network = load_network(config, about, files.weights, torch_device("cpu"))
    batches = _calibration(config, about, train, CALIBRATION)
    with (
        raising_disk_full(files.root),
        TemporaryDirectory(dir=files.root, prefix=".onnx-") as folder,
    ):
        made = _make(network, config, _metadata(config, about), batches, Path(folder), wanted)
        for one in made:
            path = Path(folder, one["file"])
            atomic_write(files.root / path.name, partial(_copied, path))
    return made


def _copied(path: Path, to: Sink) -> None:
    to.write(path.read_bytes())


def open_files(files: SeedDir, names: Sequence[str], config: TrainConfig) -> dict[str, OnnxNetwork]:
    """The networks in files of a seed, by name."""
    threads = config.runtime.threads
    return {name: OnnxNetwork(files.root / name, threads=threads) for name in names}


def _make(
    network: nn.Module,
    config: TrainConfig,
    metadata: Mapping[str, str],
    batches: Sequence[Tensor],
    folder: Path,
    wanted: Wanted,
) -> list[dict[str, Any]]:
    made = []
    for name, precision in wanted.files.items():
        path, facts = folder / name, {}
        if precision == FLOAT:
            size = config.data.image_size
            onnx_files.export(network, path, image_size=size, metadata=metadata)
        else:
            onnx_files.quantize(folder / "model.onnx", path, precision.split()[1], batches)
        written = OnnxNetwork(path, threads=config.runtime.threads)
        if precision == FLOAT:
            facts["max_difference"] = onnx_files.difference(network, written, batches[0])
        latency = written.latency_ms(batches[0])
        made.append(
            {
                "file": name,
                "precision": precision,
                "bytes": path.stat().st_size,
                "latency_ms": latency,
                **facts,
            }
        )
    return made


def _metadata(config: TrainConfig, about: About) -> dict[str, str]:
    """What one must know to use the file without hpo."""
    data = config.data
    side = data.image_size
    resize = (
        f"to {side} x {side}"
        if data.resize == "squash"
        else f"shorter side to {data.resize_size}, then the centre {side} x {side}"
    )
    return {
        "input": f"{onnx_files.INPUT}: (batch, 3, {side}, {side}) float32, RGB, channels first",
        "normalisation": "(pixel / 255 - mean) / std, by channel",
        "mean": json.dumps(about.mean),
        "std": json.dumps(about.std),
        "resize": f"{resize}; bilinear with antialiasing",
        "output": f"{onnx_files.OUTPUT}: (batch, {len(about.classes)}) float32; softmax gives "
        "probabilities",
        "classes": json.dumps(about.classes),
        "architecture": config.model.architecture,
    }


def _calibration(config: TrainConfig, about: About, train: Images, most: int) -> list[Tensor]:
    """Training images as the network sees them in evaluation, batch by batch, on the CPU."""
    places = np.unique(np.linspace(0, len(train) - 1, min(most, len(train))).round().astype(int))
    unhelped = config.data.model_copy(update={"loader_workers": 0})
    small = min(config.batch_size, 32)
    config = config.model_copy(update={"data": unhelped, "batch_size": small})
    picked = _Picked(train, places.tolist())
    return [
        pixels.contiguous()
        for pixels, _ in eval_batches(config, about, picked, torch_device("cpu"))
    ]


class _Picked(Images):
    """Some pictures of a set."""

    streamed = True

    def __init__(self, images: Images, places: list[int]) -> None:
        self._images, self._places = images, places
        self.names = tuple(images.names[i] for i in places)
        self.labels, self.sizes = images.labels[places], images.sizes[places]

    def pixels(self, i: int) -> Pixels:
        return self._images.pixels(self._places[i])
