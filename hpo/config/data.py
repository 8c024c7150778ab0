"""Configuration of the data set: name or folder, split, and the size of images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from hpo.config.base import ConfigModel, NameOrFunction, fail, is_function_name

TORCHVISION: dict[str, int | None] = {
    "cifar10": 32,
    "cifar100": 32,
    "country211": None,
    "dtd": None,
    "emnist": 28,
    "fashion_mnist": 28,
    "fer2013": 48,
    "fgvc_aircraft": None,
    "flowers102": None,
    "food101": None,
    "gtsrb": None,
    "kmnist": 28,
    "mnist": 28,
    "oxford_iiit_pet": None,
    "qmnist": 28,
    "rendered_sst2": None,
    "stl10": 96,
    "svhn": 32,
    "usps": 16,
}
"""torchvision's classification data sets with a test part, and the side of their images in
pixels; None for photographs of many sizes. How each is opened: `hpo.data.torchvision`."""

BUILT_IN = ("digits", "folder", "csv", "stanford_cars", *TORCHVISION)

FOLDERS = ("folder", "csv")
"""Those whose images are files in folders of the user's."""

NATIVE = {"digits": 8} | {name: side for name, side in TORCHVISION.items() if side}
"""Side of the images, in pixels, where all have the same."""

DEFAULT_ROOT = "data"
"""Where named data sets lie unless `data.root` says otherwise."""

REGEX = "regex:"
GROUPING = {"type": "string", "anyOf": [{"enum": ["folder"]}, {"pattern": f"^{REGEX}."}]}


def _grouping(value: str) -> str:
    """Refuse what is neither `folder` nor a regular expression."""
    pattern = value.removeprefix(REGEX)
    if value != "folder" and (pattern == value or not pattern):
        raise ValueError('allowed: "folder", or "regex:" and a regular expression for paths')
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return value


BACKGROUND = r"^(white|black|grey|ignore|#[0-9a-fA-F]{6})$"


def _background(value: str) -> str:
    if not re.fullmatch(BACKGROUND, value):
        raise ValueError(f"{value!r}: allowed: white, black, grey, ignore, or #rrggbb")
    return value


Background = Annotated[
    str, AfterValidator(_background), Field(json_schema_extra={"pattern": BACKGROUND})
]


class DataConfig(ConfigModel):
    """Where the images come from, how they are split, and the size at which they are kept."""

    dataset: Annotated[str, NameOrFunction("data set", BUILT_IN)] = "digits"
    """digits: scikit-learn's 1,797 scans of handwritten digits, 8 x 8 pixels. folder: images by
    class under `root`, either train/ [val/] [test/] or one folder per class. csv: the images that
    the file `labels` lists, with their classes. cifar10, mnist, ...: torchvision's data set of that
    name, as its class lays it out under `root`. stanford_cars: in torchvision's layout under
    `root`. `module:function` of your own, found from the working directory: called with root (str,
    absolute) and "train", "val" or "test", it returns a sequence of (PIL image, path or uint8 array
    (H, W) or (H, W, 3); name or number of its class), or None for a val or test that there is not.
    """
    root: str | None = None
    """Folder of the images; relative to the working directory. Default for named data sets and your
    own: data; of a csv: the folder of `labels`."""
    labels: str | None = None
    """csv only: a CSV file (commas, semicolons or tabs) whose first line names its columns: file (a
    path below `root`; or file_name, filename, image, path), label (or class, category, target), and
    maybe split (train, val, test; nothing: train, or, if no row has any, divided as a folder
    without parts) and group (see `group_by`). Or a folder with such a file metadata.csv in it or in
    each of its train/, validation/ and test/, as Hugging Face's image folders have: there the
    folder of an image is its split. Relative to the working directory."""
    download: bool = True
    """Download one of torchvision's data sets into `root` where it is not there yet."""
    crop_to_box: bool = False
    """stanford_cars only: crop each image to its bounding box before it is resized."""
    balance: Literal["none", "loss", "sampling"] = "none"
    """For classes of unequal size. loss: the training loss of an image counts in inverse proportion
    to the size of its class, 1 in the mean. sampling: each epoch draws as many images as there are,
    with replacement, every class equally often. Validation stays as it is."""
    image_size: int = Field(default=224, ge=8, le=1024)
    """Side of the square that the model sees, in pixels; default: the data set's own where all its
    images have the same (8 for digits, 32 for cifar10, ...), 224 otherwise."""
    resize: Literal["crop", "squash"] = "crop"
    """crop: resize the shorter side to `resize_size`, keep the aspect ratio, evaluate on the centre
    (torchvision's Resize + CenterCrop). squash: stretch to a square."""
    resize_size: int = Field(default=256, ge=8, le=2048)
    """Shorter side after resizing, in pixels; default: image_size up to 64 and where it is the data
    set's own, else image_size x 256 / 224, torchvision's own ratio. Not used by squash."""
    normalize: Literal["dataset", "imagenet", "pretrained"] = "dataset"
    """Mean and standard deviation: of the training part, or ImageNet's, or those with which the
    weights were trained: of timm's the model's own, of torchvision's ImageNet's. With torchvision's
    weights use imagenet."""
    val_fraction: float = Field(default=0.15, gt=0, lt=1)
    """Part of the images for validation where the data has no val/ folder."""
    test_fraction: float = Field(default=0.15, ge=0, lt=1)
    """Part of the images for the test where the data has neither train/ nor test/; 0: no test."""
    test_from_train: bool = False
    """folder and csv only: where there is a train/ but no test/, keep `test_fraction` of train/ for
    the test. `hpo init` sets it for such data."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of the split; training seeds never move an image between parts."""
    group_by: Annotated[str, AfterValidator(_grouping), WithJsonSchema(GROUPING)] | None = None
    """Keep the images of a group, such as one patient's or one burst, on one side of every split
    and fold that is made. folder: images of one folder inside the class folder (of a csv: of one
    folder). regex:PATTERN: those in whose path below `root` the regular expression finds the same:
    its first group that matched, else all that it matched. None: identical files alone stay
    together, and what the column group of a csv says."""
    near_duplicates: int | None = Field(default=None, ge=0, le=12)
    """Keep images together, too, whose perceptual hashes (64 bits, pHash) differ in at most so many
    bits: 4 finds most copies that were encoded again, resized or brightened, 8 some that were
    cropped, and more that are none. All are counted, also those on two sides of parts of your own.
    None: not looked for."""
    folds: int | None = Field(default=None, ge=2, le=50)
    """Cross-validation: divide what is for training and validation into so many folds, each class
    in proportion; a trial trains a network for each, validated on the images of its fold, and its
    metrics are their means. None: one network, validated on val/ or `val_fraction`. The test part
    is the same either way; `hpo train` trains on all folds."""
    limit_train: int | None = Field(default=None, ge=1)
    """Use a seeded, stratified part of this many training images (of each fold), for cheap
    searches."""
    skip_unreadable: bool = False
    """Leave out files that cannot be read as images (counted and as_tuple) instead of stopping."""
    orientation: Literal["exif", "ignore"] = "exif"
    """exif: turn an image as its EXIF data say, as phones and cameras write them and viewers show
    it. ignore: as it is stored, as torchvision's ImageFolder does (a TIFF is turned all the
    same)."""
    background: Background = "white"
    """What lies under transparent pixels: white, black, grey, or #rrggbb. ignore: the colours that
    the file hides below them (torchvision's ImageFolder). Opaque images stay as they are."""
    max_pixels: int = Field(default=50_000_000, ge=64)
    """Refuse images of more pixels than this before they are decoded."""
    cache_limit_gb: float = Field(default=20.0, ge=0)
    """Largest cache of decoded images, in GB (10^9 bytes); beyond it images are decoded in every
    epoch by `loader_workers` processes, with the same results. Also of what frozen layers make of
    them; beyond it those are computed in every epoch."""
    loader_workers: int = Field(default=2, ge=0, le=64)
    """Processes that decode images where no cache is used; 0: in the training process."""

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        name = data.get("dataset", "digits")
        native = NATIVE.get(name) if isinstance(name, str) else None
        size = data.setdefault("image_size", native or 224)
        if isinstance(size, int):
            kept = size <= 64 or size == native
            data.setdefault("resize_size", size if kept else round(size * 256 / 224))
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dataset == "folder" and not self.root:
            fail("root", self.root, 'dataset = "folder" needs the folder of the images')
        if self.dataset == "csv" and not self.labels:
            fail("labels", self.labels, 'dataset = "csv" needs the file with the labels')
        if self.labels and self.dataset != "csv":
            fail("labels", self.labels, 'only with dataset = "csv"')
        if self.dataset == "digits" and self.root:
            fail("root", self.root, 'digits come with scikit-learn; use dataset = "folder"')
        if self.test_from_train and self.dataset not in FOLDERS:
            fail("test_from_train", True, f"only for dataset = {' or '.join(FOLDERS)}")
        if self.crop_to_box and self.dataset != "stanford_cars":
            fail("crop_to_box", True, 'only dataset = "stanford_cars" has boxes')
        if (
            self.group_by == "folder"
            and self.dataset not in FOLDERS
            and not is_function_name(self.dataset)
        ):
            fail("group_by", "folder", f"images of {self.dataset} lie in no folders of groups")
        if self.resize == "crop" and self.resize_size < self.image_size:
            fail("resize_size", self.resize_size, f"at least image_size = {self.image_size}")
        if self.val_fraction + self.test_fraction >= 1:
            left = f"with test_fraction = {self.test_fraction} nothing is left for training"
            fail("val_fraction", self.val_fraction, left)
        return self

    @property
    def folder(self) -> str:
        """`root`, or its default."""
        if self.root or not self.labels:
            return self.root or DEFAULT_ROOT
        labels = Path(self.labels)
        return str(labels if labels.is_dir() else labels.parent)

    @property
    def title(self) -> str:
        """For people: the folder of a folder, the file of a csv, else the data set's name."""
        if self.dataset == "csv":
            return str(self.labels)
        return self.folder if self.dataset == "folder" else self.dataset
