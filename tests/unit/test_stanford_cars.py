"""Stanford Cars: torchvision's layout, boxes, and files that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import StanfordCars
from typer.testing import CliRunner

from hpo.cli.main import app
from hpo.config.data import DataConfig
from hpo.config.train import TrainConfig
from hpo.data.dataset import describe, open_data, open_test
from hpo.data.images import Sizing
from hpo.errors import ConfigError, DataError
from hpo.paths import Home
from hpo.trained.inference import read_images
from hpo.trained.retrain import retrain
from tests.harness.formats import CARS, annotate, make_cars


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_cars(tmp_path / "data")


def config(root: Path, **values: Any) -> DataConfig:
    given = {"image_size": 16, "resize": "squash", "val_fraction": 0.2, **values}
    return DataConfig(dataset="stanford_cars", root=str(root), **given)


def whole(root: Path, cache: Path, **values: Any) -> dict[str, tuple[int, Any]]:
    """Label and pixels of every picture by the name of its file."""
    data, test = open_data(config(root, **values), cache), open_test(config(root, **values), cache)
    assert test is not None
    return {
        name: (int(images.labels[i]), images.pixels(i).copy())
        for images in (data.train, data.val, test)
        for i, name in enumerate(images.names)
    }


@pytest.mark.parametrize("crop", [False, True])
def test_pictures_without_boxes_are_taken_whole_and_told_so(
    root: Path, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch, crop: bool
) -> None:
    monkeypatch.setenv("HPO_HOME", str(home.root))
    data = config(root, crop_to_box=crop).model_dump(exclude_defaults=True)
    settings = TrainConfig.parse({"epochs": 1, "model": {"cnn": {"filters": [4]}}, "data": data})
    run = retrain(settings, {}, out=tmp_path / "run", home=home, device="cpu")
    photo = tmp_path / "photos" / CARS[0] / "mine.png"
    for name in CARS[:2]:
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.linear_gradient("L").save(tmp_path / "photos" / name / "mine.png")
    commands = [["predict", str(run.path), str(photo)],
                ["evaluate", str(run.path), "--data", str(tmp_path / "photos")]]  # fmt: skip
    for command in commands:
        told = CliRunner().invoke(app, [*command, "--json", "--device", "cpu"])
        assert told.exit_code == 0, told.output
        assert json.loads(told.stdout)
        assert ("these have none and are taken whole" in told.stderr) == crop
    boxed = CliRunner().invoke(app, ["evaluate", str(run.path), "--device", "cpu"])
    assert not boxed.stderr
    seen = next(read_images(iter([photo]), Sizing.of(settings.data))).pixels(0)
    with Image.open(photo) as image:
        expected = image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    assert (seen == np.asarray(expected)).all()


@pytest.mark.parametrize("part", ["train", "test"])
def test_pictures_and_labels_are_torchvisions(root: Path, tmp_path: Path, part: str) -> None:
    theirs = StanfordCars(str(root), split=part)
    ours = {name: one for name, one in whole(root, tmp_path / "cache").items()
            if f"/cars_{part}/" in name}  # fmt: skip
    assert len(ours) == len(theirs)
    for path, label in theirs._samples:
        found, pixels = ours[Path(path).relative_to(root).as_posix()]
        assert found == label
        with Image.open(path) as image:
            small = image.resize((16, 16), Image.Resampling.BILINEAR)
        assert (pixels == np.asarray(small)).all()


def test_classes_and_counts(root: Path, tmp_path: Path) -> None:
    data = open_data(config(root), tmp_path / "cache")
    assert data.classes == CARS
    assert data.has_test
    assert describe(config(root)) == {
        "train": dict.fromkeys(CARS, 5),
        "val": dict.fromkeys(CARS, 1),
        "test": dict.fromkeys(CARS, 2),
    }


def test_pictures_are_cropped_to_their_boxes(root: Path, tmp_path: Path) -> None:
    plain, cropped = (whole(root, tmp_path / "cache", crop_to_box=on) for on in (False, True))
    assert plain.keys() == cropped.keys()
    for name, (label, pixels) in cropped.items():
        with Image.open(root / name) as image:
            inside = image.crop((10, 5, 40, 25)).resize((16, 16), Image.Resampling.BILINEAR)
        assert (pixels == np.asarray(inside)).all()
        assert (pixels != plain[name][1]).any()
        assert label == plain[name][0]


def test_cropping_moves_no_picture_between_the_parts(root: Path, tmp_path: Path) -> None:
    plain, cropped = (
        open_data(config(root, crop_to_box=on), tmp_path / "cache") for on in (False, True)
    )
    assert plain.val.names == cropped.val.names
    assert plain.fingerprint == cropped.fingerprint
    assert plain.mean != cropped.mean


def test_another_box_is_another_picture(root: Path, tmp_path: Path) -> None:
    before = whole(root, tmp_path / "cache", crop_to_box=True)
    samples = StanfordCars(str(root))._samples
    rows = [(Path(path).name, label + 1, (1, 1, 12, 12)) for path, label in samples]
    annotate(root, "train", rows)
    after = whole(root, tmp_path / "cache", crop_to_box=True)
    for name in before:
        assert (before[name][1] == after[name][1]).all() == ("cars_test" in name)


def test_boxes_are_of_this_data_set_alone() -> None:
    with pytest.raises(ConfigError, match=r"data.crop_to_box: true: only dataset = .*has boxes"):
        TrainConfig.parse({"data": {"crop_to_box": True}})


# What does not fit


@pytest.mark.parametrize(
    "missing",
    ["", "devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_train",
     "cars_test_annos_withlabels.mat", "cars_test"],
)  # fmt: skip
def test_absent_the_layout_is_told(root: Path, tmp_path: Path, missing: str) -> None:
    target = root / "stanford_cars" / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(DataError) as caught:
        describe(config(root))
    message = str(caught.value)
    assert message.startswith(str(target))
    assert f"\n  {root}/stanford_cars/\n    devkit/cars_meta.mat\n" in message
    for line in ("devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat",
                 "cars_train/00001.jpg ...  8,144", "cars_test/00001.jpg ...   8,041"):  # fmt: skip
        assert f"\n    {line}" in message
    if "test" in missing:  # a search does not ask for the test part
        assert len(open_data(config(root), tmp_path / "cache").train) == 15


def _rows(root: Path) -> list[tuple[str, int, tuple[int, int, int, int]]]:
    return [(Path(path).name, label + 1, (11, 6, 40, 25))
            for path, label in StanfordCars(str(root))._samples]  # fmt: skip


def _changed(place: int, value: Any) -> Callable[[Path], None]:
    """The second annotation with another picture (0), class (1) or box (2)."""

    def change(root: Path) -> None:
        rows: list[Any] = _rows(root)
        rows[1] = (*rows[1][:place], value, *rows[1][place + 1 :])
        annotate(root, "train", rows)

    return change


def _meta(names: Any, key: str = "class_names") -> Callable[[Path], None]:
    def change(root: Path) -> None:
        content = {key: np.array([names], object)}
        savemat(root / "stanford_cars/devkit/cars_meta.mat", content)

    return change


def _no_class(root: Path) -> None:
    annotate(root, "train", _rows(root), {"class": "klass"})


def _no_mat(root: Path) -> None:
    (root / "stanford_cars/devkit/cars_train_annos.mat").write_bytes(b"no matrix here, but bytes")


def _no_fiat(root: Path) -> None:
    annotate(root, "train", [row for row in _rows(root) if row[1] != 3])


ANNOS = "devkit/cars_train_annos.mat: "


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_no_mat, ANNOS + "cannot be read as a MATLAB file"),
        (_no_class, ANNOS + "'annotations' has no field 'class'; needed: bbox_x1, "),
        (_no_fiat, ANNOS + "no image of class 'Fiat 500 2012'"),
        (_changed(0, "gone.jpg"), ANNOS + "names gone.jpg, which cars_train/ does not have"),
        (_changed(0, "00000.jpg"), ANNOS + "names 00000.jpg twice"),
        (_changed(1, 4), ANNOS + "annotation 2 has class 4: allowed: 1 to 3"),
        (_changed(1, 0), ANNOS + "annotation 2 has class 0: allowed: 1 to 3"),
        (_changed(1, "Audi"), ANNOS + "annotation 2 has no whole numbers"),
        (_changed(2, (11, 6, 10, 25)), ANNOS + "annotation 2 has the box 11,6,10,25: allowed: fr"),
        (_changed(2, (0, 6, 10, 25)), ANNOS + "annotation 2 has the box 0,6,10,25: allowed: fr"),
        (_meta(CARS, "names"), "devkit/cars_meta.mat: has no 'class_names'; it has names"),
        (_meta((1.0, 2.0)), "devkit/cars_meta.mat: 'class_names' must be a list of two names"),
        (_meta((*CARS, CARS[0])), "devkit/cars_meta.mat: 'class_names' contains a name twice"),
    ],
)
def test_files_that_do_not_fit(root: Path, change: Callable[[Path], None], says: str) -> None:
    change(root)
    with pytest.raises(DataError) as caught:
        describe(config(root))
    assert str(caught.value).startswith(f"{root}/stanford_cars/{says}")
    assert "\n" not in str(caught.value)


def test_a_box_outside_the_picture_is_named_with_its_file(root: Path, tmp_path: Path) -> None:
    _changed(2, (11, 6, 61, 25))(root)
    assert len(open_data(config(root), tmp_path / "cache").train) == 15  # not looked at
    says = (
        r"stanford_cars: 1 file cannot be read as images; .*\n  stanford_cars/cars_train/\d+.jpg "
        r"\(its box 11,6,61,25 in cars_train_annos.mat is outside the image of 60 x 40 pixels\)"
    )
    with pytest.raises(DataError, match=says):
        open_data(config(root, crop_to_box=True), tmp_path / "cache")


def test_pictures_without_annotation_are_counted(root: Path, tmp_path: Path) -> None:
    annotate(root, "train", _rows(root)[2:])
    data = open_data(config(root), tmp_path / "cache")
    assert data.warnings == ("2 images of cars_train/ have no annotation",)
