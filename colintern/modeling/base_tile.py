"""Tiles of pages under a base's sizes; no library is imported, so that `colintern tiles` starts at once."""

import json
from pathlib import Path
from textwrap import fill

from colintern.core.errors import UserError
from colintern.modeling.tiling import A4, INTERNVL_TILE, INTERNVL_TOKENS, MIN_TILES, Grid, choose_grid, count_max_tiles


def choose_base_grid(
    width: int, height: int, max_visual_tokens: int, tile: int, tokens_per_tile: int, tiling: str
) -> Grid:
    """Choose the grid of a page of so many pixels, as `tiling.choose_grid` does.

    Raises:
        UserError: the budget is too small for the tiling.
    """
    try:
        max_tiles = count_max_tiles(max_visual_tokens, tokens_per_tile, tiling)
    except ValueError as error:
        raise UserError(str(error)) from error
    return choose_grid(width, height, max_tiles, tile, tiling)


def format_a4_tilings(max_visual_tokens: int, tile: int, tokens_per_tile: int) -> str:
    """Describe what an A4 page gets under each tiling, in lines of at most 80 columns."""
    lines = []
    for tiling in MIN_TILES:
        try:
            grid = choose_base_grid(*A4, max_visual_tokens, tile, tokens_per_tile, tiling)
            found = f"{grid}, {grid.tiles} tiles, {grid.tiles * tokens_per_tile} visual tokens"
        except UserError as error:
            found = f"not possible: {error}"
        lines.append(fill(f"A4 page, tiling {tiling}: {found}", 80, subsequent_indent="  "))
    return "\n".join(lines)


def read_base_tile(base: Path) -> tuple[int, int]:
    """Return side in pixels and visual tokens of the base's tiles, from its config.json if the base is a folder.

    Raises:
        UserError: the config lacks them.
    """
    if not base.is_dir():
        return INTERNVL_TILE, INTERNVL_TOKENS
    try:
        vision = json.loads((base / "config.json").read_text(encoding="utf-8"))["vision_config"]
        # InternVL's configs hold [448, 448]; the code that wrote them also takes 448.
        tile, patch = (
            int(size[0] if isinstance(size, list) else size) for size in (vision["image_size"], vision["patch_size"])
        )
        return tile, (tile // patch // 2) ** 2
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise UserError(f"{base / 'config.json'}: no vision_config with image_size and patch_size: {error}") from error
