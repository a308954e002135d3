"""From files to batches: the rows of the training set, and what the model is given of them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from colintern.manifest import root, training_folder
from colintern.params import UserError
from colintern.processor import ColIntern3_5Processor


def rows(split: str) -> Dataset:
    """The training set's rows of `split` (train, or test: the dev set), memory-mapped, images as undecoded bytes.

    Raises:
        UserError: the manifest or a file is missing or changed, or the set has no such split.
    """
    folder, names = training_folder()
    files = [str(folder / name) for name in names if Path(name).name.startswith(f"{split}-")]
    if not files:
        raise UserError(f"train_data: {folder} has no file {split}-*.parquet; it has {', '.join(names)[:200]}")
    cache = root() / "data" / ".arrow"
    table = load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))
    return table.select_columns(["query", "image"]).cast_column("image", Image(decode=False))


class Pairs(TorchDataset):
    """(query, page) pairs; an item is {"query": str, "image": PIL image, "page_id": int64 from the page's bytes}."""

    def __init__(self, table: Dataset):
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.table[index]
        return {"query": row["query"], "image": decode(row["image"]), "page_id": page_id(row["image"]["bytes"])}


def decode(image: dict[str, Any]) -> PILImage.Image:
    """A parquet row's image as a PIL image."""
    return Image().decode_example(image)


def page_id(data: bytes) -> int:
    """Equal for pages of equal bytes, whatever they are called."""
    return int.from_bytes(hashlib.sha256(data).digest()[:7])


class Collator:
    """Items of `Pairs` to one batch: `query` and `page` inputs of the model, and `page_ids` (B,) int64."""

    def __init__(self, processor: ColIntern3_5Processor):
        self.processor = processor

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, dict[str, Tensor] | Tensor]:
        return {
            "query": dict(self.processor.process_queries([item["query"] for item in items])),
            "page": dict(self.processor.process_images([item["image"] for item in items])),
            "page_ids": torch.tensor([item["page_id"] for item in items]),
        }
