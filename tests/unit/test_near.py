"""Near-duplicates: perceptual hashes, and splits that keep what looks alike together."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from hpo.config.data import DataConfig
from hpo.data import duplicates
from hpo.data.dataset import describe, open_data, open_test
from hpo.data.duplicates import cluster_hashes, perceptual_hash

SIZE = (60, 45)


def photo(seed: int) -> Image.Image:
    """Smooth blobs: unlike noise, what a photograph has in its low frequencies."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 7, 3), np.uint8)
    return Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC)


def reencoded(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    return Image.open(file).convert("RGB")


def apart(one: Image.Image, other: Image.Image) -> int:
    found = []
    for image in (one, other):
        small = image.resize((32, 32), Image.Resampling.BILINEAR).convert("L")
        value = perceptual_hash(np.asarray(small, np.float64))
        assert value is not None
        found.append(value)
    return (found[0] ^ found[1]).bit_count()


def test_copies_are_near_and_others_far() -> None:
    for seed in range(20):
        image = photo(seed)
        assert apart(image, reencoded(image)) <= 8
        assert apart(image, image.resize((31, 22), Image.Resampling.BILINEAR)) <= 8
        assert apart(image, ImageEnhance.Brightness(image).enhance(0.9)) <= 8
        assert apart(image, photo(seed + 100)) > 12
        assert apart(image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) > 12


def test_what_is_flat_is_near_to_nothing() -> None:
    assert perceptual_hash(np.full((32, 32), 7.0)) is None


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**64 - 1)), min_size=1, max_size=25),
    st.lists(st.tuples(st.integers(0, 24), st.sets(st.integers(0, 63), max_size=7)), max_size=20),
    st.integers(0, 12),
)
@settings(max_examples=80, deadline=None)
def test_clusters_are_those_of_all_pairs(
    bases: list[tuple[int, int]], copies: list[tuple[int, set[int]]], most: int
) -> None:
    values = [value for _, value in bases]
    values += [values[i % len(bases)] ^ sum(1 << bit for bit in bits) for i, bits in copies]
    labels = cluster_hashes(np.array(values, np.uint64), most)
    expected = list(range(len(values)))
    for i, one in enumerate(values):
        for j, other in enumerate(values[:i]):
            if (one ^ other).bit_count() <= most:
                old, new = expected[i], expected[j]
                expected = [new if label == old else label for label in expected]
    pairs = {(a, b) for a, b in zip(labels.tolist(), expected, strict=True)}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@pytest.mark.slow
def test_many_hashes_are_compared_quickly() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**64, 50_000, np.uint64)
    values[25_000:] = values[:25_000] ^ np.uint64(1 << 40)
    began = time.perf_counter()
    labels = cluster_hashes(values, 6)
    assert len(np.unique(labels)) == 25_000
    assert (labels[25_000:] == labels[:25_000]).all()
    assert time.perf_counter() - began < 60  # all pairs one by one would take hours


def folder(root: Path, part: str = "", first: int = 0, quality: int = 95) -> Path:
    for label in range(2):
        at = root / part / f"class{label}"
        at.mkdir(parents=True, exist_ok=True)
        for i in range(first, first + 10):
            photo(100 * label + i).save(at / f"{part}{i:03}_{quality}.jpg", quality=quality)
    return root


def config(root: Path, **values: Any) -> DataConfig:
    return DataConfig(**{"dataset": "folder", "root": str(root), "image_size": 16, **values})


def scenes(*names: str) -> set[str]:
    return {f"{Path(name).parent.name} {Path(name).name[-10:-7]}" for name in names}


def test_copies_stay_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    for quality in (95, 80, 60):
        folder(root, quality=quality)
    made = config(root, near_duplicates=8, test_fraction=0.2, val_fraction=0.2)
    data, test = open_data(made, tmp_path / "cache"), open_test(made, tmp_path / "cache")
    assert test is not None
    seen = [scenes(*images.names) for images in (data.train, data.val, test)]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 20
    assert data.warnings == ("60 images are near-duplicates, in 20 groups",)
    plain = open_data(config(root), tmp_path / "cache")
    assert scenes(*plain.train.names) & scenes(*plain.val.names)
    folds = open_data(made.model_copy(update={"folds": 3}), tmp_path / "cache", folded=True).folds
    for one in folds:
        assert not scenes(*one.train.names) & scenes(*one.val.names)
    counts = describe(made)
    assert sum(counts["val"].values()) == len(data.val)

    def never(*args: Any) -> Any:
        raise AssertionError(args)

    monkeypatch.setattr(duplicates, "_hash_of", never)  # they are remembered
    assert open_data(made, tmp_path / "cache").fingerprint == data.fingerprint


def test_copies_on_two_sides_of_given_parts_are_told(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", "train")
    folder(root, "val", first=7, quality=50)
    folder(root, "test", first=30)
    same = root / "train/class0/train007_95.jpg"
    (root / "val/class0/same.jpg").write_bytes(same.read_bytes())
    (root / "test/class0/broken.jpg").write_bytes(b"no image")
    data = open_data(config(root, near_duplicates=8), tmp_path / "cache")
    assert data.warnings == (
        "1 file of val is identical to files of train",
        "13 images are near-duplicates, in 6 groups",
        "6 images of val are near-duplicates of images of train (val/class0/val007_50.jpg, "
        "val/class0/val008_50.jpg, val/class0/val009_50.jpg, ...)",
    )


def test_a_rotated_copy_that_says_so_is_a_copy(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", "train")
    folder(root, "val", first=30)
    turned = photo(3).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown, it is turned back
    turned.save(root / "val/class0/turned.jpg", quality=95, exif=exif)
    told = open_data(config(root, near_duplicates=8), tmp_path / "cache").warnings
    name = "val/class0/turned.jpg"
    expected = f"1 images of val are near-duplicates of images of train ({name})"
    assert expected in told
    ignored = config(root, near_duplicates=8, orientation="ignore")
    assert expected not in open_data(ignored, tmp_path / "cache").warnings


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "other"])
def test_damaged_hashes_are_computed_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = config(folder(tmp_path / "data"), near_duplicates=8)
    data = open_data(made, tmp_path / "cache")
    (memo,) = (tmp_path / "cache/near").glob("*.json")
    text = memo.read_bytes()
    digit = text.rindex(b"3")
    flipped = text[:digit] + b"7" + text[digit + 1 :]
    new = {"cut": text[:-20], "emptied": b"", "flipped": flipped, "other": b"[1, 2]"}[damage]
    memo.write_bytes(new)
    assert open_data(made, tmp_path / "cache").fingerprint == data.fingerprint
    assert memo.read_bytes() == text
    assert "is damaged; the hashes of images are computed again" in caplog.text
