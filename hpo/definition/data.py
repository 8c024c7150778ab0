"""Where the images come from, how they are split, and the size at which they are kept."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from hpo.definition.fields import Part, fail


class DataConfig(Part):
    """Where the images come from, how they are split, and the size at which they are kept."""

    dataset: Literal["digits", "folder"] = "digits"
    """digits: scikit-learn's 1,797 scans of handwritten digits, 8 x 8 pixels. folder: images by
    class under `root`, either train/ [val/] [test/] or one folder per class."""
    root: str | None = None
    """Folder of the images, for dataset = "folder"; relative to the working directory."""
    image_size: int = Field(default=224, ge=8, le=1024)
    """Side of the square that the model sees, in pixels; default 8 for digits, 224 otherwise."""
    resize: Literal["crop", "squash"] = "crop"
    """crop: resize the shorter side to `resize_size`, keep the aspect ratio, evaluate on the centre
    (torchvision's Resize + CenterCrop). squash: stretch to a square."""
    resize_size: int = Field(default=256, ge=8, le=2048)
    """Shorter side after resizing, in pixels; default: image_size up to 64, above it image_size x
    256 / 224, torchvision's own ratio. Not used by squash."""
    normalize: Literal["dataset", "imagenet"] = "dataset"
    """Mean and standard deviation: of the training part, or ImageNet's. With torchvision's weights
    use imagenet."""
    val_fraction: float = Field(default=0.15, gt=0, lt=1)
    """Part of the images for validation where the data has no val/ folder."""
    test_fraction: float = Field(default=0.15, ge=0, lt=1)
    """Part of the images for the test where the data has neither train/ nor test/; 0: no test."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of the split; training seeds never move an image between parts."""
    limit_train: int | None = Field(default=None, ge=1)
    """Use a seeded, stratified part of this many training images, for cheap searches."""
    skip_unreadable: bool = False
    """Leave out files that cannot be read as images (counted and listed) instead of stopping."""
    max_pixels: int = Field(default=50_000_000, ge=64)
    """Refuse images of more pixels than this before they are decoded."""
    cache_limit_gb: float = Field(default=20.0, ge=0)
    """Largest cache of decoded images, in GB (10^9 bytes); beyond it images are decoded in every
    epoch by `loader_workers` processes, with the same results. Also of what frozen layers make of
    them; beyond it those are computed in every epoch."""
    loader_workers: int = Field(default=2, ge=0, le=64)
    """Processes that decode images where no cache is used; 0: in the training process."""

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        digits = data.get("dataset", "digits") == "digits"
        size = data.setdefault("image_size", 8 if digits else 224)
        if isinstance(size, int):
            data.setdefault("resize_size", size if size <= 64 else round(size * 256 / 224))
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dataset == "folder" and not self.root:
            fail("root", self.root, 'dataset = "folder" needs the folder of the images')
        if self.dataset == "digits" and self.root:
            fail("root", self.root, 'digits come with scikit-learn; use dataset = "folder"')
        if self.resize == "crop" and self.resize_size < self.image_size:
            fail("resize_size", self.resize_size, f"at least image_size = {self.image_size}")
        if self.val_fraction + self.test_fraction >= 1:
            left = f"with test_fraction = {self.test_fraction} nothing is left for training"
            fail("val_fraction", self.val_fraction, left)
        return self
