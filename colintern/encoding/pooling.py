"""Shrink pages: fewer vectors by pooling similar ones, shorter vectors by truncation.

Pooling is colpali-engine's hierarchical clustering (Clavié et al. 2024, "Reducing the footprint of multi-vector
retrieval with minimal performance impact via token pooling", arXiv 2409.14683), but tile by tile: clustering takes time
and memory with the square of the number of vectors. Truncation is useful for a model that was trained for it
("Matryoshka", Kusupati et al. 2022, arXiv 2205.13147); elsewhere it shows what the first dimensions hold.
"""

from collections.abc import Sequence

from colpali_engine.compression.token_pooling import HierarchicalTokenPooler
from torch import Tensor, cat
from torch.nn.functional import normalize


def pool_tiles(page: Tensor, factor: int, tile: int, before: int) -> Tensor:
    """Cluster each tile's vectors into 1/factor of them, each the normalized mean of its cluster.

    Example: of a page of 2 tiles of 256 vectors between 10 and 5 of text, factor 4 leaves 10 + 2 x 64 + 5.

    Args:
        page: (vectors, dim): `before` of text, then the tiles, then less than a tile of text.
        factor: 2 or more.
        tile: vectors of a tile.
        before: vectors of text before the tiles.
    """
    num_tiles = (len(page) - before) // tile
    head, visual, tail = page.split([before, num_tiles * tile, len(page) - before - num_tiles * tile])
    pooled = HierarchicalTokenPooler().pool_embeddings(list(visual.split(tile)), pool_factor=factor)
    return cat([head, *pooled, tail])


def truncate_dim(rows: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Return the first `dim` numbers of each vector, normalized again if that leaves some out; (n, dim) a row."""
    return [row if row.shape[1] <= dim else normalize(row[:, :dim], dim=-1) for row in rows]
