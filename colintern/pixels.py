"""What any image is as a page on white paper: eight-bit RGB, the same in training, evaluation, search and a report."""

import numpy as np
from PIL import Image


def rgb(image: Image.Image) -> Image.Image:
    """The image as RGB: transparency is put on white paper, 16-bit grey is scaled, CMYK and palettes are converted.

    Pillow's own conversion shows what lies under transparent pixels, black as a rule, and makes 16-bit grey above 255
    white.

    Raises:
        ValueError: floating-point pixels.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose white is not known")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")
