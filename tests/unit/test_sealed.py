"""The test set is sealed in a search: no code leads there, no test picture is decoded, and no seed
of a training moves a picture between the parts."""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hpo
from hpo.config.data import DataConfig
from hpo.config.study import StudyFile
from hpo.config.train import TrainConfig
from hpo.data import dataset
from hpo.data.dataset import DigitsReader, FolderReader, open_data, open_test
from hpo.data.images import Images
from hpo.data.sources import UserReader
from hpo.data.stanford_cars import BoxReader
from hpo.data.torchvision import ArrayReader
from hpo.errors import DataError
from hpo.paths import Home
from hpo.search.status import read_status
from hpo.storage.database import Database
from tests.harness.fakes import study_file
from tests.harness.formats import make_cars, make_set
from tests.harness.images import make_folder
from tests.harness.searches import TINY, search
from tests.harness.trained import tiny_config, train_run

ROOT = Path(hpo.__file__).parent
SEARCHING = ("search", "workers", "storage")
DOOR = "open_test"
LOOK = "examine_data"
"""Decodes the test images too, and gives names and reasons alone."""


def modules(folder: str) -> Iterator[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    yield from found


def names_in(path: Path) -> set[str]:
    """Every name, attribute, import and text that stands in the code of a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found |= {node.name, *node.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{one.name}" for one in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


# No code leads there


@pytest.mark.parametrize("folder", SEARCHING)
def test_searching_never_names_the_door(folder: str) -> None:
    for path in modules(folder):
        assert not {DOOR, LOOK} & names_in(path), path


@pytest.mark.parametrize("folder", [*SEARCHING, "data", "training"])
def test_searching_imports_nothing_that_comes_after_it(folder: str) -> None:
    for path in modules(folder):
        assert not [
            name for name in names_in(path) if name.startswith(("hpo.trained", "hpo.reports"))
        ], path


def test_only_retraining_and_evaluation_open_the_door() -> None:
    users = {path.relative_to(ROOT).as_posix() for path in modules("") if DOOR in names_in(path)}
    assert users == {"data/dataset.py", "trained/retrain.py", "trained/inference.py"}


def test_what_a_look_gives_has_no_pixels(tmp_path: Path, home: Home, opened: set[str]) -> None:
    root = make_folder(tmp_path / "pictures", {"train": 4, "val": 2, "test": 2}, size=(20, 16))
    config = DataConfig(dataset="folder", root=str(root), image_size=12)
    report = dataset.examine_data(config, home.cache)
    assert {name.split("/")[0] for name in opened} == {"train", "val", "test"}
    json.dumps(report.to_dict())  # names, numbers and reasons
    assert not list(home.cache.rglob("pixels"))


def test_what_a_search_gets_has_no_test_pictures() -> None:
    fields = [field.name for field in dataclasses.fields(dataset.Data) if "test" in field.name]
    assert fields == ["has_test"]


# No test picture is decoded


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of all pictures that are opened from now on."""
    found: set[str] = set()
    for source in (FolderReader, DigitsReader, ArrayReader, BoxReader, UserReader):

        def spied(self: object, name: str, real: object = source.open) -> object:
            found.add(name)
            return real(self, name)  # type: ignore[operator]

        monkeypatch.setattr(source, "open", spied)
    return found


def folder_study(root: Path) -> StudyFile:
    data = f'data = {{dataset = "folder", root = "{root}", image_size = 12}}'
    return study_file(trials=2, train=f"{TINY}\n{data}")


def test_a_search_decodes_training_and_validation_alone(
    database: Database, home: Home, opened: set[str]
) -> None:
    search(database, home, study_file(trials=2, train=TINY))
    assert read_status(database, "toy").count("complete") == 2
    searched = set(opened)
    test = open_test(DataConfig(), home.cache)
    assert test is not None
    assert len(test) == 269
    assert searched
    assert not searched & set(test.names)


def test_a_search_works_where_test_pictures_cannot_be_decoded(
    tmp_path: Path, database: Database, home: Home, opened: set[str]
) -> None:
    root = make_folder(tmp_path / "pictures", {"train": 8, "val": 4, "test": 3}, size=(20, 16))
    for path in root.glob("test/*/*"):
        path.write_text(f"no picture {path}")
    search(database, home, folder_study(root))
    status = read_status(database, "toy")
    assert status.count("complete") == 2
    assert {name.split("/")[0] for name in opened} == {"train", "val"}
    # And whoever does open it is told.
    with pytest.raises(DataError, match="9 files cannot be read"):
        train_run(tiny_config(root), tmp_path / "run", home)


def test_a_hashed_split_is_sealed_as_well(
    tmp_path: Path, database: Database, home: Home, opened: set[str]
) -> None:
    root = make_folder(tmp_path / "pictures", count=12, size=(20, 16))
    search(database, home, folder_study(root))
    searched = set(opened)
    config = DataConfig(dataset="folder", root=str(root), image_size=12)
    test = open_test(config, home.cache)
    assert test is not None
    assert len(searched) + len(test) == 36
    assert not searched & set(test.names)


def test_normalisation_never_sees_the_test_pictures(tmp_path: Path, home: Home) -> None:
    root = make_folder(tmp_path / "pictures", {"train": 4, "val": 2, "test": 2}, size=(20, 16))
    config = DataConfig(dataset="folder", root=str(root), image_size=12)
    before = open_data(config, home.cache)
    make_folder(root, {"test": 5}, size=(40, 16), seed=9)
    after = open_data(config, home.cache)
    assert (before.mean, before.std) == (after.mean, after.std)
    assert before.fingerprint == after.fingerprint


# Data sets by name and of the user's own

OWN = """
from pathlib import Path

def load(root, split):
    if split == "test" and (Path(root) / "sealed").exists():
        raise RuntimeError("the test split was asked for")
    folder = Path(root) / split
    return [(one, one.parent.name) for one in sorted(folder.glob("*/*.png"))]
"""


def _mnist(at: Path) -> None:
    make_set("mnist", at)


def _spoil_mnist(at: Path) -> None:
    (at / "MNIST/raw/t10k-images-idx3-ubyte").write_bytes(b"no pictures")


def _aircraft(at: Path) -> None:
    make_set("fgvc_aircraft", at)


def _spoil_aircraft(at: Path) -> None:
    (at / "fgvc-aircraft-2013b/data/images_variant_test.txt").unlink()


def _cars(at: Path) -> None:
    make_cars(at)


def _spoil_cars(at: Path) -> None:
    (at / "stanford_cars/cars_test_annos_withlabels.mat").unlink()


def _own(at: Path) -> None:
    make_folder(at, {"train": 6, "val": 2, "test": 3}, size=(20, 16))
    at.with_name("sealed_set.py").write_text(OWN)


def _spoil_own(at: Path) -> None:
    (at / "sealed").touch()


@pytest.mark.parametrize(
    ("name", "make", "spoil"),
    [
        ("mnist", _mnist, _spoil_mnist),
        ("fgvc_aircraft", _aircraft, _spoil_aircraft),
        ("stanford_cars", _cars, _spoil_cars),
        ("sealed_set:load", _own, _spoil_own),
    ],
)
def test_other_data_sets_are_sealed(
    name: str,
    make: Callable[[Path], None],
    spoil: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    database: Database,
    home: Home,
    opened: set[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    root = tmp_path / "data"
    make(root)
    config = DataConfig(dataset=name, root=str(root), image_size=12, download=False)
    test = open_test(config, home.cache)
    assert test is not None
    assert set(test.names) <= opened
    opened.clear()
    spoil(root)
    data = f'data = {{dataset = "{name}", root = "{root}", image_size = 12, download = false}}'
    search(database, home, study_file(trials=2, train=f"{TINY}\n{data}"))
    assert read_status(database, "toy").count("complete") == 2
    assert opened
    assert not opened & set(test.names)
    # And whoever does open it is told.
    with pytest.raises(DataError):
        open_test(config, home.cache)


# No training seed moves a picture


def parts(config: DataConfig, cache: Path) -> dict[str, frozenset[str]]:
    data = open_data(config, cache)
    test = open_test(config, cache)
    assert test is not None
    found: dict[str, Images] = {"train": data.train, "val": data.val, "test": test}
    return {part: frozenset(images.names) for part, images in found.items()}


@pytest.mark.parametrize("limit", [None, 300])
def test_training_seeds_move_nothing(home: Home, limit: int | None) -> None:
    data = {} if limit is None else {"data": {"limit_train": limit}}
    configs = [TrainConfig.parse({"seed": seed, **data}) for seed in (0, 1, 77)]
    first, *others = [parts(config.data, home.cache) for config in configs]
    assert all(other == first for other in others)
    assert not first["train"] & first["test"]
    assert not first["val"] & first["test"]
    assert not first["train"] & first["val"]


def test_the_split_seed_does(home: Home) -> None:
    first, second = (parts(DataConfig(split_seed=seed), home.cache) for seed in (0, 1))
    for part in ("train", "val", "test"):
        assert first[part] != second[part]
        assert len(first[part]) == len(second[part])


def test_every_seed_of_a_run_is_tested_on_the_same_pictures(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[tuple[str, ...]] = []
    trained: list[set[str]] = []

    def spied_test(*args: object) -> Images | None:
        images = real_test(*args)  # type: ignore[arg-type]
        tested.append(images.names if images else ())
        return images

    def spied_data(*args: object) -> dataset.Data:
        data = real_data(*args)  # type: ignore[arg-type]
        trained.append({*data.train.names, *data.val.names})
        return data

    real_test, real_data = dataset.open_test, dataset.open_data
    monkeypatch.setattr(dataset, "open_test", spied_test)
    monkeypatch.setattr(dataset, "open_data", spied_data)
    root = make_folder(tmp_path / "pictures", count=12, size=(20, 16))
    train_run(tiny_config(root), tmp_path / "run", home, seeds=3)
    assert len(tested) == 3
    assert len(set(tested)) == 1
    assert all(not seen & set(tested[0]) for seen in trained)
