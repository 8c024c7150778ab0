"""Random changes of training images."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from hpo.definition.fields import Part, Ratio, fail, listed


class AugmentConfig(Part):
    """Random changes of training images; all off by default."""

    horizontal_flip: Ratio = 0.0
    """Probability of a left-right flip."""
    crop_padding: int = Field(default=0, ge=0, le=256)
    """Pixels of black padding on each side before a random crop back to image_size; 0: off."""
    random_resized_crop: Annotated[tuple[float, float], BeforeValidator(listed)] | None = None
    """[least, most] part of the picture's area in a random resized crop (aspect 3/4 to 4/3), taken
    from the whole picture; None: off."""
    rotation: float = Field(default=0.0, ge=0, le=180)
    """Random rotation within +- this many degrees."""
    brightness: float = Field(default=0.0, ge=0, le=1)
    """Colour jitter: factor within 1 +- this."""
    contrast: float = Field(default=0.0, ge=0, le=1)
    """Colour jitter: factor within 1 +- this."""
    saturation: float = Field(default=0.0, ge=0, le=1)
    """Colour jitter: factor within 1 +- this."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Colour jitter: shift within +- this part of the colour circle."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        crop = self.random_resized_crop
        if crop is not None and not 0 < crop[0] <= crop[1] <= 1:
            fail("random_resized_crop", list(crop), "[least, most] with 0 < least <= most <= 1")
        if crop is not None and self.crop_padding:
            fail("crop_padding", self.crop_padding, "0 beside random_resized_crop: use one crop")
        return self
