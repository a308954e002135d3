"""From files to batches: the rows of the training set, and what the model is given of them."""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage
from torch.utils.data import Dataset as TorchDataset

from colintern.features import Page, PageFeatures
from colintern.manifest import training_folder
from colintern.params import Params, UserError, root
from colintern.processor import ColIntern3_5Processor


def rows(params: Params) -> dict[str, Dataset]:
    """The training set's rows by split (train, and test: the dev set), memory-mapped, images as undecoded bytes.

    Raises:
        UserError: the manifest or a file is missing or changed, or the set lacks a split.
    """
    folder, names = training_folder(params.train_data, params.train_revision)
    tables = {}
    for split in ("train", "test"):
        files = [str(folder / name) for name in names if Path(name).name.startswith(f"{split}-")]
        if not files:
            raise UserError(f"train_data: {folder} has no file {split}-*.parquet; it has {', '.join(names)[:200]}")
        cache = root() / "data" / ".arrow"
        table = load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))
        tables[split] = table.select_columns(["query", "image"]).cast_column("image", Image(decode=False))
    return tables


def pages(table: Dataset) -> list[Page]:
    """The page of each row, keyed by the bytes of its file; `datasets` keeps the keys beside its copy of the rows."""
    keys = table.map(_keys, input_columns="image", batched=True, batch_size=100, remove_columns=table.column_names)
    return [Page(key, partial(_row_image, table, index)) for index, key in enumerate(keys["page"])]


def _keys(images: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {"page": [hashlib.sha256(image["bytes"]).hexdigest() for image in images]}


def _row_image(table: Dataset, index: int) -> PILImage.Image:
    return Image().decode_example(table[index]["image"])


class Pairs(TorchDataset):
    """(query, page) pairs; an item is {"query": str, "page": its key} with the page's "features" or its "tiles"."""

    def __init__(self, queries: Sequence[str], pages: Sequence[Page], features: PageFeatures):
        self.queries, self.pages = queries, pages
        self.cache, self.processor = features.cache, features.processor

    def __len__(self) -> int:
        return len(self.pages)

    def __getitem__(self, index: int) -> dict[str, Any]:
        page = self.pages[index]
        item = {"query": self.queries[index], "page": page.key}
        known = self.cache.get(page.key)
        return item | ({"tiles": self.processor.page_tiles(page.image())} if known is None else {"features": known})


class Collator:
    """Items of `Pairs` to one batch of B pairs.

    `query` and `page` are inputs of the model, the pages' features left out. Those are in `features`, one page after
    another, where they are `known` (B,); the tiles of the others are in `tiles`; `counts` (B,) are tiles a page.
    `page_ids` (B,) int64 is equal for pages of equal bytes.
    """

    def __init__(self, processor: ColIntern3_5Processor):
        self.processor = processor

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        # One tensor of each kind: every tensor a data loader's process sends costs a file descriptor.
        parts = {kind: [item[kind] for item in items if kind in item] for kind in ("features", "tiles")}
        counts = [len(item["features"] if "features" in item else item["tiles"]) for item in items]
        return {
            "query": dict(self.processor.process_queries([item["query"] for item in items])),
            "page": dict(self.processor.page_tokens(counts)),
            **{kind: torch.cat(found) for kind, found in parts.items() if found},
            "known": torch.tensor(["features" in item for item in items]),
            "counts": torch.tensor(counts),
            "page_ids": torch.tensor([int(item["page"][:14], 16) for item in items]),
        }
