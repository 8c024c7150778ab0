"""Small folders of pictures by class, for tests: each class has its colour and its shape."""

from __future__ import annotations

import colorsys
import random
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw


def picture(label: int, classes: int, size: tuple[int, int], source: random.Random) -> Image.Image:
    """A noisy ground with a square or a disc of the class's colour somewhere on it."""
    width, height = size
    noise = Image.frombytes("RGB", size, source.randbytes(width * height * 3))
    grounded = Image.blend(Image.new("RGB", size, (90, 90, 90)), noise, 0.3)
    side = min(width, height) // 2
    left, top = source.randint(0, width - side), source.randint(0, height - side)
    colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(label / classes, 0.9, 0.9))
    draw = ImageDraw.Draw(grounded)
    shape = draw.ellipse if label % 2 else draw.rectangle
    shape((left, top, left + side, top + side), fill=colour)
    return grounded


def make_folder(
    root: Path,
    splits: Mapping[str, int] | None = None,
    *,
    count: int = 8,
    classes: int = 3,
    size: tuple[int, int] = (40, 30),
    varied: bool = False,
    extension: str = "png",
    seed: int = 0,
) -> Path:
    """`root` with `splits` pictures of each class under train/, val/..., or, without `splits`,
    `count` of each class under one folder per class. Classes are class0, class1, ...; `varied`:
    sizes differ by a few pixels."""
    source = random.Random(seed)
    for part, many in (splits or {"": count}).items():
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(many):
                more = (source.randint(0, 9), source.randint(0, 9)) if varied else (0, 0)
                shape = size[0] + more[0], size[1] + more[1]
                picture(label, classes, shape, source).save(folder / f"{i:04}.{extension}")
    return root
