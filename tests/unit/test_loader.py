"""Batches: order, bits, equality with torchvision, and the same whatever way the pixels come."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from hpo.config.augment import AugmentConfig
from hpo.config.data import DataConfig
from hpo.data.dataset import concat, open_data
from hpo.data.images import Images
from hpo.training import loader
from hpo.training.augment import ops
from hpo.training.loader import EvalBatches, TrainBatches
from tests.harness.images import make_folder

CPU = torch.device("cpu")
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255), "device": CPU}
"""Gives pixel values as they are."""


def _config(root: Path, **values: Any) -> DataConfig:
    return DataConfig(**{"dataset": "folder", "root": str(root), "image_size": 16, **values})


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """20 squares of 20 pixels in the cache."""
    at = tmp_path_factory.mktemp("square")
    make_folder(at / "data", {"train": 10, "val": 1}, classes=2, size=(24, 24))
    return open_data(_config(at / "data", resize_size=20), at / "cache").train


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("ragged")
    return make_folder(at / "data", {"train": 7, "val": 5}, classes=2, varied=True)


def _train(images: Images, augment: AugmentConfig | None = None, **values: Any) -> TrainBatches:
    given = {"image_size": 16, "batch_size": 6, "seed": 4, **PLAIN, **values}
    return TrainBatches(images, augment=augment or AugmentConfig(), **given)


def _all(batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
    pictures, labels = zip(*batches, strict=True)
    return torch.cat(pictures), torch.cat([ops.dominant(one) for one in labels])


def test_an_epoch_shows_every_picture_once_in_an_order_of_its_own(square: Images) -> None:
    batches = _train(square)
    (first, labels), (second, _) = _all(batches.epoch(1)), _all(batches.epoch(2))
    assert len(batches) == 4
    assert [len(x) for x, _ in batches.epoch(1)] == [6, 6, 6, 2]
    assert labels.bincount().tolist() == [10, 10]
    assert not torch.equal(first, second)
    whole = {picture.numpy().tobytes() for picture in first}
    assert len(whole) == 20
    assert whole == {picture.numpy().tobytes() for picture in second}


def test_an_epoch_depends_on_seed_and_number_alone(square: Images) -> None:
    config = AugmentConfig(
        horizontal_flip=0.5, crop_padding=2, rotation=10.0, brightness=0.2, hue=0.1
    )
    batches = _train(square, config)
    list(batches.epoch(1))
    resumed = _all(_train(square, config).epoch(2))
    torch.manual_seed(99)
    wanted = _all(batches.epoch(2))
    assert torch.equal(wanted[0], resumed[0])
    assert torch.equal(wanted[1], resumed[1])
    assert not torch.equal(wanted[0], _all(_train(square, config, seed=5).epoch(2))[0])


def test_labels_go_with_their_pictures(square: Images) -> None:
    known = {picture.numpy().tobytes(): int(y) for x, labels in _eval(square)
             for picture, y in zip(x, labels, strict=True)}  # fmt: skip
    for x, labels in _train(square).epoch(1):
        assert [known[picture.numpy().tobytes()] for picture in x] == labels.tolist()


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(19, [19]), (20, [20]), (50, [20]), (18, [18, 2]), (1, [1] * 20)]
)
def test_a_last_batch_of_one_picture_is_dropped(
    square: Images, batch_size: int, sizes: list[int]
) -> None:
    batches = _train(square, batch_size=batch_size)
    assert [len(x) for x, _ in batches.epoch(1)] == sizes
    assert len(batches) == len(sizes)


def _eval(images: Images, **values: Any) -> EvalBatches:
    return EvalBatches(images, **{"image_size": 16, "batch_size": 6, **PLAIN, **values})


@pytest.mark.parametrize("extension", ["png", "jpg"])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_evaluation_equals_torchvision(tmp_path: Path, extension: str, resize: str) -> None:
    root = make_folder(tmp_path / "data", {"train": 1, "val": 9}, classes=2, size=(37, 50),
                       varied=True, extension=extension)  # fmt: skip
    val = open_data(_config(root, resize=resize, resize_size=21), tmp_path / "cache").val
    steps = [v2.Resize(21), v2.CenterCrop(16)] if resize == "crop" else [v2.Resize((16, 16))]
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    transform = v2.Compose([*steps, *finish])
    wanted = torch.stack([transform(Image.open(root / name).convert("RGB")) for name in val.names])
    found, labels = _all(_eval(val, mean=mean, std=std))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert labels.tolist() == val.labels.tolist()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batches_have_the_layout_asked_for(square: Images, layout: torch.memory_format) -> None:
    config = AugmentConfig(rotation=10.0, hue=0.1)
    for x, _ in [*_train(square, config, memory_format=layout).epoch(1),
                 *_eval(square, memory_format=layout)]:  # fmt: skip
        assert x.dtype == torch.float32
        assert x.is_contiguous(memory_format=layout)


AUGMENTATIONS = [
    AugmentConfig(),
    AugmentConfig(horizontal_flip=0.5, crop_padding=3),
    AugmentConfig(horizontal_flip=0.5, random_resized_crop=(0.2, 1.0), rotation=15.0, contrast=0.3),
    AugmentConfig(
        preset="basic", strength=0.5, vertical_flip=0.5, erasing=0.5, mixup=0.3, cutmix=1.0
    ),
    AugmentConfig(preset="heavy", policy="randaugment", cached_views=2),
    AugmentConfig(policy="trivialaugment", perspective=0.3, scale=(0.8, 1.2), grayscale=0.5),
]


@pytest.mark.parametrize("config", AUGMENTATIONS)
def test_resident_and_single_pictures_give_the_same_bits(
    square: Images, config: AugmentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = _all(_train(square, config).epoch(1))[0], _all(_eval(square))[0]
    monkeypatch.setattr(loader, "_fits", lambda *_: False)
    single = _all(_train(square, config).epoch(1))[0], _all(_eval(square))[0]
    assert all(torch.equal(a, b) for a, b in zip(resident, single, strict=True))


def test_joined_sets_are_copied_up_to_a_limit(
    square: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond it they are read where they lie; the bits are the same."""
    joined = concat(square, square, square)
    resident = _all(_train(joined).epoch(1))
    monkeypatch.setattr(loader, "_MOST_COPIED", square.stacked().nbytes)
    alone = _all(_train(square).epoch(1))

    def never(self: Images) -> Any:
        raise AssertionError("a copy was made")

    monkeypatch.setattr(type(joined), "stacked", never)
    for mine, theirs in zip(_all(_train(joined).epoch(1)), resident, strict=True):
        assert torch.equal(mine, theirs)
    assert len(alone[0]) == len(square)


@pytest.mark.parametrize("config", AUGMENTATIONS)
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_streamed_pictures_give_the_same_bits(
    ragged: Path, tmp_path: Path, config: AugmentConfig, resize: str
) -> None:
    mapped = open_data(_config(ragged, resize=resize), tmp_path / "cache")
    streamed = open_data(_config(ragged, resize=resize, cache_limit_gb=0.0), tmp_path / "cache")
    assert streamed.train.streamed
    assert not mapped.train.streamed
    assert (streamed.mean, streamed.std) == (mapped.mean, mapped.std)
    assert torch.equal(_all(_eval(mapped.val))[0], _all(_eval(streamed.val))[0])
    wanted, labels = _all(_train(mapped.train, config).epoch(1))
    found = _all(_train(streamed.train, config).epoch(1))
    assert torch.equal(found[0], wanted)
    assert torch.equal(found[1], labels)


def test_processes_give_the_same_bits_and_leave_torchs_generator(
    ragged: Path, tmp_path: Path
) -> None:
    config = AUGMENTATIONS[2]
    mapped = open_data(_config(ragged), tmp_path / "cache")
    streamed = open_data(_config(ragged, cache_limit_gb=0.0), tmp_path / "cache")
    both, same = concat(streamed.train, streamed.val), concat(mapped.train, mapped.val)
    batches = _train(both, config, loader_workers=1)
    before = torch.get_rng_state()
    with_processes = [_all(batches.epoch(n))[0] for n in (1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    plain = _train(same, config)
    for n, found in enumerate(with_processes, 1):
        assert torch.equal(found, _all(plain.epoch(n))[0])


def test_a_crop_outside_the_picture_is_black() -> None:
    picture = torch.full((5, 6, 3), 9, dtype=torch.uint8)
    out = torch.full((4, 4, 3), 7, dtype=torch.uint8)
    loader.crop(picture, (-1, 4, 4, 4), out)
    assert out[..., 0].tolist() == [[0] * 4, [9, 9, 0, 0], [9, 9, 0, 0], [9, 9, 0, 0]]


def test_a_resized_crop_equals_torchvision_on_uint8() -> None:
    picture = torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8)
    out = torch.empty(16, 16, 3, dtype=torch.uint8)
    loader.crop(picture, (3, 5, 40, 33), out)
    wanted = v2.functional.resized_crop(picture.permute(2, 0, 1), 3, 5, 40, 33, [16, 16])
    assert (out.permute(2, 0, 1).int() - wanted.int()).abs().max() <= 1


def test_normalisation_uses_mean_and_deviation(square: Images) -> None:
    plain, _ = _all(_eval(square))
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.25, 0.125])
    found, _ = _all(_eval(square, mean=mean.tolist(), std=std.tolist()))
    wanted = (plain.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)


def _numbers(fail_at: int | None = None) -> Iterator[int]:
    for i in range(1, 100):
        if i == fail_at:
            raise ValueError("at 3")
        yield i


def _helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_items_made_ahead_keep_order_and_errors() -> None:
    assert list(loader._prefetch(_numbers())) == list(range(1, 100))
    failing = loader._prefetch(_numbers(fail_at=3))
    assert [next(failing), next(failing)] == [1, 2]
    with pytest.raises(ValueError, match="at 3"):
        next(failing)
    assert not _helpers()


def test_closing_ends_the_thread_that_works_ahead() -> None:
    ahead = loader._prefetch(_numbers())
    assert next(ahead) == 1
    assert _helpers()
    ahead.close()
    assert not _helpers()


def _by_content(batches: TrainBatches, epoch: int) -> set[bytes]:
    return {picture.numpy().tobytes() for picture in _all(batches.epoch(epoch))[0]}


def test_cached_views_return_whatever_the_seed(square: Images) -> None:
    config = AugmentConfig(preset="heavy", policy="trivialaugment", erasing=0.5, cached_views=3)
    one, other = _train(square, config, seed=1), _train(square, config, seed=2)
    views = [_by_content(one, epoch) for epoch in (1, 2, 3)]
    assert [_by_content(other, epoch) for epoch in (4, 5, 6)] == views
    assert views[0] != views[1] != views[2] != views[0]
    assert not torch.equal(_all(one.epoch(1))[0], _all(one.epoch(4))[0])  # the order is new


def test_mixed_batches_bring_both_labels(square: Images) -> None:
    plain = list(_train(square).epoch(1))
    mixed = list(_train(square, AugmentConfig(mixup=1.0)).epoch(1))
    for (pictures, labels), (blended, both) in zip(plain, mixed, strict=True):
        assert isinstance(both, ops.Mixed)
        assert torch.equal(both.labels, labels)
        assert torch.equal(both.others, labels.roll(1))
        wanted = both.weight * pictures + (1 - both.weight) * pictures.roll(1, 0)
        torch.testing.assert_close(blended, wanted, atol=1e-3, rtol=0)


def test_what_is_erased_gets_the_mean_colour(square: Images) -> None:
    batches = _train(square, AugmentConfig(erasing=1.0), mean=(0.3, 0.4, 0.5), std=(0.2, 0.2, 0.2))
    plain = _train(square, mean=(0.3, 0.4, 0.5), std=(0.2, 0.2, 0.2))
    found, wanted = _all(batches.epoch(1))[0], _all(plain.epoch(1))[0]
    erased = (found == 0).all(1, keepdim=True)
    assert (erased.sum((1, 2, 3)) > 0).float().mean() > 0.9
    assert torch.equal(found, torch.where(erased, 0.0, wanted))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", AUGMENTATIONS[1:])
def test_an_epoch_on_cuda_never_waits_and_shows_the_same(
    square: Images, config: AugmentConfig
) -> None:
    batches = _train(square, config, device=torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = list(batches.epoch(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = torch.cat([pictures for pictures, _ in drawn]).cpu()
    wanted = _all(_train(square, config).epoch(1))[0]
    # Levels of 0..255; cut rather than rounded, a policy's may fall to either side.
    assert (found - wanted).abs().mean() < 0.5
