"""Similarity maps: put a page's visual tokens in page order, with colpali-engine's method names.

Shapes: B pages, L tokens of a padded page, D dimensions of an embedding.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import BatchFeature

from colintern.modeling.tiling import Grid


class PageBatch(BatchFeature):
    """A batch with the tile grid of each of its pages in `grids`, which is not an input of the model."""

    grids: Sequence[Grid] = ()

    def __getstate__(self):
        return super().__getstate__() | {"grids": self.grids}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.grids = state["grids"]


class InterpretabilityMixin:
    """Methods of a processor that put a page's visual tokens, which come tile by tile, in the order of the page."""

    image_seq_length: int
    image_token_id: int
    get_page_grid: Callable[[tuple[int, int]], Grid]

    def get_n_patches(
        self, image_size: tuple[int, int], *args, patch_size: int | None = None, spatial_merge_size: int | None = None
    ) -> tuple[int, int]:
        """Count the visual tokens across and down a page of `image_size` = (height, width), without its thumbnail.

        As colpali-engine's base class has it; Pillow's `image.size` is (width, height), and would transpose the page.

        Args:
            image_size: (height, width) in pixels.
            args: a patch size, accepted for colpali-engine's signature and without effect.
            patch_size: a keyword of colpali-engine's README, which continues with its own
                `get_similarity_maps_from_embeddings`. That function does not know the order of tokens of several tiles.
            spatial_merge_size: the other keyword of that README.

        Raises:
            ValueError: one of these keywords for a page of several tiles.
        """
        grid = self.get_page_grid(image_size)
        if grid.tiles > 1 and (patch_size, spatial_merge_size) != (None, None):
            raise ValueError(
                f"get_n_patches: a page of {image_size} has several tiles, and colpali-engine's own function would put "
                "their tokens in the wrong places. Call get_n_patches((height, width)) without patch_size and "
                "spatial_merge_size, then the processor's get_similarity_maps_from_embeddings"
            )
        return self._count_patches(grid)

    def _count_patches(self, grid: Grid) -> tuple[int, int]:
        side = int(self.image_seq_length**0.5)
        return grid.cols * side, grid.rows * side

    def get_image_mask(self, batch_images: BatchFeature) -> Tensor:
        """Mark the visual tokens of a batch, (B, L) bool, including those of thumbnails."""
        mask = batch_images.input_ids == self.image_token_id
        mask.grids = getattr(batch_images, "grids", [])  # for the check of n_patches
        return mask

    def get_local_image_mask(self, batch_images: BatchFeature) -> Tensor:
        """Mark the visual tokens of a batch, those of a thumbnail left out.

        Args:
            batch_images: as the processor returned it, on any device: input_ids alone do not tell a thumbnail from
                another tile.

        Returns:
            (B, L) bool.

        Raises:
            ValueError: a batch made otherwise.
        """
        mask, size = self.get_image_mask(batch_images), self.image_seq_length
        grids: list[Grid] = mask.grids  # type: ignore[attr-defined]
        local = [index < grid.cols * grid.rows * size for grid in grids for index in range(grid.tiles * size)]
        if mask.sum() != len(local):
            raise ValueError(
                f"get_local_image_mask: {int(mask.sum())} visual tokens, but the grids of the batch describe "
                f"{len(local)}; pass the PageBatch that process_images returned, with all of its pages"
            )
        mask[mask.clone()] = torch.tensor(local, dtype=torch.bool, device=mask.device)
        return mask

    def rearrange_image_embeddings(
        self, image_embeddings: Tensor, image_mask: Tensor, n_patches: tuple[int, int]
    ) -> Tensor:
        """Arrange a page's tokens by position, (across, down, D), without the thumbnail.

        Args:
            image_embeddings: (L, D).
            image_mask: (L,) of `get_image_mask`.
            n_patches: (across, down) of `get_n_patches`.

        Raises:
            ValueError: the mask is not that of a page of this size.
        """
        (across, down), side = n_patches, int(self.image_seq_length**0.5)
        tokens, count = image_embeddings[image_mask], across * down
        if across % side or down % side or len(tokens) not in (count, count + self.image_seq_length):
            raise ValueError(
                f"n_patches={n_patches}: expected {count} visual tokens, or {count + self.image_seq_length} with a "
                f"thumbnail, but image_mask selects {len(tokens)}; call get_n_patches((height, width)) for this page"
            )
        tiles = tokens[:count].reshape(down // side, across // side, side, side, tokens.shape[-1])
        return tiles.permute(1, 3, 0, 2, 4).reshape(across, down, tokens.shape[-1])

    def get_similarity_maps_from_embeddings(
        self,
        image_embeddings: Tensor,
        query_embeddings: Tensor,
        n_patches: tuple[int, int] | list[tuple[int, int]],
        image_mask: Tensor,
    ) -> list[Tensor]:
        """Return one (query tokens, across, down) for each page, as colpali-engine's `plot_similarity_map` takes it.

        Not colpali-engine's function of this name: that expects tokens row by row of the page, ours come tile by tile.

        Args:
            image_embeddings: (B, L, D) of pages.
            query_embeddings: (B, query tokens, D) of queries, row for row.
            n_patches: (across, down) of `get_n_patches`, one for all pages or one for each.
            image_mask: (B, L) of `get_image_mask` or `get_local_image_mask`.

        Raises:
            ValueError: `n_patches` that are not those of the pages, as of (width, height) instead of (height, width).
        """
        sizes = n_patches if isinstance(n_patches, list) else [n_patches] * len(image_embeddings)
        known = [self._count_patches(grid) for grid in getattr(image_mask, "grids", [])]
        if len(known) == len(sizes) and known != [tuple(size) for size in sizes]:
            raise ValueError(
                f"n_patches={n_patches}: the pages have {known}. get_n_patches takes (height, width); Pillow's "
                "image.size is (width, height)"
            )
        pages = zip(image_embeddings, image_mask, sizes, strict=True)
        grids = [self.rearrange_image_embeddings(*page) for page in pages]
        return [torch.einsum("nk,ijk->nij", q, grid) for q, grid in zip(query_embeddings, grids, strict=True)]
