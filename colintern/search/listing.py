"""Show ranked pages in a terminal of 80 columns."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from colintern.core.page_labels import fit_columns
from colintern.core.terminal import TERMINAL_COLUMNS

NAME_COLUMNS = 65
LINK_INDENT = 6
SHADES = " .:-=+*#%@"
MAP_COLUMNS, MAP_ROWS = 24, 14
MAX_MAPS = 3  # side by side: 3 x 24 columns and what is between them


def format_ranking(ranking: Sequence[tuple[str, float]], links: Sequence[str] = ()) -> str:
    """List (name, score) of pages, best first, each with the URL of its file below it, where that fits the line."""
    lines = [f"{'rank':>4}{'score':>9}  page"]
    for rank, ((name, score), link) in enumerate(zip(ranking, links or [""] * len(ranking), strict=True), start=1):
        # A long name loses its beginning, because page and file are at its end.
        lines.append(f"{rank:>4}{score:>9.3f}  {fit_columns(name, NAME_COLUMNS, keep_end=True)}")
        if link and LINK_INDENT + len(link) <= TERMINAL_COLUMNS:
            lines.append(" " * LINK_INDENT + link)
    if too_long := sum(LINK_INDENT + len(link) > TERMINAL_COLUMNS for link in links):
        lines.append(f"links longer than a line, left out: {too_long}; --html FILE has them")
    return "\n".join(lines)


def draw_text_maps(grids: Sequence[Tensor]) -> str:
    """Draw the first pages' maps, (rows, columns) each, side by side: the darker a character, the better the match."""
    shown = grids[:MAX_MAPS]
    low = float(torch.stack([grid.mean() for grid in shown]).mean())
    high = float(torch.stack([grid.amax() for grid in shown]).amax())
    blocks = [_draw_text_map((grid - low) / max(high - low, 1e-6)) for grid in shown]
    head = "  ".join(f"{f'rank {rank}':<{MAP_COLUMNS}}" for rank in range(1, len(blocks) + 1))
    lines = ["  ".join(parts) for parts in zip(*blocks, strict=True)]
    return "\n".join(line.rstrip() for line in [head, *lines])


def _draw_text_map(grid: Tensor) -> list[str]:
    """Draw a map of 0 to 1 in MAP_ROWS lines, a cell's largest value where several share a character."""
    rows, cols = grid.shape
    num_rows = max(1, min(MAP_ROWS, round(MAP_COLUMNS * rows / cols / 2)))  # a character is twice as high as wide
    cells = adaptive_max_pool2d(grid[None], (num_rows, MAP_COLUMNS))[0]
    shades = (cells.clamp(0, 1) * (len(SHADES) - 1)).round().int().tolist()
    lines = ["".join(SHADES[shade] for shade in row) for row in shades]
    return [*lines, *[" " * MAP_COLUMNS] * (MAP_ROWS - num_rows)]
