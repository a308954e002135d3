"""From files to batches: the rows of the training set, and what the model is given of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, Image, load_dataset
from PIL.Image import Image as PILImage
from pyarrow import parquet
from torch.utils.data import Dataset as TorchDataset

from colintern import negatives
from colintern.features import Page, PageFeatures
from colintern.images import decode
from colintern.params import Params, UserError, root
from colintern.processor import ColIntern3_5Processor
from colintern.trainset import NEGATIVES, POSITIVES, TrainingSet, by_number, held_out, quarantined, training_data

SPLITS = ("train", "test")  # of the hub's training sets; test is the dev set


class Row(NamedTuple):
    """A query, the page that answers it, and pages that do not though they look like it."""

    query: str
    page: Page
    negatives: Sequence[Page] = ()


def rows(params: Params) -> dict[str, list[Row]]:
    """The training sets' rows by split (train, and test: the dev set); images stay on disk until they are needed.

    Rows in quarantine are left out. In the training split the rows of a set occur as often as its weight says.

    Raises:
        UserError: the manifest or a file is missing or changed, a set lacks a split, or the hard negatives that
            params ask for are not there.
    """
    data, bad = training_data(params), quarantined()
    corpus, unfit = _corpus(data.corpus, bad) if data.corpus else ([], set())
    parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for one in data.sets:
        numbered = by_number(one.folder / one.files[0])
        for split, found in (_numbered(one, corpus, bad) if numbered else _paired(one, bad)).items():
            parts[split] += found * (one.weight if split == "train" else 1)
    if params.negatives:
        if data.negatives:
            parts["train"] = _mined(parts["train"], corpus, data.negatives)
        parts["train"] = _first(params, parts["train"], unfit | {row.page.key for row in parts["test"]})
    return parts


def candidates(params: Params) -> tuple[list[Row], list[Page], set[str]]:
    """The training rows as the sets have them, all pages that training knows, and the keys of those among them that
    may be nobody's negative: pages of the dev set, and pages in quarantine."""
    data, bad = training_data(params), quarantined()
    parts = rows(replace(params, negatives=0))
    corpus, unfit = _corpus(data.corpus, bad) if data.corpus else ([], set())
    unfit |= {row.page.key for row in parts["test"]}
    distinct = {page.key: page for page in (*(row.page for row in parts["train"]), *corpus)}
    broken = distinct.keys() & unfit - {row.page.key for row in parts["train"]}
    return parts["train"], [page for key, page in distinct.items() if key not in broken], unfit


def _corpus(one: TrainingSet, bad: set[tuple[str, str]]) -> tuple[list[Page], set[str]]:
    """The pages of a corpus in its order, and the keys of those in quarantine."""
    table, places = _table(one, one.files, ["image"])
    found = pages(table)
    return found, {page.key for page, place in zip(found, places, strict=True) if (one.name, place) in bad}


def _table(one: TrainingSet, files: list[str], columns: list[str]) -> tuple[Dataset, list[str]]:
    """Columns of some files of a set, memory-mapped, and the place of each row as quarantine names it."""
    table = load_dataset(
        "parquet",
        data_files=[str(one.folder / file) for file in files],
        split="train",
        cache_dir=str(root() / "data" / ".arrow"),
    ).select_columns(columns)
    if "image" in columns:
        table = table.cast_column("image", Image(decode=False))
    places = [f"{f}:{n}" for f in files for n in range(parquet.read_metadata(one.folder / f).num_rows)]
    return table, places


def _good(one: TrainingSet, files: list[str], columns: list[str], bad: set[tuple[str, str]]) -> Dataset:
    """`_table` without the rows in quarantine."""
    table, places = _table(one, files, columns)
    good = [index for index, place in enumerate(places) if (one.name, place) not in bad]
    return table.select(good) if len(good) < len(table) else table


def _paired(one: TrainingSet, bad: set[tuple[str, str]]) -> dict[str, list[Row]]:
    """The rows of a set that hold their pages."""
    found = {}
    for split in SPLITS:
        files = one.split(split)
        if not files:
            raise UserError(f"train_data: {one.folder} has no file {split}-*.parquet")
        table = _good(one, files, ["query", "image"], bad)
        found[split] = [Row(query, page) for query, page in zip(table["query"], pages(table), strict=True)]
    return found


def _numbered(one: TrainingSet, corpus: Sequence[Page], bad: set[tuple[str, str]]) -> dict[str, list[Row]]:
    """The rows of a set that name their pages by number; without files for it, the dev set is drawn from them."""
    found = {}
    for split in SPLITS:
        if files := one.split(split):
            columns = [name for name in ("query", POSITIVES, NEGATIVES) if name in _columns(one)]
            found[split] = [_row(row, corpus) for row in _good(one, files, columns, bad)]
    if "test" not in found:
        dev = held_out(row.page.key for row in found["train"])
        found["test"] = [row for row in found["train"] if row.page.key in dev]
        found["train"] = [row for row in found["train"] if row.page.key not in dev]
    return found


def _columns(one: TrainingSet) -> list[str]:
    return parquet.read_schema(one.folder / one.files[0]).names


def _row(row: dict[str, Any], corpus: Sequence[Page]) -> Row:
    right = row[POSITIVES] if isinstance(row[POSITIVES], list) else [row[POSITIVES]]
    wrong = [number for number in row.get(NEGATIVES) or () if number not in right]
    return Row(row["query"], corpus[right[0]], [corpus[number] for number in wrong])


def _mined(train: list[Row], corpus: Sequence[Page], file: Path) -> list[Row]:
    """The rows with the negatives of a mined file.

    Raises:
        UserError: the file knows none of the rows.
    """
    found = negatives.read(file)
    by_key = {page.key: page for page in (*(row.page for row in train), *corpus)}
    keys = [found.get((row.query, row.page.key)) for row in train]
    unknown = sum(key is None for key in keys)
    if unknown == len(train):
        raise UserError(
            f"negatives_file: {file}: names none of the {len(train)} training rows; was it made for others?"
        )
    lost = sum(key not in by_key for row in keys for key in row or ())
    print(f"{file}: {unknown} of {len(train)} rows are not in it; {lost} of its negatives are no pages of these sets")
    return [
        row._replace(negatives=[by_key[key] for key in wrong or () if key in by_key])
        for row, wrong in zip(train, keys, strict=True)
    ]


def _first(params: Params, train: list[Row], unfit: set[str]) -> list[Row]:
    """The rows with the first `negatives` of their negatives, those left out whose page is `unfit` or the row's own.

    Raises:
        UserError: no row has any.
    """
    kept = []
    for row in train:
        fit = (page for page in row.negatives if page.key not in unfit and page.key != row.page.key)
        kept.append(row._replace(negatives=tuple(islice(fit, params.negatives))))
    fewer = sum(len(row.negatives) < params.negatives for row in kept)
    if not any(row.negatives for row in kept):
        raise UserError(
            f"negatives: {params.negatives}, but no row has one: {params.train_data} has no column {NEGATIVES}, and "
            f"negatives_file is {params.negatives_file!r}; `colintern mine` makes such a file"
        )
    print(
        f"{sum(len(row.negatives) for row in kept)} hard negatives; {fewer} of {len(kept)} rows have fewer than asked"
    )
    return kept


def pages(table: Dataset) -> list[Page]:
    """The page of each row, keyed by the bytes of its file; `datasets` keeps the keys beside its copy of the rows."""
    keys = table.map(_keys, input_columns="image", batched=True, batch_size=100, remove_columns=table.column_names)
    return [Page(key, partial(_row_image, table, index)) for index, key in enumerate(keys["page"])]


def _keys(images: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {"page": [hashlib.sha256(image["bytes"]).hexdigest() for image in images]}


def _row_image(table: Dataset, index: int) -> PILImage:
    return decode(table[index]["image"]["bytes"])


class Pairs(TorchDataset):
    """The rows of a training set, for the data loader.

    An item is {"query": str, "pages": the row's page, then its negatives}; a page is {"key": str} with its "features",
    or its "tiles" where the features are not known.
    """

    def __init__(self, rows: Sequence[Row], features: PageFeatures):
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
