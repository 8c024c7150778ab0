"""What is odd about data is told before the first epoch, in the same words by all commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hpo.api.creation import check_data
from hpo.config.data import DataConfig
from hpo.data import cache as cache_module
from hpo.data.dataset import examine_data
from hpo.data.report import DataReport
from hpo.errors import ConfigError, DataError
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search.fingerprints import keep_report, read_report
from hpo.storage.database import Database
from hpo.trained.dry_run import check
from tests.harness.fakes import study_file
from tests.harness.images import make_folder
from tests.harness.searches import TINY
from tests.harness.trained import tiny_config, train_run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data", {"train": 6, "val": 2, "test": 2}, size=(20, 16))


def config(root: Path, **values: Any) -> DataConfig:
    return DataConfig(**{"dataset": "folder", "root": str(root), "image_size": 12, **values})


def break_test_file(root: Path) -> None:
    (root / "test/class1/0000.png").write_text("no image")


def study(root: Path, more: str = "") -> Any:
    data = f'data = {{dataset = "folder", root = "{root}", image_size = 12{more}}}'
    return study_file(trials=1, train=f"{TINY}\n{data}")


def test_plain_data_have_counts_alone(root: Path, home: Home) -> None:
    assert examine_data(config(root), home.cache).lines() == [
        "train: 18 images (class0 6, class1 6, class2 6)",
        "val: 6 images (class0 2, class1 2, class2 2)",
        "test: 6 images (class0 2, class1 2, class2 2)",
    ]


def test_all_that_is_odd_is_told(root: Path, home: Home) -> None:
    shutil.copy(root / "train/class0/0000.png", root / "test/class0/copy.png")
    shutil.rmtree(root / "val/class2")
    (root / "train/class0/x.heic").touch()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 12)).save(root / "train/class1/turned.jpg", exif=exif)
    Image.new("RGBA", (9, 12), (1, 2, 3, 4)).save(root / "test/class1/clear.png")
    Image.new("I;16", (9, 12), 7).save(root / "val/class1/deep.png")
    report = examine_data(config(root), home.cache)
    assert report.lines()[3:] == [
        "val has no images of class2: it is not measured there",
        "1 file left out: 1 .heic (convert them to JPEG or PNG)",
        "pixel formats: RGB 30, I;16 1, RGBA 1; 16 bits are scaled to 8",
        '1 image with an EXIF orientation: turned upright (data.orientation = "exif")',
        '1 image partly transparent: shown on white (data.background = "white")',
        "1 file of test is identical to files of train",
    ]
    other = examine_data(config(root, orientation="ignore", background="ignore"), home.cache)
    assert any("used as they are stored" in line for line in other.lines())
    assert any("hidden colours are used" in line for line in other.lines())
    assert DataReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_what_was_seen_is_remembered_by_content(
    root: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = examine_data(config(root), home.cache)
    seen: list[str] = []
    look = cache_module.inspect_image

    def noting(source: Any, name: str, max_pixels: int) -> Any:
        seen.append(name)
        return look(source, name, max_pixels)

    monkeypatch.setattr(cache_module, "inspect_image", noting)
    (root / "train/class0/0000.png").rename(root / "train/class0/moved.png")
    assert examine_data(config(root), home.cache) == first
    assert seen == []
    break_test_file(root)
    for _ in range(2):  # what cannot be read is looked at again: it may have been mended
        with pytest.raises(DataError, match=r"test/class1/0000\.png \(not an image\)"):
            examine_data(config(root), home.cache)
    assert seen == ["test/class1/0000.png"] * 2


def test_what_is_remembered_may_be_damaged(
    root: Path, home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    first = examine_data(config(root), home.cache)
    (digests,), (looks,) = (home.cache.glob(f"{name}/*.json") for name in ("digests", "looks"))
    digests.write_bytes(digests.read_bytes()[:-9])
    looks.write_bytes(b"\xff")
    assert examine_data(config(root), home.cache) == first
    assert [one.message.partition(": ")[0] for one in caplog.records] == [
        f"{digests} is damaged",
        f"{looks} is damaged",
    ]


def _check(root: Path, home: Home, more: str) -> list[str]:
    file = study(root, more)
    return str(check(file, home=home, device="cpu", workers=1, threads=1)).splitlines()


def _run(root: Path, home: Home, more: str) -> list[str]:
    return check_data(study(root, more)).lines()


def _train(root: Path, home: Home, more: str) -> list[str]:
    lines: list[str] = []
    wanted = tiny_config(root)
    if more:
        data = wanted.data.model_copy(update={"skip_unreadable": True})
        wanted = wanted.model_copy(update={"data": data})
    train_run(wanted, root.with_name("run"), home, progress=lines.append)
    return lines


@pytest.mark.parametrize("use", [_check, _run, _train])
def test_a_broken_test_file_is_told_before_the_first_epoch(
    root: Path, home: Home, use: Callable[[Path, Home, str], list[str]]
) -> None:
    break_test_file(root)
    with pytest.raises(DataError, match="1 file cannot be read as images; repair") as caught:
        use(root, home, "")
    assert "test/class1/0000.png (not an image)" in str(caught.value)
    assert not root.with_name("run").exists() or not list(root.with_name("run").glob("seed*"))
    told = [line.strip() for line in use(root, home, ", skip_unreadable = true")]
    at = told.index("1 file cannot be read as images, left out:")
    assert told[at + 1] == "test/class1/0000.png (not an image)"


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_of_which_nothing_can_be_read(root: Path, home: Home, part: str) -> None:
    for file in root.glob(f"{part}/*/*" if part == "test" else f"{part}/class1/*"):
        file.write_text(f"no image {file}")
    says = "class 'class1': none of its train" if part == "train" else "none of the test"
    with pytest.raises(DataError, match=f"{says} images can be read"):
        examine_data(config(root, skip_unreadable=True), home.cache)


def test_checking_writes_nothing(root: Path, home: Home) -> None:
    examine_data(config(root), home.cache, remember=False)
    assert not home.cache.exists()


def test_a_study_keeps_its_report(root: Path, home: Home, database: Database) -> None:
    study, _ = studies.create(database, study_file(train=TINY))
    assert read_report(database, study.uuid) is None
    report = examine_data(config(root), home.cache)
    keep_report(database, study.uuid, report)
    assert read_report(database, study.uuid) == report


def test_unknown_names_of_weights_are_refused(home: Home) -> None:
    weights = 'model.architecture = "resnet18"\ndata.image_size = 32\nmodel.weights = "NONE_SUCH"'
    with pytest.raises(ConfigError, match=r"NONE_SUCH.*resnet18 has IMAGENET1K_V1"):
        check(study_file(train=weights), home=home, device="cpu", workers=1, threads=1)
