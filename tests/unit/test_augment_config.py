"""Augmentation as it is asked for: presets, strength, rules, and how a study stores them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hpo.config.augment import PRESETS, AugmentConfig
from hpo.config.study import StudyFile, dump_config, load_config, parse_study
from hpo.config.train import TrainConfig
from hpo.errors import ConfigError


def _augment(**fields: Any) -> AugmentConfig:
    return TrainConfig.parse({"augment": fields}).augment


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_stands_for_its_fields(name: str) -> None:
    found = _augment(preset=name)
    assert found == _augment(**PRESETS[name])
    assert found.preset == "none"
    assert found.horizontal_flip == 0.5


def test_presets_grow() -> None:
    assert PRESETS["basic"] == {"horizontal_flip": 0.5, "crop_padding": 4}
    assert PRESETS["basic"].items() <= PRESETS["advanced"].items()
    jitter = {"brightness", "contrast", "saturation", "hue"}
    assert jitter == set(PRESETS["advanced"]) - set(PRESETS["basic"])
    more = {"rotation", "random_resized_crop", "perspective", "grayscale", "translate"}
    assert jitter | more <= set(PRESETS["heavy"])


def test_fields_beside_a_preset_win() -> None:
    found = _augment(preset="heavy", rotation=0.0, hue=0.05)
    assert (found.rotation, found.hue, found.shear) == (0.0, 0.05, 10.0)


def test_a_crop_beside_a_preset_takes_the_place_of_its_own() -> None:
    assert _augment(preset="heavy", crop_padding=2).random_resized_crop is None
    assert _augment(preset="basic", random_resized_crop=[0.5, 1.0]).crop_padding == 0
    assert _augment(preset="heavy", crop_padding=0).random_resized_crop == (0.6, 1.0)


def test_an_export_holds_fields_and_no_preset(tmp_path: Any) -> None:
    config = TrainConfig.parse({"augment": {"preset": "heavy", "rotation": 5.0}})
    path = tmp_path / "best.toml"
    path.write_text(dump_config(config))
    assert "heavy" not in path.read_text()
    assert load_config(path)[0] == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "hevy"}, r'augment.preset: "hevy".*heavy'),
        ({"strength": 2.5}, "augment.strength: 2.5: .*less than or equal to 2"),
        ({"scale": [1.2, 0.8]}, r"augment.scale: \[1.2, 0.8\]: \[least, most\]"),
        ({"scale": [0.0, 1.0]}, "augment.scale: .*0 < least"),
        ({"perspective": 0.6}, "augment.perspective: 0.6: .*less than or equal to 0.5"),
        ({"policy": "randaug"}, 'augment.policy: "randaug".*randaugment'),
        ({"policy_magnitude": 31}, "augment.policy_magnitude: 31"),
        ({"mixup": -0.1}, "augment.mixup: -0.1"),
        ({"cached_views": 4, "mixup": 0.2}, "augment.cached_views: 4: 0 with mixup"),
        ({"cached_views": 4, "cutmix": 1.0}, "augment.cached_views: 4: 0 with cutmix"),
        ({"crop_padding": 4, "random_resized_crop": [0.5, 1.0]}, "augment.crop_padding: 4"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _augment(**fields)


def test_strength_multiplies_within_each_range() -> None:
    given = {
        **{"horizontal_flip": 0.4, "vertical_flip": 0.7, "crop_padding": 3},
        **{"rotation": 100.0, "translate": 0.1, "shear": 50.0},
        **{"perspective": 0.3, "perspective_probability": 0.4, "grayscale": 0.6, "erasing": 0.1},
        **{"brightness": 0.3, "contrast": 0.7, "saturation": 0.2, "hue": 0.3},
        **{"mixup": 0.2, "cutmix": 6.0, "policy": "randaugment"},
    }
    scaled = _augment(**given, scale=[0.8, 1.5], strength=2.0).scaled()
    found = scaled.model_dump()
    wanted = {
        **{"horizontal_flip": 0.5, "vertical_flip": 0.7, "crop_padding": 6},
        **{"rotation": 180.0, "translate": 0.2, "shear": 80.0},
        **{"perspective": 0.5, "perspective_probability": 0.8, "grayscale": 1.0, "erasing": 0.2},
        **{"brightness": 0.6, "contrast": 1.0, "saturation": 0.4, "hue": 0.5},
        **{"mixup": 0.4, "cutmix": 10.0, "policy": "randaugment", "policy_magnitude": 18},
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert scaled.scale == pytest.approx((0.6, 2.0))
    assert scaled.strength == 1.0


@pytest.mark.parametrize(
    ("crop", "strength", "wanted"),
    [
        ([0.6, 0.9], 0.5, (0.8, 0.95)),
        ([0.6, 0.9], 2.0, (0.2, 0.8)),
        ([0.2, 0.3], 2.0, (0.01, 0.01)),
        ([0.005, 1.0], 2.0, (0.005, 1.0)),
    ],
)
def test_strength_moves_both_ends_of_the_area(
    crop: list[float], strength: float, wanted: tuple[float, float]
) -> None:
    found = _augment(random_resized_crop=crop, strength=strength).scaled().random_resized_crop
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("policy", "strength", "magnitude"),
    [
        ("randaugment", 1.0, 9),
        ("randaugment", 0.5, 4),
        ("trivialaugment", 1.0, 30),
        ("trivialaugment", 0.5, 15),
        ("trivialaugment", 2.0, 30),
    ],
)
def test_strength_scales_the_policy(policy: str, strength: float, magnitude: int) -> None:
    assert _augment(policy=policy, strength=strength).scaled().magnitude == magnitude


def test_strength_0_is_off_and_1_changes_nothing() -> None:
    config = _augment(preset="heavy", policy="randaugment", mixup=0.2)
    assert config.scaled() is config
    assert _augment(**config.model_dump() | {"strength": 0.0}).scaled() == AugmentConfig()


SEARCHED = """
[train]
augment.erasing = 0.25
[space]
augment.preset = ["none", "basic", "heavy"]
augment.strength = {low = 0.5, high = 2.0}
"""


def test_a_searched_preset_is_expanded_in_each_trial() -> None:
    study = parse_study(SEARCHED, defaults={"name": "s"})
    stored = json.loads(json.dumps(study.definition()))
    assert stored["train"]["augment"] == {"erasing": 0.25}
    again = StudyFile.from_definition(stored)
    heavy = again.config({"augment.preset": "heavy", "augment.strength": 1.5}).augment
    assert heavy == _augment(**PRESETS["heavy"], erasing=0.25, strength=1.5)
    plain = again.config({"augment.preset": "none", "augment.strength": 1.0}).augment
    assert plain == _augment(erasing=0.25)


def test_a_fixed_preset_is_stored_as_its_fields() -> None:
    text = SEARCHED.replace('[space]\naugment.preset = ["none", "basic", "heavy"]',
                            'augment.preset = "basic"\n[space]')  # fmt: skip
    stored = parse_study(text, defaults={"name": "s"}).definition()["train"]["augment"]
    assert stored["preset"] == "none"
    assert (stored["horizontal_flip"], stored["crop_padding"]) == (0.5, 4)


def test_a_searched_crop_takes_the_place_of_the_presets_in_each_trial() -> None:
    text = '[train]\naugment.preset = "heavy"\n[space]\naugment.crop_padding = [0, 4]\n'
    again = StudyFile.from_definition(parse_study(text, defaults={"name": "s"}).definition())
    whole, padded = (again.config({"augment.crop_padding": n}).augment for n in (0, 4))
    assert whole.random_resized_crop == (0.6, 1.0)
    assert padded.random_resized_crop is None
    assert whole.rotation == padded.rotation == 15.0
