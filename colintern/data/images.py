"""The one place where the bytes of a page become pixels: upright, RGB, eight bits, of a size that memory can take."""

import io
import warnings

from PIL import ExifTags, Image, ImageOps

from colintern.pixels import rgb

# Pillow only warns above this number of pixels (256 MB as RGB); here it is the limit. A3 at 600 dpi has 70 million.
MAX_PIXELS = 89_478_485
STORED = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}  # what is kept as it is, if it needs no conversion


class BadImage(ValueError):
    """Bytes that are no page; the message is the reason, in a few words."""


def decode(data: bytes) -> Image.Image:
    """The page as an upright RGB image.

    Its EXIF orientation is applied; for the rest see `pixels.rgb`.

    Raises:
        BadImage: not an image, cut off, of more than `MAX_PIXELS`, of several pages, or of a mode without a scale.
    """
    image = _open(data)
    try:
        return rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others
        raise BadImage(f"cannot be decoded: {error}") from error


def standard(data: bytes) -> bytes:
    """The bytes themselves if they are an upright RGB or grey PNG or JPEG, else those of an RGB PNG of the same page.

    Raises:
        BadImage: see `decode`; every image is decoded, so that what is stored can be read.
    """
    image, page = _open(data), decode(data)
    upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    plain = image.format in STORED.values() and image.mode in ("RGB", "L") and "transparency" not in image.info
    return data if plain and upright else png_bytes(page)


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


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("empty: 0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size is stricter
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadImage(f"decompression bomb: {error}") from error
    except Exception as error:
        raise BadImage(f"not an image: {len(data)} bytes that begin {data[:16]!r}") from error
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
