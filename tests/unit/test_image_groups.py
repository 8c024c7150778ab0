"""Splits that keep groups of images together."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo.config.data import DataConfig
from hpo.config.train import TrainConfig
from hpo.data.dataset import describe, open_data, open_test
from hpo.data.split import Item, make_folds, merge_groups, split_groups
from hpo.errors import ConfigError, DataError
from tests.harness.images import make_folder, picture

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}
IMAGES = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 12)), min_size=1, max_size=90
)
"""(class, content, group) of each image; the same content may be in two classes, and in two
groups."""


def grouped(images: list[tuple[int, int, int]], named: str = "{}") -> list[Item]:
    items = [Item(named.format(i), label, f"{c}") for i, (label, c, _) in enumerate(images)]
    groups = {named.format(i): named.format(f"g{group}") for i, (*_, group) in enumerate(images)}
    return merge_groups({"all": items}, [groups])["all"]


@given(IMAGES, st.integers(0, 5), st.booleans())
@settings(max_examples=100, deadline=None)
def test_neither_groups_nor_contents_are_parted(
    images: list[tuple[int, int, int]], seed: int, folded: bool
) -> None:
    items = grouped(images)
    parts = (
        make_folds(items, 3, seed) if folded else list(split_groups(items, SHARES, seed).values())
    )
    assert sorted(one.name for part in parts for one in part) == sorted(one.name for one in items)
    for facts in (
        [{images[int(one.name)][2] for one in part} for part in parts],
        [{one.digest for one in part} for part in parts],
    ):
        assert sum(map(len, facts)) == len(set().union(*facts))
    for label in {label for label, *_ in images}:
        own = {one.key for one in items if one.label == label}
        pure = all(one.label == label for one in items if one.key in own)
        if pure and len(own) >= len(parts):
            assert all(any(one.label == label for one in part) for part in parts)


@given(IMAGES, st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_names_do_not_matter(images: list[tuple[int, int, int]], seed: int) -> None:
    one = split_groups(grouped(images), SHARES, seed)
    other = split_groups(grouped(images, "x{}/y")[::-1], SHARES, seed)
    for part, items in one.items():
        assert sorted((i.label, i.digest) for i in items) == sorted(
            (i.label, i.digest) for i in other[part]
        )


@given(st.lists(st.sets(st.integers(0, 2), min_size=1), min_size=3, max_size=7), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_class_is_in_every_part_if_that_can_be(patients: list[set[int]], seed: int) -> None:
    """Of patients with images of several classes."""
    items = [
        Item(f"{patient} {label}", label, f"{patient} {label}", group=f"{patient}")
        for patient, labels in enumerate(patients)
        for label in sorted(labels)
    ]
    classes = set().union(*patients)
    ways = itertools.product(range(3), repeat=len(patients))
    can = any(
        all(any(label in patients[i] for i, at in enumerate(way) if at == part)
            for part in range(3) for label in classes)
        for way in ways
    )  # fmt: skip
    if can:
        for parts in (make_folds(items, 3, seed), list(split_groups(items, SHARES, seed).values())):
            assert all({one.label for one in part} == classes for part in parts)


def test_groups_of_equal_size_are_divided_as_asked_for() -> None:
    items = grouped([(g % 2, 10 * g + i, g) for g in range(100) for i in range(10)])
    counts = {part: Counter(one.label for one in found)
              for part, found in split_groups(items, SHARES, 0).items()}  # fmt: skip
    for label in (0, 1):
        assert [counts[part][label] for part in SHARES] == pytest.approx([350, 75, 75], abs=10)
    moved = split_groups(items, SHARES, 1)
    assert {one.name for one in moved["val"]} != {
        one.name for one in split_groups(items, SHARES, 0)["val"]
    }


def test_what_two_relations_connect_is_one() -> None:
    items = [Item("a", 0, "1"), Item("b", 0, "2"), Item("c", 1, "2"), Item("d", 1, "3"),
             Item("e", 1, "4")]  # fmt: skip
    (found,) = merge_groups({"all": items}, [{"a": "p", "b": "p"}, {"c": "p", "d": "p"}]).values()
    assert len({one.key for one in found[:4]}) == 1  # a-b by a group, b-c by content, c-d
    assert found[4].key != found[0].key
    assert merge_groups({"all": items}, [{}, {}]) == {"all": items}


def _config(root: Path, **values: Any) -> DataConfig:
    return DataConfig(**{"dataset": "folder", "root": str(root), "image_size": 16, **values})


def patients(root: Path, part: str = "", first: int = 0, many: int = 8) -> Path:
    """Two classes with a folder of three images for each patient; every second patient has images
    of both classes."""
    source = random.Random(first)
    for label in (0, 1):
        for patient in range(first, first + many):
            if patient % 2 or patient % 4 == 2 * label:
                folder = root / part / f"class{label}" / f"P{patient:02}"
                folder.mkdir(parents=True)
                for i in range(3):
                    picture(label, 2, (20, 16), source).save(folder / f"{i}.png")
    return root


def _patients(names: tuple[str, ...]) -> set[str]:
    return {re.findall(r"P\d+", name)[0] for name in names}


@pytest.mark.parametrize(
    "group_by", ["folder", r"regex:/(P\d+)/", r"regex:P\d+", "regex:(x)|(P.+)/"]
)
def test_a_patient_is_on_one_side(tmp_path: Path, group_by: str) -> None:
    config = _config(patients(tmp_path / "data", many=12), group_by=group_by, test_fraction=0.2)
    data, test = open_data(config, tmp_path / "cache"), open_test(config, tmp_path / "cache")
    assert test is not None
    seen = [_patients(images.names) for images in (data.train, data.val, test)]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 12
    for images in (data.train, data.val, test):
        assert set(images.labels.tolist()) == {0, 1}
    again = open_data(config.model_copy(update={"group_by": "regex:.*"}), tmp_path / "cache")
    assert _patients(again.train.names) & _patients(again.val.names)  # without it they are not
    folds = open_data(config.model_copy(update={"folds": 3}), tmp_path / "cache", folded=True).folds
    for one in folds:
        assert not _patients(one.train.names) & _patients(one.val.names)
        assert not _patients(test.names) & _patients(one.train.names + one.val.names)


def test_given_parts_that_share_patients_are_told(tmp_path: Path) -> None:
    root = patients(tmp_path / "data", "train")
    patients(root, "test", first=5)
    data = open_data(_config(root, group_by="folder"), tmp_path / "cache")
    assert any(
        one.startswith("3 groups of test are also in train (P05, P06, P07): test does not measure")
        for one in data.warnings
    )
    assert not _patients(data.train.names) & _patients(data.val.names)


@pytest.mark.parametrize(
    ("group_by", "message"),
    [
        (r"regex:Q\d", r"finds no group for 36 of 36 images \(class0/P00/0\.png, .*of its own"),
        (r"regex:P0[01]", r"finds no group for 27 of 36 images \(class0/P03/0\.png"),
        (r"regex:\d*$", r"finds no group for 36 of 36 images"),
        (
            r"regex:^class\d",
            r"class 'class[01]' has too few groups of images \(1\) to leave one for",
        ),
    ],
)
def test_a_pattern_that_does_not_group_is_refused(
    tmp_path: Path, group_by: str, message: str
) -> None:
    root = patients(tmp_path / "data")
    for use in (lambda c: open_data(c, tmp_path / "cache"), describe):
        with pytest.raises(DataError, match=message):
            use(_config(root, group_by=group_by))


def test_the_rest_may_stand_alone(tmp_path: Path) -> None:
    root = patients(tmp_path / "data")
    assert sum(describe(_config(root, group_by=r"regex:(P0[01])|.*"))["val"].values()) > 0


def test_images_beside_the_folders_of_groups_are_refused(tmp_path: Path) -> None:
    root = patients(tmp_path / "data")
    (root / "class0/P00/0.png").rename(root / "class0/loose.png")
    with pytest.raises(DataError, match=r"for 1 of 36 images \(class0/loose\.png\): every image"):
        describe(_config(root, group_by="folder"))


def test_groups_too_large_for_a_part_are_told(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", count=40, classes=2)
    config = _config(root, group_by=r"regex:class./00[0-3]", val_fraction=0.05, test_fraction=0.0)
    data = open_data(config, tmp_path / "cache")
    assert data.warnings == (
        "val has 20 of 80 images, 4 were asked for: groups are not divided, and the largest has 10",
    )


def test_folds_that_groups_make_uneven_are_told(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"train": 30, "test": 3}, classes=2)
    config = _config(root, group_by=r"regex:class.(/00)[01]|class.(/002.*)", folds=3)
    told = open_data(config, tmp_path / "cache", folded=True).warnings
    assert [one[:6] for one in told if one.startswith("fold ")] == ["fold 0", "fold 1", "fold 2"]
    assert any("has 40 of 60 images, 20 were asked for" in one for one in told)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("regex:(", "not a regular expression: missing"),
        ("regex:", 'allowed: "folder", or "regex:" and'),
        ("patient", 'allowed: "folder", or "regex:" and'),
    ],
)
def test_what_is_no_grouping_is_refused(value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.group_by: .*{re.escape(message)}"):
        TrainConfig.parse({"data": {"group_by": value}})
    with pytest.raises(ConfigError, match="images of digits lie in no folders of groups"):
        TrainConfig.parse({"data": {"group_by": "folder"}})


def test_splits_without_groups_are_as_they_were(tmp_path: Path) -> None:
    assert open_data(DataConfig(), tmp_path).fingerprint == "5ca317ac1adca384"
    limited = DataConfig(limit_train=100, split_seed=3)
    assert open_data(limited, tmp_path).fingerprint == "b871694dbff18f14"
