"""ONNX files of a trained network, in float32 and int8."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from hpo.config.train import TrainConfig
from hpo.data.dataset import Data
from hpo.data.images import Images, Pixels
from hpo.errors import InputError, nearest
from hpo.io import Sink, atomic_write, raising_disk_full
from hpo.trained.inference import TrainedModel
from hpo.trained.run import RunMetadata, SeedDir
from hpo.training import models
from hpo.training import onnx as onnx_files
from hpo.training.device import torch_device
from hpo.training.onnx import OnnxNetwork
from hpo.training.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

FLOAT = "float32"
KINDS = ("dynamic", "static")
CALIBRATION = 256
"""Training images, evenly spread, from which static quantization takes its ranges."""
TRIED = 8
"""Images for the export of an untrained network, which finds errors before training."""


@dataclass(frozen=True)
class OnnxTargets:
    """ONNX files to write: precision by file name."""

    files: Mapping[str, str]

    @classmethod
    def of(cls, task: Task, *, onnx: bool = False, quantize: Sequence[str] = ()) -> OnnxTargets:
        """Return model.onnx if `onnx` or anything is quantized from it, and a file for
        each of `quantize`. Raises InputError for another kind than KINDS, for a task that
        cannot be exported, and without the extra."""
        for kind in quantize:
            if kind not in KINDS:
                raise InputError(f"--quantize {kind}: {nearest(kind, KINDS)}")
        if not onnx and not quantize:
            return cls({})
        task.require_export()
        onnx_files.require_packages()
        int8 = {f"model-int8-{kind}.onnx": f"int8 {kind}" for kind in dict.fromkeys(quantize)}
        return cls({"model.onnx": FLOAT, **int8})


def try_export(config: TrainConfig, data: Data, wanted: OnnxTargets) -> None:
    """Export an untrained network to temporary files, so that errors are found before training.
    Raises InputError or HpoError, as `write_files` does."""
    if not wanted.files:
        return
    size, classes = config.data.image_size, len(data.classes)
    network = models.build(config.model, classes=classes, image_size=size, pretrained=False)
    metadata = RunMetadata(data.classes, data.mean, data.std, "", False, False, 0)
    model = TrainedModel(config, metadata, (), (network.eval(),), torch_device("cpu"))
    with TemporaryDirectory() as folder:
        _make(model, _calibration(model, data.train, TRIED), Path(folder), wanted)


def write_files(
    model: TrainedModel, folder: Path, train: Images, wanted: OnnxTargets
) -> list[dict[str, Any]]:
    """Write the `wanted` files of a trained seed, whose `model` lies on the CPU, into its `folder`;
    each is written atomically.

    Return for each: file, precision, bytes, latency_ms (median of one image alone, onnxruntime on
    the CPU with runtime.threads), and of the float32 one max_difference (the largest of a logit to
    torch's, on training images). Raises HpoError if that exceeds the tolerance, InputError
    for a network that cannot be exported or has nothing to quantize.
    """
    batches = _calibration(model, train, CALIBRATION)
    with (
        raising_disk_full(folder),
        TemporaryDirectory(dir=folder, prefix=".onnx-") as temporary,
    ):
        made = _make(model, batches, Path(temporary), wanted)
        for one in made:
            path = Path(temporary, one["file"])
            atomic_write(folder / path.name, partial(_copied, path))
    return made


def _copied(path: Path, to: Sink) -> None:
    to.write(path.read_bytes())


def open_files(files: SeedDir, names: Sequence[str], config: TrainConfig) -> dict[str, OnnxNetwork]:
    """Open the ONNX files of a seed, by name."""
    threads = config.runtime.threads
    return {name: OnnxNetwork(files.root / name, threads=threads) for name in names}


def _make(
    model: TrainedModel,
    batches: Sequence[Tensor],
    folder: Path,
    wanted: OnnxTargets,
) -> list[dict[str, Any]]:
    network, threads = model.networks[0], model.config.runtime.threads
    made = []
    for name, precision in wanted.files.items():
        path, facts = folder / name, {}
        if precision == FLOAT:
            size = model.config.data.image_size
            onnx_files.export(network, path, image_size=size, metadata=_metadata(model))
        else:
            onnx_files.quantize(folder / "model.onnx", path, precision.split()[1], batches)
        written = OnnxNetwork(path, threads=threads)
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


def _metadata(model: TrainedModel) -> dict[str, str]:
    """Return metadata with which the file can be used without hpo."""
    data = model.config.data
    side = data.image_size
    resize = (
        f"to {side} x {side}"
        if data.resize == "squash"
        else f"shorter side to {data.resize_size}, then the centre {side} x {side}"
    )
    return {
        "input": f"{onnx_files.INPUT}: (batch, 3, {side}, {side}) float32, RGB, channels first",
        "normalisation": "(pixel / 255 - mean) / std, by channel",
        "mean": json.dumps(model.metadata.mean),
        "std": json.dumps(model.metadata.std),
        "resize": f"{resize}; bilinear with antialiasing",
        "output": f"{onnx_files.OUTPUT}: (batch, {len(model.classes)}) float32; softmax gives "
        "probabilities",
        "classes": json.dumps(model.classes),
        "architecture": model.config.model.architecture,
    }


def _calibration(model: TrainedModel, train: Images, most: int) -> list[Tensor]:
    """Return training images as the network sees them in evaluation, batch by batch."""
    places = np.unique(np.linspace(0, len(train) - 1, min(most, len(train))).round().astype(int))
    small = model.config.model_copy(update={"batch_size": min(model.config.batch_size, 32)})
    batches = replace(model, config=small).batches(_Picked(train, places.tolist()))
    return [pixels.contiguous() for pixels, _ in batches]


class _Picked(Images):
    """A subset of images."""

    streamed = True
    in_memory = True

    def __init__(self, images: Images, places: list[int]) -> None:
        self._images, self._places = images, places
        self.names = tuple(images.names[i] for i in places)
        self.labels, self.sizes = images.labels[places], images.sizes[places]

    def pixels(self, i: int) -> Pixels:
        return self._images.pixels(self._places[i])
