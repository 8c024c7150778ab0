"""Pretrained weights: by name or from a local file, loaded without running code."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from hpo.config.base import is_timm
from hpo.errors import DataError
from hpo.training import timm_models
from hpo.training.weights import fetch as fetch_files
from hpo.training.weights import find_weights, is_file, missing

UNREADABLE = (
    *(OSError, EOFError, struct.error, zipfile.BadZipFile, zlib.error),
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError),
    *(AssertionError, ArithmeticError),
)
"""Exceptions that readers raise for damaged files, depending on where the damage is."""


def safe_load(path: Path) -> Any:
    """Return what torch.save wrote to `path`, tensors in plain containers, on the CPU. Raises
    DataError for any other file, without running code from it."""
    try:
        _refuse_packed(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that it will refuse
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: not plain tensors, or it holds code, which is never run"
        ) from error
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _refuse_packed(path: Path) -> None:
    """Raise DataError for a compressed file: torch.save never compresses, and it may expand a
    thousandfold."""
    if not zipfile.is_zipfile(path):
        return  # of the older format, a pickle
    with zipfile.ZipFile(path) as archive:
        if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
            raise DataError(f"{path}: compressed, which torch.save never does; save it again")


AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
"""Auxiliary classifiers of googlenet and inception_v3, used only in their own training."""


@dataclass(frozen=True)
class Fit:
    """Tensors that need not match: unknown ones under `head`, and all under `replaced` together."""

    head: str
    replaced: str
    image_size: int


def load_into(model: nn.Module, source: str, architecture: str, fit: Fit) -> None:
    """Load `source`, a name of torchvision's or timm's weights or a file, into `model`.

    The new part of the head keeps its random values unless `source` fits it completely. Raises
    ConfigError for an unknown name; DataError for a file that is missing, unreadable or does not
    fit, and for weights that cannot be downloaded.
    """
    state = fetch(source, architecture)
    if is_timm(architecture):
        state = timm_models.fitted(state, model, source)
    state = {name: value for name, value in state.items() if not name.startswith(AUXILIARY)}
    own = model.state_dict()
    _stretch_positions(state, own, fit.image_size, architecture)
    if not _agree(state, own, fit.replaced):
        state = {name: value for name, value in state.items() if not _under(name, fit.replaced)}
    state = {
        name: value for name, value in state.items() if name in own or not _under(name, fit.head)
    }
    _check(state, own, fit.replaced, source, architecture)
    model.load_state_dict(state, strict=False)


def fetch(source: str, architecture: str) -> dict[str, Tensor]:
    """Return the state dict that `source` names, on the CPU."""
    if is_file(source):
        return read_file(Path(source))
    return _download(source, architecture)


def read_file(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a .safetensors or torch file; never runs code from the file.

    Unwraps a dict under `state_dict`, `model_state_dict` or `model`, and removes the prefix
    `module.` of parallel training. Raises DataError if the file cannot be used.
    """
    if not path.is_file():
        raise missing(path)
    if path.suffix != ".safetensors":
        try:
            return _unwrapped(safe_load(path), path)
        except DataError as error:
            advice = "save model.state_dict() alone, or a .safetensors file"
            raise DataError(f"model.weights: {error}; {advice}") from error
    try:
        return dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, *UNREADABLE) as error:
        raise DataError(f"model.weights: {path}: cannot be read: {error}") from error


def _unwrapped(state: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    plain = isinstance(state, Mapping) and state
    if not plain or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path}: not a state dict of names and tensors")
    parallel = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if parallel else name: state[name] for name in state}


def _download(name: str, architecture: str) -> dict[str, Tensor]:
    file = find_weights(name, architecture)
    fetch_files([file])
    if is_timm(architecture):
        return read_file(file.path)
    from torchvision.models import get_model_weights

    chosen = get_model_weights(architecture)[name]
    try:
        state = chosen.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except (pickle.UnpicklingError, *UNREADABLE) as error:
        raise DataError(
            f"model.weights: {file.path}: cannot be read ({error}); remove it, and it is "
            "downloaded anew"
        ) from error
    return {_modern(key): value for key, value in state.items()}


def _modern(name: str) -> str:
    """Rename DenseNet's tensors: its files still say `denselayer1.norm.1`, the module
    `denselayer1.norm1`."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name)


def _stretch_positions(
    state: dict[str, Tensor], own: Mapping[str, Tensor], image_size: int, architecture: str
) -> None:
    """Interpolate a vision transformer's position embeddings to another image size."""
    key = "encoder.pos_embedding"
    vit = architecture.startswith("vit_")
    if vit and key in state and key in own and state[key].shape[1] != own[key].shape[1]:
        from torchvision.models.vision_transformer import interpolate_embeddings

        patch = int(architecture.rpartition("_")[2])
        state.update(interpolate_embeddings(image_size, patch, cast(Any, dict(state))))


def _under(name: str, prefix: str) -> bool:
    return name.startswith(prefix + ".")


def _agree(state: Mapping[str, Tensor], own: Mapping[str, Tensor], prefix: str) -> bool:
    """Return whether `state` has exactly the tensors of `own` under `prefix`."""

    def shapes(of: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in of.items() if _under(name, prefix)}

    return shapes(state) == shapes(own)


def _check(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    replaced: str,
    source: str,
    architecture: str,
) -> None:
    """Raise DataError naming the differences, unless everything but the new head is there and
    fits."""
    # Files from before PyTorch 0.4.1 have no count of batches; batch norm starts it at 0.
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    optional |= {name for name in own if _under(name, replaced)}
    missing = [name for name in own if name not in state and name not in optional]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    differing = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    text = "; ".join(f"{_some(names)} {what}" for what, names in differing.items() if names)
    if text:
        raise DataError(
            f"model.weights: {source} does not fit {architecture} with this stem and head: {text}"
        )


def _some(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    more = f", ... ({len(listed)} in all)" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
