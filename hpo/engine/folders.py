"""The pictures of a folder: which parts and classes it has, by the names of its folders alone."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hpo.errors import DataError

EXTENSIONS = frozenset(["jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm"])
"""Files of other extensions are not looked at; upper and lower case are alike."""

PART_FOLDERS = {
    "train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Listing:
    """The pictures by part as their folders have them; "all" where nobody has split them yet."""

    classes: tuple[str, ...]
    parts: dict[str, list[tuple[str, int]]]
    warnings: list[str] = field(default_factory=list)
    sealed: bool = False
    """There is a test part, and it was not looked at."""
    groups: dict[str, str] = field(default_factory=dict)
    """Of images that were given one, by name; a split keeps those of a group together."""


def list_folder(root: Path) -> Listing:
    if not root.exists():
        raise DataError(f"{root}: no such folder; set data.root to the folder of the images")
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; set data.root to the folder of the images")
    folders = {part: _part_folder(root, part) for part in ("train", "val", "test")}
    if folders["test"] and not folders["train"]:
        raise DataError(f"{root}: has test/ but no train/; add train/, one folder per class in it")
    if not folders["train"]:
        folders = {"all": root}
    ignored: Counter[str] = Counter()
    found = {part: _list_classes(root, at, ignored) for part, at in folders.items() if at}
    first = next(iter(found.values()))
    classes = tuple(sorted(first))
    if len(classes) == 1:
        raise DataError(
            f"{root}: one class only, {classes[0]!r}; at least two folders are needed, one per "
            "class, each with its images"
        )
    parts = {
        part: [(name, label) for label, c in enumerate(classes) for name in of_class.get(c, [])]
        for part, of_class in found.items()
    }
    for part, of_class in found.items():
        if extra := sorted(set(of_class) - set(classes)):
            raise DataError(
                f"{folders[part]}: class {extra[0]!r} is not in train/, which has "
                f"{', '.join(classes[:8])}; a model cannot learn it: add it there or remove it here"
            )
    return Listing(classes, parts, [f"{count} {what}" for what, count in sorted(ignored.items())])


def images_below(folder: Path) -> tuple[list[str], list[str]]:
    """Paths of the images below `folder`, and of files that are none by their extension; hidden
    ones in neither."""
    files: list[str] = []
    _collect(str(folder), str(folder), frozenset(), files)
    images = [name for name in files if _is_image(name)]
    return images, [name for name in files if not _is_image(name)]


def _part_folder(root: Path, part: str) -> Path | None:
    """The folder of a part under one of its names; upper and lower case are alike."""
    found = [one for one in _folders(root) if PART_FOLDERS.get(one.name.lower()) == part]
    if len(found) > 1:
        names = " and ".join(one.name + "/" for one in found)
        raise DataError(f"{root}: both {names} are for {part}; keep one of them")
    return found[0] if found else None


def _folders(at: Path) -> list[Path]:
    return sorted(one for one in at.iterdir() if one.is_dir() and not one.name.startswith("."))


def _list_classes(root: Path, at: Path, ignored: Counter[str]) -> dict[str, list[str]]:
    """{class: paths relative to `root`} of a folder with one folder per class."""
    folders = _folders(at)
    if not folders:
        raise DataError(f"{at}: no folders of images; one folder per class is needed")
    loose = [one for one in at.iterdir() if one.is_file() and _is_image(one.name)]
    if loose:
        ignored["images outside a class folder were ignored"] += len(loose)
    found = {}
    for folder in folders:
        names = _files(folder, root)
        images = [name for name in names if _is_image(name)]
        if len(images) < len(names):
            ignored["files of other extensions were ignored"] += len(names) - len(images)
        if not images:
            raise DataError(
                f"{folder}: no images; a class folder needs at least one file of "
                f"{', '.join(sorted(EXTENSIONS))}: add some or remove the folder"
            )
        found[folder.name] = sorted(images)
    return found


def _files(folder: Path, root: Path) -> list[str]:
    """Paths relative to `root` of all files below `folder` that are not hidden.

    Links are followed, wherever they lead: many data sets are made of them. One to a folder that it
    lies in is not, nor is what is no file (a pipe would never end). Plain text, because a data set
    has too many files for a Path each.
    """
    found: list[str] = []
    above = frozenset(map(os.path.realpath, (root, folder.parent)))
    _collect(str(folder), folder.relative_to(root).as_posix(), above, found)
    return found


def _collect(at: str, below: str, above: frozenset[str], found: list[str]) -> None:
    """Add the files in the folder `at`, which is `below` the root, inside the folders `above`."""
    here = os.path.realpath(at)
    if here in above:
        return
    with os.scandir(at) as listed:
        entries = sorted((one for one in listed if not one.name.startswith(".")), key=_name)
    for entry in entries:
        name = f"{below}/{entry.name}"
        if entry.is_dir():
            _collect(entry.path, name, above | {here}, found)
        elif entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists()):
            found.append(name)  # a link to nothing is told when it is to be read


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name


def _is_image(name: str) -> bool:
    """By the extension of a name or path."""
    stem, _, extension = name.rpartition(".")
    return bool(stem) and extension.lower() in EXTENSIONS
