"""Each augmentation equals torchvision's on the same parameters, and is drawn as it draws."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from hpo.config.augment import AugmentConfig
from hpo.training import augment as aug
from hpo.training.augment import ops


def _batch(count: int = 6, size: int = 17) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def _sizes(count: int, height: int, width: int) -> torch.Tensor:
    return torch.tensor([[height, width]]).expand(count, 2)


@pytest.mark.parametrize(
    ("ours", "theirs", "amounts"),
    [
        (ops.brightness, tv.adjust_brightness, [0.0, 0.4, 1.0, 1.3, 1.9, 0.7]),
        (ops.contrast, tv.adjust_contrast, [0.0, 0.4, 1.0, 1.3, 1.9, 0.7]),
        (ops.saturation, tv.adjust_saturation, [0.0, 0.4, 1.0, 1.3, 1.9, 0.7]),
        (ops.hue, tv.adjust_hue, [-0.5, -0.2, 0.0, 0.1, 0.33, 0.5]),
    ],
)
def test_colour_equals_torchvision(ours: Any, theirs: Any, amounts: list[float]) -> None:
    batch = _batch()
    batch[0, :, :4] = 0.5  # grey has no hue
    batch[1, :, :4] = 0.0
    wanted = torch.stack([theirs(one, f) for one, f in zip(batch, amounts, strict=True)])
    torch.testing.assert_close(
        ours(batch.clone(), torch.tensor(amounts)), wanted, atol=2e-6, rtol=0
    )


def test_rotation_equals_torchvision() -> None:
    batch, angles = _batch(), [-170.0, -30.0, 0.0, 12.5, 90.0, 180.0]
    wanted = torch.stack(
        [
            tv.rotate(one, angle, interpolation=v2.InterpolationMode.BILINEAR)
            for one, angle in zip(batch, angles, strict=True)
        ]
    )
    rotated = ops.warp(batch, ops.rotation(torch.tensor(angles)))
    torch.testing.assert_close(rotated, wanted, atol=2e-5, rtol=0)


BILINEAR = v2.InterpolationMode.BILINEAR


def test_affine_equals_torchvision() -> None:
    batch = _batch()
    shift = torch.tensor([[0, 0], [3, 0], [0, -5], [2, 4], [-7, 1], [0, 0]])
    scale, shear = torch.tensor([1.0, 1.0, 0.7, 1.6, 1.0, 0.5]), [0.0, 0.0, 20.0, -35.0, 60.0, -8.0]
    wanted = torch.stack(
        [
            tv.affine(one, 0.0, move, factor, [angle, 0.0], interpolation=BILINEAR)
            for one, move, factor, angle in zip(
                batch, shift.tolist(), scale.tolist(), shear, strict=True
            )
        ]
    )
    matrix = ops.affine(shift, scale, torch.tensor(shear), 17)
    torch.testing.assert_close(ops.warp(batch, matrix), wanted, atol=2e-5, rtol=0)
    torch.testing.assert_close(ops.warp(batch, matrix[:, :2]), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [16, 17])
def test_perspective_equals_torchvision(size: int) -> None:
    batch, end = _batch(4, size), size - 1
    start = [[0, 0], [end, 0], [end, end], [0, end]]
    moves = torch.randint(0, size // 4, (4, 4, 2), generator=torch.Generator().manual_seed(2))
    moves[0] = 0
    inwards = torch.tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    corners = ops.corner_pixels(size) + inwards * moves
    wanted = torch.stack(
        [
            tv.perspective(one, start, goal.long().tolist(), interpolation=BILINEAR)
            for one, goal in zip(batch, corners, strict=True)
        ]
    )
    warped = ops.warp(batch, ops.perspective(corners, size))
    torch.testing.assert_close(warped, wanted, atol=1e-4, rtol=0)


def test_one_resampling_does_what_three_do() -> None:
    # A smooth picture, so that resampling it three times blurs little.
    line = torch.linspace(0, 3, 64).sin()
    batch = (line[:, None] * line.flip(0))[None, None].expand(1, 3, -1, -1) * 0.5 + 0.5
    angle, shift, scale, shear = 10.0, [3, -2], 1.1, 8.0
    corners = ops.corner_pixels(64)[None] + torch.tensor([[2, 3], [-5, 1], [0, -4], [6, 0]])
    start = ops.corner_pixels(64).long().tolist()
    wanted = tv.rotate(batch, angle, interpolation=BILINEAR)
    wanted = tv.affine(wanted, 0.0, shift, scale, [shear, 0.0], interpolation=BILINEAR)
    wanted = tv.perspective(wanted, start, corners[0].long().tolist(), interpolation=BILINEAR)
    turn = ops.rotation(torch.tensor([angle]))
    move = ops.affine(torch.tensor([shift]), torch.tensor([scale]), torch.tensor([shear]), 64)
    found = ops.warp(batch, turn @ move @ ops.perspective(corners, 64))
    inside = (..., slice(12, 52), slice(12, 52))
    torch.testing.assert_close(found[inside], wanted[inside], atol=3e-3, rtol=0)


def test_matrices_compose_into_one_resampling() -> None:
    quarter = ops.rotation(torch.tensor([90.0]))
    batch = _batch(1)
    twice = ops.warp(ops.warp(batch, quarter), quarter)
    torch.testing.assert_close(ops.warp(batch, quarter @ quarter), twice, atol=2e-5, rtol=0)


def test_flip_mirrors_the_chosen_pictures() -> None:
    batch = torch.randint(0, 256, (2, 5, 5, 3), dtype=torch.uint8)
    flipped = ops.horizontal_flip(batch.clone(), torch.tensor([True, False]))
    assert torch.equal(flipped[0], tv.horizontal_flip(batch[0].permute(2, 0, 1)).permute(1, 2, 0))
    assert torch.equal(flipped[1], batch[1])


def test_vertical_flip_mirrors_the_chosen_pictures() -> None:
    batch = torch.randint(0, 256, (2, 5, 5, 3), dtype=torch.uint8)
    flipped = ops.vertical_flip(batch.clone(), torch.tensor([False, True]))
    assert torch.equal(flipped[0], batch[0])
    assert torch.equal(flipped[1], tv.vertical_flip(batch[1].permute(2, 0, 1)).permute(1, 2, 0))


def test_grayscale_equals_torchvision_on_the_chosen_pictures() -> None:
    batch = _batch(2)
    found = ops.grayscale(batch.clone(), torch.tensor([True, False]))
    torch.testing.assert_close(found[0], tv.rgb_to_grayscale(batch[0], 3), atol=2e-6, rtol=0)
    assert torch.equal(found[1], batch[1])


def test_erase_equals_torchvision() -> None:
    batch = _batch(3)
    found = ops.erase(batch.clone(), torch.tensor([[2, 3, 5, 4], [0, 0, 0, 0], [0, 16, 16, 1]]))
    black = torch.zeros(3, 1, 1)
    assert torch.equal(found[0], tv.erase(batch[0], 2, 3, 5, 4, black))
    assert torch.equal(found[1], batch[1])
    assert torch.equal(found[2], tv.erase(batch[2], 0, 16, 16, 1, black))


class OnDevice(torch.Tensor):
    """Takes the way of a GPU, which is not asked what was chosen."""

    is_cuda = property(lambda _: True)


@pytest.mark.parametrize("change", [ops.horizontal_flip, ops.vertical_flip, ops.grayscale])
def test_what_is_chosen_changes_the_same_on_a_device(change: Any) -> None:
    batch, chosen = torch.rand(4, 3, 3, 3), torch.tensor([True, False, True, True])
    found = change(batch.clone().as_subclass(OnDevice), chosen).as_subclass(torch.Tensor)
    assert torch.equal(found, change(batch.clone(), chosen))
    assert not torch.equal(found[0], batch[0])
    assert torch.equal(found[1], batch[1])


def test_erasing_is_the_same_on_a_device() -> None:
    batch, found = _batch(5, 9), ops.erased(5, 0.7, 9, aug.generator(0, 1, "e"))
    there = ops.erase(batch.clone().as_subclass(OnDevice), found).as_subclass(torch.Tensor)
    assert torch.equal(there, ops.erase(batch.clone(), found))
    assert not torch.equal(there, batch)


def test_padded_crop_reaches_every_place_evenly() -> None:
    found = ops.padded_crop(_sizes(9_000, 8, 9), 1, 8, aug.generator(0, 1, "crop"))
    assert (found[:, 2:] == 8).all()
    for axis, places in ((0, 3), (1, 4)):
        values, counts = found[:, axis].unique(return_counts=True)
        assert values.tolist() == list(range(-1, places - 1))
        assert (counts - 9_000 / places).abs().max() < 5 * math.sqrt(9_000 / places)


@pytest.mark.parametrize(("height", "width"), [(60, 80), (80, 60), (20, 200)])
def test_random_resized_crop_has_torchvisions_distribution(height: int, width: int) -> None:
    count, scale = 4_000, (0.1, 0.9)
    ours = ops.random_resized_crop(_sizes(count, height, width), scale, aug.generator(0, 1, "c"))
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    picture = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transform = v2.RandomResizedCrop(8, scale=scale)
        drawn = [transform.make_params([picture]) for _ in range(count)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])
    _assert_same_distribution(ours, theirs)


@pytest.mark.parametrize(("height", "width"), [(10, 300), (300, 10), (60, 60), (61, 60)])
def test_random_resized_crop_falls_back_to_torchvisions_centre(height: int, width: int) -> None:
    # More than the whole area never fits, so that all ten tries fail.
    box = ops.random_resized_crop(_sizes(1, height, width), (4.0, 4.0), aug.generator(0, 1, "c"))
    params = v2.RandomResizedCrop(8, scale=(4.0, 4.0)).make_params([torch.empty(3, height, width)])
    assert box[0].tolist() == [params[name] for name in ("top", "left", "height", "width")]


def _assert_same_distribution(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Mean and deviation of each column of (N, K)."""
    for a, b in zip(ours.double().T, theirs.double().T, strict=True):
        error = math.sqrt((a.var() + b.var()) / len(a)) + 1e-9
        assert abs(a.mean() - b.mean()) < 4 * error
        assert abs(a.std() - b.std()) < 4 * error + 0.02 * b.std()


def _drawn_by(transform: Any, size: int, count: int) -> list[dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [transform.make_params([torch.empty(3, size, size)]) for _ in range(count)]


@pytest.mark.parametrize("size", [8, 32])
def test_erasing_has_torchvisions_distribution(size: int) -> None:
    count = 4_000
    ours = ops.erased(count, 1.0, size, aug.generator(0, 1, "e"))
    params = _drawn_by(v2.RandomErasing(p=1.0), size, count)
    theirs = torch.tensor([[p["i"], p["j"], p["h"], p["w"]] for p in params])
    _assert_same_distribution(ours, theirs)
    half = ops.erased(count, 0.3, size, aug.generator(0, 2, "e"))
    assert abs((half[:, 2] > 0).float().mean() - 0.3) < 4 * math.sqrt(0.21 / count)


def test_perspective_has_torchvisions_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    count, size = 4_000, 33
    drawn: list[torch.Tensor] = []
    real = ops.perspective

    def recorded(corners: torch.Tensor, size: int) -> torch.Tensor:
        drawn.append(corners)
        return real(corners, size)

    monkeypatch.setattr(ops, "perspective", recorded)
    config = AugmentConfig(perspective=0.4, perspective_probability=1.0)
    aug.draw_params(config, _sizes(count, size, size), size, seed=1, epoch=1)
    params = _drawn_by(v2.RandomPerspective(distortion_scale=0.4, p=1.0), size, count)
    theirs = torch.tensor([p["coefficients"] for p in params])
    identity = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0])
    assert theirs.shape == (count, 8)
    assert not torch.equal(theirs[0], identity)
    scale = torch.tensor([[2 / size, 0, -1], [0, 2 / size, -1], [0, 0, 1]]).double()
    pixels = scale.inverse() @ real(drawn[0], size).double() @ scale
    ours = (pixels / pixels[:, 2:, 2:]).flatten(1)[:, :8]
    _assert_same_distribution(ours, theirs)


def test_perspective_touches_the_chosen_part_alone() -> None:
    config = AugmentConfig(perspective=0.4, perspective_probability=0.25)
    matrix = aug.draw_params(config, _sizes(4_000, 9, 9), 32, seed=1, epoch=1).matrix
    assert matrix is not None
    moved = (matrix - torch.eye(3)).abs().amax((1, 2)) > 1e-5
    assert abs(moved.float().mean() - 0.25) < 4 * math.sqrt(0.1875 / 4_000)


def test_affine_has_torchvisions_distribution() -> None:
    count, size = 4_000, 32
    config = AugmentConfig(translate=0.2, scale=(0.5, 1.5), shear=30.0)
    matrix = aug.draw_params(config, _sizes(count, 9, 9), size, seed=1, epoch=1).matrix
    assert matrix is not None
    forward = torch.cat([matrix, torch.tensor([0.0, 0, 1]).expand(count, 1, 3)], 1).inverse()
    scale = forward[:, 1, 1]
    shear = torch.rad2deg(torch.atan(-forward[:, 0, 1] / scale))
    ours = torch.stack([*(forward[:, :2, 2] * size / 2).T, scale, shear], 1)
    transform = v2.RandomAffine(0, translate=(0.2, 0.2), scale=(0.5, 1.5), shear=30)
    theirs = [
        [*p["translate"], p["scale"], p["shear"][0]] for p in _drawn_by(transform, size, count)
    ]
    _assert_same_distribution(ours, torch.tensor(theirs))
    torch.testing.assert_close(ours[:, :2], ours[:, :2].round(), atol=1e-3, rtol=0)


def test_a_view_depends_on_its_number_and_the_picture_alone() -> None:
    config = AugmentConfig(preset="heavy", policy="randaugment", erasing=0.5, vertical_flip=0.5)
    sizes = _sizes(30, 20, 25)
    first = aug.draw_params(config, sizes, 16, seed=1, epoch=1, view=3)
    again = aug.draw_params(config, sizes, 16, seed=2, epoch=9, view=3)
    other = aug.draw_params(config, sizes, 16, view=4)
    for field in dataclasses.fields(aug.AugmentParams):
        values = getattr(first, field.name)
        assert values is not None, field.name
        assert torch.equal(values, getattr(again, field.name)), field.name
        assert not torch.equal(values, getattr(other, field.name)), field.name


def test_draws_stay_in_range_and_fill_it() -> None:
    config = AugmentConfig(
        horizontal_flip=0.3, rotation=20.0, brightness=0.4, contrast=1.0, saturation=0.2, hue=0.1
    )
    draws = aug.draw_params(config, _sizes(5_000, 9, 9), 9, seed=3, epoch=2)
    assert draws.flip is not None
    assert draws.matrix is not None
    assert abs(draws.flip.float().mean() - 0.3) < 4 * math.sqrt(0.21 / 5_000)
    angles = torch.rad2deg(torch.asin(draws.matrix[:, 1, 0]))
    ranges = {
        "angles": (angles, -20.0, 20.0),
        "brightness": (draws.brightness, 0.6, 1.4),
        "contrast": (draws.contrast, 0.0, 2.0),
        "saturation": (draws.saturation, 0.8, 1.2),
        "hue": (draws.hue, -0.1, 0.1),
    }
    for name, (values, low, high) in ranges.items():
        assert values is not None, name
        edge = (high - low) / 100
        assert low - 1e-4 <= values.min() < low + edge, name
        assert high - edge < values.max() <= high + 1e-4, name


def test_draws_depend_on_seed_epoch_and_nothing_else() -> None:
    sizes, alone = _sizes(50, 9, 9), AugmentConfig(horizontal_flip=0.5)
    both = AugmentConfig(horizontal_flip=0.5, crop_padding=2, hue=0.1)

    def flips(config: AugmentConfig, seed: int, epoch: int) -> list[bool]:
        flip = aug.draw_params(config, sizes, 9, seed, epoch).flip
        assert flip is not None
        return flip.tolist()

    torch.manual_seed(1)
    first = flips(alone, 5, 1)
    torch.manual_seed(2)
    assert flips(alone, 5, 1) == first == flips(both, 5, 1)
    assert flips(alone, 5, 2) != first != flips(alone, 6, 1)


def test_nothing_is_drawn_when_all_is_off() -> None:
    draws = aug.draw_params(AugmentConfig(), _sizes(3, 9, 9), 9, 0, 1)
    assert draws == aug.AugmentParams()
    batch = _batch()
    assert aug.apply_float(batch, draws) is batch


def test_apply_resamples_first_and_colours_in_order() -> None:
    batch, angle = _batch(2, 300), torch.tensor([90.0, 90.0])
    half = torch.tensor([0.5, 0.5])
    draws = aug.AugmentParams(
        matrix=ops.rotation(angle),
        brightness=half + 1,
        contrast=half,
        saturation=half,
        hue=half,
    )
    wanted = tv.adjust_brightness(tv.rotate(batch, 90.0), 1.5)
    wanted = tv.adjust_saturation(tv.adjust_contrast(wanted, 0.5), 0.5)
    torch.testing.assert_close(
        aug.apply_float(batch, draws), tv.adjust_hue(wanted, 0.5), atol=1e-4, rtol=0
    )
