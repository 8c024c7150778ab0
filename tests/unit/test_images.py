"""Pixels of a file: which way up, on what background, of which pixel format."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from hpo.config.data import DataConfig
from hpo.data.dataset import FolderReader, open_data
from hpo.data.images import Form, Sizing, decode, decode_with_form, image_digest, open_file, to_rgb
from hpo.data.stanford_cars import BoxReader
from hpo.errors import ConfigError, DataError
from tests.harness.images import make_folder, picture

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3, (0,) * 3


def sizing(side: int = 4, **values: Any) -> Sizing:
    return Sizing(False, side, side, **{"max_pixels": 10**6, **values})


def read(file: Path, **values: Any) -> tuple[Image.Image, Form]:
    return decode_with_form(FolderReader(file.parent), file.name, sizing(**values))


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """Colours at the top left, top right, bottom right and bottom left."""
    right, bottom = image.width - 1, image.height - 1
    places = ((0, 0), (right, 0), (right, bottom), (0, bottom))
    return [tuple(int(one > 127) for one in image.getpixel(at)) for at in places]  # type: ignore[union-attr]


def marked() -> Image.Image:
    """6 x 4, each corner in a colour of its own."""
    values = np.zeros((4, 6, 3), np.uint8)
    values[:2, :3], values[:2, 3:], values[2:, 3:], values[2:, :3] = RED, GREEN, BLUE, WHITE
    return Image.fromarray(values)


# Orientation

UPRIGHT = {
    1: "rgbw", 2: "grwb", 3: "bwrg", 4: "wbgr", 5: "rwbg", 6: "wrgb", 7: "bgrw", 8: "gbwr",
}  # fmt: skip
"""By orientation: the corners of `marked` as they are to be shown, clockwise from the top left,
written down from the table in the EXIF standard (JEITA CP-3451, 4.6.4, Orientation)."""
COLOURS = {"r": (1, 0, 0), "g": (0, 1, 0), "b": (0, 0, 1), "w": (1, 1, 1)}
OPTIONS: dict[str, dict[str, Any]] = {
    "jpg": {"quality": 100, "subsampling": 0},
    "png": {},
    "webp": {"lossless": True},
    "tif": {},
}


@pytest.mark.parametrize("extension", OPTIONS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_upright(tmp_path: Path, orientation: int, extension: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"x.{extension}"
    marked().save(file, exif=exif, **OPTIONS[extension])
    shown, form = read(file)
    assert shown.size == ((4, 6) if orientation >= 5 else (6, 4))
    assert corners(shown) == [COLOURS[one] for one in UPRIGHT[orientation]]
    if extension != "tif":  # Pillow turns a TIFF before anybody else can
        assert form.orientation == orientation
        stored, form = read(file, orientation="ignore")
        assert corners(stored) == [COLOURS[one] for one in UPRIGHT[1]]
        assert form.orientation == 1


def _xmp(orientation: int) -> bytes:
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="'
        + str(orientation).encode()
        + b'"/></rdf:RDF></x:xmpmeta>'
    )


def test_an_orientation_in_xmp_counts(tmp_path: Path) -> None:
    marked().save(tmp_path / "x.jpg", xmp=_xmp(6), **OPTIONS["jpg"])
    assert read(tmp_path / "x.jpg")[1].orientation == 6


def test_an_exif_block_behind_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, held = tmp_path / "plain.png", io.BytesIO()
    marked().save(plain)
    marked().save(held, "png", exif=exif)
    whole = held.getvalue()
    at = whole.index(b"eXIf") - 4
    block = whole[at : at + 12 + int.from_bytes(whole[at : at + 4], "big")]
    data = plain.read_bytes()
    (tmp_path / "late.png").write_bytes(data[:-12] + block + data[-12:])
    shown, form = read(tmp_path / "late.png")
    assert (form.orientation, shown.size) == (6, (4, 6))


BROKEN = {
    "no block": b"Exif\0\0garbage that is no TIFF header",
    "empty": b"Exif\0\0",
    "cut": b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01",
    "far away": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x05\0\0\0\x01\x7f\0\0\0\0\0\0\0",
    "text": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02six\0\0\0\0\0",
    "zero": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\0\0\0\0\0\0\0",
    "nine": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0\0\0\0\0",
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_exif_leaves_the_image_as_it_is(tmp_path: Path, kind: str, extension: str) -> None:
    file = tmp_path / f"x.{extension}"
    marked().save(file, exif=BROKEN[kind], **OPTIONS[extension])
    shown, form = read(file)
    assert form.orientation == 1
    assert corners(shown) == [COLOURS[one] for one in UPRIGHT[1]]


def test_sizes_and_limits_are_of_the_upright_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 20)).save(tmp_path / "x.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"20 x 60 pixels, data\.max_pixels allows 1000"):
        read(tmp_path / "x.jpg", max_pixels=1000)
    assert read(tmp_path / "x.jpg", side=10)[0].size == (10, 30)


def test_a_box_is_of_the_stored_pixels_and_what_is_cut_out_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    marked().save(tmp_path / "x.jpg", exif=exif, **OPTIONS["jpg"])
    source = BoxReader(tmp_path, 10**6, {"x.jpg": ((0, 0, 3, 4), "a.mat")})
    shown = decode(source, "x.jpg", sizing(side=3))
    assert shown.size == (4, 3)
    assert corners(shown) == [COLOURS[one] for one in "wrrw"]


# Backgrounds


def _hiding(mode: str) -> Image.Image:
    """4 x 4, the left half opaque green or grey 200, the right half transparent, red or grey 50
    below that."""
    values = np.full((4, 4, 4), (*GREEN, 255), np.uint8)
    values[:, 2:] = (*RED, 0)
    if mode == "LA":
        grey = np.full((4, 4, 2), (200, 255), np.uint8)
        grey[:, 2:] = (50, 0)
        return Image.fromarray(grey, "LA")
    return Image.fromarray(values)


def _rgba(file: Path) -> None:
    _hiding("RGBA").save(file)


def _la(file: Path) -> None:
    _hiding("LA").save(file)


def _palette(file: Path) -> None:
    image = _hiding("RGBA").convert("RGB").quantize(2)
    hidden = image.getpixel((3, 0))
    alpha = bytes(0 if i == hidden else 255 for i in range(2))
    image.save(file, transparency=alpha)


def _palette_index(file: Path) -> None:
    image = _hiding("RGBA").convert("RGB").quantize(2)
    image.save(file, transparency=image.getpixel((3, 0)))


def _colour_key(file: Path) -> None:
    _hiding("RGBA").convert("RGB").save(file, transparency=RED)


def _grey_key(file: Path) -> None:
    _hiding("LA").convert("L").save(file, transparency=50)


def _one_bit_key(file: Path) -> None:
    values = np.zeros((4, 4), bool)
    values[:, :2] = True
    Image.fromarray(values).save(file, transparency=0)


def chunk(kind: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    check = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def _deep_key(file: Path) -> None:
    """A 16-bit grey PNG, written by hand: Pillow keeps the key of none."""
    values = np.full((4, 4), 200 << 8, ">u2")
    values[:, 2:] = 0x3232

    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 4, 4, 16, 0, 0, 0, 0)
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(">H", 0x3232))
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )  # fmt: skip


HIDING: dict[str, tuple[str, Callable[[Path], None]]] = {
    "RGBA": ("png", _rgba),
    "RGBA in WebP": ("webp", lambda file: _hiding("RGBA").save(file, lossless=True)),
    "RGBA in TIFF": ("tif", _rgba),
    "LA": ("png", _la),
    "a palette": ("png", _palette),
    "an index of a palette": ("png", _palette_index),
    "GIF": ("gif", _palette_index),
    "a colour of RGB": ("png", _colour_key),
    "a value of grey": ("png", _grey_key),
    "a value of one bit": ("png", _one_bit_key),
    "a value of 16 bits": ("png", _deep_key),
}


@pytest.mark.parametrize(
    ("background", "ground"),
    [("white", WHITE), ("black", BLACK), ("grey", (128,) * 3), ("#0a14FF", (10, 20, 255))],
)
@pytest.mark.parametrize("kind", HIDING)
def test_hidden_colours_are_not_seen(
    tmp_path: Path, kind: str, background: str, ground: tuple[int, ...]
) -> None:
    extension, make = HIDING[kind]
    file = tmp_path / f"x.{extension}"
    make(file)
    shown, form = read(file, background=background)
    assert form.transparent
    below, _ = read(file, background="ignore")
    pixels, hidden = np.asarray(shown), np.asarray(below)
    assert (pixels[:, 2:] == ground).all()
    np.testing.assert_array_equal(pixels[:, :2], hidden[:, :2])


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA"])
def test_rarer_modes_with_alpha(mode: str) -> None:
    rgba = _hiding("LA" if mode == "La" else "RGBA")
    image = rgba.convert("RGB").quantize(2).convert("PA") if mode == "PA" else rgba.convert(mode)
    if mode == "PA":
        image.putalpha(rgba.getchannel("A"))
    shown, transparent = to_rgb(image, "#0a14ff")
    assert transparent
    assert image.mode == mode
    assert shown.getpixel((3, 0)) == (10, 20, 255)
    assert shown.getpixel((0, 0)) == ((200,) * 3 if mode == "La" else GREEN)


def test_half_transparent_is_a_mixture(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (*RED, 128)).save(tmp_path / "x.png")
    assert read(tmp_path / "x.png")[0].getpixel((0, 0)) == (255, 127, 127)
    assert read(tmp_path / "x.png", background="ignore")[0].getpixel((0, 0)) == RED


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_opaque_alpha_channel_changes_nothing(tmp_path: Path, mode: str) -> None:
    plain = picture(1, 3, (20, 16), random.Random(0)).convert(mode[:-1])
    plain.convert(mode).save(tmp_path / "x.png")
    shown, form = read(tmp_path / "x.png", side=16)
    assert not form.transparent
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(plain.convert("RGB")))


@pytest.mark.parametrize("value", ["blue", "#12345", "White", ""])
def test_backgrounds_that_are_none(value: str) -> None:
    from hpo.config.train import TrainConfig

    with pytest.raises(ConfigError, match="allowed: white, black, grey, ignore, or #rrggbb"):
        TrainConfig.parse({"data": {"background": value}})


# Pixel formats

DEEP = np.array([[0, 0x00FF, 0x4000], [0x8000, 0xFEFF, 0xFFFF]])
HIGH = [[0, 0, 0x40], [0x80, 0xFE, 0xFF]]


@pytest.mark.parametrize(
    ("extension", "dtype"),
    [
        ("png", "<u2"),
        ("tif", "<u2"),
        ("tif", ">u2"),
        ("tif", "<i4"),
        ("pgm", "<u2"),
        ("jp2", "<u2"),
    ],
)  # fmt: skip
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, extension: str, dtype: str) -> None:
    file = tmp_path / f"x.{extension}"
    Image.fromarray(DEEP.astype(dtype)).save(file)
    shown, form = read(file, side=2)
    assert form.mode.startswith("I")
    assert np.asarray(shown).tolist() == [[[one] * 3 for one in row] for row in HIGH]


def test_sixteen_bits_of_colour_agree_with_those_of_grey(tmp_path: Path) -> None:
    """Pillow reads 16-bit RGB itself; both must give the same of the same values."""
    rows = b"".join(
        b"\0" + b"".join(struct.pack(">HHH", *[int(one)] * 3) for one in row) for row in DEEP
    )

    header = struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)
    (tmp_path / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )  # fmt: skip
    shown, _ = read(tmp_path / "x.png", side=2)
    assert np.asarray(shown)[:, :, 0].tolist() == HIGH


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (Image.new("F", (4, 4), 0.5), r"pixel format F \(floating point"),
        (Image.new("LAB", (4, 4)), r"pixel format LAB \(CIE"),
        (Image.fromarray(np.full((4, 4), 70_000, np.int32)), "pixel format I with values .* 70000"),
        (Image.fromarray(np.full((4, 4), -1, np.int32)), "pixel format I with values from -1"),
    ],
)
def test_formats_without_a_range_are_refused_by_name(
    tmp_path: Path, image: Image.Image, says: str
) -> None:
    image.save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=says):
        read(tmp_path / "x.tif")


def test_a_refused_format_is_named_when_the_data_are_opened(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"train": 3, "val": 2})
    Image.new("F", (8, 8), 0.5).save(root / "train/class1/f.tif")
    config = {"dataset": "folder", "root": str(root), "image_size": 8}
    with pytest.raises(DataError, match=r"train/class1/f\.tif \(pixel format F"):
        open_data(DataConfig(**config), tmp_path / "cache")
    left = open_data(DataConfig(**config, skip_unreadable=True), tmp_path / "cache")
    assert [name.split(" (")[0] for name in left.unreadable] == ["train/class1/f.tif"]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "1", "L", "P"])
def test_other_formats_are_what_pillow_makes_of_them(tmp_path: Path, mode: str) -> None:
    image = marked().convert(mode)
    image.save(tmp_path / "x.tif")
    shown, form = read(tmp_path / "x.tif")
    assert form == Form(mode)
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(image.convert("RGB")))


# What a data set remembers


def _config(root: Path, **values: Any) -> DataConfig:
    return DataConfig(**{"dataset": "folder", "root": str(root), "image_size": 8, **values})


def _turn(file: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(file).save(file, exif=exif)


def _make_transparent(file: Path) -> None:
    image = Image.open(file).convert("RGBA")
    image.putpixel((0, 0), (1, 2, 3, 0))
    image.save(file)


@pytest.mark.parametrize(
    ("spoil", "field", "other"),
    [
        (_turn, "orientation", "ignore"),
        (_make_transparent, "background", "ignore"),
        (_make_transparent, "background", "black"),
    ],
)
def test_a_fingerprint_knows_what_was_done_to_pixels(
    tmp_path: Path, spoil: Callable[[Path], None], field: str, other: str
) -> None:
    root, store = make_folder(tmp_path / "data", {"train": 3, "val": 2}), tmp_path / "cache"
    plain = open_data(_config(root), store)
    assert open_data(_config(root, **{field: other}), store).fingerprint == plain.fingerprint
    spoil(root / "train/class1/0001.png")
    first, second = (
        open_data(_config(root), store),
        open_data(_config(root, **{field: other}), store),
    )
    assert len({plain.fingerprint, first.fingerprint, second.fingerprint}) == 3
    at = first.train.names.index("train/class1/0001.png")
    assert first.train.content != second.train.content
    assert first.train.identities[at] != second.train.identities[at]
    assert open_data(_config(root), store).fingerprint == first.fingerprint  # from the cache


def test_images_in_memory_are_told_apart_by_all_that_makes_their_pixels() -> None:
    rgba = _hiding("RGBA")
    opaque = rgba.convert("RGB")
    deep = Image.fromarray(DEEP.astype("<u2"))
    held = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    opaque.save(held, "png", exif=exif)
    turned = open_file(held)  # type: ignore[arg-type]
    other = Image.fromarray((DEEP | 1).astype("<u2"))
    found = [image_digest(one) for one in (rgba, opaque, deep, turned, other)]
    assert len(set(found)) == 5
    assert found == [image_digest(one) for one in (rgba, opaque, deep, turned, other)]
    assert image_digest(ImageOps.mirror(opaque)) not in found
