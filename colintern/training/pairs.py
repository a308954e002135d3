"""Training pairs: from the files of the manifest to the batches that the trainer receives.

A pair may have hard negatives: pages that score high for its query and do not answer it. They come from a column of the
training set, or from a parquet file that `colintern mine` writes, one row a training pair: `query`, `page` (sha256 of
the page's bytes), `negatives` (the same of each negative, the hardest first) and `scores` (MaxSim of each).
"""

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple, TypedDict

import pyarrow as pa
import torch
from PIL.Image import Image
from pyarrow import parquet
from torch import Tensor
from torch.utils.data import Dataset

from colintern.core.errors import UserError
from colintern.data.images import decode_image
from colintern.data.training_set import NEGATIVES, POSITIVES, ROW_INDEX, IndexRow, TrainingData, read_row_index
from colintern.encoding.page_features import Page, PageFeatures
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.storage.manifest import MANIFEST
from colintern.training.distributed import Batch

logger = logging.getLogger(__name__)
COLUMN_TYPES = {"query": pa.string(), "page": pa.string(), "negatives": pa.list_(pa.string())}
SCHEMA = pa.schema(COLUMN_TYPES | {"scores": pa.list_(pa.float32())})
PROVENANCE_KEY = b"colintern"  # of the metadata of a file of mined negatives
ROWS_PER_READ = 8  # of a row group


class TrainingPair(NamedTuple):
    """A query, the page that answers it, and pages that look similar and do not."""

    query: str
    page: Page
    negatives: Sequence[Page] = ()


class MinedNegatives(NamedTuple):
    """A row of a file of mined negatives."""

    query: str
    page: str
    negatives: list[str]
    scores: list[float]


class PageInputs(TypedDict, total=False):
    """A page of an item: its key, and its features, or its normalized tiles if they are not in the cache."""

    key: str
    features: Tensor
    tiles: Tensor


class TrainingItem(TypedDict):
    """An item of `TrainingDataset`; `pages`: the page that answers the query, then its hard negatives."""

    query: str
    pages: list[PageInputs]


def load_training_pairs(data: TrainingData, num_negatives: int = 0) -> dict[str, list[TrainingPair]]:
    """Load the pairs of the splits "train" and "test" (the dev set); images stay on disk until a page is needed.

    Rows in quarantine are excluded. In "train" the rows of a set are repeated by its weight and have at most
    `num_negatives` hard negatives; in "test" the sets take turns, so that the first `dev_queries` are of all sets.

    Raises:
        UserError: the manifest, the index or a file is missing or changed, a set has no row for a split, or no pair has
            a hard negative although they are wanted.
    """
    pages, entries = _load_pages(data)
    negatives = _load_column_negatives(data, pages, entries) if num_negatives and not data.negatives else {}
    pairs: defaultdict[tuple[str, str], list[TrainingPair]] = defaultdict(list)
    for entry in entries:
        row_negatives = negatives.get((entry.source, entry.file, entry.row), ())
        pairs[entry.source, entry.split].append(TrainingPair(entry.query, pages[entry.page], row_negatives))
    for dataset in data.sets:
        for split in ("train", "dev"):
            if not pairs[dataset.name, split]:
                raise UserError(f"train_data: {dataset.folder} has no row of {split} that can be used")
    train = [pair for dataset in data.sets for pair in pairs[dataset.name, "train"] * dataset.weight]
    turns = zip_longest(*(pairs[dataset.name, "dev"] for dataset in data.sets))
    dev = [pair for turn in turns for pair in turn if pair]
    if num_negatives:
        if data.negatives:
            train = _add_mined_negatives(train, pages, data.negatives)
        train = _limit_negatives(train, num_negatives, {pair.page.key for pair in dev}, data)
    return {"train": train, "test": dev}


def load_mining_candidates(data: TrainingData) -> tuple[list[TrainingPair], list[Page], set[str]]:
    """Load the training pairs, all pages that training may see, and the keys of the dev set's, to be excluded."""
    splits = load_training_pairs(data)
    dev_keys, train_keys = ({pair.page.key for pair in splits[split]} for split in ("test", "train"))
    pages, _ = _load_pages(data)
    return splits["train"], [page for key, page in pages.items() if key in train_keys or key not in dev_keys], dev_keys


def _load_pages(data: TrainingData) -> tuple[dict[str, Page], list[IndexRow]]:
    """Load every valid page by its key, and the rows of the index, which must be that of these sets."""
    datasets = [*data.sets, *([data.corpus] if data.corpus else [])]
    files = {(dataset.name, file): dataset.folder / file for dataset in datasets for file in dataset.files}
    numbered_sets = {dataset.name for dataset in data.sets if dataset.has_page_numbers}
    pages: dict[str, Page] = {}
    entries = read_row_index()
    for entry in entries:
        if (entry.source, entry.file) not in files:
            raise UserError(
                f"{ROW_INDEX}: {entry.file} of {entry.source} is not in {MANIFEST}; run: dvc repro -f fetch-data"
            )
        if entry.source not in numbered_sets:
            image = partial(read_page_image, files[entry.source, entry.file], entry.row)
            pages.setdefault(entry.page, Page(entry.page, image))
    return pages, entries


def _load_column_negatives(
    data: TrainingData, pages: dict[str, Page], entries: Sequence[IndexRow]
) -> dict[tuple[str, str, int], list[Page]]:
    """Map (set, file, row) to the hard negatives that the row gives by their row number in the corpus."""
    corpus = data.corpus
    if not corpus:
        return {}
    valid_pages = {(entry.file, entry.row): pages[entry.page] for entry in entries if entry.source == corpus.name}
    lengths = [(file, parquet.read_metadata(corpus.folder / file).num_rows) for file in corpus.files]
    corpus_rows = [(file, row) for file, length in lengths for row in range(length)]
    negatives, num_dropped = {}, 0
    for dataset in data.sets:
        for file in dataset.files if dataset.has_page_numbers else ():
            if NEGATIVES not in parquet.read_schema(dataset.folder / file).names:
                continue
            table = parquet.read_table(dataset.folder / file, columns=[POSITIVES, NEGATIVES], use_threads=False)
            columns = (column.to_pylist() for column in table.columns)
            for row, (positive, numbers) in enumerate(zip(*columns, strict=True)):
                positives = positive if isinstance(positive, list) else [positive]
                wanted = [number for number in numbers or () if number not in positives]
                keys = [corpus_rows[number] for number in wanted if 0 <= number < len(corpus_rows)]
                found = [valid_pages[key] for key in keys if key in valid_pages]
                negatives[dataset.name, file, row], num_dropped = found, num_dropped + len(wanted) - len(found)
    if num_dropped:
        logger.info(f"{num_dropped} numbers in {NEGATIVES} are no rows of {corpus.name}, or of pages in quarantine")
    return negatives


def _add_mined_negatives(train: list[TrainingPair], pages: dict[str, Page], file: Path) -> list[TrainingPair]:
    mined = read_mined_negatives(file)
    keys_by_pair = [mined.get((pair.query, pair.page.key)) for pair in train]
    num_missing = sum(keys is None for keys in keys_by_pair)
    if num_missing == len(train):
        raise UserError(
            f"negatives_file: {file}: names none of the {len(train)} training rows; was it made for others?"
        )
    num_dropped = sum(key not in pages for keys in keys_by_pair for key in keys or ())
    logger.info(
        f"{file}: {num_missing} of {len(train)} rows are not in it; "
        f"{num_dropped} of its negatives are no pages of these sets"
    )
    return [
        pair._replace(negatives=[pages[key] for key in keys or () if key in pages])
        for pair, keys in zip(train, keys_by_pair, strict=True)
    ]


def _limit_negatives(
    train: list[TrainingPair], num_negatives: int, excluded_page_keys: Collection[str], data: TrainingData
) -> list[TrainingPair]:
    """Keep the first `num_negatives` of each pair that are neither excluded nor its own page; require one in all."""
    limited = []
    for pair in train:
        valid = (page for page in pair.negatives if page.key not in excluded_page_keys and page.key != pair.page.key)
        limited.append(pair._replace(negatives=tuple(islice(valid, num_negatives))))
    counts = [len(pair.negatives) for pair in limited]
    if not any(counts):
        names = " + ".join(dataset.name for dataset in data.sets)
        raise UserError(
            f"negatives: {num_negatives}, but no row has one: {names} has no column {NEGATIVES}, and "
            f"negatives_file is {str(data.negatives or '')!r}; `colintern mine` makes such a file"
        )
    num_fewer = sum(count < num_negatives for count in counts)
    logger.info(f"{sum(counts)} hard negatives; {num_fewer} of {len(limited)} rows have fewer than `negatives`")
    return limited


def write_mined_negatives(path: Path, rows: Sequence[MinedNegatives], provenance: dict[str, object]) -> None:
    """Write a file of mined negatives atomically, with what they were mined from and how as JSON in its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([row._asdict() for row in rows], schema=SCHEMA)
    table = table.replace_schema_metadata({PROVENANCE_KEY: json.dumps(provenance, sort_keys=True)})
    partial_path = path.with_name(f".{path.name}.partial")
    parquet.write_table(table, partial_path)
    os.replace(partial_path, path)


def read_mined_negatives(path: Path) -> dict[tuple[str, str], list[str]]:
    """Map (query, page) to its negatives; raise UserError for any other file than `write_mined_negatives` writes."""
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise UserError(f"negatives_file: {path}: is not a parquet file: {error}") from error
    if not table.schema.equals(SCHEMA) or PROVENANCE_KEY not in (table.schema.metadata or {}):
        raise UserError(f"negatives_file: {path}: was not written by `colintern mine`; it has {table.schema.names}")
    columns = (table[name].to_pylist() for name in ("query", "page", "negatives"))
    return {(query, page): negatives for query, page, negatives in zip(*columns, strict=True)}


def read_page_image(path: Path, row: int) -> Image:
    """Read the page in one row of a parquet file.

    The row group is read up to the row and not kept. At random, a page of 300 kB takes 8 ms from groups of 100 rows and
    up to 90 ms from groups of 1,000, for which memory has to hold such a group, compressed and decompressed.
    """
    with parquet.ParquetFile(path, memory_map=True) as file:
        group = 0
        while row >= (size := file.metadata.row_group(group).num_rows):
            row, group = row - size, group + 1
        # Threads of pyarrow would not survive the fork of a DataLoader worker.
        for batch in file.iter_batches(ROWS_PER_READ, [group], ["image"], use_threads=False):
            if row < len(batch):
                image = batch["image"][row].as_py()
                return decode_image(image["bytes"] if isinstance(image, dict) else image)
            row -= len(batch)
    raise AssertionError("a row group has as many rows as its metadata says")


class TrainingDataset(Dataset[TrainingItem]):
    """The training pairs as items for the DataLoader."""

    def __init__(self, pairs: Sequence[TrainingPair], features: PageFeatures):
        self.pairs, self.cache, self.processor = pairs, features.cache, features.processor

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TrainingItem:
        pair = self.pairs[index]
        return {"query": pair.query, "pages": [self._load_page(page) for page in (pair.page, *pair.negatives)]}

    def _load_page(self, page: Page) -> PageInputs:
        features = self.cache.get(page.key)
        if features is None:
            return {"key": page.key, "tiles": self.processor.preprocess_page(page.image())}
        return {"key": page.key, "features": features}


class Collator:
    """Collates B items with P pages in all to a batch: the B pages of the pairs come first, then all hard negatives.

    `query` and `page` are inputs of the model without the pages' features. Those are in `features`, concatenated, for
    the pages that are `known` (P,); the tiles of the others are in `tiles`; `counts` (P,) are tiles per page.
    `query_ids` (B,) and `page_ids` (P,) int64 are equal for equal queries and for pages of equal bytes.
    """

    def __init__(self, processor: ColIntern3_5Processor):
        self.processor = processor

    def __call__(self, items: Sequence[TrainingItem]) -> Batch:
        """Collate the items."""
        pages = [item["pages"][0] for item in items] + [page for item in items for page in item["pages"][1:]]
        features = [page["features"] for page in pages if "features" in page]
        tiles = [page["tiles"] for page in pages if "tiles" in page]
        counts = [len(page["features"] if "features" in page else page["tiles"]) for page in pages]
        batch: Batch = {
            "query": dict(self.processor.process_queries([item["query"] for item in items])),
            "page": dict(self.processor.tokenize_pages(counts)),
            "known": torch.tensor(["features" in page for page in pages]),
            "counts": torch.tensor(counts),
            "query_ids": torch.tensor([_to_int64(_hash_query(item["query"])) for item in items]),
            "page_ids": torch.tensor([_to_int64(page["key"]) for page in pages]),
        }
        # One tensor of each kind: every tensor that a DataLoader worker sends takes a file descriptor.
        if features:
            batch["features"] = torch.cat(features)
        if tiles:
            batch["tiles"] = torch.cat(tiles)
        return batch


def _hash_query(query: str) -> str:
    return hashlib.sha256(" ".join(query.split()).encode()).hexdigest()


def _to_int64(digest: str) -> int:
    return int(digest[:14], 16)
