"""A trained run on its test split, on other folders, and on single images."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn
from typer.testing import CliRunner, Result

from hpo.cli.main import app
from hpo.cli.results import select
from hpo.cli.tables import PLAIN, evaluation_page
from hpo.config.train import TrainConfig
from hpo.data.dataset import open_test
from hpo.errors import DataError, HpoError, InputError, NotFound
from hpo.formatting import number
from hpo.intervals import wilson
from hpo.paths import Home
from hpo.reports.training import training_report
from hpo.trained.inference import Chunk, TrainedModel, evaluate_run, predictions
from hpo.trained.run import TrainedRun, load_run
from hpo.training.checkpoint import load_trained
from tests.harness.images import make_folder
from tests.harness.trained import pictures, predict, tiny_config, train_run


@pytest.fixture
def run(trained_run: TrainedRun) -> TrainedRun:
    return trained_run


@pytest.fixture
def root(run: TrainedRun) -> Path:
    """The images of `run`."""
    return Path(str(run.config.data.root))


def first_of(root: Path, label: str) -> list[Path]:
    return sorted((root / "test" / label).iterdir())[:2]


def shown(path: Path, config: TrainConfig) -> torch.Tensor:
    """What the network sees of a square picture of the kept size, by hand: (1, 3, S, S) in 0..1."""
    with Image.open(path) as image:
        assert image.size == (config.data.image_size, config.data.image_size)
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


# Evaluation


def test_the_test_split_gives_what_training_found(run: TrainedRun, home: Home) -> None:
    found = evaluate_run(run, home=home, device="cpu")
    assert found.scores() == {one.seed: one.metrics["test"] for one in run.seeds}
    assert found.summary == run.summary["test"]
    assert found.images == 15
    assert found.data.startswith("the test split of ")
    assert found.summary["top1"]["mean"] is not None
    assert found.summary["top1"]["mean"] > 0.5


def test_the_ensemble_stands_beside_its_members(run: TrainedRun, root: Path, home: Home) -> None:
    found = evaluate_run(run, home=home, device="cpu")
    assert found.ensemble == run.summary["ensemble"]
    top1 = next(one for one in found.certainties if one.score == "top1")
    assert (top1.images, top1.seeds) == (found.images, 2)
    assert top1.of_images == wilson(top1.mean, found.images)
    assert top1.of_seeds is not None
    assert 0 <= top1.of_seeds.low <= top1.mean <= top1.of_seeds.high <= 1
    assert run.summary["certainty"] == [one.to_dict() for one in run.certainties]
    shown = Console(width=120, record=True)
    shown.print(evaluation_page(found))
    lines = [line.split() for line in shown.export_text().splitlines()]
    names = [name for name in PLAIN if name in found.summary]
    seeds = [[number(one[name]) for name in names] for one in found.scores().values()]
    assert ["seed", "0", *seeds[0]] in lines
    assert ["seed", "1", *seeds[1]] in lines
    assert ["ensemble", "of", "2", *(number(found.ensemble[name]) for name in names)] in lines
    folder = evaluate_run(run, data=root / "train", home=home, device="cpu", force=True)
    assert folder.ensemble is not None
    assert sum(map(sum, folder.ensemble["confusion"])) == 24


def test_the_command_line_tells_of_the_ensemble(
    run: TrainedRun, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_HOME", str(home.root))
    told = CliRunner().invoke(app, ["evaluate", str(run.path), "--device", "cpu", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.output)["ensemble"] == run.summary["ensemble"]


def test_one_seed_alone(run: TrainedRun, home: Home) -> None:
    found = evaluate_run(load_run(run.path / "seed-1"), home=home, device="cpu")
    assert list(found.seeds) == [1]
    assert found.summary["loss"]["std"] is None
    assert found.ensemble is None


def test_a_folder_with_test_inside_and_one_without(run: TrainedRun, root: Path, home: Home) -> None:
    whole = evaluate_run(run, data=root, home=home, device="cpu")
    assert whole.data == str(root / "test")
    top1, loss = whole.summary["top1"], whole.summary["loss"]
    assert top1 == run.summary["test"]["top1"]
    assert loss == pytest.approx(run.summary["test"]["loss"], rel=1e-4)  # in another order
    train = evaluate_run(run, data=root / "train", home=home, device="cpu", force=True)
    assert train.images == 24


def test_some_of_the_classes_are_enough(
    run: TrainedRun, root: Path, tmp_path: Path, home: Home
) -> None:
    for label in ("class0", "class2"):
        shutil.copytree(root / "test" / label, tmp_path / "some" / label)
    found = evaluate_run(run, data=tmp_path / "some", home=home, device="cpu")
    confusion = found.seeds[0].confusion
    assert confusion.sum(axis=1).tolist() == [5, 0, 5]
    assert found.scores()[0]["per_class"]["class1"]["support"] == 0
    whole = run.seeds[0].metrics["test"]["confusion"]
    assert confusion[2].tolist() == whole[2]  # labels are the run's, not the folder's
    shutil.rmtree(tmp_path / "some" / "class0")
    alone = evaluate_run(run, data=tmp_path / "some", home=home, device="cpu")
    assert alone.seeds[0].confusion[2].tolist() == whole[2]


def test_unknown_classes_are_named(run: TrainedRun, tmp_path: Path, home: Home) -> None:
    folder = make_folder(tmp_path / "more", count=2, classes=5)
    with pytest.raises(DataError, match=r"does not know the classes class3, class4; it was"):
        evaluate_run(run, data=folder, home=home, device="cpu")


@pytest.mark.parametrize("splits", [{"train": 2}, {"train": 2, "val": 1}])
def test_training_pictures_are_not_taken_for_a_test(
    run: TrainedRun, tmp_path: Path, home: Home, splits: dict[str, int]
) -> None:
    folder = make_folder(tmp_path / "no-test", splits)
    with pytest.raises(DataError, match="has train/ but no test/"):
        evaluate_run(run, data=folder, home=home, device="cpu")


def test_broken_pictures_in_a_folder_are_named(run: TrainedRun, tmp_path: Path, home: Home) -> None:
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


def test_unknown_devices_and_runs(run: TrainedRun, tmp_path: Path, home: Home) -> None:
    with pytest.raises(InputError, match="'tpu'"):
        evaluate_run(run, home=home, device="tpu")
    with pytest.raises(NotFound, match="not a trained run"):
        load_run(tmp_path / "nowhere")


# Prediction


def test_probabilities_are_the_mean_of_the_seeds(
    run: TrainedRun, root: Path, tmp_path: Path
) -> None:
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
            torch.tensor(values).view(1, 3, 1, 1)
            for values in (run.metadata.mean, run.metadata.std)
        )
        with torch.inference_mode():
            expected += model((shown(path, run.config) - mean) / std)[0].softmax(0) / 2
    [prediction] = predict(run, [path])
    assert dict(prediction.rows) == pytest.approx(
        {f"class{i}": p for i, p in enumerate(expected.tolist())}, abs=1e-5
    )


class Small(nn.Module):
    """A network for which more than a few images at once are too many."""

    def __init__(self, network: nn.Module, most: int) -> None:
        super().__init__()
        self.network, self.most, self.asked = network, most, list[int]()

    def forward(self, images: torch.Tensor) -> Any:
        self.asked.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.network(images)


def test_what_does_not_fit_is_evaluated_in_smaller_parts(run: TrainedRun, home: Home) -> None:
    model = TrainedModel.load(run.path / "seed-0", device="cpu")
    images = open_test(run.config.data, home.cache)
    assert images is not None
    whole = model.score(images)[""]
    small = Small(model.networks[0], 2)
    parts = replace(model, networks=(small,)).score(images)[""]
    assert small.asked[0] > 2 >= small.asked[-1]
    np.testing.assert_allclose(parts.logits, whole.logits, atol=1e-5)
    with pytest.raises(torch.OutOfMemoryError):
        replace(model, networks=(Small(small, 0),)).score(images)


def test_predictions_agree_with_evaluation(run: TrainedRun, root: Path, home: Home) -> None:
    one = load_run(run.path / "seed-0")
    evaluation = evaluate_run(one, home=home, device="cpu").seeds[0]
    paths = [path for label in run.classes for path in sorted((root / "test" / label).iterdir())]
    found = predict(one, paths)
    said = {str(p.path): run.classes.index(p.rows[0][0]) for p in found}
    confusion = np.zeros((3, 3), np.int64)
    for path in paths:
        confusion[run.classes.index(path.parent.name), said[str(path)]] += 1
    assert confusion.tolist() == evaluation.confusion.tolist()


def test_the_most_likely_first_and_no_more_than_there_are(run: TrainedRun, root: Path) -> None:
    paths = [*first_of(root, "class2"), *first_of(root, "class0")]
    found = predict(run, paths, k=5)
    assert [one.path for one in found] == paths
    for one in found:
        values = [probability for _, probability in one.rows]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1.0)
        assert {name for name, _ in one.rows} == set(run.classes)
    assert [one.rows for one in predict(run, paths, k=1)] == [one.rows[:1] for one in found]


def test_pictures_of_any_shape_and_mode(run: TrainedRun, tmp_path: Path) -> None:
    paths = []
    for mode, size in (("L", (9, 40)), ("RGBA", (64, 13)), ("P", (12, 12)), ("RGB", (5, 5))):
        paths.append(tmp_path / f"{mode}.png")
        Image.new(mode, size).save(paths[-1])
    assert len(predict(run, paths)) == 4


def test_what_cannot_be_read_does_not_spoil_the_others(
    run: TrainedRun, root: Path, tmp_path: Path
) -> None:
    good = first_of(root, "class0")[0]
    text = tmp_path / "text.png"
    text.write_text("no image")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:100])
    reasons = {
        text: "not an image",
        empty: "not an image",
        cut: "truncated",
        tmp_path / "gone.png": "No such file",
        tmp_path: "Is a directory",
    }
    found = predict(run, [good, *reasons, good])
    assert [one.path for one in found] == [good, *reasons, good]
    assert found[0].rows == found[-1].rows
    assert found[0].error is None
    for one in found[1:-1]:
        assert reasons[one.path] in (one.error or ""), one.error
        assert (one.rows, one.trained_on) == ((), None)


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
    (found,) = predict(run, [large])
    assert found.error == "30 x 30 pixels, data.max_pixels allows 400"


def test_nothing_to_predict(run: TrainedRun, root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images"):
        select([])
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"no images in .*\.txt 1"):
        select([tmp_path])
    with pytest.raises(InputError, match="0 answers: at least 1"):
        predict(run, first_of(root, "class0"), k=0)


# Folders, patterns, CSV


def test_folders_patterns_and_files_may_be_mixed(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/deep/2.PNG", "a/.hidden.png", "a/.git/3.png", "a/readme.txt",
                 "b/4.png", "b/5.webp", "6.png", "7", "[8].png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(*paths: str) -> list[str]:
        found = select([tmp_path / one for one in paths])
        return [one.relative_to(tmp_path).as_posix() for one in found.files]

    assert names("a") == ["a/1.jpg", "a/deep/2.PNG"]
    assert names("b/*.png", "7", "a") == ["b/4.png", "7", "a/1.jpg", "a/deep/2.PNG"]
    assert names("**/*.png") == ["6.png", "[8].png", "b/4.png"]
    assert names("[8].png") == ["[8].png"]  # there is such a file
    assert names("[ab]") == ["a/1.jpg", "a/deep/2.PNG", "b/4.png", "b/5.webp"]
    assert names("nowhere.jpg") == ["nowhere.jpg"]  # told as a row
    found = select([tmp_path / "a"])
    assert found.note == "files of other extensions in these folders are left out: .txt 1"
    with pytest.raises(InputError, match=r"no images in .*\*\.gif"):
        select([tmp_path / "*.gif"])


def test_a_folder_without_end_stands_in_memory_a_few_images_at_a_time(
    run: TrainedRun, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpo.trained.inference.CHUNK", 4)
    read: list[int] = []
    begin = Chunk.__init__

    def counted(self: Chunk, paths: Sequence[Path], *rest: Any) -> None:
        read.append(len(paths))
        begin(self, paths, *rest)

    monkeypatch.setattr(Chunk, "__init__", counted)
    paths = [*first_of(root, "class0"), root / "gone.png", *first_of(root, "class1")] * 2
    answers = predictions(TrainedModel.of_run(run, torch.device("cpu")), paths)
    assert next(answers).path == paths[0]
    assert read == [4]  # no more than is asked for
    assert [one.path for one in answers] == paths[1:]
    assert read == [4, 4, 2]
    small = predict(run, paths)
    monkeypatch.undo()
    for one, other in zip(small, predict(run, paths), strict=True):
        assert [name for name, _ in one.rows] == [name for name, _ in other.rows]
        assert [p for _, p in one.rows] == pytest.approx([p for _, p in other.rows], abs=1e-6)


def told(*args: str) -> Result:
    return CliRunner().invoke(app, [*args, "--device", "cpu"])


def failure(*args: str) -> str:
    """The message of a command that fails as the user's mistake does."""
    found = told(*args)
    assert isinstance(found.exception, HpoError), found.output
    assert found.exception.exit_code == 2
    assert found.stdout == ""
    return str(found.exception)


def test_csv_has_a_row_for_each_file(run: TrainedRun, root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(root / "test" / "class0", folder / "sub")
    (folder / "bad.png").write_text("no image")
    (folder / "=1+1.png").write_bytes(first_of(root, "class1")[0].read_bytes())
    out = tmp_path / "out" / "found.csv"
    found = told("predict", str(run.path), str(folder), "--top", "2", "--csv", str(out))
    assert found.exit_code == 0, found.output
    assert "1 of 7 files cannot be read" in found.stderr
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "class", "probability", "class2", "probability2", "error",
                             "trained_on", "validated_on"]  # fmt: skip
    assert [Path(row["file"]).name for row in rows] == [
        "=1+1.png", "bad.png", *(f"{i:04}.png" for i in range(5))]  # fmt: skip
    assert (rows[1]["error"], rows[1]["class"], rows[1]["trained_on"]) == ("not an image", "", "")
    answers = predict(run, [Path(row["file"]) for row in rows], k=2)
    for row, one in zip(rows, answers, strict=True):
        if one.error is None:
            assert (row["class"], row["class2"]) == (one.rows[0][0], one.rows[1][0])
            assert float(row["probability"]) == pytest.approx(one.rows[0][1])
            assert row["trained_on"] == "false"


def test_csv_to_standard_output_is_safe_for_a_spreadsheet(
    run: TrainedRun, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("=cmd.png").write_bytes(first_of(root, "class1")[0].read_bytes())
    found = told("predict", str(run.path), "=cmd.png", "--csv", "-")
    assert found.stdout.splitlines()[1].startswith("'=cmd.png,")
    assert "exclude each other" in failure("predict", str(run.path), "x", "--csv", "-", "--json")
    assert "is a folder" in failure("predict", str(run.path), "x", "--csv", str(tmp_path))


def test_the_exit_code_is_2_only_where_nothing_can_be_read(run: TrainedRun, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("no image")
    found = told("predict", str(run.path), str(tmp_path), "--json")
    assert isinstance(found.exception, DataError)
    assert str(found.exception).startswith("none of 2 files can be read; the first one: ")
    rows = json.loads(found.stdout)
    assert [row["error"] for row in rows] == ["not an image"] * 2
    single = told("predict", str(run.path), str(tmp_path / "a.png"))
    assert str(single.exception) == f"{tmp_path / 'a.png'}: not an image"


# What a run was trained on


def copies(root: Path, folder: Path) -> Path:
    """By class: a training image under another name, a validation image stored anew without loss,
    and one test image."""
    for label in ("class0", "class1", "class2"):
        (folder / label).mkdir(parents=True)
        shutil.copy(root / "train" / label / "0001.png", folder / label / "renamed.png")
        with Image.open(root / "val" / label / "0000.png") as image:
            image.save(folder / label / "lossless.bmp")
        shutil.copy(root / "test" / label / "0000.png", folder / label / "new.png")
    return folder


def test_training_images_are_refused_under_any_name(
    run: TrainedRun, root: Path, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_HOME", str(home.root))
    folder = copies(root, tmp_path / "more")
    why = failure("evaluate", str(run.path), "--data", str(folder))
    assert "6 of 9 images were trained on: class0/lossless.bmp, class0/renamed.png, class1/" in why
    assert "--force" in why
    forced = told("evaluate", str(run.path), "--data", str(folder), "--force", "--json")
    assert forced.exit_code == 0, forced.output
    names = {f"class{i}/{one}" for i in range(3) for one in ("lossless.bmp", "renamed.png")}
    assert set(json.loads(forced.stdout)["trained_on"]) == names
    shown = told("evaluate", str(run.path), "--data", str(folder), "--force").stdout
    assert "6 of 9 images were trained on: class0/lossless.bmp" in " ".join(shown.split())
    assert "top1" in shown


def test_many_names_are_counted(run: TrainedRun, root: Path, home: Home) -> None:
    with pytest.raises(DataError, match=r"24 of 24 images were trained on: .* and 14 more"):
        evaluate_run(run, data=root / "train", home=home, device="cpu")
    moved = run.path.with_name("moved")
    shutil.copytree(run.path, moved)
    with pytest.raises(DataError, match="12 of 12 images were trained on"):
        evaluate_run(load_run(moved / "seed-1"), data=root / "val", home=home, device="cpu")
    new = evaluate_run(run, data=root / "test", home=home, device="cpu")
    assert (new.trained_on, new.overlap) == ((), None)


def test_predict_marks_training_images(run: TrainedRun, root: Path, tmp_path: Path) -> None:
    folder = copies(root, tmp_path / "more")
    found = {one.path.name: one.trained_on for one in predict(
        run, sorted((folder / "class1").iterdir()))}  # fmt: skip
    assert found == {"renamed.png": True, "lossless.bmp": True, "new.png": False}
    shown = told("predict", str(run.path), str(folder), "--top", "1")
    assert shown.exit_code == 0
    lines = [line for line in shown.stdout.splitlines() if "trained on" in line]
    assert len(lines) == 6
    assert "the run was trained on 6 of 9 images" in shown.stderr


def test_validation_images_that_chose_the_epoch_are_told_apart(
    root: Path, tmp_path: Path, home: Home
) -> None:
    shutil.copytree(root, tmp_path / "kept")
    shutil.copy(root / "val/class0/0000.png", tmp_path / "kept/test/class0/again.png")
    config = tiny_config(tmp_path / "kept", {"epochs": 1})
    kept = train_run(config, tmp_path / "run", home, keep_validation=True)
    assert any("1 of 16 test images was used for validation" in note for note in kept.notes)
    with pytest.raises(DataError, match="12 of 12 images were used for validation, which chose"):
        evaluate_run(kept, data=root / "val", home=home, device="cpu")
    with pytest.raises(DataError, match="24 of 24 images were trained on"):
        evaluate_run(kept, data=root / "train", home=home, device="cpu")
    forced = evaluate_run(kept, data=root / "val", home=home, device="cpu", force=True)
    assert (forced.trained_on, len(forced.validated_on or ())) == ((), 12)
    assert "12 of 12 images were used for validation" in (forced.overlap or "")
    [answer] = predict(kept, [root / "val/class1/0001.png"])
    assert (answer.trained_on, answer.validated_on) == (False, True)
    # A run of the version before knows what it was trained on, though not what chose its epoch.
    kept.files.validated_on.unlink()
    (tmp_path / "kept").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="24 of 24 images were trained on"):
        evaluate_run(kept, data=root / "train", home=home, device="cpu")
    older = evaluate_run(kept, data=root / "val", home=home, device="cpu")
    assert (older.trained_on, older.validated_on) == ((), None)


def test_duplicates_in_the_test_split_are_told_everywhere(tmp_path: Path, home: Home) -> None:
    root = pictures(tmp_path)
    shutil.copy(root / "train/class0/0000.png", root / "test/class0/again.png")
    run = train_run(tiny_config(root, {"epochs": 1}), tmp_path / "run", home)
    line = "1 of 16 test images was trained on: test/class0/again.png"
    assert any(line in note for note in run.notes)
    assert any(line in note for note in load_run(run.path).summary["notes"])
    assert line in training_report(run)
    found = evaluate_run(run, home=home, device="cpu")  # the run's own: not refused
    assert found.trained_on == ("test/class0/again.png",)
    assert "1 of 16 images was trained on" in (found.overlap or "")


def test_a_run_of_an_earlier_version_is_judged_by_its_data(
    run: TrainedRun, run_copy: TrainedRun, root: Path, home: Home
) -> None:
    digests, path = run.files.trained_on.read_bytes(), run_copy.files.trained_on
    path.unlink()
    with pytest.raises(DataError, match="24 of 24 images were trained on"):
        evaluate_run(run_copy, data=root / "train", home=home, device="cpu")
    assert path.read_bytes() == digests  # kept for the next time


def test_a_run_whose_data_are_gone_or_changed_does_not_know(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = pictures(tmp_path)
    old = train_run(tiny_config(root, {"epochs": 1}), tmp_path / "run", home)
    old.files.trained_on.unlink()
    extra = root / "train/class0/new.png"
    shutil.copy(root / "test/class0/0000.png", extra)
    found = evaluate_run(old, home=home, device="cpu")
    assert (found.trained_on, found.validated_on) == (None, None)
    assert "unknown" in (found.overlap or "")
    assert "has changed since" in (found.overlap or "")
    root.rename(tmp_path / "moved")
    monkeypatch.setenv("HPO_HOME", str(home.root))
    [answer] = predict(old, first_of(tmp_path / "moved", "class0")[:1])
    assert (answer.trained_on, answer.validated_on) == (None, None)
    shown = told("predict", str(old.path), str(tmp_path / "moved/test"))
    assert "its data cannot be read" in " ".join(shown.stderr.split())
    (tmp_path / "moved").rename(root)
    extra.unlink()
    again = train_run(old.config, old.path, home)  # finished: nothing is trained
    assert again.files.trained_on.exists()


def test_damaged_digests_are_no_answer(run_copy: TrainedRun, home: Home) -> None:
    file = run_copy.files.trained_on
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    for broken in (bytes(data), bytes(data[:-5]), b""):
        file.write_bytes(broken)
        with pytest.raises(InputError, match=r"trained-on\.bin: damaged"):
            evaluate_run(run_copy, home=home, device="cpu")
