"""Small data sets in the real formats of torchvision's classes and of Stanford Cars."""

from __future__ import annotations

import bz2
import json
import pickle
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from tests.harness.images import picture

TRAIN, VAL, TEST = 4, 2, 2
"""Pictures of each class."""
CHECKED = ("cifar", "svhn", "stl10", "flowers102", "fer2013")
"""torchvision's modules that compare checksums of the original files."""


def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision take files of other contents than the originals."""
    for module in CHECKED:
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity",
            lambda path, md5=None: Path(path).is_file(),
        )


def arrays(classes: int, each: int, shape: tuple[int, ...], seed: int) -> tuple[Any, list[int]]:
    """Noise around a grey of each class, (N, *shape) uint8, and the labels, classes in turn."""
    labels = [i % classes for i in range(classes * each)]
    noise = np.random.default_rng(seed).integers(0, 50, (len(labels), *shape))
    level = np.array(labels).reshape(-1, *[1] * len(shape)) * 200 // classes
    return (noise + level).astype(np.uint8), labels


def photographs(
    folder: Path,
    classes: int,
    each: int,
    extension: str,
    seed: int,
    size: tuple[int, int] = (40, 30),
) -> Iterator[tuple[str, int]]:
    """Files in `folder`, and the label of each."""
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(seed)
    for i in range(classes * each):
        name = f"{seed}{i:04}"
        picture(i % classes, classes, size, source).save(folder / f"{name}.{extension}")
        yield name, i % classes


def make_set(name: str, root: Path) -> Path:
    """The files of torchvision's data set `name` under `root`."""
    root.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Any] = {"cifar10": _cifar10, "cifar100": _cifar100}
    idx = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
    if name in idx:
        _idx_set(root / idx[name] / "raw", "", 10)
    elif name == "emnist":
        _idx_set(root / "EMNIST/raw", "emnist-balanced-", 47, test="test")
    else:
        makers.get(name, globals().get(f"_{name}"))(root)
    return root


def _batch(shape: tuple[int, ...], labels: str, each: int, seed: int) -> dict[str, Any]:
    data, truth = arrays(10, each, shape, seed)
    return {"data": data.reshape(len(data), -1), labels: truth}


def _cifar10(root: Path) -> None:
    base = root / "cifar-10-batches-py"
    base.mkdir()
    for i in range(1, 6):
        (base / f"data_batch_{i}").write_bytes(pickle.dumps(_batch((3, 32, 32), "labels", 1, i)))
    (base / "test_batch").write_bytes(pickle.dumps(_batch((3, 32, 32), "labels", TEST, 9)))
    names = [f"class{i}" for i in range(10)]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))


def _cifar100(root: Path) -> None:
    base = root / "cifar-100-python"
    base.mkdir()
    for seed, (part, each) in enumerate((("train", TRAIN), ("test", TEST))):
        batch = _batch((3, 32, 32), "fine_labels", each, seed)
        (base / part).write_bytes(pickle.dumps(batch))
    names = {"fine_label_names": [f"class{i}" for i in range(10)]}
    (base / "meta").write_bytes(pickle.dumps(names))


def idx(file: Path, data: Any) -> None:
    """An array of uint8 or int32 in the format of MNIST."""
    kind = 8 if data.dtype == np.uint8 else 12
    header = bytes([0, 0, kind, data.ndim]) + np.array(data.shape, ">i4").tobytes()
    file.write_bytes(header + data.astype(data.dtype.newbyteorder(">")).tobytes())


def _idx_set(raw: Path, prefix: str, classes: int, test: str = "t10k") -> None:
    raw.mkdir(parents=True)
    for seed, (part, each) in enumerate((("train", TRAIN), (test, TEST))):
        data, labels = arrays(classes, each, (28, 28), seed)
        idx(raw / f"{prefix}{part}-images-idx3-ubyte", data)
        idx(raw / f"{prefix}{part}-labels-idx1-ubyte", np.array(labels, np.uint8))


def _qmnist(root: Path) -> None:
    raw = root / "QMNIST/raw"
    raw.mkdir(parents=True)
    for seed, (part, each) in enumerate((("train", TRAIN), ("test", TEST))):
        data, labels = arrays(10, each, (28, 28), seed)
        idx(raw / f"qmnist-{part}-images-idx3-ubyte", data)
        more = np.array([[label, 4, 7, 0, 0, 0, 0, 0] for label in labels], np.int32)
        idx(raw / f"qmnist-{part}-labels-idx2-int", more)


def _usps(root: Path) -> None:
    for seed, (file, each) in enumerate((("usps.bz2", TRAIN), ("usps.t.bz2", TEST))):
        data, labels = arrays(10, each, (256,), seed)
        lines = [
            " ".join([str(label + 1), *(f"{i}:{v / 127.5 - 1:.6f}" for i, v in enumerate(row, 1))])
            for row, label in zip(data, labels, strict=True)
        ]
        (root / file).write_bytes(bz2.compress("\n".join(lines).encode()))


def _svhn(root: Path) -> None:
    for seed, (part, each) in enumerate((("train", TRAIN), ("test", TEST))):
        data, labels = arrays(10, each, (32, 32, 3), seed)
        truth = np.array([[label or 10] for label in labels], np.uint8)
        savemat(root / f"{part}_32x32.mat", {"X": data.transpose(1, 2, 3, 0), "y": truth})


def _stl10(root: Path) -> None:
    base = root / "stl10_binary"
    base.mkdir()
    for seed, (part, each) in enumerate((("train", TRAIN), ("test", TEST))):
        data, labels = arrays(10, each, (3, 96, 96), seed)
        (base / f"{part}_X.bin").write_bytes(data.tobytes())
        (base / f"{part}_y.bin").write_bytes((np.array(labels, np.uint8) + 1).tobytes())
    (base / "unlabeled_X.bin").write_bytes(b"")
    (base / "class_names.txt").write_text("".join(f"class{i}\n" for i in range(10)))


def _fer2013(root: Path) -> None:
    base = root / "fer2013"
    base.mkdir()
    rows = ["emotion,pixels,Usage"]
    for seed, (usage, each) in enumerate((("Training", TRAIN), ("PublicTest", TEST))):
        data, labels = arrays(7, each, (48 * 48,), seed)
        for row, label in zip(data, labels, strict=True):
            rows.append(f"{label},{' '.join(map(str, row))},{usage}")
    (base / "fer2013.csv").write_text("\n".join(rows))


def _flowers102(root: Path) -> None:
    base = root / "flowers-102"
    labels: list[int] = []
    ids: dict[str, list[int]] = {}
    for seed, (key, each) in enumerate((("trnid", 1), ("valid", 1), ("tstid", 2))):
        ids[key] = []
        for name, label in list(photographs(base / "jpg", 102, each, "jpg", seed)):
            labels.append(label + 1)
            ids[key].append(len(labels))
            (base / f"jpg/{name}.jpg").rename(base / f"jpg/image_{len(labels):05d}.jpg")
    savemat(base / "imagelabels.mat", {"labels": labels})
    savemat(base / "setid.mat", ids)


def _dtd(root: Path) -> None:
    base = root / "dtd/dtd"
    (base / "labels").mkdir(parents=True)
    for part, names in _by_class(base / "images", "jpg", ("train", "val", "test")).items():
        (base / f"labels/{part}1.txt").write_text("".join(f"{one}.jpg\n" for one in names))


def _by_class(base: Path, extension: str, parts: tuple[str, ...]) -> dict[str, list[str]]:
    """Pictures in one folder for each of 3 classes; their names, `class0/00000`, by part."""
    found = {}
    for seed, (part, each) in enumerate(zip(parts, (TRAIN, VAL, TEST), strict=False)):
        found[part] = [
            f"class{label}/{part}{name}"
            for label in range(3)
            for name, _ in photographs(
                base / f"class{label}", 1, each, extension, 10 * seed + label
            )
        ]
        for one in found[part]:
            to = base / f"{one}.{extension}"
            to.with_name(to.name.removeprefix(part)).rename(to)
    return found


def _fgvc_aircraft(root: Path) -> None:
    base = root / "fgvc-aircraft-2013b/data"
    for seed, (part, each) in enumerate((("train", TRAIN), ("val", VAL), ("test", TEST))):
        made = list(photographs(base / "images", 3, each, "jpg", seed))
        lines = "".join(f"{name} Type {label}\n" for name, label in made)
        (base / f"images_variant_{part}.txt").write_text(lines)
    (base / "variants.txt").write_text("Type 0\nType 1\nType 2\n")


def _food101(root: Path) -> None:
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for part, names in _by_class(base / "images", "jpg", ("train", "test")).items():
        of = {f"class{i}": [one for one in names if one.startswith(f"class{i}")] for i in range(3)}
        (base / f"meta/{part}.json").write_text(json.dumps(of))


def _gtsrb(root: Path) -> None:
    base = root / "gtsrb"
    for label in range(3):
        list(photographs(base / f"GTSRB/Training/{label:05}", 1, TRAIN, "ppm", label))
    made = photographs(base / "GTSRB/Final_Test/Images", 3, TEST, "ppm", 9)
    lines = "".join(f"{name}.ppm;{label}\n" for name, label in made)
    (base / "GT-final_test.csv").write_text(f"Filename;ClassId\n{lines}")


def _oxford_iiit_pet(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for seed, (part, each) in enumerate((("trainval", TRAIN), ("test", TEST))):
        lines = ""
        for name, label in list(photographs(base / "images", 3, each, "jpg", seed)):
            (base / f"images/{name}.jpg").rename(base / f"images/breed{label}_{name}.jpg")
            lines += f"breed{label}_{name} {label + 1} 1 1\n"
        (base / f"annotations/{part}.txt").write_text(lines)


def _country211(root: Path) -> None:
    for seed, (part, each) in enumerate((("train", TRAIN), ("valid", VAL), ("test", TEST))):
        for label, country in enumerate(("AD", "AE", "AF")):
            folder = root / "country211" / part / country
            list(photographs(folder, 1, each, "jpg", 10 * seed + label))


def _rendered_sst2(root: Path) -> None:
    for seed, (part, each) in enumerate((("train", TRAIN), ("valid", VAL), ("test", TEST))):
        for label, name in enumerate(("negative", "positive")):
            folder = root / "rendered-sst2" / part / name
            list(photographs(folder, 1, each, "png", 10 * seed + label))


# Stanford Cars

CARS = ("Audi TT 2011", "BMW M3 2012", "Fiat 500 2012")


def make_cars(root: Path, *, train: int = 6, test: int = 2) -> Path:
    """stanford_cars/ under `root`: 60 x 40 pixels, the car in a box of 30 x 20 at (11, 6)."""
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    names = np.array([CARS], object)
    savemat(base / "devkit/cars_meta.mat", {"class_names": names})
    for seed, (part, each) in enumerate((("train", train), ("test", test))):
        made = list(photographs(base / f"cars_{part}", 3, each, "jpg", seed, (60, 40)))
        annotate(root, part, [(f"{name}.jpg", label + 1, (11, 6, 40, 25)) for name, label in made])
    return root


def annotate(
    root: Path,
    part: str,
    rows: list[tuple[str, int, tuple[int, int, int, int]]],
    names: Mapping[str, str] | None = None,
) -> None:
    """Write the annotations of a part: picture, class from 1, box. `names`: other field names."""
    file = "devkit/cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat"
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    kind = [((names or {}).get(name, name), object) for name in fields]
    table = np.array([[(*box, label, picture) for picture, label, box in rows]], kind)
    savemat(root / "stanford_cars" / file, {"annotations": table})
