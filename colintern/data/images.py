"""The one place where the bytes of a page become pixels: upright, RGB, eight bits, of a size that memory can take."""

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps

# Pillow only warns above this number of pixels (256 MB as RGB); here it is the limit. A3 at 600 dpi has 70 million.
MAX_PIXELS = 89_478_485
STORED = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}  # what is kept as it is, if it needs no conversion


class BadImage(ValueError):
    """Bytes that are no page; the message is the reason, in a few words."""


def decode(data: bytes) -> Image.Image:
    """The page as an upright RGB image.

    Its EXIF orientation is applied, transparency is put on white paper, 16-bit grey is scaled to 8 bits, CMYK and
    palettes are converted.

    Raises:
        BadImage: not an image, cut off, of more than `MAX_PIXELS`, of several pages, or of a mode without a scale.
    """
    image = _open(data)
    try:
        return _rgb(ImageOps.exif_transpose(image))
    except BadImage:
        raise
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


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose white is not known")
    if image.mode.startswith("I"):  # Pillow's own conversion would turn everything above 255 white
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")
