"""Random changes of training images."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from hpo.config.base import ConfigModel, Ratio, as_tuple, fail

Range = Annotated[tuple[float, float], BeforeValidator(as_tuple)]
Jitter = Annotated[float, Field(ge=0, le=1)]

_FLIP = {"horizontal_flip": 0.5}
PRESETS: dict[str, dict[str, Any]] = {
    "basic": {**_FLIP, "crop_padding": 4},
    "advanced": {
        **_FLIP,
        "crop_padding": 4,
        **{"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1},
    },
    "heavy": {
        **_FLIP,
        "random_resized_crop": (0.6, 1.0),
        "rotation": 15.0,
        **{"translate": 0.1, "scale": (0.9, 1.1), "shear": 10.0},
        "perspective": 0.2,
        **{"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1},
        "grayscale": 0.1,
    },
}
"""What `augment.preset` stands for."""

_CROPS = "crop_padding", "random_resized_crop"
PRESET_OR_CROP = frozenset({"augment.preset", *(f"augment.{name}" for name in _CROPS)})
"""Fields on whose values it depends what a preset expands to."""
_MULTIPLIED = (
    *("rotation", "translate", "shear", "perspective", "perspective_probability"),
    *("brightness", "contrast", "saturation", "hue", "grayscale", "erasing", "mixup", "cutmix"),
)
_LEAST_AREA, _LEAST_SCALE = 0.01, 0.1


class AugmentConfig(ConfigModel):
    """Random changes of training images; all off by default.

    They happen in this order: crop, flips, policy, one resampling (rotation, affine, perspective),
    brightness, contrast, saturation, hue, grayscale, erasing, then mixup or cutmix of the batch.
    """

    preset: Literal["none", "basic", "advanced", "heavy"] = "none"
    """Fields in one word; those given beside it win, and what is stored is the fields. basic: flip,
    crop_padding 4. advanced: the same and colour jitter. heavy: flip, random resized crop,
    rotation, affine, perspective, colour jitter, grayscale."""
    strength: float = Field(default=1.0, ge=0, le=2)
    """Multiplies every magnitude and probability, each kept within its range, but no flip comes
    above 0.5 by it. Of [least, most] of area and scale the distance from 1 is multiplied. 0: all
    is off."""
    cached_views: int = Field(default=0, ge=0, le=1024)
    """Fixed augmented views of each image, the same for every training seed: epoch e shows view
    e modulo this; 0: drawn anew in every epoch."""
    horizontal_flip: Ratio = 0.0
    """Probability of a left-right flip."""
    vertical_flip: Ratio = 0.0
    """Probability of a top-bottom flip."""
    crop_padding: int = Field(default=0, ge=0, le=256)
    """Pixels of black padding on each side before a random crop back to image_size; 0: off."""
    random_resized_crop: Range | None = None
    """[least, most] part of the image's area in a random resized crop (aspect 3/4 to 4/3), taken
    from the whole image; None: off."""
    policy: Literal["none", "randaugment", "trivialaugment"] = "none"
    """Random operations of torchvision's set: randaugment: policy_ops of them with one magnitude;
    trivialaugment: one of any magnitude (TrivialAugmentWide)."""
    policy_ops: int = Field(default=2, ge=1, le=8)
    """randaugment only: operations for each image, one after another."""
    policy_magnitude: int | None = Field(default=None, ge=0, le=30)
    """Steps of 30. randaugment: magnitude of every operation, default 9; trivialaugment: largest
    magnitude drawn, default 30."""
    rotation: float = Field(default=0.0, ge=0, le=180)
    """Random rotation within +- this many degrees."""
    translate: Ratio = 0.0
    """Random shift along each axis within +- this part of the side, in whole pixels."""
    scale: Range | None = None
    """[least, most] factor of size; None: off."""
    shear: float = Field(default=0.0, ge=0, le=80)
    """Random shear along the horizontal within +- this many degrees."""
    perspective: float = Field(default=0.0, ge=0, le=0.5)
    """Random perspective: each corner moves by up to this part of half the side."""
    perspective_probability: Ratio = 0.5
    """Probability of that perspective."""
    brightness: Jitter = 0.0
    """Colour jitter: factor within 1 +- this."""
    contrast: Jitter = 0.0
    """Colour jitter: factor within 1 +- this."""
    saturation: Jitter = 0.0
    """Colour jitter: factor within 1 +- this."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Colour jitter: shift within +- this part of the colour circle."""
    grayscale: Ratio = 0.0
    """Probability of losing all colour."""
    erasing: Ratio = 0.0
    """Probability of erasing a rectangle (0.02 to 0.33 of the area, aspect 0.3 to 3.3), which gets
    the mean colour: 0 after normalisation."""
    mixup: float = Field(default=0.0, ge=0, le=10)
    """alpha of mixup: each batch is blended with itself, shifted by one image, by a weight from
    Beta(alpha, alpha), and its labels likewise; 0: off. train_top1 then counts the label of the
    larger weight. Beside cutmix: one of both for each batch, evenly."""
    cutmix: float = Field(default=0.0, ge=0, le=10)
    """alpha of cutmix: as mixup, but a rectangle of that part of the area is replaced."""

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, data: Any) -> Any:
        """Add the preset's fields that are not given; of the two crops, keep the one given."""
        preset = PRESETS.get(str(data.get("preset"))) if isinstance(data, dict) else None
        if preset is None:
            return data
        given = {name: value for name, value in data.items() if name != "preset"}
        if any(given.get(name) for name in _CROPS):
            preset = {name: value for name, value in preset.items() if name not in _CROPS}
        return {**preset, **given}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        crop, scale = self.random_resized_crop, self.scale
        if crop is not None and not 0 < crop[0] <= crop[1] <= 1:
            fail("random_resized_crop", list(crop), "[least, most] with 0 < least <= most <= 1")
        if crop is not None and self.crop_padding:
            fail("crop_padding", self.crop_padding, "0 beside random_resized_crop: use one crop")
        if scale is not None and not 0 < scale[0] <= scale[1] <= 10:
            fail("scale", list(scale), "[least, most] with 0 < least <= most <= 10")
        if self.cached_views and (self.mixup or self.cutmix):
            mixing = "mixup" if self.mixup else "cutmix"
            fail("cached_views", self.cached_views, f"0 with {mixing}: it mixes each batch anew")
        return self

    def scaled(self) -> AugmentConfig:
        """Return the same with `strength` 1, its effect worked into the fields."""
        if self.strength == 1:
            return self
        if self.strength == 0:
            return AugmentConfig(cached_views=self.cached_views)
        values = {name: self._times(name) for name in _MULTIPLIED}
        flips = {
            name: min(self._times(name), max(getattr(self, name), 0.5))
            for name in ("horizontal_flip", "vertical_flip")
        }
        padding = round(self._times("crop_padding"))
        ranges = {
            "random_resized_crop": self._stretched(self.random_resized_crop, _LEAST_AREA, 1.0),
            "scale": self._stretched(self.scale, _LEAST_SCALE, 10.0),
        }
        magnitude = min(30, round(self.magnitude * self.strength))
        whole = {"crop_padding": padding, "policy_magnitude": magnitude, "strength": 1.0}
        return self.model_copy(update={**values, **flips, **ranges, **whole})

    @property
    def magnitude(self) -> int:
        """`policy_magnitude`, or what None stands for."""
        if self.policy_magnitude is not None:
            return self.policy_magnitude
        return 30 if self.policy == "trivialaugment" else 9

    def _times(self, name: str) -> float:
        """Return a field times `strength`, at most the largest value that it may have."""
        bounds = type(self).model_fields[name].metadata
        largest = next(bound.le for bound in bounds if hasattr(bound, "le"))
        return float(min(getattr(self, name) * self.strength, largest))

    def _stretched(
        self, range_: tuple[float, float] | None, least: float, most: float
    ) -> tuple[float, float] | None:
        """Return both ends `strength` times as far from 1, within `least` and `most`."""
        if range_ is None:
            return None
        least = min(least, range_[0])
        low, high = (min(max(1 + (end - 1) * self.strength, least), most) for end in range_)
        return low, high
