"""The one place where the bytes of a page become pixels: upright, RGB, eight bits, of a size that memory can take."""

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
STORED = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}  # what is kept as it is, if it needs no conversion
# Pillow reads many more, among them PostScript, which it hands to Ghostscript. None of these starts a program.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "AVIF", "PPM")
PNG_HEAD = 8  # bytes of a PNG before its first chunk
METADATA_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # of a PNG; Pillow refuses those that inflate to more than 1 MB


class BadImage(ValueError):
    """Bytes that are no page; the message is the reason, in a few words."""


def decode(data: bytes) -> Image.Image:
    """The page as an upright RGB image.

    Its EXIF orientation is applied; for the rest see `pixels.rgb`.

    Raises:
        BadImage: not an image of `FORMATS`, cut off, of more than `MAX_PIXELS`, of several pages, or of a mode without
            a scale.
    """
    return _decode(data)[1]


def standard(data: bytes) -> bytes:
    """The bytes themselves if they are an upright RGB or grey PNG or JPEG, else those of an RGB PNG of the same page.

    Raises:
        BadImage: see `decode`; every image is decoded, so that what is stored can be read.
    """
    image, page = _decode(data)
    upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    plain = image.format in STORED.values() and image.mode in ("RGB", "L") and "transparency" not in image.info
    return data if plain and upright and not image.info.get("bare") else png_bytes(page)


def _decode(data: bytes) -> tuple[Image.Image, Image.Image]:
    """The image as Pillow opens it, and its page. `image.info["bare"]`: Pillow opens it without its metadata only."""
    try:
        return _decode_exactly(data)
    except BadImage:
        bare = drop_metadata(data)
        if bare == data:
            raise
        image, page = _decode_exactly(bare)
        image.info["bare"] = True
        return image, page


def _decode_exactly(data: bytes) -> tuple[Image.Image, Image.Image]:
    image = _open(data)
    try:
        _check_depth(image)
        for kind, start, _ in _png_chunks(data):
            if kind == b"sBIT":
                image.info["sBIT"] = data[start + 8]
        page = to_rgb(image)
        page.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
        return image, ImageOps.exif_transpose(page)
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others
        raise BadImage(f"cannot be decoded: {error}") from error


def _check_depth(image: ImageFile.ImageFile) -> None:
    """Refuse colours of 16 bits that would not be those of the page; Pillow keeps the high byte of each.

    Raises:
        BadImage: see above.
    """
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITSPERSAMPLE, ())
    if len(bits) > 1 and bits[0] > 8 and tags.get(PLANAR_CONFIGURATION) == 2:
        raise BadImage("16 bits a colour in separate planes, which Pillow takes for 8; save it with 8 bits")
    deep = image.mode in ("RGB", "RGBA") and any(";16" in str(tile.args) for tile in image.tile)
    if deep and 0 < np.asarray(image)[..., :3].max() < 2**6:
        raise BadImage("16 bits a colour, of which no more than 14 are used; save it with 8 bits")


def drop_metadata(data: bytes) -> bytes:
    """Remove the texts and the colour profile of a PNG, of which a page needs none; other bytes stay as they are."""
    kept = [data[start:end] for kind, start, end in _png_chunks(data) if kind not in METADATA_CHUNKS]
    return data[:PNG_HEAD] + b"".join(kept) if kept else data


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Find each chunk's kind, start and end in the bytes of a PNG; other bytes have none."""
    place = PNG_HEAD
    while STORED.get(data[:PNG_HEAD]) == "PNG" and place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        yield kind, place, place + 12 + length
        place += 12 + length


def png_bytes(image: Image.Image) -> bytes:
    """The image as an RGB PNG, the same bytes for the same pixels (given one version of Pillow)."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def check_size(width: int, height: int) -> None:
    """Refuse what would not fit; nothing is decoded for it.

    Raises:
        BadImage: more than `MAX_PIXELS`.
    """
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} = {width * height / 1e6:.0f} megapixels, more than {MAX_PIXELS / 1e6:.0f}")


def _open(data: bytes) -> ImageFile.ImageFile:
    if not data:
        raise BadImage("empty: 0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size is stricter
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage(f"decompression bomb: {error}") from error
    except Exception as error:
        raise BadImage(
            f"not an image: {len(data)} bytes that begin {data[:16]!r}; it must be one of {', '.join(FORMATS)}"
        ) from error
    check_size(*image.size)
    if (pages := _pages(image)) > 1:
        raise BadImage(f"holds {pages} pages; give one image a page")
    return image


def _pages(image: Image.Image) -> int:
    if image.format == "MPO":  # a photo with its preview
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except Exception as error:  # to count them the decoders read what may be damaged
        raise BadImage(f"cannot be decoded: {error}") from error
