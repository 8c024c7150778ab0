"""torchvision's classification data sets, read by torchvision's own classes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hpo.control import ProgressCallback, no_progress
from hpo.data.cache import file_digests, locked
from hpo.data.folders import Listing
from hpo.data.images import ImageReader, Pixels, array_digest
from hpo.data.sources import DatasetSource, FolderReader
from hpo.errors import DataError, HpoError

Options = Mapping[str, Any]

_TRAIN: dict[str, Options] = {"train": {"train": True}, "test": {"train": False}}
_SPLIT: dict[str, Options] = {"train": {"split": "train"}, "test": {"split": "test"}}
_VAL: dict[str, Options] = {**_SPLIT, "val": {"split": "val"}}


@dataclass(frozen=True)
class Kind:
    """One of torchvision's data set classes, and its arguments."""

    name: str
    """Name of the class."""
    splits: Mapping[str, Options]
    """Arguments of the class for each part that it has."""
    files: str
    """The files it expects under `data.root`."""

    def open(self, root: Path, part: str, *, download: bool = False) -> Any:
        """Return torchvision's data set object of one part."""
        from torchvision import datasets  # brings torch, which a supervisor has no use for

        made = getattr(datasets, self.name)
        options = {"download": True} if download else {}
        return made(str(root), **self.splits[part], **options)


def _idx(name: str) -> str:
    files = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return f"{name}/raw/ with " + ", ".join(f"{one}-ubyte" for one in files)


KINDS: Mapping[str, Kind] = {
    "cifar10": Kind("CIFAR10", _TRAIN, "cifar-10-batches-py/ with data_batch_1 to data_batch_5, "
                    "test_batch, batches.meta (what cifar-10-python.tar.gz holds)"),
    "cifar100": Kind("CIFAR100", _TRAIN, "cifar-100-python/ with train, test, meta (what "
                     "cifar-100-python.tar.gz holds)"),
    "country211": Kind("Country211", {**_SPLIT, "val": {"split": "valid"}},
                       "country211/ with train/, valid/, test/ (what country211.tgz holds)"),
    "dtd": Kind("DTD", _VAL, "dtd/dtd/ with images/, labels/ (dtd-r1.0.1.tar.gz unpacked in dtd/)"),
    "emnist": Kind("EMNIST", {part: {"split": "balanced", **options}
                              for part, options in _TRAIN.items()},
                   "EMNIST/raw/ with emnist-balanced-train-images-idx3-ubyte, -train-labels-idx1-"
                   "ubyte, -test-images-idx3-ubyte, -test-labels-idx1-ubyte"),
    "fashion_mnist": Kind("FashionMNIST", _TRAIN, _idx("FashionMNIST")),
    "fer2013": Kind("FER2013", _SPLIT, "fer2013/ with icml_face_data.csv or fer2013.csv"),
    "fgvc_aircraft": Kind("FGVCAircraft", _VAL, "fgvc-aircraft-2013b/ with data/ (what "
                          "fgvc-aircraft-2013b.tar.gz holds)"),
    "flowers102": Kind("Flowers102", _VAL, "flowers-102/ with jpg/ (what 102flowers.tgz holds), "
                       "imagelabels.mat, setid.mat"),
    "food101": Kind("Food101", _SPLIT, "food-101/ with images/, meta/ (what food-101.tar.gz "
                    "holds)"),
    "gtsrb": Kind("GTSRB", _SPLIT, "gtsrb/ with GTSRB/Training/, GTSRB/Final_Test/Images/, "
                  "GT-final_test.csv"),
    "kmnist": Kind("KMNIST", _TRAIN, _idx("KMNIST")),
    "mnist": Kind("MNIST", _TRAIN, _idx("MNIST")),
    "oxford_iiit_pet": Kind("OxfordIIITPet", {"train": {"split": "trainval"},
                                              "test": {"split": "test"}},
                            "oxford-iiit-pet/ with images/, annotations/ (images.tar.gz and "
                            "annotations.tar.gz, unpacked in oxford-iiit-pet/)"),
    "qmnist": Kind("QMNIST", _TRAIN, "QMNIST/raw/ with qmnist-train-images-idx3-ubyte, "
                   "qmnist-train-labels-idx2-int, qmnist-test-images-idx3-ubyte, "
                   "qmnist-test-labels-idx2-int"),
    "rendered_sst2": Kind("RenderedSST2", _VAL, "rendered-sst2/ with train/, valid/, test/ (what "
                          "rendered-sst2.tgz holds)"),
    "stl10": Kind("STL10", _SPLIT, "stl10_binary/ (what stl10_binary.tar.gz holds)"),
    "svhn": Kind("SVHN", _SPLIT, "train_32x32.mat, test_32x32.mat"),
    "usps": Kind("USPS", _TRAIN, "usps.bz2, usps.t.bz2"),
}  # fmt: skip
"""torchvision's classes, by the name in `data.dataset`. A given validation part is used, otherwise
we split one off. Left out are those without test labels (CLEVR, ImageNet, Places365, Imagenette),
and PCAM, which needs h5py. EMNIST is the balanced variant with 47 classes."""


class TorchvisionSource(DatasetSource):
    """One of `KINDS` under `root`, downloaded if necessary and allowed."""

    def __init__(self, name: str, root: Path, *, download: bool) -> None:
        self.name, self.root, self._download = name, root, download
        self.reader: ImageReader = FolderReader(root)

    def listing(self, *, test: bool) -> Listing:
        """Return names and labels by part, downloading the data set if necessary and allowed."""
        parts = [part for part in KINDS[self.name].splits if test or part != "test"]
        opened = {
            part: _opened(self.name, self.root, part, self._download, self.tick) for part in parts
        }
        found = {part: _contents(one, self.name, part) for part, one in opened.items()}
        classes = getattr(opened["train"], "classes", None)
        if classes is None:
            classes = range(max(found["train"][1]) + 1)
        arrays = {part: data for part, (data, _) in found.items() if isinstance(data, np.ndarray)}
        if arrays:
            self.reader = ArrayReader(self.name, self.root, arrays)
        return Listing(
            tuple(map(str, classes)),
            {part: self._items(part, *contents) for part, contents in found.items()},
            sealed=not test,
        )

    def _items(
        self, part: str, images: Pixels | list[Path], labels: list[int]
    ) -> list[tuple[str, int]]:
        if isinstance(images, np.ndarray):
            return [(f"{part}/{i}", label) for i, label in enumerate(labels)]
        names = (Path(one).relative_to(self.root).as_posix() for one in images)
        return list(zip(names, labels, strict=True))

    def digests(self, names: Sequence[str], cache: Path | None) -> dict[str, str]:
        """Return the digest of each image in an array, or of the content of each file."""
        if isinstance(self.reader, ArrayReader):
            return {name: array_digest(self.reader.pixels(name)) for name in names}
        return file_digests(self.root, names, cache, self.tick)


@dataclass
class ArrayReader:
    """Images of a data set that is one array; another process reads it again."""

    name: str
    root: Path
    arrays: dict[str, Pixels] = field(default_factory=dict)
    """(N, H, W) or (N, H, W, 3) uint8 by part."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the arrays: the other process reads them itself."""
        return {"name": self.name, "root": self.root, "arrays": {}}

    def pixels(self, name: str) -> Pixels:
        """Return one image, (H, W) or (H, W, 3) uint8."""
        part, _, number = name.partition("/")
        if part not in self.arrays:
            opened = _opened(self.name, self.root, part, download=False)
            data, _ = _contents(opened, self.name, part)
            assert isinstance(data, np.ndarray)
            self.arrays[part] = data
        image: Pixels = self.arrays[part][int(number)]
        return image

    def open(self, name: str) -> Image.Image:
        """Return one image."""
        return Image.fromarray(self.pixels(name))


def _contents(opened: Any, name: str, part: str) -> tuple[Pixels | list[Path], list[int]]:
    """Return the images, as one array or as files, and their labels. torchvision's classes have no
    common attribute for them; a test covers every one of `KINDS`."""
    for files in ("_image_files", "_images"):
        if hasattr(opened, files):
            return getattr(opened, files), list(opened._labels)
    for samples in ("_samples", "samples"):
        if hasattr(opened, samples):
            images, labels = zip(*getattr(opened, samples), strict=True)
            if None in labels:
                raise DataError(f"{name}: the images of {part} have no labels in these files")
            if hasattr(images[0], "numpy"):
                return np.stack([one.numpy() for one in images]), list(labels)
            return list(images), list(labels)
    data = np.asarray(opened.data)
    if data.ndim == 4 and data.shape[1] == 3:
        data = data.transpose(0, 2, 3, 1)
    truth = np.asarray(opened.targets if hasattr(opened, "targets") else opened.labels)
    # QMNIST keeps more than the class.
    return np.ascontiguousarray(data), (truth[:, 0] if truth.ndim == 2 else truth).tolist()


def _opened(
    name: str, root: Path, part: str, download: bool, tick: ProgressCallback = no_progress
) -> Any:
    """Return torchvision's object of one part; `tick` is called while another process downloads it.
    Raises DataError if it is missing or incomplete."""
    kind = KINDS[name]
    try:
        return kind.open(root, part)
    except MemoryError:
        raise
    except Exception as error:  # its classes raise anything for what is missing or broken
        reason = error  # `error` itself is gone after the clause
    if not download or name == "fer2013":
        hint = "; hpo run downloads it unless data.download = false" if name != "fer2013" else ""
        raise DataError(_missing(name, root, reason) + hint) from reason
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f".{name}", tick):
            return _brought(name, root, part)
    except HpoError:
        raise
    except Exception as error:
        raise DataError(_missing(name, root, error, "could not be downloaded")) from error


def _brought(name: str, root: Path, part: str) -> Any:
    """Download into a hidden folder and move into place, so that what is visible is complete; call
    under the lock."""
    kind = KINDS[name]
    with suppress(Exception):  # it may be there by now: another worker held the lock before
        return kind.open(root, part)
    beside = root / f".{name}"
    shutil.rmtree(beside, ignore_errors=True)  # left by a download that was killed
    try:
        beside.mkdir()
        for each in kind.splits:
            kind.open(beside, each, download=True)
        for one in sorted(beside.iterdir()):
            target = root / one.name
            if target.is_dir():
                raise DataError(
                    f"{name}: {target} exists, but torchvision cannot use it; remove it so that it "
                    f"is downloaded again, or complete it: {kind.files}"
                )
            one.replace(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return kind.open(root, part)


def _missing(name: str, root: Path, error: Exception, what: str = "cannot be opened") -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    kind = KINDS[name]
    return (
        f"{name}: {what} under {root} ({type(error).__name__}: {reason}); to provide it manually, "
        f"put what torchvision.datasets.{kind.name} reads there: {kind.files}"
    )
