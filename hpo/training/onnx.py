"""ONNX export of a trained network: writing, comparison with torch, quantisation to int8, and
inference.

onnxruntime quantises the exported file: what is measured is what is shipped, and every architecture
of torchvision works. torch.ao.quantization is deprecated, and its successors require choosing a
backend for each kind of machine.

Needs the extra `onnx`, which is imported on use.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from hpo.errors import HpoError, InputError
from hpo.extras import install_command

INPUT, OUTPUT = "images", "logits"
"""Names in the file: (batch, 3, S, S) float32 normalised, and (batch, classes) float32."""
TOLERANCE = 1e-3
"""Largest difference of a logit between onnxruntime and torch, both in float32 on the CPU, relative
to the largest logit, but at least to 1."""
LINEAR = ("MatMul", "Gemm")
COMPUTING = ("Conv", *LINEAR)
"""Operators that static quantisation converts to int8; sums, norms and softmax stay float32."""
WARM_UPS, TIMED = 3, 20
PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def require_packages() -> None:
    """Raise InputError if the extra is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(f"ONNX needs {', '.join(missing)}: {install_command('onnx')}")


def export(network: nn.Module, path: Path, *, image_size: int, metadata: Mapping[str, str]) -> None:
    """Write `network`, on the CPU in eval mode, for any batch size; `metadata` is stored in the
    file's properties. Raises InputError if it cannot be expressed as ONNX."""
    import onnx

    sample = torch.zeros(2, 3, image_size, image_size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own making
            program = torch.onnx.export(
                network,
                (sample,),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise InputError(f"this network cannot be written as ONNX: {reason}") from error
    assert program is not None  # only the older exporter returns nothing
    model = program.model_proto
    _strip(model.graph)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, str(path))


def _strip(graph: Any) -> None:
    """Remove source paths of this machine, and shapes of constants, which quantisation contradicts
    when it transposes them."""
    for part in (graph, *graph.node, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.value_info[:]


class OnnxNetwork:
    """An ONNX file on the CPU, called like a network."""

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        """Load the file; `threads` per operator, 0: one for each core."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) float32 to logits (B, C) float32, on the device of `images`."""
        (logits,) = self._session.run([OUTPUT], {INPUT: images.cpu().contiguous().numpy()})
        return torch.from_numpy(logits).to(images.device)

    def latency_ms(self, images: Tensor) -> float:
        """Return the median milliseconds for the first of `images` alone."""
        seconds = []
        for _ in range(WARM_UPS + TIMED):
            start = time.perf_counter()
            self(images[:1])
            seconds.append(time.perf_counter() - start)
        return 1000 * statistics.median(seconds[WARM_UPS:])


def difference(network: nn.Module, written: OnnxNetwork, images: Tensor) -> float:
    """Return the largest difference of a logit between `network` and the exported file, on `images`
    as one batch and on the first alone. Raises HpoError above TOLERANCE."""
    batches = (images, images[:1])
    with torch.inference_mode():
        expected = torch.cat([network(batch) for batch in batches])
    actual = torch.cat([written(batch) for batch in batches])
    largest = (actual - expected).abs().max().item()
    limit = TOLERANCE * max(1.0, expected.abs().max().item())
    if not largest <= limit:
        raise HpoError(
            f"onnxruntime and torch differ by {largest:.3g} on the same images, {limit:.3g} is "
            "allowed; other versions of onnxruntime or torch may agree, or train without --onnx"
        )
    return largest


def quantize(path: Path, target: Path, kind: str, calibration: Sequence[Tensor]) -> None:
    """Write the network in `path` with int8 weights, per channel, to `target`.

    `dynamic`: linear layers only; the ranges of their inputs are taken from each batch. `static`:
    convolutions too; the ranges are the minimum and maximum over `calibration`, batches of
    normalised images. Raises InputError if nothing can be quantised.
    """
    import onnx
    from onnxruntime import quantization as ort

    operators = LINEAR if kind == "dynamic" else COMPUTING
    model = onnx.load(str(path))
    if not any(node.op_type in operators for node in model.graph.node):
        raise InputError(
            f"--quantize {kind}: this network has nothing that it quantises (linear layers"
            f"{'' if kind == 'dynamic' else ' and convolutions'}); leave it out"
            + (", or take static" if kind == "dynamic" else "")
        )
    with TemporaryDirectory(dir=target.parent) as folder:
        prepared = Path(folder) / "prepared.onnx"
        ort.shape_inference.quant_pre_process(str(path), str(prepared))
        common: dict[str, Any] = {"op_types_to_quantize": list(operators), "per_channel": True}
        if kind == "dynamic":
            ort.quantize_dynamic(prepared, target, weight_type=ort.QuantType.QInt8, **common)
        else:
            ort.quantize_static(prepared, target, _Reader(calibration), **common)
    finished = onnx.load(str(target))
    props = {one.key: one.value for one in model.metadata_props}
    onnx.helper.set_model_props(finished, props | {"quantization": f"int8 {kind}"})
    onnx.save(finished, str(target))


class _Reader:
    """Batches in the form that onnxruntime's calibration expects."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch; None at the end."""
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}
