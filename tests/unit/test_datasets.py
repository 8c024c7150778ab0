"""Data sets: layouts, splits that leak nothing, clear refusals, and a cache that is never wrong."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import v2

from hpo.config.data import DataConfig
from hpo.data import cache as cache_module
from hpo.data import dataset, images
from hpo.data.cache import Index
from hpo.data.dataset import concat, describe, open_data, open_test
from hpo.data.split import Item, limit_items, split
from hpo.errors import DataError, DiskFull
from hpo.io import LENGTH
from tests.harness.images import make_folder, picture


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pictures that were decoded, as it happens."""
    names: list[str] = []

    def noting(source: Any, name: str, sizing: Any) -> tuple[Image.Image, images.Form]:
        names.append(name)
        return images.decode_with_form(source, name, sizing)

    monkeypatch.setattr(cache_module, "decode_with_form", noting)
    return names


def _config(root: Path, **values: Any) -> DataConfig:
    return DataConfig(**{"dataset": "folder", "root": str(root), "image_size": 16, **values})


def test_a_look_fills_the_cache_for_what_is_opened_next(
    root: Path, store: Path, decoded: list[str]
) -> None:
    make_folder(root, {"train": 6, "val": 2, "test": 2}, varied=True)
    (root / "test" / "class0" / "bad.png").write_bytes(b"no image")
    (root / "val" / "class0" / "bad.png").write_bytes(b"no image")
    config = _config(root, skip_unreadable=True)
    plain = dataset.examine_data(config, store, remember=False)
    assert not decoded
    assert dataset.examine_data(config, store, remember=False, fill=True) == plain
    assert len(plain.unreadable) == 2
    assert len(decoded) == 24  # no test image is in the cache
    open_data(config, store, folded=True)
    assert len(decoded) == 24
    folds = _config(make_folder(root / "all", count=6), folds=3)
    dataset.examine_data(folds, store, fill=True)
    count = len(decoded)
    open_data(folds, store, folded=True)
    assert len(decoded) == count


# Layouts


@pytest.mark.parametrize("layout", [{"train": 20, "val": 4}, {"train": 20}])
def test_without_a_test_folder_a_part_of_train_becomes_the_test(
    root: Path, store: Path, layout: dict[str, int], decoded: list[str]
) -> None:
    make_folder(root, layout, varied=True)
    config = _config(root, test_from_train=True)
    data = open_data(config, store)
    seen = {*data.train.names, *data.val.names}
    assert data.has_test
    assert seen == set(decoded)
    test = open_test(config, store)
    assert test is not None
    assert not seen & {*test.names}
    assert {name.split("/")[0] for name in test.names} == {"train"}
    assert len(test) == 9  # 15 % of 60
    assert sum(describe(config)["test"].values()) == 9
    assert len(seen | {*test.names}) == 3 * sum(layout.values())
    report = dataset.examine_data(config, store)
    assert "there is no test/: 15% of train/ are kept for the test" in "\n".join(report.lines())
    for without in (_config(root), _config(root, test_from_train=True, test_fraction=0.0)):
        assert open_test(without, store) is None
        lines = dataset.examine_data(without, store).lines()
        assert any("Add test/, or split one off" in line for line in lines)


def test_parts_are_taken_from_their_folders(root: Path, store: Path) -> None:
    make_folder(root, {"train": 4, "valid": 2, "Test": 3}, varied=True)
    data = open_data(_config(root), store)
    assert data.classes == ("class0", "class1", "class2")
    assert Counter(name.split("/")[0] for name in data.train.names) == {"train": 12}
    assert Counter(name.split("/")[0] for name in data.val.names) == {"valid": 6}
    assert data.has_test
    for part in (data.train, data.val):
        assert [f"class{label}" for label in part.labels] == [n.split("/")[1] for n in part.names]
    test = open_test(_config(root), store)
    assert test is not None
    assert {name.split("/")[0] for name in test.names} == {"Test"}
    assert describe(_config(root)) == {
        part: dict.fromkeys(data.classes, n) for part, n in (("train", 4), ("val", 2), ("test", 3))
    }


def test_validation_is_split_off_train(root: Path, store: Path) -> None:
    make_folder(root, {"train": 10, "test": 2})
    data = open_data(_config(root, val_fraction=0.2), store)
    assert data.has_test
    assert np.bincount(data.train.labels).tolist() == [8, 8, 8]
    assert np.bincount(data.val.labels).tolist() == [2, 2, 2]
    assert not set(data.train.names) & set(data.val.names)
    assert all(name.startswith("train/") for name in data.val.names)


def test_one_folder_per_class_is_split_three_ways(root: Path, store: Path) -> None:
    make_folder(root, count=20)
    config = _config(root)
    data, test = open_data(config, store), open_test(config, store)
    assert test is not None
    parts = [set(part.names) for part in (data.train, data.val, test)]
    assert [len(part) for part in parts] == [42, 9, 9]
    assert len(set.union(*parts)) == 60
    assert describe(config)["test"] == {"class0": 3, "class1": 3, "class2": 3}


def test_without_a_test_split_the_door_opens_on_nothing(root: Path, store: Path) -> None:
    make_folder(root)
    config = _config(root, test_fraction=0.0)
    assert not open_data(config, store).has_test
    assert open_test(config, store) is None
    assert set(describe(config)) == {"train", "val"}


def test_which_files_count(root: Path, store: Path) -> None:
    make_folder(root, {"train": 3, "val": 2})
    deep = root / "train" / "class0" / "more" / "still"
    deep.mkdir(parents=True)
    (root / "train" / "class0" / "0000.png").rename(deep / "UPPER.PNG")
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "class1" / ".hidden.png").write_bytes(b"")
    (root / "train" / "class1" / "Thumbs.db").write_bytes(b"")
    (root / "train" / "class1" / "notes.txt").write_bytes(b"")
    shutil.copy(root / "train" / "class2" / "0000.png", root / "train" / "loose.png")
    data = open_data(_config(root), store)
    assert "train/class0/more/still/UPPER.PNG" in data.train.names
    assert len(data.train) == 9
    assert data.warnings == (
        "1 image outside a class folder in train/ left out",
        "class0/ holds more/: their images count as class0",
    )


# The split


def test_a_split_depends_on_contents_and_its_seed_alone(root: Path, tmp_path: Path) -> None:
    make_folder(root, count=12)
    moved = tmp_path / "moved"
    for i, file in enumerate(sorted(root.rglob("*.png"))):
        (moved / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, moved / file.parent.name / f"{99 - i}.png")

    def seen(at: Path, seed: int) -> tuple[str, bytes, list[int]]:
        data = open_data(_config(at, split_seed=seed), tmp_path / f"cache{at.name}")
        pixels = [data.val.pixels(i).tobytes() for i in range(len(data.val))]
        return data.fingerprint, b"".join(pixels), data.val.labels.tolist()

    assert seen(root, 0) == seen(moved, 0)
    assert seen(root, 0)[1] != seen(root, 1)[1]
    assert seen(root, 0)[0] != seen(root, 1)[0]


def _items(spec: str) -> list[Item]:
    """Of class a, b, ... by content: "a1 a1 b2" has one content twice in class a."""
    return [Item(f"{i}", ord(word[0]) - ord("a"), word[1:]) for i, word in enumerate(spec.split())]


def test_identical_files_share_a_part_also_across_classes() -> None:
    source = random.Random(0)
    for seed in range(20):
        words = [f"{source.choice('abc')}{source.randrange(25)}" for _ in range(120)]
        parts = split(_items(" ".join(words)), {"val": 0.2, "test": 0.2}, seed)
        assert sorted(int(item.name) for items in parts.values() for item in items) == [*range(120)]
        contents = [{item.digest for item in items} for items in parts.values()]
        assert sum(map(len, contents)) == len(set.union(*contents)) == len({w[1:] for w in words})


@pytest.mark.parametrize("seed", range(5))
def test_a_part_gets_its_rounded_fraction_of_every_class(seed: int) -> None:
    items = _items(" ".join([f"a{i}" for i in range(40)] + [f"b{100 + i}" for i in range(7)]))
    parts = split(items, {"val": 0.15, "test": 0.1}, seed)
    counts = {part: Counter(item.label for item in items) for part, items in parts.items()}
    assert counts == {"val": {0: 6, 1: 1}, "test": {0: 4, 1: 1}, "train": {0: 30, 1: 5}}


def test_many_copies_of_one_file_do_not_swell_a_part() -> None:
    items = _items("a0 " * 60 + " ".join(f"a{i}" for i in range(1, 41)))
    for seed in range(10):
        assert len(split(items, {"val": 0.1}, seed)["val"]) == 10


def test_where_every_file_has_a_copy_each_part_still_gets_some() -> None:
    parts = split(_items("a1 a1 a2 a2 a3 a3"), {"val": 0.1, "test": 0.1}, 0)
    assert {part: len(items) for part, items in parts.items()} == {"val": 2, "test": 2, "train": 2}


@pytest.mark.parametrize("images", ["a1 a2 a3", "a1 a2 a3 a3 a3 a3", "a1 a2 a3 a4"])
def test_a_large_first_part_leaves_some_for_the_next(images: str) -> None:
    for seed in range(10):
        parts = split(_items(images), {"val": 0.5, "test": 0.15}, seed)
        assert all(parts.values())


@pytest.mark.parametrize(
    ("limit", "wanted"), [(2, [1, 1]), (11, [10, 1]), (22, [20, 2]), (43, [39, 4]), (99, [40, 4])]
)
def test_limited_keeps_proportions(limit: int, wanted: list[int]) -> None:
    items = _items(" ".join([f"a{i}" for i in range(40)] + [f"b{i}" for i in range(4)]))
    kept = limit_items(items, limit, 0)
    assert [sum(item.label == label for item in kept) for label in (0, 1)] == wanted
    assert kept == [item for item in items if item in kept]
    if limit < 44:
        assert kept != limit_items(items, limit, 1) or limit == 43


def test_limit_train_decodes_only_its_part(root: Path, store: Path, decoded: list[str]) -> None:
    make_folder(root, {"train": 10, "val": 2})
    data = open_data(_config(root, limit_train=6), store)
    assert np.bincount(data.train.labels).tolist() == [2, 2, 2]
    assert sorted(decoded) == sorted(data.train.names + data.val.names)
    assert len(open_data(_config(root), store).val) == len(data.val)
    with pytest.raises(DataError, match=r"limit_train = 2: at least 3"):
        open_data(_config(root, limit_train=2), store)


def test_no_door_but_its_own_decodes_the_test_pictures(
    root: Path, store: Path, decoded: list[str]
) -> None:
    make_folder(root, count=10)
    config = _config(root)
    describe(config)
    assert not decoded
    assert not store.exists()
    data = open_data(config, store)
    search = set(decoded)
    assert search == set(data.train.names + data.val.names)
    built = set(store.glob("*/pixels"))
    decoded.clear()
    test = open_test(config, store)
    assert test is not None
    assert set(decoded) == set(test.names)
    assert not search & set(test.names)
    assert len(set(store.glob("*/pixels")) - built) == 1


def test_identical_files_on_two_sides_are_told(root: Path, store: Path) -> None:
    make_folder(root, {"train": 3, "val": 2, "test": 2})
    train = root / "train"
    shutil.copy(train / "class0" / "0000.png", root / "val" / "class0" / "x.png")
    for name in ("x.png", "y.png"):
        shutil.copy(train / "class1" / "0001.png", root / "test" / "class1" / name)
    shutil.copy(train / "class1" / "0000.png", train / "class2" / "x.png")
    assert open_data(_config(root), store).warnings == (
        "1 file of val is identical to files of train",
        "2 files of test are identical to files of train",
        "1 file is in more than one class with identical content",
    )


# Pictures


def _save(root: Path, name: str, image: Image.Image, **options: Any) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    image.save(root / name, **options)


def _odd_pictures(root: Path) -> None:
    rgb = picture(0, 3, (30, 22), random.Random(1))
    palette = rgb.quantize(16)
    odd = {
        "grey.png": (rgb.convert("L"), {}),
        "opaque.png": (rgb.convert("RGBA"), {}),
        "palette.png": (palette, {}),
        "palette.gif": (palette, {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "one_bit.bmp": (rgb.convert("1"), {}),
        "grey.pgm": (rgb.convert("L"), {}),
        "plain.ppm": (rgb, {}),
        "plain.webp": (rgb, {}),
        "plain.tif": (rgb, {}),
        "plain.jpg": (rgb, {}),
    }
    for name, (image, options) in odd.items():
        _save(root, f"val/class0/{name}", image, **options)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_every_kind_of_picture_is_read_as_torchvision_does(
    root: Path, store: Path, limit: float
) -> None:
    make_folder(root, {"train": 2})
    _odd_pictures(root)
    val = open_data(_config(root, resize_size=20, cache_limit_gb=limit), store).val
    assert len(val) == 11
    assert val.streamed == (limit == 0)
    for i, name in enumerate(val.names):
        wanted = np.asarray(v2.functional.resize(pil_loader(root / name), [20]))
        np.testing.assert_array_equal(val.pixels(i), wanted, err_msg=name)
        assert val.sizes[i].tolist() == list(wanted.shape[:2])


def test_mean_and_deviation_come_from_the_training_part_alone(root: Path, store: Path) -> None:
    make_folder(root, {"train": 5, "val": 5}, varied=True)
    data = open_data(_config(root), store)
    whole = np.concatenate([data.train.pixels(i).reshape(-1, 3) for i in range(15)]) / 255
    np.testing.assert_allclose(data.mean, whole.mean(0), rtol=1e-9)
    np.testing.assert_allclose(data.std, whole.std(0), rtol=1e-9)
    make_folder(root, {"val": 5}, seed=7)
    assert open_data(_config(root), store).mean == data.mean
    named = open_data(_config(root, normalize="imagenet"), store)
    assert (named.mean, named.std) == dataset.IMAGENET


def test_uniform_pictures_are_one_array_and_ragged_ones_are_not(root: Path, store: Path) -> None:
    make_folder(root, {"train": 3, "val": 2}, varied=True)
    ragged = open_data(_config(root), store)
    assert not ragged.train.uniform
    with pytest.raises(ValueError, match="several sizes"):
        ragged.train.stacked()
    square = open_data(_config(root, resize="squash"), store)
    stacked = square.train.stacked()
    assert stacked.shape == (9, 16, 16, 3)
    assert all((stacked[i] == square.train.pixels(i)).all() for i in range(9))
    both = concat(square.train, square.val)
    assert both.stacked().shape == (15, 16, 16, 3)
    assert (both.stacked()[9] == square.val.pixels(0)).all()
    assert (both.pixels(10) == square.val.pixels(1)).all()
    assert both.names == square.train.names + square.val.names
    assert both.labels.tolist() == [*square.train.labels, *square.val.labels]


def test_digits(store: Path) -> None:
    data, test = open_data(DataConfig(), store), open_test(DataConfig(), store)
    assert test is not None
    assert data.classes == tuple("0123456789")
    assert len(data.train) + len(data.val) + len(test) == 1797
    assert data.train.stacked().shape[1:] == (8, 8, 3)
    assert data.train.stacked().max() == 255
    assert not set(data.val.names) & set(test.names)
    assert data.fingerprint != open_data(DataConfig(split_seed=1), store).fingerprint
    larger = open_data(DataConfig(image_size=12), store)
    assert larger.train.names == data.train.names
    wanted = v2.functional.resize(Image.fromarray(data.train.pixels(3)), [12])
    np.testing.assert_array_equal(larger.train.pixels(3), np.asarray(wanted))
    assert sum(describe(DataConfig())["test"].values()) == len(test)


# Refusals


def _empty(root: Path) -> None:
    root.mkdir()


def _file(root: Path) -> None:
    root.write_text("")


def _one_class(root: Path) -> None:
    make_folder(root, classes=1)


def _class_only_in_test(root: Path) -> None:
    make_folder(root, {"train": 2, "val": 2})
    make_folder(root, {"test": 1}, classes=4)


def _class_without_images(root: Path) -> None:
    make_folder(root)
    (root / "empty").mkdir()
    (root / "empty" / "notes.txt").write_text("")


def _no_train(root: Path) -> None:
    make_folder(root, {"test": 2})


def _two_vals(root: Path) -> None:
    make_folder(root, {"train": 2, "val": 2, "valid": 2})


def _too_few(root: Path) -> None:
    make_folder(root)
    for name in range(2, 8):
        (root / "class1" / f"{name:04}.png").unlink()


def _too_few_for_val(root: Path) -> None:
    make_folder(root, {"train": 1})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda root: None, "data: no such folder; set data.root"),
        (_file, "data: not a folder; set data.root"),
        (_empty, "data: no folders of images; one folder per class"),
        (_one_class, "data: only one class, 'class0'; at least two"),
        (_class_only_in_test, r"test: class 'class3' is not in train/, .*add it there or remove"),
        (_class_without_images, r"empty: no images .*1 \.txt.*bmp, gif.* add some or remove"),
        (_no_train, "data: has test/, which means the test part, but no train/; add train/"),
        (_two_vals, "data: both val/ and valid/ are for val; keep one"),
        (_too_few, "data: class 'class1' has too few different images .*test"),
        (_too_few_for_val, "data: class 'class0' has too few different images .*val"),
    ],
)
def test_folders_that_cannot_be_used(
    root: Path, store: Path, make: Callable[[Path], None], says: str
) -> None:
    make(root)
    for use in (lambda: open_data(_config(root), store), lambda: describe(_config(root))):
        with pytest.raises(DataError, match=says) as caught:
            use()
        assert "\n" not in str(caught.value)


def _huge_png(file: Path, side: int) -> None:
    """The header of a picture of `side` x `side` pixels, and no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))


def _break(root: Path) -> Path:
    """A folder with a text, half a JPEG, a link to nothing and a bomb among its pictures."""
    make_folder(root, {"train": 4, "val": 2}, extension="jpg")
    at = root / "train" / "class1"
    (at / "text.jpg").write_text("not a picture")
    whole = (at / "0000.jpg").read_bytes()
    (at / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (at / "gone.jpg").symlink_to(root / "nowhere.jpg")
    _huge_png(at / "huge.png", 30_000)
    Image.new("RGB", (3, 4000)).save(at / "thin.png")
    return at


def test_unreadable_files_are_named(root: Path, store: Path, decoded: list[str]) -> None:
    _break(root)
    with pytest.raises(DataError) as caught:
        open_data(_config(root, max_pixels=1_000_000, resize_size=200), store)
    message = str(caught.value)
    assert f"{root}: 5 files cannot be read as images" in message
    assert "data.skip_unreadable = true" in message
    assert "train/class1/text.jpg (not an image)" in message
    assert "train/class1/half.jpg (" in message
    assert "truncated" in message.lower()
    assert "train/class1/gone.jpg (No such file or directory)" in message
    assert "huge.png (30000 x 30000 pixels, data.max_pixels allows 1000000)" in message
    assert "thin.png (200 x 266666 pixels after resizing" in message
    assert not {"train/class1/huge.png", "train/class1/thin.png"} & set(decoded)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_unreadable_files_are_left_out_on_request(root: Path, store: Path, limit: float) -> None:
    _break(root)
    config = _config(
        root, max_pixels=1_000_000, resize_size=200, skip_unreadable=True, cache_limit_gb=limit
    )
    data = open_data(config, store)
    assert len(data.train) == 12
    assert len(data.unreadable) == 5
    assert all(data.train.pixels(i).shape[2] == 3 for i in range(12))
    assert open_data(config, store).unreadable == data.unreadable


def test_more_than_ten_unreadable_files_are_counted(root: Path, store: Path) -> None:
    make_folder(root, {"train": 14, "val": 1})
    for file in (root / "train" / "class0").iterdir():
        file.write_text(file.name)
    with pytest.raises(DataError, match="14 files") as caught:
        open_data(_config(root), store)
    assert str(caught.value).count(".png") == 10
    assert str(caught.value).endswith("and 4 more")
    with pytest.raises(DataError, match="'class0': none of its train images can be read"):
        open_data(_config(root, skip_unreadable=True), store)


# The cache


def test_the_cache_is_built_once_and_notices_a_changed_file(
    root: Path, store: Path, decoded: list[str]
) -> None:
    make_folder(root, {"train": 4, "val": 2})
    first = open_data(_config(root), store)
    assert len(decoded) == 18
    again = open_data(_config(root), store)
    assert len(decoded) == 18
    assert again.fingerprint == first.fingerprint
    picture(2, 3, (40, 30), random.Random(9)).save(root / "val" / "class0" / "0000.png")
    changed = open_data(_config(root), store)
    assert len(decoded) == 24
    assert changed.fingerprint != first.fingerprint
    open_data(_config(root, image_size=12), store)
    assert len(decoded) == 42


def test_unchanged_files_are_not_read_again(
    root: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(root, {"train": 4, "val": 2})
    first = open_data(_config(root), store)
    read: list[Path] = []
    opened = Path.open

    def noting(self: Path, *args: Any, **options: Any) -> Any:
        read.append(self)
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", noting)
    assert open_data(_config(root), store).fingerprint == first.fingerprint
    assert not [file for file in read if file.is_relative_to(root)]
    touched = root / "train" / "class0" / "0000.png"
    os.utime(touched, ns=(1, 1))
    assert open_data(_config(root), store).fingerprint == first.fingerprint
    assert [file for file in read if file.is_relative_to(root)] == [touched]


def test_one_of_many_builds_and_all_see_the_same(
    root: Path, store: Path, decoded: list[str]
) -> None:
    make_folder(root, {"train": 6, "val": 2})
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: open_data(_config(root), store), range(4)))
    assert len(decoded) == 24
    assert len({data.train.pixels(5).tobytes() for data in found}) == 1


def test_a_part_beyond_the_limit_is_streamed_until_it_fits(root: Path, store: Path) -> None:
    make_folder(root, {"train": 4, "val": 2})
    streamed = open_data(_config(root, cache_limit_gb=0.0), store)
    assert streamed.train.streamed
    assert not list(store.glob("*/pixels"))
    mapped = open_data(_config(root), store)
    assert not mapped.train.streamed
    assert mapped.fingerprint == streamed.fingerprint
    assert all((mapped.train.pixels(i) == streamed.train.pixels(i)).all() for i in range(12))
    assert open_data(_config(root, cache_limit_gb=0.0), store).train.streamed


@pytest.mark.parametrize("limit", [20.0, 0.0])
def test_identities_are_known_without_another_look(
    root: Path, store: Path, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    make_folder(root, {"train": 4, "val": 2}, size=(16, 16))
    shutil.copy(root / "train/class0/0000.png", root / "val/class2/again.png")
    data = open_data(_config(root, cache_limit_gb=limit, loader_workers=0), store)
    both = concat(data.train, data.val)
    expected = tuple(images.array_digest(both.pixels(i)) for i in range(len(both)))
    monkeypatch.delattr(images.MemmapImages, "pixels")
    monkeypatch.delattr(images.StreamedImages, "pixels")
    again = open_data(_config(root, cache_limit_gb=limit, loader_workers=0), store)
    assert concat(again.train, again.val).identities == expected
    assert len(set(expected)) == len(expected) - 1
    assert (
        expected[both.names.index("train/class0/0000.png")]
        == (expected[both.names.index("val/class2/again.png")])
    )


def test_a_part_beyond_the_free_disk_is_streamed(
    root: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(root, {"train": 4, "val": 2})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    assert open_data(_config(root), store).train.streamed


def test_a_streamed_file_that_is_gone_is_named(root: Path, store: Path) -> None:
    make_folder(root, {"train": 4, "val": 2})
    train = open_data(_config(root, cache_limit_gb=0.0), store).train
    (root / train.names[3]).unlink()
    with pytest.raises(DataError, match=rf"{train.names[3]}: was readable when .* put the file"):
        train.pixels(3)


def test_a_part_that_fills_the_disk_is_streamed_until_there_is_room(
    root: Path, store: Path, small_files: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(root, {"train": 4, "val": 2})
    size = 12 * 16 * 21 * 3
    small_files(size - 1)
    data = open_data(_config(root), store)
    assert data.train.streamed
    assert not data.val.streamed
    told = r"does not fit: the disk mounted at \S+ has .* decoded again in every epoch"
    assert re.search(told, caplog.text)
    small_files(size + LENGTH)
    assert not open_data(_config(root), store).train.streamed


def test_a_full_disk_leaves_nothing_half_written(
    root: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(root, {"train": 4, "val": 2})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Index, "save", full)
    with pytest.raises(DiskFull, match=rf"{store}.* does not fit: the disk mounted at"):
        open_data(_config(root), store)
    assert not [one for one in store.iterdir() if one.is_dir() and one.name != "digests"]
    monkeypatch.undo()
    assert len(open_data(_config(root), store).train) == 12


def test_what_a_killed_builder_left_is_replaced(root: Path, store: Path) -> None:
    make_folder(root, {"train": 4, "val": 2})
    open_data(_config(root), store)
    for folder in [file.parent for file in store.glob("*/pixels")]:
        half = folder.rename(folder.with_name(f".{folder.name}"))
        (half / "pixels").write_bytes(b"half")
    data = open_data(_config(root), store)
    assert data.train.pixels(0).shape == (16, 21, 3)
    assert not list(store.glob(".*"))
