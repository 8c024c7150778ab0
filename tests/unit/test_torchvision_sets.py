"""torchvision's data sets: every one that fits is known, opened as torchvision opens it, downloaded
once, and its absence explained."""

from __future__ import annotations

import gzip
import hashlib
import inspect
import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torchvision.datasets as tv

from hpo.config.data import NATIVE, TORCHVISION, DataConfig
from hpo.config.study import parse_study
from hpo.config.train import TrainConfig
from hpo.data.dataset import describe, open_data, open_test
from hpo.data.torchvision import KINDS, ArrayReader, TorchvisionSource
from hpo.errors import ConfigError, DataError
from tests.harness.formats import make_set, unchecked

OTHER = {
    **dict.fromkeys(["Kinetics", "HMDB51", "UCF101", "MovingMNIST"], "videos"),
    **dict.fromkeys(["Kitti", "WIDERFace", "CelebA", "PhotoTour", "Cityscapes"], "other targets"),
    **dict.fromkeys(["KittiFlow", "Sintel", "FlyingThings3D", "HD1K"], "optical flow"),
    **dict.fromkeys(["Kitti2012Stereo", "Kitti2015Stereo", "Middlebury2014Stereo"], "stereo"),
    **dict.fromkeys(["InStereo2k", "ETH3DStereo"], "stereo"),
    "CLEVRClassification": "its test pictures have no labels",
    "Places365": "its test pictures have no labels",
    "PCAM": "needs h5py",
    "StanfordCars": "opened by a module of its own",
    "LFWPeople": "its test people are others",
    "LFWPairs": "pairs",
}
"""Classes with a train and a test part that are not in the table, and why."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No network; the addresses that were asked for."""
    unchecked(monkeypatch)
    asked: list[str] = []

    def refuse(request: Any, *args: Any, **options: Any) -> None:
        asked.append(request if isinstance(request, str) else request.full_url)
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return asked


def config(name: str, root: Path, **values: Any) -> DataConfig:
    return DataConfig(dataset=name, root=str(root), **values)


def classes_with_a_test_part() -> Iterator[str]:
    for name in tv.__all__:
        made = getattr(tv, name)
        if not inspect.isclass(made):
            continue
        options = inspect.signature(made.__init__).parameters
        text = inspect.getsource(made)
        by_split = "split" in options and re.search(r"[\"']test[\"']", text)
        if "train" in options or by_split:
            yield name


def test_every_class_of_torchvision_that_fits_is_known() -> None:
    known = {kind.name for kind in KINDS.values()}
    assert len(known) == len(KINDS)
    assert set(classes_with_a_test_part()) - OTHER.keys() == known
    assert set(KINDS) == set(TORCHVISION)


@pytest.mark.parametrize("name", KINDS)
def test_pictures_and_labels_are_torchvisions(name: str, tmp_path: Path) -> None:
    root = make_set(name, tmp_path / "data")
    source = TorchvisionSource(name, root, download=False)
    listing = source.listing(test=True)
    assert not listing.sealed
    assert set(listing.parts) == set(KINDS[name].splits)
    for part, items in listing.parts.items():
        theirs = KINDS[name].open(root, part)
        assert len(items) == len(theirs) > 0
        for i, (item, label) in enumerate(items):
            image, truth = theirs[i]
            assert label == truth
            with source.reader.open(item) as ours:
                assert ours.convert("RGB").tobytes() == image.convert("RGB").tobytes()
        if hasattr(theirs, "classes"):
            assert listing.classes == tuple(theirs.classes)
    assert len({label for _, label in listing.parts["train"]}) == len(listing.classes)


@pytest.mark.parametrize("name", ["cifar10", "mnist", "usps", "flowers102", "dtd", "gtsrb"])
def test_opened_like_any_other(name: str, tmp_path: Path) -> None:
    data = config(name, make_set(name, tmp_path / "data"), image_size=16, val_fraction=0.25)
    found = open_data(data, tmp_path / "cache")
    test = open_test(data, tmp_path / "cache")
    assert test is not None
    assert found.has_test
    counts = describe(data)
    seen = {"train": found.train, "val": found.val, "test": test}
    assert {part: sum(count.values()) for part, count in counts.items()} == {
        part: len(images) for part, images in seen.items()
    }
    given = "val" in KINDS[name].splits
    assert any(one.startswith("train/") for one in found.val.names) == (
        not given and name not in ("gtsrb", "dtd")
    )
    assert not set(found.train.names) & set(found.val.names)
    again = open_data(data, tmp_path / "other")
    assert again.fingerprint == found.fingerprint
    assert again.val.names == found.val.names


def test_streamed_pictures_are_the_same(tmp_path: Path) -> None:
    root = make_set("cifar10", tmp_path / "data")
    kept = open_data(config("cifar10", root), tmp_path / "cache").train
    streamed = open_data(config("cifar10", root, cache_limit_gb=0.0), tmp_path / "none").train
    assert streamed.streamed
    elsewhere = pickle.loads(pickle.dumps(streamed))
    assert not elsewhere.reader.arrays
    for i in (0, 7):
        assert (elsewhere.pixels(i) == kept.pixels(i)).all()
    assert isinstance(elsewhere.reader, ArrayReader)


def test_sizes_are_the_data_sets_own() -> None:
    sizes = {name: DataConfig(dataset=name) for name in TORCHVISION}
    assert {name: one.image_size for name, one in sizes.items()} == {
        name: NATIVE.get(name, 224) for name in TORCHVISION
    }
    assert sizes["stl10"].resize_size == 96
    assert sizes["dtd"].resize_size == 256
    assert DataConfig(dataset="stl10", image_size=112).resize_size == 128


# What is not there


@pytest.mark.parametrize("name", KINDS)
def test_where_nothing_can_be_downloaded_the_message_says_what_to_put_where(
    name: str, tmp_path: Path, offline: list[str]
) -> None:
    root = tmp_path / "data"
    with pytest.raises(DataError) as caught:
        open_data(config(name, root), tmp_path / "cache")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{name}: ")
    assert f"torchvision.datasets.{KINDS[name].name} reads there: {KINDS[name].files}" in message
    assert str(root) in message
    assert bool(offline) == (name != "fer2013")
    assert [one.name for one in root.glob("*") if not one.name.endswith(".lock")] == []


def test_without_leave_nothing_is_downloaded_or_written(tmp_path: Path, offline: list[str]) -> None:
    root = tmp_path / "data"
    for use in (
        lambda: open_data(config("cifar10", root, download=False), tmp_path / "cache"),
        lambda: describe(config("cifar10", root)),
        lambda: describe(config("cifar10", root, download=False), download=True),
    ):
        with pytest.raises(DataError, match=r"hpo run downloads it unless data.download = false"):
            use()
    assert not offline
    assert not root.exists()


def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"mnist: could not be downloaded under .*manually"):
        open_data(config("mnist", tmp_path / "file"), tmp_path / "cache")


def test_what_torchvision_cannot_use_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(tmp_path, monkeypatch)
    half = tmp_path / "data/MNIST/raw"
    half.mkdir(parents=True)
    (half / "mine").write_text("kept")
    with pytest.raises(DataError, match=r"MNIST exists, but torchvision cannot use it; remove"):
        open_data(config("mnist", tmp_path / "data"), tmp_path / "cache")
    assert [one.name for one in half.iterdir()] == ["mine"]


def test_files_of_another_kind(tmp_path: Path) -> None:
    root = make_set("svhn", tmp_path / "data")
    (root / "train_32x32.mat").write_text("no matrix")
    with pytest.raises(DataError, match=r"svhn: cannot be opened under .*train_32x32.mat, test"):
        describe(config("svhn", root))


def test_a_corrupt_picture_is_named_by_its_file(tmp_path: Path) -> None:
    root = make_set("dtd", tmp_path / "data")
    broken = root / "dtd/dtd/images/class1/train10001.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError) as caught:
        open_data(config("dtd", root), tmp_path / "cache")
    assert f"\n  {broken.relative_to(root).as_posix()} (" in str(caught.value)
    assert "dtd: " in str(caught.value)
    left = open_data(config("dtd", root, skip_unreadable=True), tmp_path / "cache")
    assert any(broken.name in one for one in left.unreadable)


# Downloads


class Served:
    """An answer from the network."""

    def __init__(self, url: str, body: bytes) -> None:
        self.url, self._body, self.length = url, body, len(body)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def read(self, size: int) -> bytes:
        part, self._body = self._body[:size], self._body[size:]
        return part


def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A network that has MNIST, with checksums to match; what was fetched from it."""
    files = make_set("mnist", tmp_path / "served") / "MNIST" / "raw"
    bodies = {f"{one.name}.gz": gzip.compress(one.read_bytes()) for one in files.iterdir()}
    sums = [(name, hashlib.md5(body).hexdigest()) for name, body in bodies.items()]
    monkeypatch.setattr(tv.MNIST, "resources", sums)
    fetched: list[str] = []

    def answer(request: Any, *args: Any, **options: Any) -> Served:
        name = request.full_url.rpartition("/")[2]
        if request.headers.get("Method") != "HEAD":
            fetched.append(name)
        return Served(request.full_url, bodies[name])

    monkeypatch.setattr("urllib.request.urlopen", answer)
    return fetched


def test_many_workers_download_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = served(tmp_path, monkeypatch)
    data = config("mnist", tmp_path / "data", val_fraction=0.25)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: open_data(data, tmp_path / "cache"), range(4)))
    assert sorted(fetched) == sorted(name for name, _ in tv.MNIST.resources)
    assert len({one.fingerprint for one in found}) == 1
    assert len(found[0].train) == 30
    left = sorted(one.name for one in (tmp_path / "data").iterdir())
    assert left == [".mnist.lock", "MNIST"]
    assert sum(describe(data)["test"].values()) == 20


def test_a_killed_download_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served(tmp_path, monkeypatch)
    half = tmp_path / "data/.mnist/MNIST/raw"
    half.mkdir(parents=True)
    (half / "train-images-idx3-ubyte").write_bytes(b"half")
    counts = describe(config("mnist", tmp_path / "data"), download=True)
    assert sum(counts["test"].values()) == 20
    assert not (tmp_path / "data/.mnist").exists()


# Names


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "cifar",
            '"cifar": unknown data set (your own is named module:function); did you mean '
            "'cifar10' or 'cifar100'?",
        ),
        ("cars:", 'data.dataset: "cars:": unknown data set; your own is named module:function'),
        ("my-data:cars", '"my-data:cars": unknown data set; your own is named module:function'),
    ],
)
def test_unknown_names(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        TrainConfig.parse({"data": {"dataset": name}})


def test_the_default_folder_is_found_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "[study]\nname = 'x'\n[train]\ndata.dataset = {!r}\n[space]\nbatch_size = [32, 64]\n"
    for name, root in (("cifar10", str(tmp_path / "data")), ("digits", None)):
        file = parse_study(text.format(name), "x.toml")
        assert file.config({"batch_size": 32}).data.root == root


def test_digests_of_arrays_follow_their_contents(tmp_path: Path) -> None:
    root = make_set("mnist", tmp_path / "data")
    source = TorchvisionSource("mnist", root, download=False)
    names = [name for name, _ in source.listing(test=False).parts["train"]]
    digests = source.digests(names, None)
    reader = source.reader
    assert isinstance(reader, ArrayReader)
    pixels = {digests[name]: reader.pixels(name) for name in names}
    assert len(pixels) == len(names)
    reader.arrays["train"] = np.repeat(reader.arrays["train"][:1], len(names), 0)
    assert len(set(source.digests(names, None).values())) == 1
