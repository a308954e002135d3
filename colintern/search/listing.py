"""Ranked pages in a terminal of 80 columns."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from colintern.terminal import escape_controls

NAME = 65  # characters of a page's name
SHADES = " .:-=+*#%@"
ACROSS, DOWN, MAPS = 24, 14, 3  # characters of a map, and maps side by side: 3 x 24 and what is between them


def listing(ranked: Sequence[tuple[str, float]]) -> str:
    """(name, score) of pages, best first."""
    rows = [f"{rank:>4}{score:>9.3f}  {_tail(name)}" for rank, (name, score) in enumerate(ranked, start=1)]
    return "\n".join([f"{'rank':>4}{'score':>9}  page", *rows])


def _tail(name: str) -> str:
    """A name on one line; a long one loses its beginning, because page and file stand at its end."""
    line = escape_controls(" ".join(name.split()))
    return line if len(line) <= NAME else f"...{line[3 - NAME :]}"


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
