"""`hpo check`: the data counted, every network built, a step timed, nothing written."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpo import io
from hpo.config.recommended import recommend
from hpo.config.study import StudyFile
from hpo.control import NullControl
from hpo.data.dataset import DecodedImages, open_data
from hpo.data.report import DataReport
from hpo.errors import ConfigError, DataError, InputError
from hpo.formatting import rough_duration
from hpo.paths import Home
from hpo.trained import dry_run as checks
from hpo.trained.cost import Cost
from hpo.trained.dry_run import CheckResult, check
from hpo.training import device as runtime
from hpo.training import feature_cache, models, weights
from hpo.training.checkpoint import save_weights
from hpo.training.device import FeatureCacheCost, StepCost
from hpo.training.inputs import TrainingData
from hpo.training.train import train
from tests.harness.fakes import study_file
from tests.harness.images import make_folder
from tests.harness.searches import TINY


def examined(file: StudyFile, home: Home, **options: Any) -> CheckResult:
    return check(file, home=home, **{"device": "cpu", "workers": 2, "threads": 1, **options})


def most_s(result: CheckResult) -> float:
    """The longest time that the study is expected to take."""
    assert result.forecast is not None
    assert result.forecast.seconds is not None
    return result.forecast.seconds[1]


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Steps of 0.5 s, of 0.01 s on frozen layers' outputs of 1 MB that take 0.1 s, that are not
    computed; the configurations that were to be timed."""
    timed: list[Any] = []

    def step(config: Any, *, classes: int, device: torch.device) -> StepCost:
        timed.append(config)
        return StepCost(0.5, 100.0, config.batch_size)

    def kept(config: Any, *, classes: int, device: torch.device) -> FeatureCacheCost:
        return FeatureCacheCost(1_000_000, 0.1, 0.0 if config.frozen else 0.01, config.batch_size)

    monkeypatch.setattr(runtime, "measure_step", step)
    monkeypatch.setattr(runtime, "measure_feature_cache", kept)
    monkeypatch.setattr(runtime, "measure_loader", lambda *_: 0.0)
    images = DecodedImages([np.zeros((8, 8, 3), np.uint8)], [0], decode_s=0.0)
    monkeypatch.setattr(checks, "sample_training_images", lambda *_: images)
    return timed


def files_below(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_nothing_is_written(tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "pictures", count=8, size=(20, 16))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    data = f'data = {{dataset = "folder", root = "{root}", image_size = 12}}\n'
    before = files_below(tmp_path)
    result = examined(study_file(train=data + "model.cnn.filters = [4]"), home)
    assert files_below(tmp_path) == before
    assert result.data["test"] == {"class0": 1, "class1": 1, "class2": 1}
    assert not home.root.exists()


def test_the_result_in_words(home: Home) -> None:
    train = TINY.replace("batch_size = 64", "")
    file = study_file(trials=7, train=train, space="batch_size = [32, 128]")
    file = replace(file, study=file.study.model_copy(update={"defaults": True}))
    result = examined(file, home)
    [cost] = result.costs
    assert cost.batch_size == 128
    # A convolution of 4 filters with bias, its norm, and a linear layer to 10 classes.
    assert cost.parameters == 3 * 9 * 4 + 4 + 8 + 4 * 10 + 10
    assert cost.memory_mb is not None
    assert cost.memory_mb > 0
    text = str(result)
    proposed = recommend(file)
    assert [one.values for one in proposed] == [{"batch_size": 32}, {"batch_size": 128}]
    for one in proposed:
        size = one.values["batch_size"]
        assert f"  recommended: {one.source}\n    batch_size = {size}\n" in text
    assert text.startswith(
        "study toy: 7 trials of up to 3 epochs\npruner none: every trial runs to its end\n"
        "data:\n  train: 1259 images (0 "
    )
    assert f"  small_cnn at 8 px: {cost.parameters} parameters, about " in text
    assert "in all: 7 trials, 7 full trainings = 21 epochs, " in text
    assert " with 2 workers\n" in text
    assert text.endswith("nothing was written")


def test_the_estimate(home: Home, instant: list[Any]) -> None:
    space = "epochs = [2, 10]\nbatch_size = [64, 100]"
    result = examined(study_file(trials=5, train="model.cnn.filters = [4]", space=space), home)
    epoch_s = (1259 + 269 / 3) * 0.5 / 100
    assert result.costs[0].epoch_s == pytest.approx(epoch_s)
    assert most_s(result) == pytest.approx(3 * 10 * epoch_s)  # 5 trials in 3 rounds of 2 workers
    assert result.forecast is not None
    assert (result.forecast.epochs, result.forecast.max_epochs) == ((50, 50), 10)


FROZEN = "model.cnn.filters = [4]\nmodel.trainable_blocks = 0\nbatch_size = 100\n"
TRAIN, VAL = 1259, 269


def test_what_is_kept_is_computed_once(home: Home, instant: list[Any]) -> None:
    space = "optimizer.lr = [0.1, 0.2]\nmodel.dropout = [0.0, 0.5]"
    result = examined(study_file(trials=5, train=f"epochs = 10\n{FROZEN}", space=space), home)
    kept = result.costs[0].kept
    assert kept is not None
    assert (kept.choices, kept.prefixes, kept.size) == (1, 1, (TRAIN + VAL) * 1_000_000)
    assert kept.once_s == pytest.approx((TRAIN + VAL) * 0.1)
    assert kept.epoch_s == pytest.approx((TRAIN + VAL) * 0.01 / 100)
    assert most_s(result) == pytest.approx(kept.once_s + 3 * 10 * kept.epoch_s)
    assert (
        "    frozen layers are computed once, 1.5 GB on disk (data.cache_limit_gb = 20): the first "
        "trial 3 min, later ones 1.5 s\n"
    ) in str(result)


def test_an_epoch_is_told_as_it_will_run(home: Home, instant: list[Any]) -> None:
    """On kept outputs, where all trials have them; both times where only some do."""
    whole, fast = "7.6 s an epoch", "0.2 s an epoch on outputs of frozen layers"
    for more, words, part in (
        ("", f"batch 100, {fast}\n", 1.0),
        ("augment.horizontal_flip = [0.0, 0.5]", f"batch 100, {whole}, {fast}\n", 0.5),
        ("augment.horizontal_flip = [0.5, 0.0]", f"batch 100, {whole}, {fast}\n", 0.5),
        ("augment.horizontal_flip = [0.25, 0.5]", f"batch 100, {whole}\n", 0.0),
    ):
        space = f"optimizer.lr = [0.1, 0.2]\n{more}"
        result = examined(study_file(train=f"epochs = 10\n{FROZEN}", space=space), home)
        (cost,) = result.costs
        assert words in str(result)
        assert cost.kept_part == part
        assert cost.epoch_s is not None
        fast_s = (TRAIN + VAL) * 0.01 / 100
        assert cost.mean_epoch_s == pytest.approx(part * fast_s + (1 - part) * cost.epoch_s)


def test_each_choice_of_frozen_layers_is_kept(home: Home, instant: list[Any]) -> None:
    """Heads share them; another normalisation is another input. Two workers share the work."""
    space = """
        model.trainable_blocks = [0, 1, "all"]
        model.head.hidden = [[4], [8]]
        data.normalize = ["dataset", "imagenet"]
    """
    train = "model.cnn.filters = [4, 4]\nbatch_size = 100\nepochs = 3"
    (cost,) = (result := examined(study_file(trials=40, train=train, space=space), home)).costs
    assert cost.kept is not None
    assert (cost.built, cost.kept.choices, cost.kept.prefixes) == (6, 4, 4)
    assert cost.epoch_s is not None
    mean = (4 * cost.kept.epoch_s + 2 * cost.epoch_s) / 6
    assert most_s(result) == pytest.approx(2 * cost.kept.once_s + 20 * 3 * mean)
    assert "1.5 GB on disk for each of 4 choices" in str(result)


OWN = """
data = {{dataset = "folder", root = "{root}", image_size = 8}}
model.architecture = "nets:build"
model.options.name = "{name}"
model.trainable_blocks = 0
epochs = 5
"""


@pytest.mark.usefixtures("nets")
def test_frozen_layers_of_a_network_of_ones_own(
    tmp_path: Path, home: Home, instant: list[Any]
) -> None:
    """They are computed once as torchvision's are, or else a line says why not."""
    root = make_folder(tmp_path / "images", count=8, size=(8, 8))
    (cost,) = (found := examined(study_file(train=OWN.format(root=root, name="Plain")), home)).costs
    assert cost.kept is not None
    assert found.forecast is not None
    assert cost.epoch_s is not None
    assert cost.mean_epoch_s == cost.kept.epoch_s < cost.epoch_s / 10
    assert "\n    frozen layers are computed once, " in str(found)
    found = examined(study_file(train=OWN.format(root=root, name="ByContents")), home)
    (cost,) = found.costs
    assert cost.kept is None
    assert cost.mean_epoch_s == cost.epoch_s
    [line] = [one for one in str(found).splitlines() if "frozen layers" in one]
    assert line.startswith("    frozen layers are computed in every epoch: its forward ")


def test_what_is_larger_than_the_limit_is_computed_anew(home: Home, instant: list[Any]) -> None:
    """The limit is one of each part: of the training images here."""
    for limit, fits in ((1.2591, True), (1.2589, False)):
        train = f"epochs = 3\n{FROZEN}data.cache_limit_gb = {limit}"
        (cost,) = (result := examined(study_file(train=train), home)).costs
        assert cost.kept is not None
        assert cost.kept.fits == fits
        assert cost.epoch_s is not None
        slow = "take 1.5 GB, more than data.cache_limit_gb = 1.2589 allows" in str(result)
        assert slow != fits
        if not fits:
            assert most_s(result) == pytest.approx(3 * 3 * cost.epoch_s)


def test_of_a_frozen_retrieval_only_the_search_is_left(home: Home, instant: list[Any]) -> None:
    space = "retrieval.k = [5, 10]"
    file = study_file(train=f'task = "retrieval"\n{FROZEN}', space=space)
    assert "the first trial 3 min, later ones as long as their search" in str(examined(file, home))


@pytest.mark.parametrize(
    "fields",
    [
        "",
        "augment.cached_views = 3\naugment.rotation = 20.0",
        'task = "retrieval"\naugment.rotation = 20.0',
        'task = "retrieval"\nmodel.trainable_blocks = 1\naugment.cached_views = 2',
    ],
    ids=["plain", "views", "retrieval", "retrieval that learns"],
)
def test_the_estimated_size_is_what_a_training_keeps(home: Home, fields: str) -> None:
    model = "model.cnn.filters = [4, 8]\n"
    blocks = "" if "trainable_blocks" in fields else "model.trainable_blocks = 0\n"
    runtime = 'runtime = {precision = "float32", memory_format = "contiguous", threads = 1}\n'
    file = study_file(train=f"{model}{blocks}{runtime}{fields}", space="seed = [0, 1]")
    (cost,) = examined(file, home).costs
    config = file.config({"seed": 0})
    data = open_data(config.data, home.cache)
    seen = TrainingData(10, data.train, data.val, data.mean, data.std)
    next(train(config, seen, NullControl(), device=torch.device("cpu"), cache=home.cache))
    there = [one for one in (home.cache / "features").iterdir() if one.suffix != ".lock"]
    assert cost.kept is not None
    sizes = [one.stat().st_size - feature_cache.HEADER - io.LENGTH for one in there]
    assert (cost.kept.size, cost.kept.largest) == (sum(sizes), max(sizes))


@pytest.mark.parametrize("fields", ["", f"{FROZEN}augment.horizontal_flip = 0.5"])
def test_where_nothing_is_kept_nothing_is_said_of_it(home: Home, fields: str) -> None:
    result = examined(study_file(train=fields or TINY), home)
    assert result.costs[0].kept is None
    assert "frozen" not in str(result)


def test_a_batch_is_no_larger_than_the_data(home: Home, instant: list[Any]) -> None:
    examined(study_file(train="batch_size = 60_000"), home)
    assert instant[0].batch_size == 1259


def test_each_architecture_at_each_size_and_every_combination(
    home: Home, instant: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    build = models.build

    def counted(config: Any, **options: Any) -> Any:
        built.append((config.architecture, options["image_size"], config.trainable_blocks))
        return build(config, **options)

    monkeypatch.setattr(models, "build", counted)
    space = """
        model.architecture = ["resnet18", "small_cnn"]
        model.trainable_blocks = [0, "all"]
        data.image_size = [32, 64]
        model.cnn.filters = {choices = [[4], [8, 8]], when = {"model.architecture" = "small_cnn"}}
        model.dropout = {low = 0.0, high = 0.5}
    """
    file = study_file(train='runtime = {precision = "float32", memory_format = "contiguous"}',
                      space=space)  # fmt: skip
    result = examined(file, home)
    combinations = {
        (name, size, blocks)
        for name in ("resnet18", "small_cnn")
        for size in (32, 64)
        for blocks in (0, "all")
    }
    assert set(built) == combinations
    assert len(built) == 4 + 8
    assert [(cost.architecture, cost.image_size, cost.built) for cost in result.costs] == [
        ("resnet18", 32, 2), ("resnet18", 64, 2), ("small_cnn", 32, 4), ("small_cnn", 64, 4),
    ]  # fmt: skip
    # Timed is what has most to learn.
    assert all(config.model.trainable_blocks == "all" for config in instant)
    assert all(config.model.cnn.filters == (8, 8) for config in instant[2:])


def test_too_many_combinations_are_thinned(
    home: Home, instant: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "MOST_BUILT", 5)
    space = "model.cnn.filters = [[4], [8], [16]]\nmodel.trainable_blocks = [0, 1]"
    result = examined(study_file(space=space), home)
    assert result.costs[0].built == 4  # each choice once: 3 filters, and one more of blocks


def test_problems_are_shown_together(home: Home, instant: list[Any]) -> None:
    space = 'model.architecture = ["alexnet", "small_cnn", "vit_b_16"]'
    file = study_file(train="data.image_size = 8\nmodel.cnn.filters = [4, 4]", space=space)
    with pytest.raises(ConfigError) as caught:
        examined(file, home)
    text = str(caught.value)
    assert "2 networks of the space cannot be trained" in text
    assert "\n  alexnet at 8 px: " in text
    assert "\n  vit_b_16 at 8 px: data.image_size: 8" in text
    assert "small_cnn at" not in text


def test_a_problem_names_the_choice(home: Home, instant: list[Any]) -> None:
    file = study_file(train="model.cnn.filters = [4]", space="model.trainable_blocks = [0, 99]")
    with pytest.raises(ConfigError, match=r"at most 1, or 'all' \(with .*\"trainable_blocks\": 99"):
        examined(file, home)


def test_weights_from_a_file_are_tried(tmp_path: Path, home: Home, instant: list[Any]) -> None:
    path = tmp_path / "odd.safetensors"
    save_weights(path, {"no.such": torch.zeros(1)}, {})
    with pytest.raises(ConfigError, match="does not fit small_cnn"):
        examined(study_file(train=f'model.weights = "{path}"'), home)


def test_weights_by_name_are_looked_up_but_not_downloaded(
    home: Home, instant: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "urlopen", lambda *_, **__: BytesIO())
    train = 'model = {architecture = "squeezenet1_1", weights = "DEFAULT"}\ndata.image_size = 32'
    result = examined(study_file(train=train), home)
    assert "weights DEFAULT of squeezenet1_1: 5 MB to download" in str(result)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("instant")
def test_loading_and_the_spread_of_steps_count(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    file = study_file(trials=5, train="epochs = 10\nbatch_size = 100\nmodel.cnn.filters = [4]")
    before = examined(file, home)
    monkeypatch.setattr(runtime, "measure_loader", lambda *_: 0.01)
    step = StepCost(0.5, 100.0, 100, spread=(0.8, 1.5))
    monkeypatch.setattr(runtime, "measure_step", lambda *_, **__: step)
    images = DecodedImages([np.zeros((8, 8, 3), np.uint8)], [0], decode_s=0.1)
    monkeypatch.setattr(checks, "sample_training_images", lambda *_: images)
    result = examined(file, home)
    epoch_s = (before.costs[0].epoch_s or 0.0) + (1259 + 269) * 0.01
    assert result.costs[0].epoch_s == pytest.approx(epoch_s)
    assert result.forecast is not None
    decoding = (1259 + 269) * 0.1
    assert result.forecast.seconds == pytest.approx(
        (decoding + 30 * epoch_s * 0.8, decoding + 30 * epoch_s * 1.5)
    )


def test_what_would_be_quicker(
    home: Home, instant: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def step(config: Any, *, classes: int, device: torch.device) -> StepCost:
        part = (config.data.image_size / 128) ** 2
        part *= 0.3 if config.model.trainable_blocks == 2 else 1.0
        return StepCost(4.0 * part, 100.0, config.batch_size)

    monkeypatch.setattr(runtime, "measure_step", step)
    assert not examined(study_file(trials=1, train=TINY), home).quicker
    root = make_folder(tmp_path / "pictures", count=8, size=(20, 16))
    train = f"""
data = {{dataset = "folder", root = "{root}", image_size = 128}}
model = {{architecture = "squeezenet1_1", weights = "DEFAULT"}}
epochs = 20
batch_size = 1"""
    line = next(one for one in str(examined(study_file(trials=50, train=train), home)).splitlines()
                if one.startswith("quicker: "))  # fmt: skip
    assert line.startswith(
        "quicker: epochs = 10 (1/2), data.image_size = 64 (about 1/4), "
        "model.trainable_blocks = 2 (about 1/3), or a limit: --time "
    )
    space = "epochs = [10, 20]\ndata.image_size = [64, 128]\nmodel.trainable_blocks = [1, 2]"
    train = train.replace("epochs = 20\n", "").replace(", image_size = 128", "")
    file = study_file(trials=50, train=train, space=space)
    assert {one.partition(":")[0] for one in examined(file, home).quicker} <= {"or a limit"}


def test_what_does_not_fit_is_said(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(runtime, "measure_step", full)
    result = examined(study_file(train=TINY), home)
    assert result.forecast is not None
    assert result.forecast.seconds is None
    assert "a batch of 64 does not fit the device" in str(result)


def test_data_and_devices_that_are_not_there(tmp_path: Path, home: Home) -> None:
    train = f'data = {{dataset = "folder", root = "{tmp_path / "gone"}"}}'
    with pytest.raises(DataError, match="no such folder"):
        examined(study_file(train=train), home)
    with pytest.raises(InputError, match="'tpu' is not available"):
        examined(study_file(), home, device="tpu")


def test_without_a_test_split_it_says_so(tmp_path: Path, home: Home) -> None:
    root = make_folder(tmp_path / "pictures", {"train": 4, "val": 2}, size=(20, 16))
    train = f'data = {{dataset = "folder", root = "{root}", image_size = 12}}\n{TINY}'
    assert "no test split: results can only be validated. Add" in str(
        examined(study_file(train=train), home)
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (12.3, "12 s"), (240, "4 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert rough_duration(seconds) == text


def test_long_lists_of_classes_are_cut(home: Home) -> None:
    cost = Cost("small_cnn", "default", 8, 1, 10, 64, 1.0, 1.0)
    many = {f"c{i}": 2 for i in range(30)}
    file = study_file(trials=1, train="epochs = 2")
    result = CheckResult("x", DataReport("x", {"train": many}), (cost,), file, 1, "cpu", (), "")
    assert "train: 60 images (c0 2, " in str(result)
    assert "c9 2, ... (30 classes))" in str(result)
    assert most_s(result) == 2.0
