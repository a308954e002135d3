"""Ranked pages in a terminal of 80 columns."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from colintern.core.page_labels import fit_columns
from colintern.core.terminal import TERMINAL_COLUMNS

NAME = 65  # columns of a page's name
LINK_INDENT = 6
SHADES = " .:-=+*#%@"
ACROSS, DOWN, MAPS = 24, 14, 3  # characters of a map, and maps side by side: 3 x 24 and what is between them


def listing(ranked: Sequence[tuple[str, float]], links: Sequence[str] = ()) -> str:
    """List (name, score) of pages, best first, each with the URL of its file below it, where that fits the line."""
    rows = [f"{'rank':>4}{'score':>9}  page"]
    for rank, ((name, score), link) in enumerate(zip(ranked, links or [""] * len(ranked), strict=True), start=1):
        # A long name loses its beginning, because page and file stand at its end.
        rows.append(f"{rank:>4}{score:>9.3f}  {fit_columns(name, NAME, keep_end=True)}")
        if link and LINK_INDENT + len(link) <= TERMINAL_COLUMNS:
            rows.append(" " * LINK_INDENT + link)
    if too_long := sum(LINK_INDENT + len(link) > TERMINAL_COLUMNS for link in links):
        rows.append(f"links longer than a line, left out: {too_long}; --html FILE has them")
    return "\n".join(rows)


def maps(grids: Sequence[Tensor]) -> str:
    """The first pages' maps, (rows, columns) each, side by side: the darker the character, the better the match."""
    shown = grids[:MAPS]
    low, high = (float(f(torch.stack([f(grid) for grid in shown]))) for f in (torch.mean, torch.amax))
    blocks = [_block((grid - low) / max(high - low, 1e-6)) for grid in shown]
    head = "  ".join(f"{f'rank {rank}':<{ACROSS}}" for rank in range(1, len(blocks) + 1))
    lines = ["  ".join(parts) for parts in zip(*blocks, strict=True)]
    return "\n".join(line.rstrip() for line in [head, *lines])


def _block(grid: Tensor) -> list[str]:
    """A map in as many characters as `maps` gives it, a cell's largest value where several share one."""
    rows, cols = grid.shape
    down = max(1, min(DOWN, round(ACROSS * rows / cols / 2)))  # a character is twice as high as wide
    cells = adaptive_max_pool2d(grid[None], (down, ACROSS))[0]
    places = (cells.clamp(0, 1) * (len(SHADES) - 1)).round().int().tolist()
    text = ["".join(SHADES[place] for place in row) for row in places]
    return [*text, *[" " * ACROSS] * (DOWN - down)]
