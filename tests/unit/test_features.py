"""Outputs of frozen layers: computed once, shared, and the same results as without them."""

import errno
import multiprocessing
import os
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import hpo.data.cache
from hpo.config.train import TrainConfig
from hpo.control import NullControl
from hpo.data.dataset import concat, open_data
from hpo.errors import Interrupted
from hpo.training import feature_cache, inputs
from hpo.training.checkpoint import Checkpoint, best_weights, load_trained, save_weights
from hpo.training.evaluation import evaluate
from hpo.training.feature_cache import Extractor, Features
from hpo.training.inputs import TrainingData
from hpo.training.learner import Learner
from hpo.training.loader import EvalBatches
from hpo.training.train import EpochResult, train
from tests.harness import networks
from tests.harness.images import make_folder, picture

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "pictures", {"train": 27, "val": 7}, size=(20, 16))


def config(folder: Path, **fields: Any) -> TrainConfig:
    data = {"dataset": "folder", "root": str(folder), "image_size": 16}
    base: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 16,
        "data": data | fields.pop("data", {}),
        "model": {"cnn": {"filters": [8, 16]}, "dropout": 0.3, "trainable_blocks": 0},
        "optimizer": {"lr": 0.1},
        "runtime": {"precision": "float32", "memory_format": "contiguous", "threads": 1},
    }
    return TrainConfig.parse(base | fields)


def seen(settings: TrainConfig, cache: Path) -> TrainingData:
    data = open_data(settings.data, cache)
    return TrainingData(len(data.classes), data.train, data.val, data.mean, data.std)


def run(
    settings: TrainConfig, cache: Path, *, kept: bool = True, data: Any = None, **options: Any
) -> list[EpochResult]:
    control = options.pop("control", NullControl())
    data = data or seen(settings, cache)
    given = cache if kept else None
    return list(train(settings, data, control, device=CPU, cache=given, **options))


def scores(results: list[EpochResult]) -> list[list[float]]:
    names = "train_loss", "train_top1", "val_loss", "val_top1"
    return [[one.metrics[name] for name in names if name in one.metrics] for one in results]


def files(cache: Path) -> set[str]:
    """What is kept, without the locks and what says that it was read through."""
    folder = cache / "features"
    there = folder.iterdir() if folder.exists() else ()
    return {one.name for one in there if one.suffix not in (".lock", ".verified")}


class Counted:
    """Counts the parts that are computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts = 0
        original = Extractor._build

        def build(*args: Any) -> None:
            self.parts += 1
            original(*args)

        monkeypatch.setattr(Extractor, "_build", build)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


LAYOUTS = ["contiguous", "channels_last"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("trainable_blocks", [0, 1])
def test_the_results_are_those_of_a_training_without(
    folder: Path, tmp_path: Path, trainable_blocks: int, precision: str, layout: str
) -> None:
    settings = config(
        folder,
        model={"cnn": {"filters": [8, 16]}, "dropout": 0.3, "trainable_blocks": trainable_blocks},
        runtime={"precision": precision, "memory_format": layout, "threads": 1},
    )
    cache = tmp_path / "cache"
    plain = run(settings, cache, kept=False)
    assert not files(cache)
    for _ in range(2):
        found = run(settings, cache)
        assert len(files(cache)) == 2
        for one, other in zip(scores(found), scores(plain), strict=True):
            assert one == pytest.approx(other, rel=1e-5)
    assert plain[0].metrics["train_loss"] > plain[-1].metrics["train_loss"]


@pytest.mark.parametrize(
    ("architecture", "trainable_blocks"),
    [
        ("resnet18", 1),
        pytest.param("mobilenet_v2", 1, marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", 0, marks=pytest.mark.slow),
    ],
)
def test_families_of_torchvision_too(
    folder: Path, tmp_path: Path, architecture: str, trainable_blocks: int
) -> None:
    """EfficientNet's first step behind the cut works in place: nothing kept may change by that."""
    settings = config(
        folder,
        epochs=2,
        data={"image_size": 32},
        model={"architecture": architecture, "trainable_blocks": trainable_blocks},
        optimizer={"lr": 1e-3},
    )
    cache = tmp_path / "cache"
    plain, found = run(settings, cache, kept=False), run(settings, cache)
    assert len(files(cache)) == 2
    for one, other in zip(scores(found), scores(plain), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize(
    ("name", "trainable_blocks", "fields"),
    [
        ("Plain", 0, {}),
        ("Skips", 1, {"ema_decay": 0.9}),
        ("DropoutBetween", 0, {}),
        ("Dense", 1, {"runtime": {"memory_format": "channels_last", "threads": 1}}),
        ("Dictionary", 1, {"ema_decay": 0.9}),
    ],
)
def test_networks_of_ones_own_too(
    folder: Path, tmp_path: Path, name: str, trainable_blocks: int, fields: dict[str, Any]
) -> None:
    model = networks.named(name, trainable_blocks)
    settings = config(folder, data={"image_size": 8}, model=model, batch_size=27, **fields)
    cache = tmp_path / "cache"
    plain, found = run(settings, cache, kept=False), run(settings, cache)
    assert len(files(cache)) == 2
    for one, other in zip(scores(found), scores(plain), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.usefixtures("nets")
def test_what_cannot_be_kept_is_said_in_a_line(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(folder, data={"image_size": 8}, model=networks.named("ByContents", 0))
    cache = tmp_path / "cache"
    plain, found = run(settings, cache, kept=False), run(settings, cache)
    assert scores(plain) == scores(found)
    assert not files(cache)
    [line] = [one for one in caplog.messages if "frozen layers" in one]
    assert line.startswith("frozen layers are computed in every epoch: its forward branches")


def test_what_is_kept_is_what_the_layers_give(folder: Path, tmp_path: Path) -> None:
    cache, settings = tmp_path / "cache", config(folder)
    data = seen(settings, cache)
    learner = Learner(settings, classes=3, device=CPU)
    how = feature_cache.Preprocessing(data.mean, data.std, settings, CPU)
    cut = feature_cache.find_cut(learner.model, learner.frozen, settings, CPU)
    assert cut is not None
    views = inputs.views(settings, data)
    kept = feature_cache.build_cache(learner.model, cut, how, views, cache, NullControl(), epoch=1)
    assert [images for images, _ in kept] == [data.train, data.val]
    begun = cut.prefix(learner.model).eval()
    for (images, _), found in kept.items():
        order = torch.randperm(len(images))
        rows = torch.cat(list(found.rows(order, 5, [slice(0, 7), slice(7, len(images))])))
        assert rows.shape == (len(images), 16 * 4)
        assert cut.packing.unpack(rows)[0].shape == (len(images), 16)
        batches = EvalBatches(
            images,
            mean=data.mean,
            std=data.std,
            image_size=16,
            batch_size=feature_cache.BATCH,
            device=CPU,
        )
        with torch.no_grad():
            wanted = torch.cat([begun(pixels) for pixels, _ in batches])
        assert torch.equal(rows, wanted[order])


def test_the_weights_are_the_whole_network(folder: Path, tmp_path: Path) -> None:
    """Its predictions on pictures are those that training had on features."""
    cache, settings = tmp_path / "cache", config(folder)
    results = run(settings, cache, checkpoint=lambda n: tmp_path / f"{n}.ckpt")
    best = results[-1].best_epoch
    path = results[-1].checkpoint
    assert path is not None
    save_weights(tmp_path / "weights.safetensors", best_weights(path), {})
    model = load_trained(tmp_path / "weights.safetensors", settings.model, classes=3, image_size=16)
    data = seen(settings, cache)
    assert data.val is not None
    batches = EvalBatches(
        data.val, mean=data.mean, std=data.std, image_size=16, batch_size=16, device=CPU
    )
    found = evaluate(
        model, batches, classes=3, device=CPU, precision="float32", control=NullControl()
    )
    assert found.top1 == results[best - 1].metrics["val_top1"]
    assert found.loss == pytest.approx(results[best - 1].metrics["val_loss"], rel=1e-5)


def test_resumed_it_gives_the_same(folder: Path, tmp_path: Path) -> None:
    cache, settings = tmp_path / "cache", config(folder)
    whole = run(settings, cache, checkpoint=lambda n: tmp_path / f"{n}.ckpt")
    rest = run(settings, cache, resume=tmp_path / "1.ckpt")
    assert scores(rest) == scores(whole)[1:]
    assert Checkpoint.load(tmp_path / "3.ckpt").model.keys() >= {"features.0.conv.weight"}


def test_trials_share_them(folder: Path, tmp_path: Path, counted: Counted) -> None:
    cache = tmp_path / "cache"
    run(config(folder), cache)
    assert counted.parts == 2
    run(config(folder, batch_size=7, optimizer={"lr": 0.3}, epochs=1), cache)
    assert counted.parts == 2
    run(config(folder, seed=1), cache)
    assert counted.parts == 4  # without pretrained weights the seed makes the layers


def test_retraining_on_everything_shares_them(
    folder: Path, tmp_path: Path, counted: Counted
) -> None:
    cache, settings = tmp_path / "cache", config(folder)
    data = seen(settings, cache)
    assert data.val is not None
    run(settings, cache)
    joined = TrainingData(3, concat(data.train, data.val), None, data.mean, data.std)
    found = run(settings, cache, data=joined)
    assert counted.parts == 2
    plain = run(settings, cache, data=joined, kept=False)
    for one, other in zip(scores(found), scores(plain), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_the_cut_is_found_with_the_same_algorithms_in_each_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cuDNN times comes out otherwise in another process, whose outputs would not be found."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    settings, timed = config(folder), set[bool]()
    learner = Learner(settings, classes=3, device=CPU)
    learner.model.register_forward_pre_hook(
        lambda *_: timed.add(torch.backends.cudnn.benchmark)  # type: ignore[func-returns-value]
    )
    assert feature_cache.find_cut(learner.model, learner.frozen, settings, CPU) is not None
    assert timed == {False}
    assert torch.backends.cudnn.benchmark


def test_changes_are_noticed(folder: Path, tmp_path: Path, counted: Counted) -> None:
    cache = tmp_path / "cache"
    run(config(folder), cache)
    changed = picture(2, 3, (20, 16), random.Random(9))
    changed.save(folder / "train/class0/0000.png")
    settings = config(folder, data={"normalize": "imagenet"})
    run(settings, cache)
    assert counted.parts == 4  # another normalisation
    run(config(folder), cache)
    assert counted.parts == 6  # another picture, and so another mean
    run(config(folder, data={"normalize": "imagenet", "image_size": 8}), cache)
    assert counted.parts == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"augment": {"horizontal_flip": 0.5}},
        {"data": {"cache_limit_gb": 0.0, "loader_workers": 0}},
        {"data": {"cache_limit_gb": 1e-7, "loader_workers": 0}},
        {"model": {"cnn": {"filters": [8, 16]}, "trainable_blocks": "all"}},
        {"model": {"cnn": {"filters": [8, 16]}, "trainable_blocks": {"first": 1}}},
    ],
)
def test_where_nothing_is_kept(folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    cache, settings = tmp_path / "cache", config(folder, **fields)
    plain, found = run(settings, cache, kept=False), run(settings, cache)
    assert not files(cache)
    assert scores(plain) == scores(found)


def test_outputs_much_larger_than_the_pictures_are_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(folder, model={"cnn": {"filters": [128, 8]}, "trainable_blocks": 1})
    run(settings, tmp_path / "cache")  # 128 x 8 x 8 floats: 32 KiB
    assert not files(tmp_path / "cache")
    monkeypatch.setattr(feature_cache, "SMALL", 32_768)
    run(settings, tmp_path / "cache")
    assert len(files(tmp_path / "cache")) == 2


def test_views_follow_one_another() -> None:
    parts = (torch.arange(6.0).reshape(2, 3, 1), torch.arange(10.0, 14.0).reshape(2, 2, 1))
    kept = Features(parts, CPU)
    order = torch.tensor([4, 0, 2, 3, 1])
    found = [
        torch.cat(list(kept.rows(order, n, [slice(0, 2), slice(2, 5)]))).flatten().tolist()
        for n in (1, 2, 3)
    ]
    assert found[0] == [13, 3, 5, 12, 4]
    assert found[1] == [11, 0, 2, 10, 1]
    assert found[2] == found[0]


def test_a_full_disk_ends_no_training(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache, settings = tmp_path / "cache", config(folder)
    data = seen(settings, cache)
    plain = run(settings, cache, data=data, kept=False)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        found = run(settings, cache, data=data)
    assert scores(found) == scores(plain)
    assert not files(cache)
    assert "does not fit: the disk mounted at" in caplog.text


class Asked(NullControl):
    """Ends the training at the n-th question, and keeps what it was told."""

    def __init__(self, end: int) -> None:
        self.end = end
        self.told: list[tuple[int, int]] = []

    def step(self, *, epoch: int, images: int) -> None:
        self.told.append((epoch, images))
        if len(self.told) == self.end:
            raise Interrupted("enough")


def test_the_computation_can_be_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "BATCH", 16)
    cache, settings = tmp_path / "cache", config(folder)
    control = Asked(4)
    with pytest.raises(Interrupted):
        run(settings, cache, control=control)
    assert control.told == [(1, 0)] * 4
    assert not files(cache)
    run(settings, cache)
    assert len(files(cache)) == 2


def test_waiting_for_another_can_be_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hpo.data.cache, "_POLL_S", 0.01)
    cache, settings = tmp_path / "cache", config(folder)
    run(settings, cache)
    keys = files(cache)
    control = Asked(3)
    locks = [FileLock(cache / "features" / f"{key}.lock") for key in keys]
    for lock in locks:
        lock.acquire()
    with pytest.raises(Interrupted):
        run(settings, cache, control=control)
    assert control.told == [(1, 0)] * 3
    for lock in locks:
        lock.release()
    assert len(run(settings, cache)) == 3


class Dies(NullControl):
    """Ends its process, as kill -9 would, at the n-th question."""

    def __init__(self, end: int) -> None:
        self.left = end

    def step(self, *, epoch: int, images: int) -> None:
        self.left -= 1
        if not self.left:
            os._exit(9)


def _train_elsewhere(folder: Path, cache: Path, dies: int, log: Path) -> None:
    original = Extractor._build

    def build(*args: Any) -> None:
        with log.open("a") as file:
            file.write("built\n")
        original(*args)

    Extractor._build = build  # type: ignore[method-assign]
    feature_cache.BATCH = 16
    with closing(
        train(config(folder), seen(config(folder), cache), Dies(dies), device=CPU, cache=cache)
    ) as results:
        log.with_name(f"{log.name}.{os.getpid()}").write_text(str(scores(list(results))))


def _start(*args: Any) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=_train_elsewhere, args=args)
    process.start()
    return process


@pytest.mark.slow
def test_processes_share_them_and_outlive_a_killed_one(folder: Path, tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    killed = _start(folder, cache, 3, log)
    killed.join(120)
    assert killed.exitcode == 9
    assert [name[0] for name in files(cache)] == ["."]  # incomplete, and so not in place
    assert log.read_text().split() == ["built"]
    both = [_start(folder, cache, 0, log) for _ in range(2)]
    for one in both:
        one.join(120)
        assert one.exitcode == 0
    assert log.read_text().split() == ["built"] * 3
    assert len(files(cache)) == 2
    first, second = (tmp_path.joinpath(f"log.{one.pid}").read_text() for one in both)
    assert first == second


def test_cached_views_are_computed_once(folder: Path, tmp_path: Path, counted: Counted) -> None:
    cache = tmp_path / "cache"
    views = {"cached_views": 2, "horizontal_flip": 0.5, "rotation": 20.0, "crop_padding": 2}
    settings = config(folder, augment=views, epochs=4)
    plain, found = run(settings, cache, kept=False), run(settings, cache)
    assert counted.parts == 2
    for one, other in zip(scores(found), scores(plain), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    run(config(folder, augment=views | {"cached_views": 3}), cache)
    assert counted.parts == 3  # validation has no views
