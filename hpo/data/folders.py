"""Image folders: the parts and classes of a data set, by the names of its folders alone."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpo.config.starter import FolderSummary
from hpo.config.template import median_side
from hpo.errors import DataError
from hpo.formatting import plural

EXTENSIONS = frozenset([
    "jpg", "jpeg", "jpe", "jfif", "pjpeg", "pjp", "mpo", "png", "apng", "bmp", "gif", "webp",
    "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "avif", "avifs", "jp2", "j2k", "jpf", "jpx", "j2c",
    "jpc",
])  # fmt: skip
"""Extensions of images, in lower case; files with any other extension are ignored."""

TO_CONVERT = frozenset([
    "heic", "heif", "hif", "jxl", "tga", "psd", "dng", "cr2", "cr3", "nef", "arw", "orf", "raf",
    "rw2", "dcm", "svg",
])  # fmt: skip
"""Extensions of image formats that are not supported."""

_PARTS = {
    "train": "train", "training": "train",
    "val": "val", "validation": "val", "valid": "val", "dev": "val", "eval": "val",
    "evaluation": "val",
    "test": "test", "testing": "test", "tests": "test",
}  # fmt: skip

RUBBISH = frozenset([
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin",
    "__macosx", "lost+found", "system volume information", "thumbs.db", "ehthumbs.db",
    "desktop.ini", "icon\r",
])  # fmt: skip
"""Files and folders left by file managers, NAS and archives; ignored, as is everything that begins
with a dot."""

SHOWN = 3
"""Folders named in a line."""


@dataclass(frozen=True)
class Listing:
    """The images of a data set by part, as given; the part "all" means that they are not split
    yet."""

    classes: tuple[str, ...]
    parts: dict[str, list[tuple[str, int]]]
    warnings: list[str] = field(default_factory=list)
    sealed: bool = False
    """Whether there is a test part that was not looked at."""
    groups: dict[str, str] = field(default_factory=dict)
    """Group of an image, by name, if the data set gives one; a split keeps the images of a group
    together."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Files that are ignored, by extension."""


def list_folder(root: Path, *, grouped: bool = False, learnt: bool = True) -> Listing:
    """Return the images of a folder with train/ [val/] [test/] by class, or with one folder per
    class.

    With `grouped`, folders inside class folders may be groups; unless they are `learnt`, a single
    class is enough. Raises DataError for a folder that cannot be used.
    """
    _require_folder(root)
    folders = _parts_of(root)
    if folders and "train" not in folders:
        raise DataError(_without_train(root, folders))
    warnings = _beside(root, folders)
    tree = {part: _list_classes(root, at) for part, at in (folders or {"all": root}).items()}
    first = next(iter(tree))
    for part, contents in tree.items():
        _require_images(root, folders.get(part, root), contents, learnt=learnt and part == first)
    if first == "all":
        _refuse_parts(root, tree[first].inner, grouped=grouped)
    classes = tuple(sorted(tree[first].images))
    place = {_normal(name): label for label, name in enumerate(classes)}
    parts = {}
    for part, contents in tree.items():
        if extra := sorted(name for name in contents.images if _normal(name) not in place):
            raise DataError(
                f"{folders[part]}: class {extra[0]!r} is not in {folders['train'].name}/, which "
                f"has {', '.join(classes[:8])}; a model cannot learn it: add it there or remove it "
                "here"
            )
        labelled = ((place[_normal(name)], images) for name, images in contents.images.items())
        parts[part] = [(name, label) for label, images in sorted(labelled) for name in images]
        warnings += contents.loose
        warnings += [] if grouped else _nested(contents.inner)
    counters = [one for contents in tree.values() for one in contents.left_out_of.values()]
    left_out = sum(counters, Counter[str]())
    return Listing(classes, parts, list(dict.fromkeys(warnings)), left_out=dict(left_out))


def summarize_folder(root: Path) -> FolderSummary:
    """Return the facts about the images under `root` that a starter study file needs. Raises as
    `list_folder`."""
    listing = list_folder(root)
    first = listing.parts.get("train") or listing.parts["all"]
    files = [root / name for name, _ in first]
    parts = () if "all" in listing.parts else tuple(listing.parts)
    return FolderSummary(len(listing.classes), len(files), median_side(files), parts)


def images_below(folder: Path) -> tuple[list[str], list[str]]:
    """Return the paths of the images below `folder`, and of the other files; hidden files are in
    neither."""
    files: list[str] = []
    _collect(str(folder), str(folder), frozenset(), files)
    images = [name for name in files if _is_image(name)]
    return images, [name for name in files if not _is_image(name)]


def parse_part(name: str) -> str | None:
    """Return the part that a folder name stands for ("Test", "testing", "test_set", ...); None for
    any other name."""
    plain = re.sub(r"[\s_-]", "", name.lower())
    return _PARTS.get(re.sub(r"(?<=.)(set|split|data|images)$", "", plain))


def folder_to_test(root: Path) -> Path:
    """Return the test folder inside `root`, or `root` itself."""
    return (_parts_of(root) if root.is_dir() else {}).get("test", root)


def _require_folder(root: Path) -> None:
    if not root.exists():
        raise DataError(f"{root}: no such folder; set data.root to the folder of the images")
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; set data.root to the folder of the images")


def _normal(name: str) -> str:
    """Return a name in Unicode form NFC: macOS decomposes names, Linux does not."""
    return unicodedata.normalize("NFC", name)


def _parts_of(root: Path) -> dict[str, Path]:
    """Return the folder of each part; none if these are class folders. A class may be named like a
    part: such a folder without subfolders is a class if there are other folders."""
    folders = _folders(root)
    named = [one for one in folders if parse_part(one.name)]
    if len(named) < len(folders) and not any(_folders(one) for one in named):
        return {}
    candidates: dict[str, list[Path]] = defaultdict(list)
    for one in named:
        candidates[parse_part(one.name) or ""].append(one)
    for part, several in candidates.items():
        if len(several) > 1:
            names = " and ".join(one.name + "/" for one in several)
            raise DataError(f"{root}: both {names} are for {part}; keep one of them")
    return {part: candidates[part][0] for part in ("train", "val", "test") if part in candidates}


def _without_train(root: Path, folders: Mapping[str, Path]) -> str:
    part, folder = next(iter(folders.items()))
    others = [one.name for one in _folders(root) if one not in folders.values()]
    is_class = f", or rename {folder.name}/ if it is a class" if others else ""
    beside = f" beside {_shown(others)}" if others else ""
    return (
        f"{root}: has {folder.name}/{beside}, which means the {part} part, but no train/; "
        f"add train/, one folder per class in it{is_class}"
    )


def _beside(root: Path, folders: Mapping[str, Path]) -> list[str]:
    """Return warnings about folders whose name or place is ambiguous."""
    others = [one for one in _folders(root) if one not in folders.values()]
    if not folders:
        return [
            f"{one.name}/ has no folders: treated as a class; a part needs one folder per class"
            for one in others
            if parse_part(one.name)
        ]
    unused = [one.name for one in others if images_below(one)[0]]
    if not unused:
        return []
    train = folders["train"].name
    are = "is" if len(unused) == 1 else "are"
    return [f"{_shown(unused)} beside {train}/ {are} not used; if {train} is a class, rename it"]


def _refuse_parts(root: Path, folders: Mapping[str, list[str]], *, grouped: bool) -> None:
    """Raise DataError for folders that are not classes because they contain parts, or all the same
    subfolders."""
    inner = {
        name: {_normal(one).casefold(): one for one in held}
        for name, held in folders.items()
        if "" not in held and len(held) > 1
    }
    for name, held in inner.items():
        parts = sorted(one for one in held.values() if parse_part(one))
        if len(parts) == len(held):
            raise DataError(
                f"{root}: {name}/ holds {_shown(parts)}; parts must be above classes: "
                f"{parts[0]}/{name}/, {parts[1]}/{name}/"
            )
    if grouped:
        return
    for one, other in ((a, b) for a in inner for b in inner if a < b):
        both = inner[one].keys() & inner[other].keys()
        if len(both) > 1 and 2 * len(both) >= min(len(inner[one]), len(inner[other])):
            same = _shown(sorted(inner[one][key] for key in both))
            raise DataError(
                f"{root}: {one}/ and {other}/ hold the same folders ({same}), so they are parts "
                "rather than classes: name them train/, val/ or test/; if they are classes, put "
                'them into train/, or set data.group_by = "folder" if what they hold are groups'
            )


def _nested(folders: Mapping[str, list[str]]) -> list[str]:
    """Return warnings about class folders with images in subfolders."""
    nested = {name: inner for name, held in folders.items() if (inner := [*filter(None, held)])}
    lines = [
        f"{name}/ holds {_shown(inner)}: their images count as {name}"
        for name, inner in list(nested.items())[:SHOWN]
    ]
    more = len(nested) - SHOWN
    return [*lines, f"so do those of {more} more class folders"] if more > 0 else lines


def _shown(names: Sequence[str]) -> str:
    """Return `a/, b/ and c/`, or the first of many."""
    folders = [f"{name}/" for name in names]
    if len(folders) > SHOWN:
        return f"{', '.join(folders[:SHOWN])} and {len(folders) - SHOWN} more"
    return " and ".join([", ".join(folders[:-1]), folders[-1]] if folders[1:] else folders)


def _folders(at: Path) -> list[Path]:
    return sorted(one for one in at.iterdir() if one.is_dir() and not _is_rubbish(one.name))


def _is_rubbish(name: str) -> bool:
    return name.startswith(".") or name.lower() in RUBBISH


@dataclass
class _Classes:
    """The contents of a folder that has one subfolder per class."""

    images: dict[str, list[str]] = field(default_factory=dict)
    """Paths relative to the root, by class."""
    inner: dict[str, list[str]] = field(default_factory=dict)
    """Subfolders of each class folder that contain images; an empty name if some lie in the class
    folder itself."""
    left_out_of: dict[str, Counter[str]] = field(default_factory=dict)
    """Files that are ignored, by class and extension."""
    loose: list[str] = field(default_factory=list)


def _list_classes(root: Path, at: Path) -> _Classes:
    folders = _folders(at)
    loose = sum(one.is_file() and _is_image(one.name) for one in at.iterdir())
    if not folders:
        unlabelled = f", and its {plural(loose, 'image')} have no class" if loose else ""
        raise DataError(f"{at}: no folders of images; one folder per class is needed{unlabelled}")
    contents, forms = _Classes(), dict[str, str]()
    if loose:
        where = "" if at == root else f" in {at.name}/"
        contents.loose.append(f"{plural(loose, 'image')} outside a class folder{where} left out")
    for folder in folders:
        other = forms.setdefault(_normal(folder.name), folder.name)
        if other != folder.name:
            raise DataError(
                f"{at}: two folders are called {other!r}, in two forms of Unicode; join them"
            )
        depth = len(folder.relative_to(root).parts)
        names = _files(folder, root)
        images = sorted(name for name in names if _is_image(name))
        contents.left_out_of[folder.name] = Counter(
            _extension(name) for name in names if not _is_image(name)
        )
        contents.images[folder.name] = images
        contents.inner[folder.name] = sorted({_below(name, depth) for name in images})
    return contents


def _below(name: str, depth: int) -> str:
    """Return the folder that contains `name` below `depth` others; empty if there is none."""
    parts = name.split("/", depth + 1)
    return parts[depth] if len(parts) > depth + 1 else ""


def _require_images(root: Path, at: Path, contents: _Classes, *, learnt: bool) -> None:
    """Raise DataError for folders without images, and for a single class if it is `learnt`."""
    full = [name for name, images in contents.images.items() if images]
    if learnt and len(full) == 1 and (deep := _deeper(at / full[0])):
        inner = _shown([one.name for one in _folders(deep)])
        advice = f"set data.root to {deep}" if at == root else f"move these up into {at.name}/"
        raise DataError(
            f"{at}: only one class, {full[0]!r}; the folders {inner} are too deep, in "
            f"{deep.relative_to(root)}/: {advice}"
        )
    for name in contents.images:
        if name not in full:
            held = left_out_summary(contents.left_out_of[name])
            raise DataError(
                f"{at / name}: no images{f' ({held})' if held else ''}; a class folder needs at "
                f"least one file of {', '.join(sorted(EXTENSIONS))}: add some or remove the folder"
            )
    if learnt and len(full) == 1:
        raise DataError(
            f"{root}: only one class, {full[0]!r}; at least two folders are needed, one per "
            "class, each with its images"
        )


def _deeper(at: Path) -> Path | None:
    """Return the folder, `at` or one below it, that holds several folders of images; None if there
    is none."""
    while len(full := [one for one in _folders(at) if images_below(one)[0]]) == 1:
        at = full[0]
    return at if full else None


def left_out_summary(left_out: Mapping[str, int]) -> str:
    """Return in words which files are ignored: `8 files left out: 5 .heic (convert them to JPEG or
    PNG), 3 .txt`; empty if there are none."""
    if not left_out:
        return ""
    each = [
        f"{count} {f'.{name}' if name else 'without extension'}"
        + " (convert them to JPEG or PNG)" * (name in TO_CONVERT)
        for name, count in sorted(left_out.items(), key=lambda one: (-one[1], one[0]))
    ]
    return f"{plural(sum(left_out.values()), 'file')} left out: {', '.join(each)}"


def _files(folder: Path, root: Path) -> list[str]:
    """Return paths relative to `root` of all files below `folder` that are not hidden.

    Links are followed wherever they lead, since many data sets consist of them, except a link to a
    folder that contains it; special files are skipped (a pipe would never end). Plain strings,
    because a data set has too many files for a Path each.
    """
    files: list[str] = []
    above = frozenset(map(os.path.realpath, (root, folder.parent)))
    _collect(str(folder), folder.relative_to(root).as_posix(), above, files)
    return files


def _collect(at: str, below: str, above: frozenset[str], files: list[str]) -> None:
    """Add to `files` those in the folder `at`, whose path from the root is `below`, except in
    folders that are in `above`."""
    here = os.path.realpath(at)
    if here in above:
        return
    with os.scandir(at) as listed:
        entries = sorted((one for one in listed if not _is_rubbish(one.name)), key=_name)
    for entry in entries:
        name = f"{below}/{entry.name}"
        if entry.is_dir():
            _collect(entry.path, name, above | {here}, files)
        elif entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists()):
            files.append(name)  # a broken link is reported when it is read


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name


def _is_image(name: str) -> bool:
    """Return whether a name or path has the extension of an image."""
    return _extension(name) in EXTENSIONS


def _extension(name: str) -> str:
    """Return the extension in lower case, without the dot; empty if there is none."""
    stem, _, extension = name.rpartition("/")[2].rpartition(".")
    return extension.lower() if stem else ""
