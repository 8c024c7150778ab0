"""A data set of the user's own: what its function may return, and what is said of anything else."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hpo.config.data import DataConfig
from hpo.data.dataset import describe, open_data, open_test
from hpo.errors import DataError
from hpo.paths import Home
from tests.harness.images import make_folder
from tests.harness.trained import tiny_config, train_run

HEADER = """
from pathlib import Path
import numpy as np
from PIL import Image

def pixels(label, i):
    return np.random.default_rng(100 * label + i).integers(0, 256, (20, 24, 3)).astype(np.uint8)

def items(make, each, first=0):
    return [(make(label, first + i), f"kind{label}") for label in range(3) for i in range(each)]

FIRST = {"train": 0, "val": 20, "test": 30}
EACH = {"train": 6, "val": 2, "test": 3}
"""
ARRAYS = """
def load(root, split):
    return items(pixels, EACH[split], FIRST[split])
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module `mine` in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path / "mine.py"
    sys.modules.pop("mine", None)


def write(module: Path, code: str) -> DataConfig:
    module.write_text(HEADER + code)
    sys.modules.pop("mine", None)
    return DataConfig(dataset="mine:load", root="pictures", image_size=16)


def test_arrays_by_name(module: Path, tmp_path: Path) -> None:
    config = write(module, ARRAYS)
    data, test = open_data(config, tmp_path / "cache"), open_test(config, tmp_path / "cache")
    assert data.classes == ("kind0", "kind1", "kind2")
    assert data.has_test
    assert test is not None
    assert [len(one) for one in (data.train, data.val, test)] == [18, 6, 9]
    counts = {part: dict.fromkeys(data.classes, n)
              for part, n in (("train", 6), ("val", 2), ("test", 3))}  # fmt: skip
    assert describe(config) == counts
    assert set(test.names) == {f"test[{i}]" for i in range(9)}


@pytest.mark.parametrize(
    "make",
    ["Image.fromarray(pixels(label, i))", "pixels(label, i)[..., 0]", "pixels(label, i)"],
)
def test_kinds_of_pictures(module: Path, tmp_path: Path, make: str) -> None:
    code = f"""
def load(root, split):
    return items(lambda label, i: {make}, EACH[split], FIRST[split])
"""
    config = write(module, code)
    config = config.model_copy(update={"resize_size": 20, "image_size": 20})
    train = open_data(config, tmp_path / "cache").train
    where = int(train.names[0][6:-1])
    seed = 100 * (where // 6) + where % 6
    truth = np.random.default_rng(seed).integers(0, 256, (20, 24, 3)).astype(np.uint8)
    if "0]" in make:
        truth = np.repeat(truth[..., :1], 3, 2)
    assert (train.pixels(0) == truth).all()


def test_paths_below_the_root(module: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "pictures", {"train": 8, "test": 3})
    code = """
def load(root, split):
    if split == "val":
        return None
    return [(one.relative_to(root) if split == "train" else str(one.absolute()), one.parent.name)
            for one in sorted(Path(root, split).glob("*/*.png"))]
"""
    config = write(module, code)
    data, test = open_data(config, tmp_path / "cache"), open_test(config, tmp_path / "cache")
    assert data.classes == ("class0", "class1", "class2")
    assert len(data.train) + len(data.val) == 24
    assert len(data.val) == 3
    assert test is not None
    assert len(test) == 9
    folder = DataConfig(dataset="folder", root="pictures", image_size=16)
    same = open_data(folder, tmp_path / "cache")
    assert same.fingerprint == data.fingerprint  # whatever way the pictures come
    assert (same.val.pixels(0) == data.val.pixels(0)).all()


def test_numbers_as_labels(module: Path, tmp_path: Path) -> None:
    code = """
def load(root, split):
    return [(p, np.int64(10 + int(name[4:]))) for p, name in
            items(pixels, EACH[split], FIRST[split])]
"""
    data = open_data(write(module, code), tmp_path / "cache")
    assert data.classes == ("10", "11", "12")
    assert set(data.train.labels.tolist()) == {0, 1, 2}


def test_streamed_elsewhere(module: Path, tmp_path: Path) -> None:
    config = write(module, ARRAYS)
    kept = open_data(config, tmp_path / "cache").train
    streaming = config.model_copy(update={"cache_limit_gb": 0.0})
    elsewhere = pickle.loads(pickle.dumps(open_data(streaming, tmp_path / "none").train))
    assert elsewhere.streamed
    assert (elsewhere.pixels(4) == kept.pixels(4)).all()


def test_the_test_split_is_asked_for_by_its_door_alone(module: Path, tmp_path: Path) -> None:
    code = ARRAYS.replace("    return", "    (Path(root) / split).write_text('')\n    return")
    (tmp_path / "pictures").mkdir()
    config = write(module, code)
    open_data(config, tmp_path / "cache")
    asked = {one.name for one in (tmp_path / "pictures").iterdir()}
    assert asked == {"train", "val"}
    open_test(config, tmp_path / "cache")
    assert (tmp_path / "pictures/test").exists()


def test_a_run_without_a_test_split(module: Path, tmp_path: Path, home: Home) -> None:
    config = write(
        module,
        "\ndef load(root, split):\n    if split != 'test':\n"
        "        return items(pixels, EACH[split], FIRST[split])\n",
    )
    assert open_test(config, home.cache) is None
    assert set(describe(config)) == {"train", "val"}
    whole = tiny_config(tmp_path)
    run = train_run(whole.model_copy(update={"data": config}), tmp_path / "run", home)
    assert run is not None


SEVERAL = """
def load(root, split):
    found = items(pixels, 6)
    return {}
"""


@pytest.mark.parametrize(
    ("returns", "says"),
    [
        ("None", "mine:load: returned None for 'train'; only val and test may"),
        ("3", "mine:load(root, 'train') returned int: allowed: a sequence of (image, lab"),
        ("iter(found)", "mine:load(root, 'train') returned list_iterator: allowed: a seq"),
        ("[]", "mine:load(root, 'train') returned no images; return None where"),
        ("1 / 0", "mine:load(root, 'train') raised ZeroDivisionError: division by zero"),
        ("[1, 2]", "mine:load: train[0] is int: allowed: (image, label)"),
        ("[(1, 2, 3)]", "mine:load: train[0] is tuple of 3: allowed: (image, label)"),
        ("[(1, 'a')]", "mine:load: train[0]: the image is int: allowed: a PIL image, a path"),
        ("[(pixels(0, 0), None)]", "mine:load: train[0] has the label None: allowed: a name (str)"),
        ("[(pixels(0, 0), True)]", "mine:load: train[0] has the label True: allowed: a name (str)"),
        ("[(pixels(0, 0) / 255, 'a')]", "train[0]: the image is an array of float64, shape "
         "(20, 24, 3): allowed: a PIL image, a path, or a uint8 array of shape (H, W) or (H, W, 3"),
        ("[(pixels(0, 0).transpose(2, 0, 1), 'a')]", "an array of uint8, shape (3, 20, 24): allo"),
        ("found[:6]", "mine:load: 6 training images of 1 classes; at least two"),
        ("found + [(pixels(0, 0), 3)]", "mine:load: some labels are names, some numbers"),
        ("found if split == 'train' else [(pixels(9, 9), 'new')]",
         "mine:load: val[0] of val is of class 'new', which no training image has"),
    ],
)  # fmt: skip
def test_what_it_must_not_return(module: Path, tmp_path: Path, returns: str, says: str) -> None:
    config = write(module, SEVERAL.format(returns))
    for use in (lambda: open_data(config, tmp_path / "cache"), lambda: describe(config)):
        with pytest.raises(DataError, match=re.escape(says)) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_picture_that_raises_is_named(module: Path, tmp_path: Path) -> None:
    code = """
class Broken(list):
    def __getitem__(self, i):
        if i == 7:
            raise OSError("truncated")
        return super().__getitem__(i)

def load(root, split):
    return Broken(items(pixels, 6))
"""
    with pytest.raises(DataError, match=r"mine:load: train\[7\] raised OSError: truncated"):
        open_data(write(module, code), tmp_path / "cache")


def test_a_file_that_is_no_picture_is_named(module: Path, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "pictures", {"train": 8, "val": 2, "test": 2})
    (root / "train/class1/0003.png").write_text("no picture")
    code = """
def load(root, split):
    return [(one, one.parent.name) for one in sorted(Path(root, split).glob("*/*.png"))]
"""
    config = write(module, code)
    with pytest.raises(DataError, match=r"1 file cannot be read .*\n.*class1/0003.png \(not an"):
        open_data(config, tmp_path / "cache")
    left = config.model_copy(update={"skip_unreadable": True})
    assert len(open_data(left, tmp_path / "cache").train) == 23


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing:load", "data.dataset: 'missing:load' cannot be imported (ModuleNotFoundError"),
        ("mine:nothing", "data.dataset: 'mine:nothing' cannot be imported (AttributeError"),
        ("mine:FIRST", "TypeError: it is dict, not a function"),
        ("wrong:load", "data.dataset: 'wrong:load' cannot be imported (SyntaxError"),
    ],
)
def test_functions_that_are_not_there(module: Path, name: str, says: str) -> None:
    write(module, ARRAYS)
    module.with_name("wrong.py").write_text("def")
    with pytest.raises(DataError, match=re.escape(says)):
        describe(DataConfig(dataset=name))


def test_a_class_with_one_picture(module: Path) -> None:
    code = """
def load(root, split):
    found: list = items(pixels, 6) + [(pixels(9, 9), "alone")]
    return found if split == "train" else None
"""
    says = "mine:load: class 'alone' has too few different images (1) to leave one for val"
    with pytest.raises(DataError, match=re.escape(says)):
        describe(write(module, code))
