"""Encode pages and queries: batches through the processor and the model, then padding removed."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature

from colintern.modeling.processing_colintern import ColIntern3_5Processor as Processor

T = TypeVar("T")


def embed_pages(model: nn.Module, processor: Processor, images: Sequence[Image.Image], batch_size: int) -> list[Tensor]:
    """Return one (tokens, 128) float32 tensor a page, on the CPU, in the order of `images`.

    `model`: `ColIntern3_5` or a wrapper with the same forward. `batch_size` changes no more than the last bits.
    """
    return _embed_batches(model, processor.process_images, images, batch_size)


def embed_features(model: nn.Module, processor: Processor, features: Iterable[Tensor], batch_size: int) -> list[Tensor]:
    """Do the same as `embed_pages` from page features, (tiles, tokens of a tile, hidden size) each."""

    def collate_features(pages: list[Tensor]) -> BatchFeature:
        batch = processor.tokenize_pages([len(page) for page in pages])
        batch["image_features"] = torch.cat(pages)
        return batch

    return _embed_batches(model, collate_features, features, batch_size)


def embed_queries(model: nn.Module, processor: Processor, queries: Iterable[str], batch_size: int) -> list[Tensor]:
    """Return one (tokens, 128) float32 tensor a query, on the CPU, in the order of `queries`; see `embed_pages`."""
    return _embed_batches(model, processor.process_queries, queries, batch_size)


def _embed_batches(
    model: nn.Module, process: Callable[[list[T]], BatchFeature], items: Iterable[T], batch_size: int
) -> list[Tensor]:
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()  # also called on the dev set in the middle of training, where dropout is on
    embeddings: list[Tensor] = []
    try:
        with torch.no_grad():
            remaining = iter(items)
            while batch_items := list(islice(remaining, batch_size)):
                batch = process(batch_items).to(device)
                padded = model(**batch).float().cpu()
                masks = batch["attention_mask"].bool().cpu()
                embeddings += [row[mask] for row, mask in zip(padded, masks, strict=True)]
    finally:
        model.train(was_training)
    return embeddings
