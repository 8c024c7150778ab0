"""First study file for a folder of images, as `hpo init` writes it."""

from __future__ import annotations

import re
import statistics
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from hpo.config.base import toml_repr
from hpo.config.recommended import recommend
from hpo.config.study import parse_study
from hpo.errors import DataError

SAMPLED = 60  # images whose size is read; enough for a median

TEMPLATE = """\
# {name}: search for a classifier of the images in
#   {root}
# {summary}
#
#   hpo check {file}    looks at the data, estimates time and memory, writes nothing
#   hpo run {file}      searches; run it again after an interruption and it goes on
#
# Every field, its range and its default: hpo schema

[study]
name = {name_toml}
metric = "val_top1"       # share of validation images whose class is named right
# The search ends with the first of these:
# trials = 50             # exactly so many are run; the default where no time is given
# max_time = "2h"         # by the clock; also: hpo run {file} --time 2h
# patience_trials = 15    # so many trials in a row without a better one

[train]
epochs = {epochs}               # of a full trial; most are stopped earlier

[train.data]
{source}
image_size = {size}          # side in pixels that the network sees; smaller is quicker
normalize = {normalize}
{split}

[train.model]
architecture = "{architecture}"
{stem}# Start from ImageNet's weights instead of random ones (a download of {megabytes} MB, once):
# weights = "DEFAULT"
# trainable_blocks = 2    # and train only the last two blocks and the head: quicker

[train.augment]
# horizontal_flip = 0.5   # searched below; fix a value here and remove it there
{crop}
# What is searched, by the dotted name of its field: a range or a list of choices.
[space]
optimizer.name = ["sgd", "adamw"]
optimizer.lr = {{low = 1e-4, high = 0.1, log = true}}
optimizer.weight_decay = {{low = 1e-6, high = 1e-2, log = true}}
optimizer.momentum = {{low = 0.8, high = 0.98, when = {{"optimizer.name" = "sgd"}}}}
batch_size = {batches}
label_smoothing = [0.0, 0.1]
model.dropout = {{low = 0.0, high = 0.5, step = 0.1}}
augment.horizontal_flip = [0.0, 0.5]    # leave out if left and right differ, as in writing
augment.rotation = [0, 10, 20]
augment.brightness = [0.0, 0.2, 0.4]

# Tried first: what one would take without a search. All other trials must beat it.
[[baseline]]
optimizer.name = "adamw"
optimizer.lr = 1e-3
optimizer.weight_decay = 1e-2
"""


NEXT = """
# Tried next: recommended configurations, cut to the space above (none: defaults = false under
# [study]). Once you have changed it, this shows them anew:
#   hpo check {file}
"""


@dataclass(frozen=True)
class FolderSummary:
    """Summary of a folder of images, found without opening files but for some sizes."""

    classes: int
    images: int
    """Images for training; all of them where the folder has no split."""
    side: int
    """Median of the shorter side of some images, in pixels."""
    parts: tuple[str, ...]
    """Which of train, val and test it has; empty: it has no parts."""


def median_side(files: list[Path]) -> int:
    """Median shorter side of up to `SAMPLED` images, spread over all classes."""
    from PIL import Image

    sides = []
    for file in files[:: max(1, len(files) // SAMPLED)]:
        try:
            with warnings.catch_warnings(), Image.open(file) as image:
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                sides.append(min(image.size))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # `hpo check` names what cannot be read
    if not sides:
        raise DataError(f"{files[0].parent.parent}: none of the images that were tried can be read")
    return int(statistics.median(sides))


def starter_file(data: Path, folder: FolderSummary, name: str | None = None) -> str:
    """Return the text of a study file for the images of `data`, a folder or a CSV file, of which a
    look has told `folder`; it works as it is.

    Its settings are cheap enough for a CPU. `name` is the study's; default: that of `data`.
    """
    root = data.expanduser().absolute()
    key, dataset = ("labels", "csv") if root.is_file() else ("root", "folder")
    name = name or _name(root)
    small = folder.side <= 64
    text = TEMPLATE.format(
        name=name,
        file=f"{name}.toml",
        name_toml=_quoted(name),
        root=root if str(root).isprintable() else _quoted(str(root)),
        source=f'dataset = "{dataset}"\n{key} = {_quoted(str(root))}',
        summary=_summary(folder),
        epochs=30 if folder.images < 5_000 else 15,
        size=max(16, folder.side) if small else 128 if folder.side >= 128 else 96,
        normalize='"dataset"      # "imagenet" with ImageNet\'s weights',
        split=_split(folder),
        architecture="resnet18" if small else "mobilenet_v2",
        stem='stem = "small"            # for images of some 32 pixels\n' if small else "",
        megabytes=45 if small else 14,
        crop="# crop_padding = 4\n" if small else "random_resized_crop = [0.5, 1.0]\n",
        batches=_batches(folder.images),
    )
    found = recommend(parse_study(text, str(root)))
    lines = (f"#   {one.source}\n{_wrapped(one.values)}\n" for one in found)
    return text + NEXT.format(file=f"{name}.toml") + "".join(lines)


def _wrapped(values: Mapping[str, Any]) -> str:
    """Return `values` as comment lines."""
    given = ", ".join(f"{name} = {toml_repr(value)}" for name, value in values.items())
    return textwrap.fill(given, 98, initial_indent="#     ", subsequent_indent="#     ",
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip


def _summary(folder: FolderSummary) -> str:
    of = "for training " if folder.parts else ""
    return (
        f"{folder.images:,} images {of}in {folder.classes} classes, "
        f"shorter side about {folder.side} pixels."
    )


def _split(folder: FolderSummary) -> str:
    """Return the comments and fields that say which images validate and test."""
    lines = []
    if "val" not in folder.parts:
        lines.append("val_fraction = 0.15        # part of the images that compares the trials")
    if not folder.parts:
        lines.append("test_fraction = 0.15       # part kept for the test after the search")
    lines += [f"# {part}/ is used as it is" for part in folder.parts]
    return "\n".join(lines)


def _batches(images: int) -> str:
    """Small data sets need small batches to make enough steps in an epoch."""
    if images < 500:
        return "[8, 16]"
    return "[16, 32]" if images < 2_000 else "[32, 64, 128]"


def _name(root: Path) -> str:
    """Return a study's name made of a folder's, or a file's."""
    return (
        re.sub(r"[^A-Za-z0-9._-]+", "-", root.stem if root.is_file() else root.name).strip("-.")[
            :64
        ]
        or "photos"
    )


def _quoted(text: str) -> str:
    """Return `text` as a TOML string."""
    return tomli_w.dumps({"x": text}).removeprefix("x = ").rstrip("\n")
