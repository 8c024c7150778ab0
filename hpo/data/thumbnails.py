"""Thumbnails of images for reports."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from hpo.data.images import Pixels

SIDE = 96
"""Longer side of a thumbnail, in pixels."""


def thumbnail(pixels: Pixels) -> bytes:
    """Return (H, W, 3) uint8 pixels as a JPEG of at most SIDE x SIDE."""
    image = Image.fromarray(np.asarray(pixels))
    image.thumbnail((SIDE, SIDE))
    held = io.BytesIO()
    image.save(held, "JPEG", quality=80)
    return held.getvalue()
