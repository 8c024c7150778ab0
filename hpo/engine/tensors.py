"""Files of torch.save from anywhere: read without running code, and without being blown up."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from hpo.errors import DataError

UNREADABLE = (
    *(OSError, EOFError, struct.error, zipfile.BadZipFile, zlib.error),
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError),
    *(AssertionError, ArithmeticError),
)
"""What the readers raise for damaged files, by where the damage is."""


def load_plain(path: Path) -> Any:
    """What torch.save wrote to `path`: tensors in plain containers, on the CPU. Raises DataError
    for anything else."""
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
    """torch.save never compresses; a file that somebody packed may grow a thousand times."""
    if not zipfile.is_zipfile(path):
        return  # of the older format, a pickle
    with zipfile.ZipFile(path) as archive:
        if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
            raise DataError(f"{path}: compressed, which torch.save never does; save it again")
