"""Checkpoints and weights on disk."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import safetensors
import torch

from hpo.config.model import CnnConfig, ModelConfig
from hpo.config.train import TrainConfig
from hpo.errors import Damaged, DataError, DiskFull
from hpo.io import KEY
from hpo.training import models
from hpo.training.checkpoint import Checkpoint, best_weights, load_trained, save_weights


def checkpoint(**fields: Any) -> Checkpoint:
    base: dict[str, Any] = {
        "config": TrainConfig.parse({}).to_dict(),
        "metrics": [{"val_loss": 1.0}, {"val_loss": 2.0}],
        "best_epoch": 1,
        "micro_batch": 4,
        "model": {"weight": torch.ones(2)},
        "best": {"weight": torch.zeros(2)},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
    }
    return Checkpoint(**(base | fields))


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "epoch-2.ckpt"
    checkpoint().save(path)
    loaded = Checkpoint.load(path)
    assert loaded.epoch == 2
    assert loaded.optimizer["param_groups"] == [{"lr": 0.1, "betas": (0.9, 0.999)}]
    assert torch.equal(loaded.model["weight"], torch.ones(2))
    loaded.require(TrainConfig.parse({}))


def test_the_best_weights_may_be_the_current_ones(tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "a")
    checkpoint(best=None).save(tmp_path / "b")
    assert best_weights(tmp_path / "a")["weight"].sum() == 0
    assert best_weights(tmp_path / "b")["weight"].sum() == 2


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "epoch-1.ckpt"
    checkpoint(micro_batch=1).save(path)

    def broken(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint(micro_batch=2).save(path)
    assert Checkpoint.load(path).micro_batch == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("most", [0, 100, 1200])
def test_what_does_not_fit_leaves_what_was_there(
    tmp_path: Path, small_files: Callable[[int], None], most: int
) -> None:
    path, weights = tmp_path / "epoch-1.ckpt", tmp_path / "weights.safetensors"
    checkpoint(micro_batch=1).save(path)
    size = path.stat().st_size
    small_files(most)
    with pytest.raises(
        DiskFull, match=r"epoch-1\.ckpt does not fit: the disk mounted at"
    ) as caught:
        checkpoint(micro_batch=1).save(path)
    assert caught.value.path == path
    assert abs(caught.value.needed - size) < 100  # its own name is in it
    with pytest.raises(DiskFull, match=r"weights\.safetensors"):
        save_weights(weights, {"a": torch.zeros(1000)}, {})
    assert Checkpoint.load(path).micro_batch == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_checkpoint_says_where_it_was_wanted(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match=r"epoch-1\.ckpt is not on this host"):
        Checkpoint.load(tmp_path / "epoch-1.ckpt")


def test_no_flipped_bit_is_read(tmp_path: Path) -> None:
    """Wherever it is: the file is refused, or, where the byte means nothing, all of it is there."""
    path = tmp_path / "epoch-2.ckpt"
    checkpoint(model={"weight": torch.randn(50)}).save(path)
    whole, sound = path.read_bytes(), Checkpoint.load(path)
    refused = 0
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = Checkpoint.load(path)
        except Damaged:
            refused += 1
            continue
        assert str(found) == str(sound)
        assert torch.equal(found.model["weight"], sound.model["weight"])
    assert refused > 500
    for length in (len(whole) - 40, len(whole) // 2, 1):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            Checkpoint.load(path)


def test_a_folder_in_the_place_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "epoch-1.ckpt").mkdir()
    with pytest.raises(Damaged, match=r"cannot be read: .*directory"):
        Checkpoint.load(tmp_path / "epoch-1.ckpt")


@pytest.mark.parametrize("content", [b"", b"nonsense that is long enough"])
def test_a_damaged_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "epoch-1.ckpt").write_bytes(content)
    with pytest.raises(Damaged, match=r"cannot be read|not plain tensors"):
        Checkpoint.load(tmp_path / "epoch-1.ckpt")


def test_where_the_images_lie_may_differ() -> None:
    here = {"data": {"dataset": "folder", "root": "here", "loader_workers": 1}}
    there = {"data": {"dataset": "folder", "root": "there", "loader_workers": 4}}
    kept = checkpoint(config=TrainConfig.parse(here).to_dict())
    kept.require(TrainConfig.parse(there))
    with pytest.raises(Damaged, match="seed = 0 instead of 1"):
        kept.require(TrainConfig.parse(there | {"seed": 1}))


def test_trained_weights_come_back_with_their_metadata(tmp_path: Path) -> None:
    config = ModelConfig(cnn=CnnConfig(filters=(4,)))
    model = models.build(config, classes=3, image_size=8).to(memory_format=torch.channels_last)
    path = tmp_path / "weights.safetensors"
    save_weights(path, model.state_dict(), {"classes": '["a", "b", "c"]'})
    loaded = load_trained(path, config, classes=3, image_size=8)
    images = torch.randn(2, 3, 8, 8)
    assert not loaded.training
    torch.testing.assert_close(loaded(images), model.eval()(images))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"classes": '["a", "b", "c"]', KEY: ANY}
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = load_trained(path, config, classes=3, image_size=8).state_dict()
        except DataError:
            refused += 1
            continue
        for name, value in model.state_dict().items():
            assert torch.equal(found[name], value)
    assert refused > len(whole) - 30  # all but the checksum itself


def test_weights_of_another_network(tmp_path: Path) -> None:
    model = models.build(ModelConfig(cnn=CnnConfig(filters=(4,))), classes=3, image_size=8)
    save_weights(tmp_path / "weights.safetensors", model.state_dict(), {})
    with pytest.raises(DataError, match="does not hold this network"):
        load_trained(
            tmp_path / "weights.safetensors",
            ModelConfig(cnn=CnnConfig(filters=(8,))),
            classes=3,
            image_size=8,
        )
