"""Choose the tiles that a page is cut into; nothing else decides it.

InternVL reads a page as a grid of square tiles, plus a thumbnail of the whole page, each tile costing the same
number of visual tokens (256 for InternVL3.5, whose tiles are 448 px). transformers' own tiler takes the grid whose
aspect ratio is closest and adds the thumbnail to every grid but a single tile, so an A4 page jumps from 3 tiles to 7,
and 1536 tokens are impossible. With `tiling: exact` the budget is a hard bound: the smallest grid below it that is as
sharp as possible to within 2 %, and the thumbnail if it still fits. With `tiling: stock` the grid is transformers',
whose `max_patches` is the budget in tiles less the thumbnail, so that other programs (vLLM) cut a page alike.
"""

from typing import NamedTuple

INTERNVL_TILE, INTERNVL_TOKENS = 448, 256  # side in pixels and visual tokens of a tile, in every InternVL3.5 of the hub
MIN_TILES = {"exact": 1, "stock": 2}  # that a budget must allow; stock: a tile and the thumbnail
A4 = 1240, 1754  # pixels, at 150 dpi
MIN_SHARPNESS = 0.98  # relative to the sharpest grid: up to 2 % may be lost to save tiles


class Grid(NamedTuple):
    """`cols` x `rows` tiles, followed by one tile that shows the whole page if `thumbnail`."""

    cols: int
    rows: int
    thumbnail: bool

    @property
    def tiles(self) -> int:
        """Return the number of tiles, thumbnail included."""
        return self.cols * self.rows + int(self.thumbnail)

    def __str__(self) -> str:
        """Return such as "1 x 2 + thumbnail"."""
        return f"{self.cols} x {self.rows}{' + thumbnail' * self.thumbnail}"


def count_max_tiles(max_visual_tokens: int, tokens_per_tile: int, tiling: str) -> int:
    """Return the most tiles that a page may get, thumbnail included.

    Raises:
        ValueError: the budget is too small for the tiling.
    """
    least = MIN_TILES[tiling] * tokens_per_tile
    if max_visual_tokens < least:
        cost = "one tile costs" if tiling == "exact" else f"a tile and its thumbnail cost with tiling: {tiling}"
        raise ValueError(f"max_visual_tokens: {max_visual_tokens} is less than {cost}; it must be at least {least}")
    return max_visual_tokens // tokens_per_tile


def choose_grid(width: int, height: int, max_tiles: int, tile: int, tiling: str = "exact") -> Grid:
    """Choose the grid that shows a page in at most `max_tiles` tiles of `tile` x `tile` pixels.

    With `tiling` "stock" transformers chooses. With "exact": a page stretched onto `cols` x `rows` tiles is as sharp as
    its worse axis, min(cols * tile / width, rows * tile / height), and enlarging beyond 1 adds no information. Of the
    grids with at least MIN_SHARPNESS of the sharpness that the bound allows, the one with the fewest tiles is chosen,
    then the sharpest, then the one that distorts least.

    >>> choose_grid(1240, 1754, max_tiles=6, tile=448)    # A4 at 150 dpi, 1536 tokens
    Grid(cols=2, rows=3, thumbnail=False)
    >>> choose_grid(1240, 1754, max_tiles=7, tile=448)    # 1792 tokens
    Grid(cols=2, rows=3, thumbnail=True)
    >>> choose_grid(450, 448, max_tiles=12, tile=448)     # little to gain from a second tile
    Grid(cols=1, rows=1, thumbnail=False)
    >>> choose_grid(1240, 1754, max_tiles=6, tile=448, tiling="stock")
    Grid(cols=1, rows=2, thumbnail=True)

    Args:
        width: of the page in pixels.
        height: of the page in pixels.
        max_tiles: bound on the tiles of the page, thumbnail included; at least `MIN_TILES`.
        tile: side of a tile in pixels.
        tiling: exact or stock.

    Raises:
        ValueError: a size below 1 pixel or a bound that is too small.
    """
    if width < 1 or height < 1:
        raise ValueError(f"page of {width} x {height} pixels: both sides must be at least 1")
    if max_tiles < MIN_TILES[tiling]:
        raise ValueError(f"max_tiles={max_tiles}: at least {MIN_TILES[tiling]} needed to show a page ({tiling} tiling)")
    if tiling == "stock":
        # Imported here, because with torch it takes longer than `colintern tiles` may take for exact tiles.
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

        cols, rows = get_optimal_tiled_canvas((height, width), (tile, tile), 1, max_tiles - 1)
        return Grid(cols, rows, thumbnail=cols * rows > 1)

    def compute_sharpness(grid: tuple[int, int]) -> float:
        return min(grid[0] * tile / width, grid[1] * tile / height, 1.0)

    def get_sort_key(grid: tuple[int, int]) -> tuple[int, float, float]:
        cols, rows = grid
        distortion = (cols * height) / (rows * width)
        return (cols * rows, -compute_sharpness(grid), max(distortion, 1 / distortion))

    grids = [(cols, rows) for cols in range(1, max_tiles + 1) for rows in range(1, max_tiles // cols + 1)]
    min_sharpness = MIN_SHARPNESS * max(map(compute_sharpness, grids))
    cols, rows = min((grid for grid in grids if compute_sharpness(grid) >= min_sharpness), key=get_sort_key)
    return Grid(cols, rows, thumbnail=1 < cols * rows < max_tiles)
