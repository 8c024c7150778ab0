"""NPZ files of arrays: written atomically with a checksum, read without running code."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from hpo.errors import DataError
from hpo.io import atomic_write, find_damage

UNREADABLE = (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""Exceptions that NumPy raises for damaged files, depending on where the damage is."""
HEADER = 4096
"""Bytes before the data in a file of cached features: their shape, as JSON."""


def write_arrays(path: Path, *, compressed: bool = False, **arrays: Any) -> None:
    """Write `arrays` to the NPZ file `path`, atomically. Raises DiskFull."""
    content = io.BytesIO()  # NumPy would go back in the file, to complete its headers
    (np.savez_compressed if compressed else np.savez)(content, **arrays)
    atomic_write(path, lambda file: file.write(content.getbuffer()), sealed=True)


def read_arrays(path: Path, advice: str) -> dict[str, Any]:
    """Return all arrays of an NPZ file by name. Raises DataError, ending with `advice`, if it is
    missing or damaged."""
    try:
        damage = find_damage(path)
        if damage is None:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    except UNREADABLE as error:
        damage = str(error)
    raise DataError(f"{path} cannot be read: {damage}; {advice}")
