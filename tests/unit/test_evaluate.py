"""A trained run on its test split, on other folders, and on single images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from hpo.cli.main import app
from hpo.cli.tables import PLAIN, evaluation_page
from hpo.definition.config import TrainConfig
from hpo.engine.checkpoint import load_trained
from hpo.errors import DataError, InputError, NotFound
from hpo.paths import Home
from hpo.results.evaluate import evaluate_run, load_run
from hpo.results.predict import predict
from hpo.results.runs import Run
from hpo.results.table import number
from tests.images import make_folder
from tests.trained import pictures, tiny_config, train_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two seeds, trained long enough to name most test pictures right."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(root, {"epochs": 12, "model.cnn.filters": [8, 16]})
    return train_run(config, folder / "run", Home(folder), seeds=2)


def first_of(root: Path, label: str) -> list[Path]:
    return sorted((root / "test" / label).iterdir())[:2]


def shown(path: Path, config: TrainConfig) -> torch.Tensor:
    """What the network sees of a square picture of the kept size, by hand: (1, 3, S, S) in 0..1."""
    with Image.open(path) as image:
        assert image.size == (config.data.image_size, config.data.image_size)
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


# Evaluation


def test_the_test_split_gives_what_training_found(run: Run, home: Home) -> None:
    found = evaluate_run(run, home=home, device="cpu")
    assert found.scores() == {one.seed: one.metrics["test"] for one in run.seeds}
    assert found.summary == run.summary["test"]
    assert found.images == 15
    assert found.data.startswith("the test split of ")
    assert found.summary["top1"]["mean"] is not None
    assert found.summary["top1"]["mean"] > 0.5


def test_the_ensemble_stands_beside_its_members(run: Run, root: Path, home: Home) -> None:
    found = evaluate_run(run, home=home, device="cpu")
    assert found.ensemble == run.summary["ensemble"]
    shown = Console(width=120, record=True)
    shown.print(evaluation_page(found))
    lines = [line.split() for line in shown.export_text().splitlines()]
    seeds = [[number(one[name]) for name in PLAIN] for one in found.scores().values()]
    assert ["seed", "0", *seeds[0]] in lines
    assert ["seed", "1", *seeds[1]] in lines
    assert ["ensemble", "of", "2", *(number(found.ensemble[name]) for name in PLAIN)] in lines
    folder = evaluate_run(run, data=root / "train", home=home, device="cpu")
    assert folder.ensemble is not None
    assert sum(map(sum, folder.ensemble["confusion"])) == 24


def test_the_command_line_tells_of_the_ensemble(
    run: Run, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_HOME", str(home.root))
    told = CliRunner().invoke(app, ["evaluate", str(run.path), "--device", "cpu", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.output)["ensemble"] == run.summary["ensemble"]


def test_one_seed_alone(run: Run, home: Home) -> None:
    found = evaluate_run(load_run(run.path / "seed-1"), home=home, device="cpu")
    assert list(found.seeds) == [1]
    assert found.summary["loss"]["std"] is None
    assert found.ensemble is None


def test_a_folder_with_test_inside_and_one_without(run: Run, root: Path, home: Home) -> None:
    whole = evaluate_run(run, data=root, home=home, device="cpu")
    assert whole.data == str(root / "test")
    top1, loss = whole.summary["top1"], whole.summary["loss"]
    assert top1 == run.summary["test"]["top1"]
    assert loss == pytest.approx(run.summary["test"]["loss"], rel=1e-4)  # in another order
    train = evaluate_run(run, data=root / "train", home=home, device="cpu")
    assert train.images == 24


def test_some_of_the_classes_are_enough(run: Run, root: Path, tmp_path: Path, home: Home) -> None:
    for label in ("class0", "class2"):
        shutil.copytree(root / "test" / label, tmp_path / "some" / label)
    found = evaluate_run(run, data=tmp_path / "some", home=home, device="cpu")
    confusion = found.seeds[0].confusion
    assert confusion.sum(axis=1).tolist() == [5, 0, 5]
    assert found.scores()[0]["per_class"]["class1"]["support"] == 0
    whole = run.seeds[0].metrics["test"]["confusion"]
    assert confusion[2].tolist() == whole[2]  # labels are the run's, not the folder's


def test_unknown_classes_are_named(run: Run, tmp_path: Path, home: Home) -> None:
    folder = make_folder(tmp_path / "more", count=2, classes=5)
    with pytest.raises(DataError, match=r"does not know the classes class3, class4; it was"):
        evaluate_run(run, data=folder, home=home, device="cpu")


@pytest.mark.parametrize("splits", [{"train": 2}, {"train": 2, "val": 1}])
def test_training_pictures_are_not_taken_for_a_test(
    run: Run, tmp_path: Path, home: Home, splits: dict[str, int]
) -> None:
    folder = make_folder(tmp_path / "no-test", splits)
    with pytest.raises(DataError, match="has train/ but no test/"):
        evaluate_run(run, data=folder, home=home, device="cpu")


def test_broken_pictures_in_a_folder_are_named(run: Run, tmp_path: Path, home: Home) -> None:
    folder = make_folder(tmp_path / "broken", count=2)
    (folder / "class1" / "x.png").write_text("no")
    with pytest.raises(DataError, match=r"class1/x\.png \(not an image\)"):
        evaluate_run(run, data=folder, home=home, device="cpu")


def test_no_test_split_and_no_folder(tmp_path: Path, home: Home) -> None:
    config = tiny_config(pictures(tmp_path, {"train": 8, "val": 4}), {"epochs": 1})
    without = train_run(config, tmp_path / "run", home)
    with pytest.raises(DataError, match=r"has no test split; .*--data"):
        evaluate_run(without, home=home, device="cpu")
    with pytest.raises(DataError, match="no such folder"):
        evaluate_run(without, data=tmp_path / "nowhere", home=home, device="cpu")


def test_unknown_devices_and_runs(run: Run, tmp_path: Path, home: Home) -> None:
    with pytest.raises(InputError, match="'tpu'"):
        evaluate_run(run, home=home, device="tpu")
    with pytest.raises(NotFound, match="not a trained run"):
        load_run(tmp_path / "nowhere")


# Prediction


def test_probabilities_are_the_mean_of_the_seeds(run: Run, root: Path, tmp_path: Path) -> None:
    path = tmp_path / "square.png"
    side = run.config.data.image_size
    with Image.open(first_of(root, "class1")[0]) as image:
        image.resize((side, side)).save(path)
    expected = torch.zeros(3)
    for one in run.seeds:
        model = load_trained(
            one.files.weights, run.config.model, classes=3, image_size=run.config.data.image_size
        )
        mean, std = (
            torch.tensor(values).view(1, 3, 1, 1) for values in (run.about.mean, run.about.std)
        )
        with torch.inference_mode():
            expected += model((shown(path, run.config) - mean) / std)[0].softmax(0) / 2
    [prediction] = predict(run, [path], device="cpu")
    assert dict(prediction.top) == pytest.approx(
        {f"class{i}": p for i, p in enumerate(expected.tolist())}, abs=1e-5
    )


def test_predictions_agree_with_evaluation(run: Run, root: Path, home: Home) -> None:
    one = load_run(run.path / "seed-0")
    evaluation = evaluate_run(one, home=home, device="cpu").seeds[0]
    paths = [path for label in run.classes for path in sorted((root / "test" / label).iterdir())]
    found = predict(one, paths, device="cpu")
    said = {str(p.path): run.classes.index(p.top[0][0]) for p in found}
    confusion = np.zeros((3, 3), np.int64)
    for path in paths:
        confusion[run.classes.index(path.parent.name), said[str(path)]] += 1
    assert confusion.tolist() == evaluation.confusion.tolist()


def test_the_most_likely_first_and_no_more_than_there_are(run: Run, root: Path) -> None:
    paths = [*first_of(root, "class2"), *first_of(root, "class0")]
    found = predict(run, paths, device="cpu", k=5)
    assert [one.path for one in found] == paths
    for one in found:
        values = [probability for _, probability in one.top]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1.0)
        assert {name for name, _ in one.top} == set(run.classes)
    assert [one.top for one in predict(run, paths, device="cpu", k=1)] == [
        one.top[:1] for one in found
    ]


def test_pictures_of_any_shape_and_mode(run: Run, tmp_path: Path) -> None:
    paths = []
    for mode, size in (("L", (9, 40)), ("RGBA", (64, 13)), ("P", (12, 12)), ("RGB", (5, 5))):
        paths.append(tmp_path / f"{mode}.png")
        Image.new(mode, size).save(paths[-1])
    assert len(predict(run, paths, device="cpu")) == 4


def test_files_that_cannot_be_used_are_named(run: Run, root: Path, tmp_path: Path) -> None:
    good = first_of(root, "class0")[0]
    text = tmp_path / "text.png"
    text.write_text("no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:100])
    for path, reason in [
        (text, "not an image"),
        (cut, "cannot be read"),
        (tmp_path / "gone.png", "No such file"),
        (tmp_path, "Is a directory"),
    ]:
        with pytest.raises(DataError, match=f"{path}: .*{reason}"):
            predict(run, [good, path], device="cpu")


def test_huge_pictures_are_refused_by_their_header(
    root: Path, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(root, {"epochs": 1, "data.max_pixels": 400})
    run = train_run(config, tmp_path / "run", home)
    large = tmp_path / "large.png"
    Image.new("RGB", (30, 30)).save(large)

    def decoded(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "convert", decoded)
    with pytest.raises(DataError, match=r"large\.png: 30 x 30 pixels, data\.max_pixels allows 400"):
        predict(run, [large], device="cpu")


def test_nothing_to_predict(run: Run, root: Path) -> None:
    with pytest.raises(InputError, match="no images"):
        predict(run, [], device="cpu")
    with pytest.raises(InputError, match="0 answers: at least 1"):
        predict(run, first_of(root, "class0"), device="cpu", k=0)
