"""A small model that keeps the contract of `ColIntern3_5`; imports little, since each process imports it again."""

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import normalize
from transformers import BatchFeature

from colintern.encoding.embed import embed_pages

COLOURS = 512


class ColourModel(nn.Module):
    """input_ids (B, L) and attention_mask (B, L) to (B, L, 128): unit rows, zeros where the mask is 0."""

    def __init__(self, spread: float = 1.0):
        super().__init__()
        table = torch.randn(COLOURS, 128, generator=torch.Generator().manual_seed(1))
        self.table = nn.Parameter(normalize(table * spread + 1.0, dim=-1))  # 1.0: some similarities are high for all

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.table[input_ids].masked_fill(attention_mask.unsqueeze(-1) == 0, 0.0)


class ColourProcessor:
    """Pages: the colour number of each cell. Queries: the numbers they name."""

    def process_images(self, images: list[Image.Image]) -> BatchFeature:
        return self._pad([[r // 32 * 64 + g // 32 * 8 + b // 32 for r, g, b in _pixels(image)] for image in images])

    def process_queries(self, queries: list[str]) -> BatchFeature:
        return self._pad([[int(word) for word in query.split()] for query in queries])

    def _pad(self, rows: list[list[int]]) -> BatchFeature:
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return BatchFeature({"input_ids": ids, "attention_mask": mask})


def _pixels(image: Image.Image) -> list[tuple[int, int, int]]:
    return [image.getpixel((x, 0)) for x in range(image.width)]


def load_embedder(max_pages: int):
    """Return a function that embeds a batch of images, of which memory holds so many."""
    model, processor = ColourModel(), ColourProcessor()

    def embed(images: list[Image.Image]) -> list[torch.Tensor]:
        if len(images) > max_pages:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return embed_pages(model, processor, images, len(images))

    return embed
