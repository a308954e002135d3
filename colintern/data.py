"""From files to batches: the rows of the training set, and what the model is given of them."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from pyarrow.parquet import ParquetFile
from torch.utils.data import Dataset

from colintern import index
from colintern.features import Page, PageFeatures
from colintern.images import decode
from colintern.manifest import MANIFEST, training_sets
from colintern.params import Params, UserError
from colintern.processor import ColIntern3_5Processor


class Pair(NamedTuple):
    """A query and the page that answers it."""

    query: str
    page: Page


def rows(params: Params) -> dict[str, list[Pair]]:
    """The training sets' rows by split: train, and test: the dev set. Images stay on disk until a page is asked for.

    Rows in quarantine are left out. In the training split the rows of a set occur as often as its weight says.

    Raises:
        UserError: the manifest, the index or a file is missing or changed, or a set has no row for a split.
    """
    sets = training_sets(params.train_data, params.train_revision)
    checked = {(part.name, file): part.folder / file for part in sets for file in part.files}
    pages: dict[str, Page] = {}
    found: defaultdict[tuple[str, str], list[Pair]] = defaultdict(list)
    for source, split, file, row, key, query in index.read():
        if (source, file) not in checked:
            raise UserError(f"{index.INDEX}: {file} of {source} is not in {MANIFEST}; run: dvc repro -f fetch-data")
        page = pages.setdefault(key, Page(key, partial(row_image, checked[source, file], row)))
        found[source, split].append(Pair(query, page))
    for part in sets:
        for split, prefix in (("train", "train"), ("dev", "test")):
            if not found[part.name, split]:
                raise UserError(f"train_data: {part.folder} has no row that can be used in {prefix}-*.parquet")
    return {
        "train": [pair for part in sets for pair in found[part.name, "train"] * part.weight],
        "test": [pair for part in sets for pair in found[part.name, "dev"]],
    }


def row_image(path: Path, row: int) -> Image:
    """The page in one row of a parquet file.

    Its row group is read no further than the row, and let go of. At random a page of 300 kB costs 8 ms in groups of
    100 rows and up to 90 ms in groups of 1,000, for which memory has to hold such a group, compressed and not.

    Raises:
        BadImage: see `decode`.
    """
    with ParquetFile(path, memory_map=True) as file:
        group = 0
        while row >= (size := file.metadata.row_group(group).num_rows):
            row, group = row - size, group + 1
        # No threads: they would not survive the fork of a data loader's process.
        for batch in file.iter_batches(8, [group], ["image"], use_threads=False):
            if row < len(batch):
                image = batch["image"][row].as_py()
                return decode(image["bytes"] if isinstance(image, dict) else image)
            row -= len(batch)
    raise AssertionError("a row group holds as many rows as its metadata says")


class Pairs(Dataset):
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
