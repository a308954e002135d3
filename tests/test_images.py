"""Faults D1 and D2: what is a page comes out upright and RGB, what is none is refused with its reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from colintern.data.images import BadImage, decode, png_bytes, standard

GREY = Image.fromarray((np.arange(1200).reshape(30, 40) // 5).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A true PNG of one bit a pixel, all white."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    line = b"\x00" + b"\xff" * (width // 8)
    data = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


TWO_PAGES, ANIMATED = (encoded(GREY, kind, save_all=True, append_images=[GREY.rotate(90)]) for kind in ("TIFF", "GIF"))
NOISE = png_bytes(Image.effect_noise((200, 200), 50))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty: 0 bytes"),
        (b"<!DOCTYPE html><title>404</title>", "not an image: 33 bytes that begin b'<!DOCTYPE html><'"),
        (b"\0" * 5000, "not an image"),
        (NOISE[:3000], "cannot be decoded"),
        (NOISE[:3000] + b"\0" * 20 + NOISE[3020:], "cannot be decoded"),
        (encoded(Image.effect_noise((200, 200), 50), "JPEG")[:1500], "cannot be decoded: image file is truncated"),
        (encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "floating-point"),
        (TWO_PAGES, "holds 2 pages"),
        (TWO_PAGES[:1362], "cannot be decoded"),
        (ANIMATED[:1669], "cannot be decoded"),
    ],
    ids=["empty", "html", "zeros", "cut", "damaged", "cut jpeg", "float", "two pages", "cut tiff", "cut gif"],
)
def test_what_is_no_page_is_refused_with_its_reason(data, reason):
    for read in (decode, standard):
        with pytest.raises(BadImage, match=reason):
            read(data)


@pytest.mark.parametrize(("width", "height"), [(14_000, 14_000), (9_600, 9_600)])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(width, height):
    data = bomb(width, height)
    assert len(data) < 190_000
    with pytest.raises(BadImage, match=r"bomb|megapixels"):
        decode(data)


def near(image: Image.Image, other: Image.Image, most: int = 2) -> bool:
    return image.size == other.size and bool((np.abs(np.asarray(image, int) - np.asarray(other, int)) <= most).all())


def test_every_mode_gives_the_same_page():
    page = GREY.convert("RGB")
    deep = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    alpha = GREY.convert("RGBA")
    palette = GREY.convert("P")
    bits = GREY.point(lambda value: 255 * (value > 99))
    for data, expected in (
        (encoded(deep, "PNG"), page),
        (encoded(deep, "TIFF"), page),
        (encoded(alpha, "PNG"), page),
        (encoded(palette, "PNG"), page),
        (encoded(palette, "GIF"), page),
        (encoded(GREY.convert("LA"), "PNG"), page),
        (encoded(page.convert("CMYK"), "TIFF"), page),
        (encoded(bits.convert("1"), "PNG"), bits.convert("RGB")),
    ):
        assert decode(data).mode == "RGB"
        assert near(decode(data), expected)
        assert near(Image.open(io.BytesIO(standard(data))).convert("RGB"), expected)


def test_a_cmyk_jpeg_keeps_its_colours():
    red = Image.new("RGB", (32, 32), (200, 30, 30))
    assert near(decode(encoded(red.convert("CMYK"), "JPEG", quality=95)), red, 6)


def test_transparent_is_white_paper_not_black():
    assert decode(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG")).getpixel((1, 1)) == (255, 255, 255)
    cut = Image.new("RGB", (4, 4), "black")
    data = encoded(cut, "PNG", transparency=(0, 0, 0))
    assert decode(data).getpixel((1, 1)) == (255, 255, 255)
    assert decode(standard(data)).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation):
    upright = Image.new("RGB", (40, 24), "white")
    upright.paste("black", (0, 0, 10, 6))  # the top left corner tells all eight apart
    turned = {
        1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270",
    }[orientation]  # fmt: skip
    stored = upright if turned is None else upright.transpose(Image.Transpose[turned])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "JPEG", exif=exif, quality=95)
    assert near(decode(data), upright, 40)
    assert near(Image.open(io.BytesIO(standard(data))), upright, 40)


def test_what_needs_no_conversion_keeps_its_bytes():
    for data in (png_bytes(GREY), encoded(GREY.convert("RGB"), "JPEG"), encoded(GREY, "PNG")):
        assert standard(data) is data
    assert standard(encoded(GREY, "BMP")).startswith(b"\x89PNG")
