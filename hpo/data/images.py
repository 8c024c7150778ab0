"""Labelled images: decoding, and the ways in which a data set holds them.

Mapped from a file, streamed from the original files, or concatenated sets: the same pixels.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache as once
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageColor

from hpo.config.data import DataConfig
from hpo.errors import DataError

# Pillow warns of large images when it opens them; `data.max_pixels` refuses them by the header,
# before anything is decoded.
Image.MAX_IMAGE_PIXELS = None

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are opened, by content and not by name; some of Pillow's other formats run programs
(EPS)."""

Pixels = NDArray[np.uint8]
Numbers = NDArray[np.int64]


class ImageReader(Protocol):
    """Opens images by name; must be picklable, because streaming opens them in other processes."""

    def open(self, name: str) -> Image.Image:
        """Return the image as a context manager, not decoded yet."""


@dataclass(frozen=True)
class Sizing:
    """Conversion of an image to RGB pixels: orientation, background, and size."""

    squash: bool
    image_size: int
    resize_size: int
    max_pixels: int
    orientation: str = "exif"
    background: str = "white"

    @classmethod
    def of(cls, config: DataConfig) -> Sizing:
        """Return the sizing that `config` asks for."""
        squash = config.resize == "squash"
        side = config.image_size if squash else config.resize_size
        return cls(
            squash,
            config.image_size,
            side,
            config.max_pixels,
            config.orientation,
            config.background,
        )

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) after resizing, rounded as torchvision's Resize does."""
        side = self.resize_size
        if self.squash:
            return side, side
        if width <= height:
            return side, int(side * height / width)
        return int(side * width / height), side

    def refuse(self, width: int, height: int) -> str | None:
        """Return the reason why an image of this size is not decoded; None if it may be."""
        target = self.target(width, height)
        return too_large((width, height), self.max_pixels) or too_large(
            target, self.max_pixels, " after resizing"
        )


def too_large(size: tuple[int, int], max_pixels: int, what: str = "") -> str | None:
    """Return the reason why an image of this width and height is not decoded; None if it may be."""
    width, height = size
    if width * height <= max_pixels:
        return None
    return f"{width} x {height} pixels{what}, data.max_pixels allows {max_pixels}"


def open_file(path: Path | str) -> Image.Image:
    """Open the image in a file without decoding it. Raises whatever Pillow raises for a broken
    file."""
    return Image.open(path, formats=_formats())


@once
def _formats() -> tuple[str, ...]:
    """Return the FORMATS that this build of Pillow supports."""
    Image.init()
    return tuple(one for one in FORMATS if one in Image.OPEN)


class Form(NamedTuple):
    """Format of an image file, before its conversion to RGB pixels."""

    mode: str
    """Pillow's name of the pixel format."""
    orientation: int = 1
    """EXIF orientation, 1 to 8, if the image was turned by it; 1: used as stored."""
    transparent: bool = False
    """Whether it is not fully opaque."""

    def treatment(self, background: str) -> str:
        """Return the conversions beyond what torchvision's ImageFolder does; empty for most
        images."""
        done = [f"exif {self.orientation}"] * (self.orientation != 1)
        done += [f"on {background}"] * (self.transparent and background != "ignore")
        done += ["16 bit"] * self.mode.startswith("I")
        return ", ".join(done)


_PLAIN = frozenset(["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
"""Modes of at most 8 bits that are converted to RGB directly."""
_ALPHA = frozenset(["RGBA", "LA", "PA", "RGBa", "La"])
_DEEP = frozenset(["I", "I;16", "I;16L", "I;16B", "I;16N"])
_TOLD = {"F": "floating point, without a defined range", "LAB": "CIE L*a*b*"}
REFUSED = "pixel format"
"""Prefix of the reason why an image with an unsupported mode is not read."""
OPAQUE = 255
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that makes the image upright, by EXIF orientation."""
ON_ITS_SIDE = 5
"""EXIF orientations from this one on swap width and height."""


def decode(reader: ImageReader, name: str, sizing: Sizing) -> Image.Image:
    """Return one image as RGB, upright, on its background, resized as torchvision's Resize does
    (bilinear). Raises ValueError if it is too large or its pixel format has no defined range, and
    whatever Pillow raises for a broken file."""
    return decode_with_form(reader, name, sizing)[0]


def decode_with_form(reader: ImageReader, name: str, sizing: Sizing) -> tuple[Image.Image, Form]:
    """Return the image as `decode` does, and the format of its file."""
    with reader.open(name) as image:
        require_size(image, sizing)
        image.load()
        orientation = exif_orientation(image) if sizing.orientation == "exif" else 1
        rgb, transparent = to_rgb(image, sizing.background)
        form = Form(image.mode, orientation, transparent)
    if orientation in _TURNS:
        rgb = rgb.transpose(_TURNS[orientation])
    target = sizing.target(*rgb.size)
    if rgb.size != target:
        rgb = rgb.resize(target, Image.Resampling.BILINEAR)
    return rgb, form


class ImageInfo(NamedTuple):
    """A readable image file: `form` with the orientation as stored, and the width and height of the
    upright image in pixels."""

    form: Form
    width: int
    height: int


def inspect_image(reader: ImageReader, name: str, max_pixels: int) -> ImageInfo:
    """Return the format and size of an image after decoding it completely. Raises as `decode`
    does."""
    with reader.open(name) as image:
        if reason := too_large(image.size, max_pixels):
            raise ValueError(reason)
        image.load()
        form = Form(image.mode, exif_orientation(image), to_rgb(image, "ignore")[1])
        return ImageInfo(form, *upright_size(image, "exif"))


def require_size(image: Image.Image, sizing: Sizing) -> None:
    """Raise ValueError for an image that `sizing` refuses to decode; reads only the header."""
    if sizing.refuse(*image.size):
        raise ValueError(sizing.refuse(*upright_size(image, sizing.orientation)))


def upright_size(image: Image.Image, orientation: str) -> tuple[int, int]:
    """Return (width, height) of the upright image, which may not be decoded yet."""
    width, height = image.size
    # Pillow turns a TIFF itself, and its size is that afterwards. Of a PNG it would decode all for
    # an EXIF block that may follow the pixels.
    known = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
    on_its_side = known and orientation == "exif" and exif_orientation(image) >= ON_ITS_SIDE
    return (height, width) if on_its_side else (width, height)


def exif_orientation(image: Image.Image) -> int:
    """Return the orientation in an image's EXIF or XMP data, 1 to 8; 1 if there is none or it
    cannot be read: an image with broken metadata is still an image."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return int(orientation) if orientation in _TURNS else 1
    except MemoryError:
        raise
    except Exception:  # Pillow's parsers raise anything
        return 1


def to_rgb(image: Image.Image, background: str) -> tuple[Image.Image, bool]:
    """Return an image as RGB on `background` (see `data.background`), and whether it is partly
    transparent. Raises ValueError for a pixel format without a defined range of values."""
    if image.mode not in _PLAIN | _ALPHA | _DEEP:
        raise ValueError(
            f"{REFUSED} {image.mode} ({_TOLD.get(image.mode, 'not supported')}): "
            "convert it to 8 or 16 bits a channel"
        )
    alpha = _alpha(image)
    transparent = alpha is not None and alpha.getextrema()[0] != OPAQUE
    rgb = _eight_bits(image).convert("RGB") if image.mode in _DEEP else _colours(image)
    if alpha is None or not transparent or background == "ignore":
        return rgb, transparent
    ground = Image.new("RGB", rgb.size, ImageColor.getrgb(background))
    return Image.composite(rgb, ground, alpha), True


def _alpha(image: Image.Image) -> Image.Image | None:
    """Return the alpha channel of an image in mode L; None if it has none."""
    if image.mode in _DEEP:
        hidden = image.info.get("transparency")
        if not isinstance(hidden, int):
            return None
        return Image.fromarray(np.where(np.asarray(image) == hidden, 0, OPAQUE).astype(np.uint8))
    if image.mode == "PA":
        return image.getchannel("A")
    if image.mode in _ALPHA:
        return image.getchannel("a" if image.mode in ("RGBa", "La") else "A")
    if image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info:
        return image.convert("RGBA").getchannel("A")
    return None


def _colours(image: Image.Image) -> Image.Image:
    """Return an image of 8 bits a channel as RGB, ignoring transparency."""
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    if "transparency" in image.info:
        image = image.copy()
        del image.info["transparency"]  # only makes Pillow warn; RGB has none
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return the high bytes of 16-bit grey values, as Pillow does for 16-bit RGB."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise ValueError(
            f"{REFUSED} {image.mode} with values from {low} to {high}; 0 to 65535 can be read: "
            "convert it to 8 or 16 bits a channel"
        )
    return Image.fromarray((values.astype(np.int64) >> 8).astype(np.uint8))


def image_digest(image: Image.Image) -> str:
    """Return 32 hex digits of everything that decides the pixels of an image in memory."""
    image.load()  # a TIFF is turned by that
    if image.mode in _PLAIN and "transparency" not in image.info and exif_orientation(image) == 1:
        return array_digest(np.asarray(image.convert("RGB")))
    metadata = (image.mode, exif_orientation(image), image.info.get("transparency"))
    raw = array_digest(np.asarray(image))
    palette = image.getpalette("RGBA") if image.mode in ("P", "PA") else None
    return hashlib.blake2b(repr((metadata, raw, palette)).encode(), digest_size=16).hexdigest()


def array_digest(pixels: Pixels) -> str:
    """Return 32 hex digits of the shape and values of an image."""
    data = repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class Images(ABC):
    """A set of labelled images, uint8 RGB. `labels`: (N,); `sizes`: (N, 2), height and width of
    each."""

    names: tuple[str, ...]
    labels: Numbers
    sizes: Numbers
    streamed = False
    """Whether `pixels` decodes a file at every call."""
    in_memory = False
    """Whether no process need help to decode."""
    content = ""
    """Digest of the images and their size; empty if unknown."""
    files: tuple[str, ...] = ()
    """Content digest of each image's file, 32 hex digits; empty if unknown."""

    @property
    def parts(self) -> tuple[Images, ...]:
        """The sets that were concatenated into this one, in order."""
        return (self,)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    @cached_property
    def identities(self) -> tuple[str, ...]:
        """Digest of the pixels of each image: images with equal digests are identical. Reads all of
        them, unless the digests were known on opening."""
        return tuple(array_digest(self.pixels(i)) for i in range(len(self)))

    @abstractmethod
    def pixels(self, i: int) -> Pixels:
        """Return image `i`, (H, W, 3)."""

    @property
    def uniform(self) -> bool:
        """True if all images are squares of one size, so that `stacked` works."""
        return not self.streamed and bool((self.sizes == self.sizes[0, 0]).all())

    def stacked(self) -> Pixels:
        """Return all images as one array, (N, S, S, 3). Raises ValueError unless `uniform`."""
        raise ValueError("images of several sizes, or streamed ones, have no single array")


class MemmapImages(Images):
    """Images in a memory-mapped file: one copy per host."""

    def __init__(self, file: Path, sizes: Numbers, labels: Numbers, names: tuple[str, ...]) -> None:
        self.file, self.sizes, self.labels, self.names = file, sizes, labels, names
        self._ends = np.cumsum(sizes.prod(1) * 3)
        # Copy on write: torch requires writable memory, although nothing writes.
        size = int(self._ends[-1])  # behind them is the file's checksum
        self._data: Pixels = np.asarray(np.memmap(file, np.uint8, "c", shape=(size,)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Map the file again in the other process."""
        return MemmapImages, (self.file, self.sizes, self.labels, self.names)

    def pixels(self, i: int) -> Pixels:
        """Return image `i`, (H, W, 3), without copying it."""
        height, width = self.sizes[i]
        end = self._ends[i]
        return self._data[end - height * width * 3 : end].reshape(height, width, 3)

    def stacked(self) -> Pixels:
        """Return all images as one array, (N, S, S, 3), without copying them."""
        if not self.uniform:
            return super().stacked()
        side = int(self.sizes[0, 0])
        return self._data.reshape(len(self), side, side, 3)


class StreamedImages(Images):
    """Images that are decoded at every access."""

    streamed = True

    def __init__(
        self,
        reader: ImageReader,
        sizing: Sizing,
        sizes: Numbers,
        labels: Numbers,
        names: tuple[str, ...],
    ) -> None:
        self.reader, self.sizing = reader, sizing
        self.sizes, self.labels, self.names = sizes, labels, names

    def pixels(self, i: int) -> Pixels:
        """Decode image `i`, (H, W, 3). Raises DataError if its file has become unreadable."""
        # A copy, because torch wants writable memory.
        try:
            return np.array(decode(self.reader, self.names[i], self.sizing))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"{self.names[i]}: was readable when the search began, but no longer is ({error}); "
                "put the file back"
            ) from error


class ConcatImages(Images):
    """Sets of images, one after the other."""

    def __init__(self, *sets: Images) -> None:
        self._sets = sets
        self._ends = np.cumsum([len(one) for one in sets])
        self.names = tuple(name for one in sets for name in one.names)
        self.labels = np.concatenate([one.labels for one in sets])
        self.sizes = np.concatenate([one.sizes for one in sets])
        self.streamed = any(one.streamed for one in sets)
        self.files = tuple(file for one in sets for file in one.files)

    @property
    def parts(self) -> tuple[Images, ...]:
        """The sets that were concatenated, nested ones flattened."""
        return tuple(one for part in self._sets for one in part.parts)

    @cached_property
    def identities(self) -> tuple[str, ...]:
        """Digest of the pixels of each image, set after set."""
        return tuple(identity for one in self._sets for identity in one.identities)

    def pixels(self, i: int) -> Pixels:
        """Return image `i`, (H, W, 3), counted through all sets."""
        place = int(np.searchsorted(self._ends, i, side="right"))
        return self._sets[place].pixels(i - int(self._ends[place - 1]) if place else i)

    def stacked(self) -> Pixels:
        """Return all images as one new array, (N, S, S, 3)."""
        if not self.uniform:
            return super().stacked()
        return np.concatenate([part.stacked() for part in self._sets])


def concat(*sets: Images) -> Images:
    """Concatenate sets of images in this order; a single set is returned as it is."""
    return sets[0] if len(sets) == 1 else ConcatImages(*sets)
