"""First study file for a folder of images, as `hpo init` writes it."""

from __future__ import annotations

import re
import shlex
import statistics
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from hpo.config.base import toml_repr
from hpo.config.recommended import recommend
from hpo.config.starter import FolderSummary, Starter, Wish, choose
from hpo.config.study import parse_study
from hpo.errors import DataError
from hpo.formatting import printable

SAMPLED = 60  # images whose size is read; enough for a median

TEMPLATE = """\
# {name}: search for a classifier of the images in
#   {root}
# {summary}
# Written by: {command}
#
#   hpo check {file}    looks at the data, estimates time and memory, writes nothing
#   hpo run {file}      searches; run it again after an interruption and it goes on
#
# Every field, its range and its default: hpo schema

[study]
name = {name_toml}
metric = "val_top1"       # accuracy on the validation images
# The search ends with the first of these:
{budget}
# patience_trials = 15    # so many trials in a row without a better one

[train]
{training}
[train.data]
{source}
image_size = {size}          # side in pixels that the network sees; smaller is quicker
normalize = "{normalize}"    # {normalize_told}
{split}

[train.model]
{model}
[train.augment]
# horizontal_flip = 0.5   # searched below; fix a value here and remove it there
{crop}{phases}
# What is searched, by the dotted name of its field: a range or a list of choices.
[space]
{space}
batch_size = {batches}
label_smoothing = [0.0, 0.1]
model.dropout = {{low = 0.0, high = 0.5, step = 0.1}}
augment.horizontal_flip = [0.0, 0.5]    # leave out if left and right differ, as in writing
augment.rotation = [0, 10, 20]
augment.brightness = [0.0, 0.2, 0.4]

# Tried first: what one would take without a search. All other trials must beat it.
[[baseline]]
{baseline}
batch_size = {batch}
label_smoothing = 0.0
model.dropout = {dropout}
augment.horizontal_flip = 0.5
augment.rotation = 0
augment.brightness = 0.0
"""

FINE_TUNED = """\
optimizer.lr = {low = 1e-4, high = 1e-2, log = true}
optimizer.backbone_lr_factor = {low = 0.03, high = 1.0, log = true}  # of pretrained layers
optimizer.weight_decay = {low = 1e-4, high = 0.1, log = true}"""
FINE_TUNED_BASELINE = """\
optimizer.lr = 1e-3
optimizer.backbone_lr_factor = 0.1
optimizer.weight_decay = 1e-2"""
SCRATCH = """\
optimizer.name = ["sgd", "adamw"]
optimizer.lr = {low = 1e-4, high = 0.1, log = true}
optimizer.weight_decay = {low = 1e-6, high = 1e-2, log = true}
optimizer.momentum = {low = 0.8, high = 0.98, when = {"optimizer.name" = "sgd"}}"""
SCRATCH_BASELINE = """\
optimizer.name = "adamw"
optimizer.lr = 1e-3
optimizer.weight_decay = 1e-2"""


NEXT = """
# Tried next: recommended configurations, cut to the space above (none: defaults = false under
# [study]). Once you have changed it, this shows them anew:
#   hpo check {file}
"""


def median_side(files: list[Path]) -> int:
    """Return the median shorter side of up to `SAMPLED` images, spread over all classes."""
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


def starter_file(
    data: Path, folder: FolderSummary, output: Path | None = None, wish: Wish | None = None
) -> str:
    """Return the text of a study file for the images of `data`, a folder or a CSV file, of which a
    look has told `folder`; it works as it is.

    It holds what `choose` finds for `wish`. The study is named after `output`, its file; default:
    after `data`.
    """
    root = data.expanduser().absolute()
    root = root.resolve() if ".." in root.parts else root
    key, dataset = ("labels", "csv") if folder.listed else ("root", "folder")
    name, wish = name_of(root) if output is None else _name(output.stem), wish or Wish()
    file = f"{name}.toml" if output is None else shlex.quote(printable(str(output)))
    chosen = choose(folder, wish)
    batches = _batches(chosen.limit_train or folder.images)
    text = TEMPLATE.format(
        name=name,
        file=file,
        name_toml=_quoted(name),
        root=root if str(root).isprintable() else _quoted(str(root)),
        command=command_of(wish),
        source=f'dataset = "{dataset}"\n{key} = {_quoted(str(root))}',
        summary=_summary(folder),
        budget=_budget(chosen, wish, file),
        training=_training(chosen),
        size=chosen.image_size,
        normalize="imagenet" if chosen.pretrained else "dataset",
        normalize_told="as the pretrained weights expect it" if chosen.pretrained else
        "mean and deviation of the training images",
        split=_split(folder, chosen),
        model=_model(chosen),
        crop="# crop_padding = 4\n" if chosen.stem == "small" else
        "random_resized_crop = [0.5, 1.0]\n",
        phases=_phases(chosen),
        space=_space(chosen),
        baseline=_baseline(chosen),
        batches=batches,
        batch=batches[len(batches) // 2],
        dropout=0.0 if chosen.stem == "small" else 0.2,
    )  # fmt: skip
    found = recommend(parse_study(text, str(root)))
    lines = (f"#   {one.source}\n{_wrapped(one.values)}\n" for one in found)
    return text + (NEXT.format(file=file) + "".join(lines) if found else "")


def command_of(wish: Wish) -> str:
    """Return the command, without the folder and the time, that writes a file for `wish`."""
    return f"hpo init {wish.options}".rstrip()


def _budget(chosen: Starter, wish: Wish, file: str) -> str:
    trials = f"trials = {chosen.trials}" if chosen.trials else "# trials = 50"
    time = f"max_time = {_quoted(wish.max_time)}" if wish.max_time else '# max_time = "2h"'
    return (
        f"{trials:25} # exactly so many are run; the default where no time is given\n"
        f"{time:25} # by the clock; also: hpo run {file} --time 2h"
    )


def _training(chosen: Starter) -> str:
    """Return the fields of [train] itself."""
    if len(chosen.epochs) > 1:
        return "# epochs of a full trial are those of its phases, below; most trials stop earlier\n"
    return (
        f"epochs = {chosen.epochs[0]}               # of a full trial; most are stopped earlier\n"
    )


def _model(chosen: Starter) -> str:
    """Return the fields of [train.model] and [train.optimizer]."""
    lines = []
    if len(chosen.architectures) == 1:
        lines.append(f'architecture = "{chosen.architectures[0]}"')
    if chosen.pretrained:
        lines += ['weights = "DEFAULT"       # ImageNet\'s, from torchvision, downloaded once',
                  "", "[train.optimizer]", 'name = "adamw"']  # fmt: skip
    if chosen.stem == "small":
        lines.append('stem = "small"            # for images of some 32 pixels')
    return "".join(f"{line}\n" for line in lines)


def _phases(chosen: Starter) -> str:
    if len(chosen.epochs) == 1:
        return ""
    head, rest = chosen.epochs
    return (
        "\n# The new head first, then the last blocks of the network with it.\n"
        f"[[train.phases]]\nepochs = {head}\ntrainable_blocks = 0\n\n"
        f"[[train.phases]]\nepochs = {rest}       # its trainable_blocks are searched\n"
    )


def _space(chosen: Starter) -> str:
    if not chosen.pretrained:
        return SCRATCH
    lines = []
    if len(chosen.architectures) > 1:
        lines.append(f"model.architecture = {toml_repr(list(chosen.architectures))}")
    lines.append(FINE_TUNED)
    if chosen.blocks:
        lines.append(f"phases.1.trainable_blocks = {toml_repr(list(chosen.blocks))}")
    return "\n".join(lines)


def _baseline(chosen: Starter) -> str:
    if not chosen.pretrained:
        return SCRATCH_BASELINE
    lines = []
    if len(chosen.architectures) > 1:
        lines.append(f'model.architecture = "{chosen.architectures[0]}"')
    lines.append(FINE_TUNED_BASELINE)
    if chosen.blocks:
        lines.append(f"phases.1.trainable_blocks = {toml_repr(chosen.blocks[1])}")
    return "\n".join(lines)


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


def _split(folder: FolderSummary, chosen: Starter) -> str:
    """Return the comments and fields that say which images train, validate and test."""
    lines = []
    if "val" not in folder.parts:
        lines.append("val_fraction = 0.15        # part of the images that compares the trials")
    if not folder.parts:
        lines.append("test_fraction = 0.15       # part kept for the test after the search")
    elif "test" not in folder.parts:
        lines += ["# there is no test/: a part of train/ is kept for the test after the search",
                  "test_from_train = true", "test_fraction = 0.15       # 0: no test"]  # fmt: skip
    if chosen.limit_train:
        lines.append(
            f"limit_train = {chosen.limit_train}          # so many training images, to be quick"
        )
    lines += [f"# {part}/ is used as it is" for part in folder.parts
              if part != "train" or "test" in folder.parts]  # fmt: skip
    return "\n".join(lines)


def _batches(images: int) -> list[int]:
    """Return batch sizes: small data sets need small batches to make enough steps in an epoch."""
    if images < 500:
        return [8, 16]
    return [16, 32] if images < 2_000 else [32, 64, 128]


def name_of(root: Path) -> str:
    """Return a study's name made of a folder's, or a file's."""
    return _name(root.stem if root.is_file() else root.name)


def _name(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:64] or "photos"


def _quoted(text: str) -> str:
    """Return `text` as a TOML string."""
    return tomli_w.dumps({"x": text}).removeprefix("x = ").rstrip("\n")
