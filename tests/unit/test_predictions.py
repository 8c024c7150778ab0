"""What a good trial's weights answer on the validation images: kept beside them, and gone with
them."""

from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from hpo.dashboard import pictures
from hpo.data.arrays import write_arrays
from hpo.data.images import Images
from hpo.errors import DataError
from hpo.paths import PREDICTIONS, WEIGHTS, Home, files_in
from hpo.reports.study import study_report
from hpo.search import predictions, sync
from hpo.search import study as studies
from hpo.search.predictions import Mistake, Predictions
from hpo.search.status import read_status
from hpo.search.study import Study
from hpo.storage.database import Database
from tests.harness.fakes import study_file
from tests.harness.searches import TINY, search
from tests.unit.test_report import drawn, text_of

ONE_EPOCH = TINY.replace("epochs = 3", "epochs = 1")


def of_best(database: Database, home: Home, study: Study) -> tuple[Predictions | None, float]:
    best = read_status(database, "toy").best
    assert best is not None
    assert best.value is not None
    found = predictions.find(database, home, study.uuid, best.attempts[-1])
    return found, best.value


@pytest.mark.parametrize("folds", ["", "data.folds = 3\n"])
def test_they_are_those_of_the_best_epoch(database: Database, home: Home, folds: str) -> None:
    study = search(database, home, study_file(trials=1, train=folds + TINY))
    found, value = of_best(database, home, study)
    assert found is not None
    matrix = np.array(found.confusion)
    assert matrix.sum() == len(found.names) == len(set(found.names))
    assert np.trace(matrix) / matrix.sum() == pytest.approx(value, abs=2e-3 if folds else 1e-9)
    assert found.wrong == matrix.sum() - np.trace(matrix)
    worst = found.worst()
    assert [one.of_actual for one in worst] == sorted(one.of_actual for one in worst)
    for one in worst:
        assert one.actual != one.predicted
        assert one.of_actual <= one.probability <= 1
        assert one.thumbnail is not None
        assert max(Image.open(io.BytesIO(one.thumbnail)).size) <= 96


def test_a_picture_takes_any_name() -> None:
    drawn = pictures._tile(Mistake("a\udcff\x01.jpg", "<b>", "c", 0.9, 0.1, None), 0, 0)
    assert ElementTree.fromstring(f"<g>{drawn}</g>".encode())
    assert "a\\udcff\\x01.jpg" in drawn


def test_the_report_shows_the_mistakes(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_HOME", str(home.root))
    study = search(database, home, study_file(trials=1, train=ONE_EPOCH))
    found, _ = of_best(database, home, study)
    assert found is not None
    page = study_report(database, "toy")
    text, worst = text_of(page), found.worst()
    assert f"got {found.wrong} of {len(found.names)} validation images wrong" in text
    assert page.count("data:image/jpeg;base64,") == len(worst) == predictions.PICTURED
    assert f'alt="{worst[0].name}"' in page
    matrix = drawn(page)["confusion"]["data"][0]["z"]
    assert matrix[0] == pytest.approx([n / sum(found.confusion[0]) for n in found.confusion[0]])
    (path,) = home.root.rglob("predictions.npz")
    path.write_bytes(b"nonsense")
    page = study_report(database, "toy")
    assert "confusion" not in drawn(page)
    assert "the report goes on without" in text_of(page)


def test_they_go_with_the_weights(database: Database, home: Home, tmp_path: Path) -> None:
    file, store = study_file(trials=5, train=ONE_EPOCH), tmp_path / "store"
    made, _ = studies.create(database, file)
    sync.keep(database, made.row, sync.check(str(store), made.row, database), home)
    study = search(database, home, file)
    directory = study.directory(home)
    here = [directory.name_of(path) for path in files_in(directory.trials)]
    weights = {WEIGHTS.fullmatch(name)[1] for name in here if WEIGHTS.fullmatch(name)}  # type: ignore[index]
    kept = {PREDICTIONS.fullmatch(name)[1] for name in here if PREDICTIONS.fullmatch(name)}  # type: ignore[index]
    assert weights == kept
    assert len(kept) == 3
    there = sync.find(database, study.uuid, home)
    assert there is not None
    assert sorted(there.names()) == sorted(here)
    before, _ = of_best(database, home, study)
    for path in files_in(directory.trials):
        path.unlink()
    fetched, _ = of_best(database, home, study)
    assert before is not None
    assert fetched is not None
    assert fetched.confusion == before.confusion


def test_a_retrieval_has_none(database: Database, home: Home) -> None:
    study = search(database, home, study_file(trials=1, train=f'task = "retrieval"\n{ONE_EPOCH}'))
    assert of_best(database, home, study)[0] is None


class Pictures(Images):
    """Two grey images, the second of which has gone."""

    names = ("a\udce4.png", "b.png")
    labels = np.array([0, 1])

    def pixels(self, i: int) -> np.ndarray:
        if i:
            raise DataError("gone")
        return np.full((200, 100, 3), 127, np.uint8)


def test_an_image_that_has_gone_has_no_thumbnail(tmp_path: Path) -> None:
    path = tmp_path / "predictions.npz"
    found = {"predicted": [1, 0], "confidence": [[0.9, 0.1], [0.6, 0.4]]}
    assert predictions.save(path, ("x", "y"), [Pictures()], [found])
    first, second = predictions.load(path).worst()
    assert (first.name, first.actual, first.predicted) == ("a\udce4.png", "x", "y")
    assert (first.thumbnail is None, second.thumbnail is None) == (False, True)
    assert not predictions.save(tmp_path / "no.npz", ("x", "y"), [Pictures()], [{}])
    assert not (tmp_path / "no.npz").exists()


@pytest.mark.parametrize("labels", [[0, 5], [0], [0, -1]])
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, labels: list[int]) -> None:
    path = tmp_path / "predictions.npz"
    none = np.zeros(0, np.int64)
    write_arrays(
        path, classes=np.array(["x", "y"]), names=np.array(["a", "b"]), labels=np.array(labels),
        predicted=np.array([0, 1]), confidence=np.zeros((2, 2), np.float32), pictured=none,
        sizes=none, pictures=np.zeros(0, np.uint8),
    )  # fmt: skip
    with pytest.raises(DataError, match="remove it; the report goes on without"):
        predictions.load(path)
