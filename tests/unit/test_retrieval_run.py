"""Image retrieval from a study's configuration to its report: train, evaluate, predict."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpo.cli.main import app
from hpo.errors import DataError
from hpo.paths import Home
from hpo.reports.training import training_report
from hpo.trained.inference import evaluate_run
from hpo.trained.run import TrainedRun, load_run
from hpo.training.checkpoint import save_weights
from hpo.training.models import build
from hpo.training.retrieval import Index
from tests.harness.trained import pictures, predict, tiny_config, train_run

FROZEN = {"task": "retrieval", "model.trainable_blocks": 0, "model.cnn.filters": [8, 8]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("retrieval")


@pytest.fixture(scope="module")
def run(place: Path) -> TrainedRun:
    """Trained with the weights of a file."""
    weights = place / "known.safetensors"
    config = tiny_config(pictures(place), FROZEN)
    save_weights(weights, build(config.model, classes=3, image_size=12).state_dict(), {})
    values = {**FROZEN, "model.weights": str(weights), "retrieval.k": 10, "retrieval.pca": 4}
    config = tiny_config(place / "pictures", values)
    return train_run(config, place / "run", Home(place / "home"), seeds=3)


def test_a_frozen_run_needs_one_seed_and_says_so(run: TrainedRun) -> None:
    assert [one.seed for one in run.seeds] == [0]
    assert any("every seed would give the same" in note for note in run.notes)
    metrics = run.seeds[0].metrics
    assert metrics["epochs"] == 1
    assert metrics["images"] == {"train": 36, "val": 0, "test": 15}
    assert metrics["train"] == {}
    assert 1 / 3 < metrics["test"]["precision_at_5"] <= 1
    assert 1 / 3 < metrics["test"]["precision_at_k"] <= 1


def test_the_index_holds_training_and_validation_images(run: TrainedRun) -> None:
    index = Index.load(run.seeds[0].files.index)
    assert len(index.gallery) == 36
    assert {name.split("/")[0] for name in index.gallery.names} == {"train", "val"}
    assert index.placed.shape == (36, 4)


def test_random_frozen_features_differ_by_seed(place: Path) -> None:
    config = tiny_config(place / "pictures", FROZEN)
    found = train_run(config, place / "random", Home(place / "home"), seeds=2)
    assert [one.seed for one in found.seeds] == [0, 1]
    first, second = (one.metrics["test"]["mean_distance"] for one in found.seeds)
    assert first != second


def test_evaluating_again_gives_the_same(run: TrainedRun, place: Path) -> None:
    found = evaluate_run(run, home=Home(place / "home"), device="cpu")
    assert found.scores() == {0: run.seeds[0].metrics["test"]}
    folder = evaluate_run(run, data=place / "pictures", home=Home(place / "home"), device="cpu")
    assert folder.summary["mean_distance"]["mean"] == pytest.approx(
        found.summary["mean_distance"]["mean"]
    )  # its last bit may hang on where tensors lie in memory
    assert folder.summary["top1"] == found.summary["top1"]


def test_training_images_looked_up_are_not_their_own_neighbours(
    run: TrainedRun, place: Path
) -> None:
    found = evaluate_run(
        run, data=place / "pictures/train", home=Home(place / "home"), device="cpu", force=True
    )
    assert found.images == 24
    assert len(found.trained_on or ()) == 24
    assert found.summary["mean_distance"]["mean"] > 0
    (lookup,) = predict(run, [place / "pictures/train/class1/0003.png"], k=40)
    assert len(lookup.rows) == 35
    assert lookup.trained_on
    assert "train/class1/0003.png" not in {name for name, *_ in lookup.rows}


def test_predict_lists_the_nearest_images(run: TrainedRun, place: Path) -> None:
    paths = [place / f"pictures/test/class{label}/0000.png" for label in range(3)]
    found = predict(run, paths, k=3)
    assert [one.path for one in found] == paths
    for one in found:
        distances = [distance for *_, distance in one.rows]
        assert distances == sorted(distances)
        assert all(label == name.split("/")[1] for name, label, _ in one.rows)


def test_without_its_index_a_run_cannot_be_used(run: TrainedRun, place: Path) -> None:
    shutil.copytree(run.path, place / "broken")
    (place / "broken/seed-0/index.npz").unlink()
    with pytest.raises(DataError, match=r"index\.npz cannot be read"):
        evaluate_run(load_run(place / "broken"), home=Home(place / "home"), device="cpu")


def test_without_test_images_those_of_validation_are_looked_up(place: Path) -> None:
    folder = place / "alone"
    shutil.copytree(place / "pictures/train", folder / "train")
    config = tiny_config(folder, {**FROZEN, "retrieval.k": 30})
    found = train_run(config, place / "within", Home(place / "home"))
    metrics = found.seeds[0].metrics
    assert metrics["test"] is None
    assert metrics["images"]["val"] > 0
    assert 0 < metrics["val"]["precision_at_k"] <= 1
    assert "each training image was looked up among the others" not in training_report(found)


def test_a_network_that_learns_keeps_its_best_epoch(place: Path) -> None:
    values = {"task": "retrieval", "retrieval.distance": "cosine", "epochs": 2}
    config = tiny_config(place / "pictures", values)
    found = train_run(config, place / "learnt", Home(place / "home"), keep_validation=True)
    metrics = found.seeds[0].metrics
    assert set(metrics["train"]) == {"loss", "top1"}
    assert {"loss", "precision_at_5", "mean_distance"} <= set(metrics["val"])
    assert len(Index.load(found.seeds[0].files.index).gallery) == 24


def test_the_report_shows_queries_with_their_neighbours(run: TrainedRun) -> None:
    page = training_report(run)
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert sum(figures["precision"]["data"][0]["y"]) == 15
    assert sum(sum(trace["y"]) for trace in figures["distance"]["data"]) == 15
    assert page.count('<div class="found">') == 12
    assert page.count('src="data:image/jpeg;base64,') == 12 * 6
    kept = json.loads(run.seeds[0].files.neighbours.read_text())
    wrong = sum(one["vote"] != one["label"] for one in kept["examples"])
    assert wrong == min(6, kept["right"].count(False))
    assert page.count('<figure class="query wrong">') == wrong
    for said in ("precision at 5", "macro f1", "by their neighbours&#39; votes"):
        assert said in page.replace("neighbours'", "neighbours&#39;")


def test_the_command_line(run: TrainedRun, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_HOME", str(place / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    image = str(place / "pictures/test/class0/0000.png")
    told = CliRunner().invoke(app, ["predict", str(run.path), image, "--top", "2"])
    assert told.exit_code == 0, told.output
    assert told.output.count("class0") >= 2
    as_json = CliRunner().invoke(app, ["predict", str(run.path), image, "--json"])
    (one,) = json.loads(as_json.output)
    assert len(one["nearest"]) == 5
    assert set(one["nearest"][0]) == {"image", "class", "distance"}
    scores = CliRunner().invoke(app, ["evaluate", str(run.path)])
    assert scores.exit_code == 0, scores.output
    for name in ("precision_at_5", "precision_at_k", "macro_f1", "mean_distance"):
        assert name in scores.output
