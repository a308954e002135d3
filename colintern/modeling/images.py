"""Convert any image to a page on white paper: eight-bit RGB, the same in training, evaluation, search and a report."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

# Significant bits of samples that cameras, scanners and programs write into a wider type without a tag.
SAMPLE_BITS = (8, 10, 12, 14, 16, 24)
MAX_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE = 281, 341  # tags of TIFF
SCALED_FORMATS = ("PPM", "JPEG2000")  # Pillow scales their samples of more than 8 bits to 16 bits


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB: transparency to white, deep grey scaled, CMYK and palettes converted.

    Pillow's own conversion shows the color of transparent pixels, mostly black, and makes 16-bit grey above 255 white.

    Raises:
        ValueError: floating-point pixels, or whole numbers below 0.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose white is not known")
    if image.mode.startswith("I"):
        return _scale_grey(image).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")


def find_white_level(largest: int, full: int, stated: int = 0) -> int:
    """Find the sample value of white.

    Args:
        largest: the largest value in the image.
        full: the largest value of its type.
        stated: the largest value according to its file, 0 if it does not say; `full` adds no information.

    Returns:
        `stated` if it is below `full` and no value exceeds it; else the smallest of `full` and the largest numbers of
        8, 10, 12, 14, 16 or 24 bits that no value exceeds.
    """
    if 0 < stated < full and largest <= stated:
        return stated
    return next(level for level in sorted({full, *(2**bits - 1 for bits in SAMPLE_BITS)}) if level >= largest)


def _scale_grey(image: Image.Image) -> Image.Image:
    """Scale integers of more than 8 bits, black at 0, to 8 bits."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    signed = image.mode == "I" and tags.get(SAMPLEFORMAT, (1 if tags else 2,))[0] == 2
    bits = tags.get(BITSPERSAMPLE, (16 if image.mode.startswith("I;") else 32,))[0]
    values = np.asarray(image).astype(np.int64)
    if not signed:
        values &= 2**bits - 1  # Pillow reads unsigned 32-bit numbers as signed ones
    if values.min() < 0:
        raise ValueError("whole numbers below 0, whose black is not known")
    largest, full = int(values.max()), 2 ** (bits - signed) - 1
    if image.format in SCALED_FORMATS:
        white = 2**16 - 1
    elif bits not in (16, 32):  # 12, which its file says
        white = full
    elif "sBIT" in image.info:  # of a PNG; its standard has samples scaled to 16 bits, but not every program does it
        white = full if largest >= 2 ** image.info["sBIT"] else 2 ** image.info["sBIT"] - 1
    else:
        stated = (tags.get(MAX_SAMPLE_VALUE) or tags.get(S_MAX_SAMPLE_VALUE) or (0,))[0]
        white = find_white_level(largest, full, int(stated))
    values *= 255  # in place: a page may have `images.MAX_PIXELS`
    values //= white
    grey = values.astype(np.uint8)
    # Where 0 is white, Pillow inverts samples of up to 8 bits only.
    return Image.fromarray(255 - grey if tags.get(PHOTOMETRIC_INTERPRETATION) == 0 else grey)
