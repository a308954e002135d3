"""`colintern tiles`: show how a page of a given size is cut."""

import argparse
from pathlib import Path

from colintern.core.errors import UserError
from colintern.modeling.base_tile import choose_base_grid, read_base_tile
from colintern.modeling.tiling import MIN_TILES
from colintern.params import load_params

SUMMARY = "show which tiles a page is cut into"
EXAMPLE = "colintern tiles 1240 1754 --max-visual-tokens 1536 --tile 448 --tokens-per-tile 256"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("width", type=_parse_pixels, metavar="WIDTH", help="page width in pixels")
    parser.add_argument("height", type=_parse_pixels, metavar="HEIGHT", help="page height in pixels")
    parser.add_argument(
        "--max-visual-tokens",
        type=_parse_tokens,
        metavar="N",
        help="most a page may cost (default: that of params.yaml)",
    )
    parser.add_argument("--tiling", choices=MIN_TILES, help="default: that of params.yaml, or exact without it")
    parser.add_argument("--tile", type=_parse_pixels, metavar="PX", help="side of a tile (default: that of the base)")
    parser.add_argument(
        "--tokens-per-tile",
        type=_parse_tokens,
        metavar="N",
        help="visual tokens a tile costs (default: that of the base)",
    )


def run(args: argparse.Namespace) -> None:
    """Print grid and tokens of a page.

    Raises:
        UserError: half a description of the base's tiles, or a bound that is too small.
    """
    bound, tile, tokens, tiling = args.max_visual_tokens, args.tile, args.tokens_per_tile, args.tiling or "exact"
    if (tile is None) != (tokens is None):
        raise UserError("--tile and --tokens-per-tile describe one base: give both, or neither")
    if bound is None or tile is None:
        params = load_params()
        bound, tiling = bound or params.max_visual_tokens, args.tiling or params.tiling
        if tile is None:
            tile, tokens = read_base_tile(Path(params.base))
    grid = choose_base_grid(args.width, args.height, bound, tile, tokens, tiling)
    print(f"page    {args.width} x {args.height} px")
    print(f"tiles   {grid.cols} x {grid.rows} of {tile} px{' + thumbnail' * grid.thumbnail}")
    print(f"tokens  {grid.tiles} x {tokens} = {grid.tiles * tokens} visual tokens, at most {bound}")


def _parse_pixels(text: str) -> int:
    return _parse_int(text, 1_000_000)


def _parse_tokens(text: str) -> int:
    return _parse_int(text, 65536)


def _parse_int(text: str, high: int) -> int:
    if not (text.isdecimal() and len(text) <= 9 and 1 <= int(text) <= high):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {high}")
    return int(text)
