"""Where on a page a query's tokens find what they look for: similarities put back in the order of the page.

A page's visual tokens come tile by tile, tiles row by row, the thumbnail last, and within a tile row by row:
InternVL's pixel unshuffle joins 2 x 2 patches into one token and turns the axes back at its end, so a token's number is
its row times the tile's width plus its column. tests/test_heatmaps.py holds that against the real tower.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from colintern.modeling.tiling import Grid


class Layout(NamedTuple):
    """How a page's tokens lie.

    `grid`: its tiles. `side`: tokens across, and down, a tile. `first`: position of the first visual token.
    """

    grid: Grid
    side: int
    first: int

    @property
    def visual(self) -> int:
        """Visual tokens of the page, those of a thumbnail included."""
        return self.grid.tiles * self.side**2


class SimilarityMap(NamedTuple):
    """Dot products of a query's tokens with a page's.

    `page`: (query tokens, rows, columns) in true page order. `thumbnail`: (query tokens, side, side), the whole page
    seen small; None where the page has none. `rest`: (query tokens, n), the prompt around the tiles.
    """

    page: Tensor
    thumbnail: Tensor | None
    rest: Tensor

    @property
    def best(self) -> Tensor:
        """(query tokens,): what each adds to the MaxSim score, wherever it found it."""
        parts = [self.page, self.thumbnail, self.rest]
        return torch.cat([part.flatten(1) for part in parts if part is not None], dim=1).amax(dim=1)

    @property
    def on_page(self) -> Tensor:
        """(query tokens,) bool: found in a tile of the page, not in its thumbnail or the prompt."""
        return self.page.flatten(1).amax(dim=1) >= self.best


def layout(processor: Any, image_size: tuple[int, int]) -> Layout:
    """How the processor lays out a page of `image_size` = (width, height) pixels."""
    width, height = image_size
    grid = processor.get_page_grid((height, width))
    tokens = processor.tokenize_pages([grid.tiles])
    first = int(processor.get_image_mask(tokens)[0].int().argmax())
    return Layout(grid, round(processor.image_seq_length**0.5), first)


def similarity_map(query: Tensor, page: Tensor, where: Layout) -> SimilarityMap:
    """The similarity of each token of a query with each place of a page.

    Example: of a page of 2 x 1 tiles with 2 x 2 tokens each, visual tokens 0 1 / 2 3 are the left tile, 4 5 / 6 7 the
    right one, and the map's rows are 0 1 4 5 and 2 3 6 7.

    Args:
        query: (query tokens, dim).
        page: (page tokens, dim), all of a page's tokens as the model gives them, padding taken off.
        where: how they lie, see `layout`.

    Raises:
        ValueError: a page with fewer tokens than its layout says.
    """
    if query.dim() != 2 or page.dim() != 2 or len(page) < where.first + where.visual:
        raise ValueError(
            f"query {tuple(query.shape)} and page {tuple(page.shape)}: expected (tokens, dim) of each, and of the page "
            f"{where.visual} visual tokens from token {where.first} on"
        )
    products = query.float() @ page.float().T
    visual = products[:, where.first : where.first + where.visual]
    rest = torch.cat([products[:, : where.first], products[:, where.first + where.visual :]], dim=1)
    tiles = visual.reshape(len(query), where.grid.tiles, where.side, where.side)
    cols, rows = where.grid.cols, where.grid.rows
    cells = tiles[:, : cols * rows].reshape(len(query), rows, cols, where.side, where.side)
    whole = cells.permute(0, 1, 3, 2, 4).reshape(len(query), rows * where.side, cols * where.side)
    return SimilarityMap(whole, tiles[:, -1] if where.grid.thumbnail else None, rest)


def hottest(grid: Tensor, image_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom), in pixels of the page, of the largest cell of a (rows, columns) grid."""
    row, col = divmod(int(grid.argmax()), grid.shape[1])
    wide, high = image_size[0] / grid.shape[1], image_size[1] / grid.shape[0]
    return col * wide, row * high, (col + 1) * wide, (row + 1) * high


def standing_out(maps: Tensor) -> Tensor:
    """One (rows, columns) grid of the maps of several tokens: how far a place stands out for the token it suits best.

    A token's similarities are taken from its own mean over the page first. Without that the tokens that are alike
    everywhere decide: over the demo's 200 test pages the hottest cell of the plain sum lies on the answer in 57, of
    this in 199.
    """
    return (maps - maps.mean(dim=(1, 2), keepdim=True)).amax(dim=0)
