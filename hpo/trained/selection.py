"""Image files to predict: files, folders and patterns as they are typed."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from hpo.data.folders import images_below
from hpo.errors import InputError


@dataclass(frozen=True)
class Selection:
    """Image files to predict."""

    files: tuple[Path, ...]
    left_out: Counter[str] = field(default_factory=Counter)
    """Files in folders that are no images by their extension: count by extension."""

    @property
    def note(self) -> str | None:
        """Return a line on the files that were left out, if any."""
        if not self.left_out:
            return None
        kinds = ", ".join(f"{kind or 'without'} {n:,}" for kind, n in self.left_out.most_common(8))
        return f"files of other extensions in these folders are left out: {kinds}"


def select(paths: Sequence[Path]) -> Selection:
    """Expand `paths` in their order: files as they are, even unreadable ones; folders to the images
    below them, by the rules of `data.root`; patterns (`*`, `?`, `[`; `**` for any folders) that are
    no files to what they match.

    Raises InputError if no image is left.
    """
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in _matched(paths):
        if not path.is_dir():
            files.append(path)
            continue
        images, others = images_below(path)
        files += map(Path, images)
        left_out.update(PurePath(one).suffix.lower() for one in others)
    found = Selection(tuple(files), left_out)
    if not files:
        given = ", ".join(map(str, paths))
        why = f"; {found.note}" if found.note else ""
        raise InputError(f"no images in {given}{why}" if paths else "no images: give a file")
    return found


def _matched(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.exists() or not glob.has_magic(str(path)):
            yield path
        else:
            yield from map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207
