"""Decode the bytes of a page: upright, RGB, eight bits, of a size that memory can take."""

import io
import struct
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PLANAR_CONFIGURATION

from colintern.modeling.images import to_rgb

# Pillow only warns above this number of pixels (256 MB as RGB); here it is the limit. A3 at 600 dpi has 70 million.
MAX_PIXELS = 89_478_485
STORED_FORMATS = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}  # kept as they are if they need no conversion
# Pillow reads many more, among them PostScript, which it hands to Ghostscript. None of these starts a program.
READ_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "AVIF", "PPM")
PNG_HEADER_BYTES = 8
METADATA_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # of a PNG; Pillow refuses those that inflate to more than 1 MB


class InvalidImageError(ValueError):
    """Bytes that are not a page; the message is the reason in a few words."""


def decode_image(data: bytes) -> Image.Image:
    """Decode a page as an upright RGB image.

    The EXIF orientation is applied; `modeling.images` converts the colors.

    Raises:
        InvalidImageError: not an image of `READ_FORMATS`, truncated, of more than `MAX_PIXELS`, of several pages, or
            of a mode without a scale.
    """
    return _open_page(data)[1]


def normalize_image_bytes(data: bytes) -> bytes:
    """Return `data` itself if it is an upright RGB or grey PNG or JPEG, otherwise the page as an RGB PNG.

    Raises:
        InvalidImageError: see `decode_image`; every image is decoded, so that what is stored can be read.
    """
    image, page = _open_page(data)
    is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    is_plain = image.format in STORED_FORMATS.values() and image.mode in ("RGB", "L")
    needs_conversion = "transparency" in image.info or "without_metadata" in image.info
    return data if is_plain and is_upright and not needs_conversion else encode_png(page)


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as an RGB PNG: the same bytes for the same pixels, given one version of Pillow."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def check_pixel_count(width: int, height: int) -> None:
    """Refuse an image that memory may not hold, before it is decoded."""
    if width * height > MAX_PIXELS:
        pixels = f"{width} x {height} = {width * height / 1e6:.0f} megapixels"
        raise InvalidImageError(f"{pixels}, more than {MAX_PIXELS / 1e6:.0f}")


def drop_png_metadata(data: bytes) -> bytes:
    """Remove the texts and the color profile of a PNG; other bytes stay as they are."""
    kept = [data[start:end] for kind, start, end in _iter_png_chunks(data) if kind not in METADATA_CHUNKS]
    return data[:PNG_HEADER_BYTES] + b"".join(kept) if kept else data


def _open_page(data: bytes) -> tuple[Image.Image, Image.Image]:
    """Return the image as Pillow opens it, and its page.

    `image.info["without_metadata"]` is set where Pillow refuses the metadata.
    """
    try:
        return _decode_as_is(data)
    except InvalidImageError:
        reduced = drop_png_metadata(data)
        if reduced == data:
            raise
        image, page = _decode_as_is(reduced)
        image.info["without_metadata"] = True
        return image, page


def _decode_as_is(data: bytes) -> tuple[Image.Image, Image.Image]:
    image = _open(data)
    try:
        _check_bit_depth(image)
        for kind, start, _ in _iter_png_chunks(data):
            if kind == b"sBIT":
                image.info["sBIT"] = data[start + 8]
        page = to_rgb(image)
        page.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
        return image, ImageOps.exif_transpose(page)
    except InvalidImageError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others
        raise InvalidImageError(f"cannot be decoded: {error}") from error


def _open(data: bytes) -> ImageFile.ImageFile:
    if not data:
        raise InvalidImageError("empty: 0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_pixel_count is stricter
            image = Image.open(io.BytesIO(data), formats=READ_FORMATS)
    except Image.DecompressionBombError as error:
        raise InvalidImageError(f"decompression bomb: {error}") from error
    except Exception as error:
        start = f"{len(data)} bytes that begin {data[:16]!r}"
        raise InvalidImageError(f"not an image: {start}; it must be one of {', '.join(READ_FORMATS)}") from error
    check_pixel_count(*image.size)
    try:
        pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a photo with its preview
    except Exception as error:  # to count them the decoders read what may be damaged
        raise InvalidImageError(f"cannot be decoded: {error}") from error
    if pages > 1:
        raise InvalidImageError(f"holds {pages} pages; give one image a page")
    return image


def _check_bit_depth(image: ImageFile.ImageFile) -> None:
    """Refuse 16-bit colors that Pillow would read wrongly, since it keeps the high byte of each."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITSPERSAMPLE, ())
    if len(bits) > 1 and bits[0] > 8 and tags.get(PLANAR_CONFIGURATION) == 2:
        raise InvalidImageError("16 bits a colour in separate planes, which Pillow takes for 8; save it with 8 bits")
    has_16_bits = image.mode in ("RGB", "RGBA") and any(";16" in str(tile.args) for tile in image.tile)
    if has_16_bits and 0 < np.asarray(image)[..., :3].max() < 2**6:
        raise InvalidImageError("16 bits a colour, of which no more than 14 are used; save it with 8 bits")


def _iter_png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of each chunk of a PNG; nothing for other bytes."""
    start = PNG_HEADER_BYTES
    while STORED_FORMATS.get(data[:PNG_HEADER_BYTES]) == "PNG" and start + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        yield kind, start, start + 12 + length
        start += 12 + length
