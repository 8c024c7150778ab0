"""RandAugment and TrivialAugment: each operation, its magnitudes and its frequency."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from hpo.training import augment as aug
from hpo.training.augment import policies

NAMES = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "color": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
}
"""Ours and torchvision's."""

THEIRS: dict[str, Any] = {
    "randaugment": v2.RandAugment(interpolation=InterpolationMode.BILINEAR),
    "trivialaugment": v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
}


def _pictures(count: int, size: int = 24) -> torch.Tensor:
    """Smooth, noisy, dark and single-coloured ones."""
    source = torch.Generator().manual_seed(3)
    batch = torch.rand(count, size, size, 3, generator=source) * 255
    batch[1::4] *= torch.linspace(0, 1, size)[:, None]
    batch[2::4] = batch[2::4] * 0.3 + 20
    batch[3::4] = 77.0
    return batch.to(torch.uint8)


def _applied(pixels: torch.Tensor, kinds: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    warps = policies.matrices(kinds, amounts, pixels.shape[1])
    return policies.apply_operations(pixels.clone(), kinds, amounts, warps)


def _theirs(policy: str, picture: torch.Tensor, name: str, amount: float) -> torch.Tensor:
    """torchvision's operation, from our units to its own."""
    if name == "solarize":
        amount /= 255
    transform = THEIRS[policy]
    changed: torch.Tensor = transform._apply_image_or_video_transform(
        picture.permute(2, 0, 1), NAMES[name], amount, transform.interpolation, transform._fill
    )
    return changed.permute(1, 2, 0)


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> tuple[int, float]:
    """The largest difference of a value, and the share of values that differ."""
    distance = (found.int() - wanted.int()).abs()
    return int(distance.max()), float((distance > 0).float().mean())


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
@pytest.mark.parametrize("size", [24, 224])
def test_magnitudes_are_torchvisions(policy: Any, size: int) -> None:
    table = policies.magnitudes(policy, size)
    space = THEIRS[policy]._AUGMENTATION_SPACE
    assert [NAMES[name] for name in policies.OPERATIONS] == list(space)
    for row, name in zip(table, policies.OPERATIONS, strict=True):
        values, signed = space[NAMES[name]]
        wanted = values(policies.BINS, size, size)
        wanted = torch.zeros(policies.BINS) if wanted is None else wanted.float()
        if name.startswith("translate"):
            wanted = wanted.trunc()
        if name == "solarize":
            wanted = wanted * 255
        assert torch.equal(row, wanted), name
        assert signed == (name in policies._SIGNED), name


@pytest.mark.parametrize("name", policies.OPERATIONS)
@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_each_operation_equals_torchvisions(policy: Any, name: str) -> None:
    pixels = _pictures(8)
    kind = policies.OPERATIONS.index(name)
    bins = torch.tensor([0, 4, 9, 15, 20, 25, 29, 30])
    amounts = policies.magnitudes(policy, 24)[kind, bins]
    if name in policies._SIGNED:
        amounts[::2] *= -1
    found = _applied(pixels, torch.full((8, 1), kind), amounts[:, None])
    wanted = [_theirs(policy, p, name, float(a)) for p, a in zip(pixels, amounts, strict=True)]
    largest, share = _apart(found, torch.stack(wanted))
    # What is close to a whole number may be cut to either side of it.
    assert largest <= 1
    assert share < 0.01


def test_rounds_follow_each_other_on_each_picture() -> None:
    pixels = _pictures(40)
    kinds, amounts = policies.draw_operations(
        "randaugment", 40, 3, 9, 24, torch.Generator().manual_seed(5)
    )
    found = _applied(pixels, kinds, amounts)
    wanted = []
    for picture, column, values in zip(pixels, kinds, amounts, strict=True):
        for kind, amount in zip(column.tolist(), values.tolist(), strict=True):
            picture = _theirs("randaugment", picture, policies.OPERATIONS[kind], amount)
        wanted.append(picture)
    distance = (found.int() - torch.stack(wanted).int()).abs()
    # A level of difference grows where a later operation is steep, as equalize is.
    assert distance.float().mean() < 0.2
    assert (distance > 2).float().mean() < 0.01


@pytest.mark.parametrize(("policy", "magnitude"), [("randaugment", 9), ("trivialaugment", 30)])
def test_operations_bins_and_signs_are_even(policy: Any, magnitude: int) -> None:
    count = 28_000
    kinds, amounts = policies.draw_operations(
        policy, count, 1, magnitude, 32, aug.generator(0, 1, "policy")
    )
    found = kinds.flatten().bincount(minlength=14)
    assert (found - count / 14).abs().max() < 4 * math.sqrt(count / 14)
    turns = amounts[kinds == policies.OPERATIONS.index("rotate")]
    assert abs((turns < 0).float().mean() - (turns > 0).float().mean()) < 4 / math.sqrt(len(turns))
    if policy == "randaugment":
        assert turns.abs().unique().tolist() == [9.0]
    else:
        values, counts = turns.abs().unique(return_counts=True)
        torch.testing.assert_close(values, torch.linspace(0, 135, 31))
        assert (counts - len(turns) / 31).abs().max() < 4 * math.sqrt(len(turns) / 31)


def test_a_smaller_magnitude_narrows_trivialaugment() -> None:
    kinds, amounts = policies.draw_operations(
        "trivialaugment", 5_000, 1, 10, 32, aug.generator(0, 1, "p")
    )
    turns = amounts[kinds == policies.OPERATIONS.index("rotate")].abs()
    assert turns.max() == 45.0
    assert len(turns.unique()) == 11
