"""Each augmentation equals torchvision's on the same parameters, and is drawn as it draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from hpo.definition.augment import AugmentConfig
from hpo.engine import augment as aug
from hpo.engine.augment import boxes, colour, geometry


def _batch(count: int = 6, size: int = 17) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def _sizes(count: int, height: int, width: int) -> torch.Tensor:
    return torch.tensor([[height, width]]).expand(count, 2)


@pytest.mark.parametrize(
    ("ours", "theirs", "amounts"),
    [
        (colour.brightness, tv.adjust_brightness, [0.0, 0.4, 1.0, 1.3, 1.9, 0.7]),
        (colour.contrast, tv.adjust_contrast, [0.0, 0.4, 1.0, 1.3, 1.9, 0.7]),
        (colour.saturation, tv.adjust_saturation, [0.0, 0.4, 1.0, 1.3, 1.9, 0.7]),
        (colour.hue, tv.adjust_hue, [-0.5, -0.2, 0.0, 0.1, 0.33, 0.5]),
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
    rotated = geometry.warp(batch, geometry.rotation(torch.tensor(angles)))
    torch.testing.assert_close(rotated, wanted, atol=2e-5, rtol=0)


def test_matrices_compose_into_one_resampling() -> None:
    quarter = geometry.rotation(torch.tensor([90.0]))
    batch = _batch(1)
    twice = geometry.warp(geometry.warp(batch, quarter), quarter)
    torch.testing.assert_close(geometry.warp(batch, quarter @ quarter), twice, atol=2e-5, rtol=0)


def test_flip_mirrors_the_chosen_pictures() -> None:
    batch = torch.randint(0, 256, (2, 5, 5, 3), dtype=torch.uint8)
    flipped = boxes.horizontal_flip(batch.clone(), torch.tensor([True, False]))
    assert torch.equal(flipped[0], tv.horizontal_flip(batch[0].permute(2, 0, 1)).permute(1, 2, 0))
    assert torch.equal(flipped[1], batch[1])


def test_padded_crop_reaches_every_place_evenly() -> None:
    found = boxes.padded_crop(_sizes(9_000, 8, 9), 1, 8, aug.generator(0, 1, "crop"))
    assert (found[:, 2:] == 8).all()
    for axis, places in ((0, 3), (1, 4)):
        values, counts = found[:, axis].unique(return_counts=True)
        assert values.tolist() == list(range(-1, places - 1))
        assert (counts - 9_000 / places).abs().max() < 5 * math.sqrt(9_000 / places)


@pytest.mark.parametrize(("height", "width"), [(60, 80), (80, 60), (20, 200)])
def test_random_resized_crop_has_torchvisions_distribution(height: int, width: int) -> None:
    count, scale = 4_000, (0.1, 0.9)
    ours = boxes.random_resized_crop(_sizes(count, height, width), scale, aug.generator(0, 1, "c"))
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    picture = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transform = v2.RandomResizedCrop(8, scale=scale)
        drawn = [transform.make_params([picture]) for _ in range(count)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])
    for column in range(4):
        a, b = ours[:, column].double(), theirs[:, column].double()
        error = math.sqrt((a.var() + b.var()) / count) + 1e-9
        assert abs(a.mean() - b.mean()) < 4 * error
        assert abs(a.std() - b.std()) < 4 * error + 0.02 * b.std()


@pytest.mark.parametrize(("height", "width"), [(10, 300), (300, 10), (60, 60), (61, 60)])
def test_random_resized_crop_falls_back_to_torchvisions_centre(height: int, width: int) -> None:
    # More than the whole area never fits, so that all ten tries fail.
    box = boxes.random_resized_crop(_sizes(1, height, width), (4.0, 4.0), aug.generator(0, 1, "c"))
    params = v2.RandomResizedCrop(8, scale=(4.0, 4.0)).make_params([torch.empty(3, height, width)])
    assert box[0].tolist() == [params[name] for name in ("top", "left", "height", "width")]


def test_draws_stay_in_range_and_fill_it() -> None:
    config = AugmentConfig(
        horizontal_flip=0.3, rotation=20.0, brightness=0.4, contrast=1.0, saturation=0.2, hue=0.1
    )
    draws = aug.draw(config, _sizes(5_000, 9, 9), 9, seed=3, epoch=2)
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
        flip = aug.draw(config, sizes, 9, seed, epoch).flip
        assert flip is not None
        return flip.tolist()

    torch.manual_seed(1)
    first = flips(alone, 5, 1)
    torch.manual_seed(2)
    assert flips(alone, 5, 1) == first == flips(both, 5, 1)
    assert flips(alone, 5, 2) != first != flips(alone, 6, 1)


def test_nothing_is_drawn_when_all_is_off() -> None:
    draws = aug.draw(AugmentConfig(), _sizes(3, 9, 9), 9, 0, 1)
    assert draws == aug.Draws()
    batch = _batch()
    assert aug.apply(batch, draws) is batch


def test_apply_resamples_first_and_colours_in_order() -> None:
    batch, angle = _batch(2, 300), torch.tensor([90.0, 90.0])
    half = torch.tensor([0.5, 0.5])
    draws = aug.Draws(
        matrix=geometry.rotation(angle),
        brightness=half + 1,
        contrast=half,
        saturation=half,
        hue=half,
    )
    wanted = tv.adjust_brightness(tv.rotate(batch, 90.0), 1.5)
    wanted = tv.adjust_saturation(tv.adjust_contrast(wanted, 0.5), 0.5)
    torch.testing.assert_close(
        aug.apply(batch, draws), tv.adjust_hue(wanted, 0.5), atol=1e-4, rtol=0
    )
