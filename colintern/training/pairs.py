"""From files to batches: the rows of the training set, and what the model is given of them."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from pyarrow.parquet import ParquetFile, read_metadata, read_schema, read_table
from torch.utils.data import Dataset

from colintern.core.errors import UserError
from colintern.data.images import decode_image
from colintern.data.training_set import (
    NEGATIVES,
    POSITIVES,
    ROW_INDEX,
    IndexRow,
    TrainingData,
    TrainingSet,
    load_training_data,
    read_row_index,
)
from colintern.encoding.page_features import Page, PageFeatures
from colintern.modeling.processing_colintern import ColIntern3_5Processor
from colintern.params import Params
from colintern.storage.manifest import MANIFEST
from colintern.training import negatives


class Pair(NamedTuple):
    """A query, the page that answers it, and pages that do not though they look like it."""

    query: str
    page: Page
    negatives: Sequence[Page] = ()


def rows(params: Params) -> dict[str, list[Pair]]:
    """The training sets' rows by split: train, and test: the dev set. Images stay on disk until a page is asked for.

    Rows in quarantine are left out. In the training split the rows of a set occur as often as its weight says; in the
    dev set the sets take turns.

    Raises:
        UserError: the manifest, the index or a file is missing or changed, a set has no row for a split, or the hard
            negatives that params ask for are not there.
    """
    data = load_training_data(params)
    pages, entries = _pages(data)
    wrong = _from_column(data, pages, entries) if params.negatives and not data.negatives else {}
    found: defaultdict[tuple[str, str], list[Pair]] = defaultdict(list)
    for e in entries:
        found[e.source, e.split].append(Pair(e.query, pages[e.page], wrong.get((e.source, e.file, e.row), ())))
    for one in data.sets:
        for split in ("train", "dev"):
            if not found[one.name, split]:
                raise UserError(f"train_data: {one.folder} has no row of {split} that can be used")
    train = [pair for one in data.sets for pair in found[one.name, "train"] * one.weight]
    # In turn, so that of the first `dev_queries` each set has its share.
    turns = zip_longest(*(found[one.name, "dev"] for one in data.sets))
    dev = [pair for turn in turns for pair in turn if pair]
    if params.negatives:
        if data.negatives:
            train = _mined(train, pages, data.negatives)
        train = _first(params, train, {pair.page.key for pair in dev})
    return {"train": train, "test": dev}


def candidates(params: Params) -> tuple[list[Pair], list[Page], set[str]]:
    """The training rows without negatives, all pages that training knows, and the keys of those among them that may be
    nobody's negative, since the dev set asks for them."""
    parts = rows(replace(params, negatives=0, negatives_file=""))
    dev, own = ({pair.page.key for pair in parts[split]} for split in ("test", "train"))
    pages, _ = _pages(load_training_data(params))
    return parts["train"], [page for key, page in pages.items() if key in own or key not in dev], dev


def _pages(data: TrainingData) -> tuple[dict[str, Page], list[IndexRow]]:
    """Every page that can be used, by its key, and the rows of the index.

    Raises:
        UserError: the index is missing, or is not that of these sets.
    """
    sets = [*data.sets, *([data.corpus] if data.corpus else [])]
    places = {(one.name, file): one.folder / file for one in sets for file in one.files}
    numbered = {one.name for one in data.sets if one.has_page_numbers}
    pages: dict[str, Page] = {}
    entries = read_row_index()
    for e in entries:
        if (e.source, e.file) not in places:
            raise UserError(f"{ROW_INDEX}: {e.file} of {e.source} is not in {MANIFEST}; run: dvc repro -f fetch-data")
        if e.source not in numbered:
            pages.setdefault(e.page, Page(e.page, partial(row_image, places[e.source, e.file], e.row)))
    return pages, entries


def _from_column(
    data: TrainingData, pages: dict[str, Page], entries: Sequence[IndexRow]
) -> dict[tuple[str, str, int], list[Page]]:
    """(set, file, row) -> the negatives that the row itself names by number; pages that cannot be used are left out."""
    if not data.corpus:
        return {}
    known = {(e.file, e.row): pages[e.page] for e in entries if e.source == data.corpus.name}
    in_order = [(file, row) for file in data.corpus.files for row in range(_length(data.corpus, file))]
    found, lost = {}, 0
    for one in data.sets:
        for file in one.files if one.has_page_numbers else ():
            if NEGATIVES not in read_schema(one.folder / file).names:
                continue
            table = read_table(one.folder / file, columns=[POSITIVES, NEGATIVES], use_threads=False)
            for row, (right, wrong) in enumerate(zip(*(column.to_pylist() for column in table.columns), strict=True)):
                right = right if isinstance(right, list) else [right]
                numbers = [number for number in wrong or () if number not in right]
                there = [known[in_order[n]] for n in numbers if 0 <= n < len(in_order) and in_order[n] in known]
                found[one.name, file, row], lost = there, lost + len(numbers) - len(there)
    if lost:
        print(f"{lost} numbers in {NEGATIVES} are no rows of {data.corpus.name}, or of pages in quarantine")
    return found


def _length(one: TrainingSet, file: str) -> int:
    return read_metadata(one.folder / file).num_rows


def _mined(train: list[Pair], pages: dict[str, Page], file: Path) -> list[Pair]:
    """The rows with the negatives of a mined file.

    Raises:
        UserError: the file knows none of the rows.
    """
    found = negatives.read(file)
    keys = [found.get((pair.query, pair.page.key)) for pair in train]
    unknown = sum(wrong is None for wrong in keys)
    if unknown == len(train):
        raise UserError(
            f"negatives_file: {file}: names none of the {len(train)} training rows; was it made for others?"
        )
    lost = sum(key not in pages for wrong in keys for key in wrong or ())
    print(f"{file}: {unknown} of {len(train)} rows are not in it; {lost} of its negatives are no pages of these sets")
    return [
        pair._replace(negatives=[pages[key] for key in wrong or () if key in pages])
        for pair, wrong in zip(train, keys, strict=True)
    ]


def _first(params: Params, train: list[Pair], unfit: set[str]) -> list[Pair]:
    """The rows with the first `negatives` of their negatives, those left out whose page is `unfit` or the row's own.

    Raises:
        UserError: no row has any.
    """
    kept = []
    for pair in train:
        fit = (page for page in pair.negatives if page.key not in unfit and page.key != pair.page.key)
        kept.append(pair._replace(negatives=tuple(islice(fit, params.negatives))))
    fewer = sum(len(pair.negatives) < params.negatives for pair in kept)
    if not any(pair.negatives for pair in kept):
        raise UserError(
            f"negatives: {params.negatives}, but no row has one: {params.train_data} has no column {NEGATIVES}, and "
            f"negatives_file is {params.negatives_file!r}; `colintern mine` makes such a file"
        )
    print(
        f"{sum(len(pair.negatives) for pair in kept)} hard negatives; {fewer} of {len(kept)} rows have fewer than asked"
    )
    return kept


def row_image(path: Path, row: int) -> Image:
    """The page in one row of a parquet file.

    Its row group is read no further than the row, and let go of. At random a page of 300 kB costs 8 ms in groups of
    100 rows and up to 90 ms in groups of 1,000, for which memory has to hold such a group, compressed and not.

    Raises:
        InvalidImageError: see `decode_image`.
    """
    with ParquetFile(path, memory_map=True) as file:
        group = 0
        while row >= (size := file.metadata.row_group(group).num_rows):
            row, group = row - size, group + 1
        # No threads: they would not survive the fork of a data loader's process.
        for batch in file.iter_batches(8, [group], ["image"], use_threads=False):
            if row < len(batch):
                image = batch["image"][row].as_py()
                return decode_image(image["bytes"] if isinstance(image, dict) else image)
            row -= len(batch)
    raise AssertionError("a row group holds as many rows as its metadata says")


class Pairs(Dataset):
    """The rows of a training set, for the data loader.

    An item is {"query": str, "pages": the row's page, then its negatives}; a page is {"key": str} with its "features",
    or its "tiles" where the features are not known.
    """

    def __init__(self, rows: Sequence[Pair], features: PageFeatures):
        self.rows, self.cache, self.processor = rows, features.cache, features.processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"query": row.query, "pages": [self._page(page) for page in (row.page, *row.negatives)]}

    def _page(self, page: Page) -> dict[str, Any]:
        known = self.cache.get(page.key)
        found = {"tiles": self.processor.page_tiles(page.image())} if known is None else {"features": known}
        return {"key": page.key} | found


class Collator:
    """Items of `Pairs` to one batch of B rows with P pages: the B pages of the rows, then the negatives of all rows.

    `query` and `page` are inputs of the model, the pages' features left out. Those are in `features`, one page after
    another, where they are `known` (P,); the tiles of the others are in `tiles`; `counts` (P,) are tiles a page.
    `query_ids` (B,) and `page_ids` (P,) int64 are equal for queries of equal words and pages of equal bytes.
    """

    def __init__(self, processor: ColIntern3_5Processor):
        self.processor = processor

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        pages = [item["pages"][0] for item in items] + [page for item in items for page in item["pages"][1:]]
        # One tensor of each kind: every tensor a data loader's process sends costs a file descriptor.
        parts = {kind: [page[kind] for page in pages if kind in page] for kind in ("features", "tiles")}
        counts = [len(page["features"] if "features" in page else page["tiles"]) for page in pages]
        return {
            "query": dict(self.processor.process_queries([item["query"] for item in items])),
            "page": dict(self.processor.page_tokens(counts)),
            **{kind: torch.cat(found) for kind, found in parts.items() if found},
            "known": torch.tensor(["features" in page for page in pages]),
            "counts": torch.tensor(counts),
            "query_ids": torch.tensor([_number(_words_key(item["query"])) for item in items]),
            "page_ids": torch.tensor([_number(page["key"]) for page in pages]),
        }


def _words_key(query: str) -> str:
    return hashlib.sha256(" ".join(query.split()).encode()).hexdigest()


def _number(key: str) -> int:
    """A hash as a number that fits int64."""
    return int(key[:14], 16)
