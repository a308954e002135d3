"""Pages and heatmaps as data URIs, small enough that a hundred of them open at once."""

import base64
import io

import numpy as np
from PIL import Image
from torch import Tensor

from colintern.modeling.images import to_rgb

SIDE = 900  # pixels of a picture's longer side: text of 10 points on A4 can be read
QUALITY = 60
# Multiplied with the page: what does not stand out leaves it white, and its text stays readable at any heat.
RAMP = ((255, 255, 255), (255, 236, 168), (255, 190, 85), (250, 120, 60), (214, 40, 57))
SHADES = 32


def picture(image: Image.Image) -> str:
    """A page as WebP."""
    small = to_rgb(image)
    if max(small.size) > SIDE:
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return _uri(small, "webp", quality=QUALITY, method=4)


def heat(maps: Tensor) -> str:
    """Maps (n, rows, columns) of 0 to 1, one below the other, a pixel for each cell, as PNG."""
    shades = (maps.clamp(0, 1) * (SHADES - 1)).round().byte().reshape(-1, maps.shape[2]).numpy()
    image = Image.fromarray(shades, mode="P")
    stops = np.linspace(0, len(RAMP) - 1, SHADES)
    image.putpalette(
        np.stack([np.interp(stops, range(len(RAMP)), channel) for channel in zip(*RAMP, strict=True)], axis=1)
        .round()
        .astype(np.uint8)
        .tobytes()
    )
    return _uri(image, "png", optimize=True)


def _uri(image: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
