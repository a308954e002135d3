"""Faults D1 and D2: what is a page comes out upright and RGB, what is none is refused with its reason."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import EPS
from PIL import Image

from colintern.data.images import InvalidImageError, decode_image, encode_png, normalize_image_bytes
from colintern.modeling.images import to_rgb

GREY = Image.fromarray((np.arange(1200).reshape(30, 40) // 5).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A true PNG of one bit a pixel, all white."""
    packer = zlib.compressobj(9)
    line = b"\x00" + b"\xff" * (width // 8)
    data = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


TWO_PAGES, ANIMATED = (encoded(GREY, kind, save_all=True, append_images=[GREY.rotate(90)]) for kind in ("TIFF", "GIF"))
NOISE = encode_png(Image.effect_noise((200, 200), 50))


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
    for read in (decode_image, normalize_image_bytes):
        with pytest.raises(InvalidImageError, match=reason):
            read(data)


@pytest.mark.parametrize(("width", "height"), [(14_000, 14_000), (9_600, 9_600)])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(width, height):
    data = bomb(width, height)
    assert len(data) < 190_000
    with pytest.raises(InvalidImageError, match=r"bomb|megapixels"):
        decode_image(data)


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
        assert decode_image(data).mode == "RGB"
        assert near(decode_image(data), expected)
        assert near(Image.open(io.BytesIO(normalize_image_bytes(data))).convert("RGB"), expected)


def test_a_cmyk_jpeg_keeps_its_colours():
    red = Image.new("RGB", (32, 32), (200, 30, 30))
    assert near(decode_image(encoded(red.convert("CMYK"), "JPEG", quality=95)), red, 6)


def test_transparent_is_white_paper_not_black():
    assert decode_image(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG")).getpixel((1, 1)) == (255, 255, 255)
    cut = Image.new("RGB", (4, 4), "black")
    data = encoded(cut, "PNG", transparency=(0, 0, 0))
    assert decode_image(data).getpixel((1, 1)) == (255, 255, 255)
    assert decode_image(normalize_image_bytes(data)).getpixel((1, 1)) == (255, 255, 255)


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
    assert near(decode_image(data), upright, 40)
    assert near(Image.open(io.BytesIO(normalize_image_bytes(data))), upright, 40)


def test_what_needs_no_conversion_keeps_its_bytes():
    for data in (encode_png(GREY), encoded(GREY.convert("RGB"), "JPEG"), encoded(GREY, "PNG")):
        assert normalize_image_bytes(data) is data
    assert normalize_image_bytes(encoded(GREY, "BMP")).startswith(b"\x89PNG")


LEVELS = np.asarray(GREY).astype(np.int64) * 255 // 239  # 0 to 255


def tiff(values: np.ndarray, tags: dict[int, int] | None = None, order: str = "<") -> bytes:
    """An uncompressed TIFF of samples as they are; (tag, value) pairs replace what is written otherwise."""
    bands = 1 if values.ndim == 2 else values.shape[2]
    bits, data = values.dtype.itemsize * 8, values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape[:2]
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1 if bands == 1 else 2, 273: 8, 277: bands, 278: height}
    entries |= {279: len(data), 284: 1, 339: 2 if values.dtype.kind == "i" else 1, **(tags or {})}
    after = 8 + len(data) + 2 + 12 * len(entries) + 4
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    rows = b""
    for tag, value in sorted(entries.items()):
        count = bands if tag in (258, 339) else 1
        if count > 2:  # both lists hold one number several times, and are read from one place
            rows += struct.pack(f"{order}HHII", tag, 3, count, after if tag == 258 else after + 2 * bands)
        elif count == 1 and value < 2**16:
            rows += struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
        else:
            rows += struct.pack(f"{order}HHII", tag, 4, 1, value)
    lists = struct.pack(f"{order}{bands}H", *[entries[258]] * bands) + struct.pack(f"{order}{bands}H", *[1] * bands)
    return head + data + struct.pack(f"{order}H", len(entries)) + rows + bytes(4) + lists


def png_16(values: np.ndarray, significant: int | None = None) -> bytes:
    """A PNG of 16-bit grey, with a chunk that says how many bits are significant."""
    data = encoded(Image.fromarray(values.astype(np.uint16)), "PNG")
    end_of_head = 8 + 25
    return data[:end_of_head] + (chunk(b"sBIT", bytes([significant])) if significant else b"") + data[end_of_head:]


@pytest.mark.parametrize(
    "data",
    [
        tiff(LEVELS.astype(np.uint8)),
        tiff(LEVELS.astype(np.int32)),
        tiff(LEVELS.astype(np.uint16), order=">"),
        tiff((LEVELS * 4095 // 255).astype(np.uint16)),
        tiff((LEVELS * 4095 // 255).astype(np.uint32)),
        tiff((LEVELS * 1023 // 255).astype(np.uint16)),
        tiff((LEVELS * 257).astype(np.uint16)),
        tiff((LEVELS * 32767 // 255).astype(np.int16)),
        tiff((LEVELS * 4095 // 255).astype(np.int16)),
        tiff((LEVELS * (2**31 - 1) // 255).astype(np.int32)),
        tiff((LEVELS * (2**32 - 1) // 255).astype(np.uint32)),
        tiff(((255 - LEVELS) * 257).astype(np.uint16), {262: 0}),
        tiff(((255 - LEVELS) * 4095 // 255).astype(np.uint16), {262: 0}),
        encoded(Image.fromarray((LEVELS * 16).astype(np.uint16)), "TIFF", compression="tiff_lzw"),
        png_16(LEVELS * 4095 // 255),
        png_16(LEVELS * 4095 // 255, 12),
        png_16(LEVELS * 4095 // 255 << 4, 12),
        b"P5 40 30 4095\n" + (LEVELS * 4095 // 255).astype(">u2").tobytes(),
        encoded(Image.fromarray((LEVELS * 257).astype(np.uint16)), "JPEG2000"),
    ],
    ids=[
        "8", "signed 32 of 8", "16 of 8", "12 of 16", "12 of 32", "10 of 16", "16", "signed 16", "12 of signed 16",
        "signed 32", "32", "0 is white", "0 is white, 12 of 16", "compressed", "PNG", "sBIT", "sBIT, scaled", "PGM",
        "JPEG 2000",
    ],
)  # fmt: skip
def test_deep_grey_is_scaled_to_its_white(data):
    expected = Image.fromarray(LEVELS.astype(np.uint8)).convert("RGB")
    assert near(decode_image(data), expected)
    assert near(Image.open(io.BytesIO(normalize_image_bytes(data))), expected)


@pytest.mark.parametrize(
    ("data", "white"),
    [
        (tiff(np.full((4, 4), 200, np.uint16), {281: 4095}), 4095),
        (tiff(np.full((4, 4), 200, np.uint16), {281: 65535}), 255),  # the tag's default, which says nothing
        (tiff(np.full((4, 4), 5000, np.uint16), {281: 4095}), 16383),
        (png_16(np.full((4, 4), 200), 12), 4095),
        (b"P5 4 4 4095\n" + np.full(16, 200, ">u2").tobytes(), 4095),
    ],
)
def test_a_dark_page_is_scaled_by_what_its_file_says(data, white):
    value = int(np.asarray(Image.open(io.BytesIO(data))).max())
    value = 200 if data.startswith(b"P5") else value
    assert abs(decode_image(data).getpixel((1, 1))[0] - value * 255 / white) <= 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff((LEVELS - 128).astype(np.int16)), "whole numbers below 0"),
        (tiff((LEVELS - 128).astype(np.int32)), "whole numbers below 0"),
        (tiff(np.dstack([LEVELS * 16] * 3).astype(np.uint16)), "16 bits a colour, of which no more than 14"),
        (tiff(np.dstack([LEVELS * 257] * 3).astype(np.uint16), {284: 2}), "16 bits a colour in separate planes"),
    ],
)
def test_samples_without_a_known_scale_are_refused(data, reason):
    with pytest.raises(InvalidImageError, match=reason):
        normalize_image_bytes(data)


def test_colours_of_16_bits_and_lab_are_pages():
    colours = np.dstack([LEVELS, LEVELS[::-1], LEVELS[:, ::-1]])
    assert near(decode_image(tiff((colours * 257).astype(np.uint16))), Image.fromarray(colours.astype(np.uint8)))
    lab = encoded(Image.merge("LAB", [Image.new("L", (4, 4), level) for level in (255, 128, 128)]), "TIFF")
    assert min(decode_image(lab).getpixel((1, 1))) > 250


def test_a_page_keeps_its_scale_outside_of_files():
    assert near(
        to_rgb(Image.fromarray(LEVELS.astype(np.int32))), Image.fromarray(LEVELS.astype(np.uint8)).convert("RGB")
    )
    assert to_rgb(Image.new("I;16", (4, 4))).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("place", [33, -12])  # after the header, and before the end
@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"source\0\0" + zlib.compress(b"x" * 1_350_000)),
        chunk(b"iTXt", b"source\0\1\0\0\0" + zlib.compress(b"x" * 1_350_000)),
        chunk(b"tEXt", b"source\0" + b"x" * 1_350_000) * 60,
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"x" * 1_350_000)),
    ],
    ids=["zTXt", "iTXt", "81 MB", "profile"],
)
def test_a_png_with_much_text_is_a_page_that_any_program_opens(extra, place):
    plain = encode_png(GREY)
    data = plain[:place] + extra + plain[place:]
    assert near(decode_image(data), GREY.convert("RGB"))
    stored = normalize_image_bytes(data)
    assert len(stored) < 2 * len(plain) or stored is data  # a profile at the end is not read
    with Image.open(io.BytesIO(stored)) as image:
        assert near(image.convert("RGB"), GREY.convert("RGB"))


WMF = struct.pack("<IHhhhhHI", 0x9AC6CDD7, 0, 0, 0, 40, 30, 72, 0).ljust(22, b"\0") + b"\x01\0\x09\0" + bytes(40)


@pytest.mark.parametrize(
    "data",
    [EPS, b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)) + bytes(20) + EPS, WMF, b"%PDF-1.4\n",
     b"SIMPLE  =                    T".ljust(2880), b"\0\0\x01\xb3\x02\x80\x1e\x10", b"GRIB".ljust(64, b"\0")],
    ids=["EPS", "EPS in DOS", "WMF", "PDF", "FITS", "MPEG", "GRIB"],
)  # fmt: skip
def test_no_program_is_started_for_what_is_no_picture(data, fake_gs):
    for read in (decode_image, normalize_image_bytes):
        with pytest.raises(InvalidImageError, match=r"not an image: .*; it must be one of PNG, JPEG"):
            read(data)
    assert not fake_gs.exists()
    if data == EPS:  # else this test would not notice it
        with pytest.raises(OSError), Image.open(io.BytesIO(data)) as image:
            image.load()
        assert fake_gs.exists()


def test_every_image_is_opened_by_a_list_of_formats():
    top = Path(__file__).parents[1]
    files = [file for name in ("colintern", "stages", "bench", "demo") for file in (top / name).rglob("*.py")]
    opened = [line for file in files for line in file.read_text().splitlines() if "Image.open(" in line]
    assert opened and all("formats=" in line for line in opened)
