"""Files that are not what was written: found by `hpo storage check --files`, and made anew."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hpo.config.train import TrainConfig
from hpo.control import NullControl
from hpo.data import arrays
from hpo.data.dataset import open_data
from hpo.doctor import files, rules
from hpo.doctor.rules import Finding
from hpo.doctor.scan import check_all, repair_all
from hpo.errors import DiskFull, Interrupted
from hpo.io import stamp_of
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search import sync
from hpo.search.study import Study
from hpo.storage.database import Database
from hpo.trained.run import TrainedRun
from hpo.training.inputs import TrainingData
from hpo.training.train import EpochResult, train
from tests.harness.commands import calls
from tests.harness.fakes import study_file
from tests.harness.searches import TINY, search
from tests.harness.trained import pictures, tiny_config, train_run


def flip(path: Path, at: float = 0.5) -> None:
    """Flip one bit at this part of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    """Lose the last block."""
    content = path.read_bytes()
    lost = min(4096, len(content) // 2)
    path.write_bytes(content[:-lost] + bytes(lost))


DAMAGES = [flip, cut, empty, zero]
each_damage = pytest.mark.parametrize("spoil", DAMAGES)


# hpo storage check --files


@pytest.fixture
def study(database: Database, home: Home) -> Study:
    """A finished search with kept checkpoints and weights, decoded images and kept features."""
    lines = f"{TINY}\nmodel.trainable_blocks = 0"
    return search(database, home, study_file(trials=3, train=lines, study="keep_checkpoints = 1"))


def spoiled(database: Database, home: Home, artifacts: str | None = None) -> list[Finding]:
    found = check_all(database, home, artifacts, files=True).findings
    return [one for one in found if one.kind == rules.DAMAGED_FILE]


def one_of(home: Home, pattern: str) -> Path:
    return sorted(path for path in home.root.rglob(pattern) if path.is_file())[0]


CACHED = ["cache/*/index.npz", "cache/*/pixels", "cache/features/*[!kd]"]


def test_what_is_whole_is_no_finding(database: Database, home: Home, study: Study) -> None:
    assert spoiled(database, home) == []


@each_damage
@pytest.mark.parametrize("pattern", [*CACHED, "*.ckpt", "predictions.npz", "*.safetensors"])
def test_damage_is_found_and_mended(
    database: Database, home: Home, study: Study, pattern: str, spoil: Callable[[Path], None]
) -> None:
    path = one_of(home, pattern)
    spoil(path)
    (found,) = spoiled(database, home)
    assert str(path if "index" not in pattern and "pixels" not in pattern else path.parent) in (
        found.message
    )
    is_result = pattern == "*.safetensors"
    assert (found.repair is None) == is_result
    mended = repair_all(database, check_all(database, home, files=True))
    assert [one.message for one in mended] == ([] if is_result else [found.message])
    assert len(spoiled(database, home)) == int(is_result)
    assert path.exists() == is_result


def test_without_the_option_no_file_is_read(database: Database, home: Home, study: Study) -> None:
    flip(one_of(home, "*.ckpt"))
    found = check_all(database, home).findings
    assert rules.DAMAGED_FILE not in {one.kind for one in found}


def test_copies_in_a_store_are_read_too(database: Database, home: Home, tmp_path: Path) -> None:
    store = tmp_path / "store"
    file = study_file(trials=2, train=TINY, study="keep_checkpoints = 1")
    made, _ = studies.create(database, file)
    sync.keep(database, made.row, sync.check(str(store), made.row, database), home)
    search(database, home, file)
    assert spoiled(database, home) == []
    copy = sorted(store.rglob("*.ckpt"))[0]
    flip(copy)
    (found,) = spoiled(database, home)
    assert str(store) in found.message
    mended = repair_all(database, check_all(database, home, files=True))
    assert [one.message for one in mended] == [found.message]
    assert not copy.exists()


def test_what_cannot_be_read_is_told_and_never_removed(
    database: Database, home: Home, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "find_damage", refuse)
    found = spoiled(database, home)
    assert len(found) > 3
    assert all("cannot be read" in one.message and one.repair is None for one in found)


def test_the_command_says_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    database: Database,
    home: Home,
    study: Study,
) -> None:
    hpo = calls(monkeypatch, capsys)
    monkeypatch.setenv("HPO_STORAGE", database.secret_url)
    assert hpo("storage", "check", "--files")[0] == 0
    path = one_of(home, "*.ckpt")
    flip(path)
    code, out, _ = hpo("storage", "check", "--files")
    assert code == 1
    assert f"damaged file: toy, trial {path.parts[-3]}: {path}: its checksum differs" in out
    assert hpo("storage", "check", "--files", "--repair")[0] == 0
    assert hpo("storage", "check", "--files")[0] == 0


def test_trained_runs_are_read_too(
    database: Database, home: Home, study: Study, trained_run: TrainedRun
) -> None:
    out = shutil.copytree(trained_run.path, home.trained("best"))
    assert spoiled(database, home) == []
    flip(out / "seed-0" / "test.npz")
    (found,) = spoiled(database, home)
    assert "test.npz: its checksum differs" in found.message
    assert found.repair is None


# What is damaged is made anew


def frozen(home: Home) -> list[EpochResult]:
    config = TrainConfig.parse(
        {
            "epochs": 2,
            "batch_size": 32,
            "data": {"dataset": "digits", "limit_train": 60},
            "model": {"cnn": {"filters": [4]}, "trainable_blocks": 0},
            "runtime": {"precision": "float32", "memory_format": "contiguous", "threads": 1},
        }
    )
    data = open_data(config.data, home.cache)
    seen = TrainingData(10, data.train, data.val, data.mean, data.std)
    device = torch.device("cpu")
    return list(train(config, seen, NullControl(), device=device, cache=home.cache))


def losses(results: list[EpochResult]) -> list[tuple[float, float]]:
    return [(one.metrics["train_loss"], one.metrics["val_loss"]) for one in results]


def after_a_start(path: Path) -> None:
    """Forget that a file was read through since the host was started."""
    stamp_of(path).unlink(missing_ok=True)


@each_damage
@pytest.mark.parametrize("pattern", CACHED)
def test_a_damaged_cache_is_made_anew(
    home: Home, pattern: str, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    first = losses(frozen(home))
    for path in home.root.glob(pattern):
        if path.is_file():
            spoil(path)
            after_a_start(path)
    with caplog.at_level(logging.WARNING):
        assert losses(frozen(home)) == first
    assert any("rebuilt" in one.getMessage() for one in caplog.records)
    caplog.clear()
    assert losses(frozen(home)) == first
    assert not caplog.records


def test_a_cache_is_read_through_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen(home)
    frozen(home)
    read: list[Path] = []
    monkeypatch.setattr("hpo.io.find_damage", lambda path, tick, sealed: read.append(path))
    frozen(home)
    assert read == []
    pixels = one_of(home, "cache/*/pixels")
    os.utime(pixels)  # somebody touched it
    frozen(home)
    assert read == [pixels]


@each_damage
def test_hpo_train_goes_back_where_its_checkpoint_is_damaged(
    tmp_path: Path, home: Home, spoil: Callable[[Path], None]
) -> None:
    config = tiny_config(pictures(tmp_path))
    whole = train_run(config, tmp_path / "whole", home, seeds=1)

    class Stop:
        def step(self, *, epoch: int, images: int) -> None:
            if epoch == 3:
                raise Interrupted("stopped by a signal")

    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train_run(config, out, home, seeds=1, control=Stop())
    (checkpoint,) = out.rglob("*.ckpt")
    spoil(checkpoint)
    lines: list[str] = []
    run = train_run(config, out, home, seeds=1, progress=lines.append)
    assert run.seeds[0].metrics["test"] == whole.seeds[0].metrics["test"]
    assert any(checkpoint.name in line for line in lines), lines


# A full disk


def test_a_full_disk_names_the_file_and_leaves_none(
    tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    small_files(200)
    path = tmp_path / "test.npz"
    with pytest.raises(DiskFull, match=r"test\.npz") as caught:
        arrays.write_arrays(path, logits=np.zeros((100, 10), np.float32))
    assert caught.value.path == path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_a_full_disk_after_the_training_names_the_file(
    tmp_path: Path, home: Home, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test logits, or the index of a retrieval, do not fit."""
    small: list[Path] = []
    real = arrays.atomic_write

    def full(path: Path, write: object, *, sealed: bool) -> None:
        if path.name in ("test.npz", "index.npz") and path.parent.name == "seed-0":
            small.append(path)
            raise DiskFull(f"{path} does not fit", path=path)
        real(path, write, sealed=sealed)  # type: ignore[arg-type]

    monkeypatch.setattr(arrays, "atomic_write", full)
    config = tiny_config(pictures(tmp_path), {"task": task})
    with pytest.raises(DiskFull, match=r"seed-0/(test|index)\.npz"):
        train_run(config, tmp_path / "run", home, seeds=1)
    monkeypatch.undo()
    assert train_run(config, tmp_path / "run", home, seeds=1).seeds[0].metrics["test"]
    assert files.damage_of(small[0]) is None
