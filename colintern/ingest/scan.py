"""Scan every row of the data once before anything is trained on it: each page is decoded, on all cores."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from colintern.core.errors import UserError
from colintern.data.images import InvalidImageError, decode_image
from colintern.data.training_set import POSITIVES, IndexRow
from colintern.ingest.documents import MAX_QUERY_CHARACTERS, find_query_error
from colintern.storage.files import list_files
from colintern.storage.manifest import TRAIN_SUFFIXES
from colintern.storage.parallel import parallel_map

TEXT_TYPES = "(large_)?string(_view)?|null"
COLUMN_TYPES = {  # column -> types whose values can be read, and what it must hold in words
    "query": (TEXT_TYPES, "text"),
    "image": (f"struct<.*>|(large_)?binary|{TEXT_TYPES}", "the bytes of images"),
    POSITIVES: (".*", ""),
}
ID_TYPES = (rf"u?int\d+|halffloat|float|double|decimal.*|bool|{TEXT_TYPES}", "numbers or text")
DEV_FRACTION = 50  # one page in so many is the dev set of a data set that has none


class DatasetSplit(NamedTuple):
    """Parquet files of one split of a data set; `name` is what params call it.

    `is_published`: the split is that of a data set of the hub. `corpus`: where rows find the pages that they name by
    number. Such a set may lack files for the dev set, which is then drawn from its training rows.
    """

    name: str
    split: str  # train, dev, test, or corpus
    folder: Path
    files: Sequence[str]
    is_published: bool = False
    corpus: "DatasetSplit | None" = None

    def __str__(self) -> str:
        return f"{self.name} ({self.split})"


class RowInfo(NamedTuple):
    """One row. `where` is its file and number, `key` the sha256 of its page's bytes, `error` why it cannot be used."""

    where: str
    key: str
    size: tuple[int, int] | None
    query: str
    error: str
    is_cut: bool = False  # the query was longer than MAX_QUERY_CHARACTERS


ScannedRows = dict[DatasetSplit, list[RowInfo]]


def scan_rows(splits: Sequence[DatasetSplit]) -> ScannedRows:
    """Return every row of every split; of an evaluation set the pages, which have no query.

    Raises:
        UserError: a file is not a parquet file, lacks a column, has one of a wrong type, or cannot be read.
    """
    tasks = [
        (split, name, group)
        for split in splits
        if split.corpus is None
        for name in split.files
        for group in _list_row_groups(split, name)
    ]
    rows: ScannedRows = {split: [] for split in splits}
    groups = parallel_map(_scan_row_group, tasks, "checking pages", "block")
    for (split, _, _), group_rows in zip(tasks, groups, strict=True):
        rows[split] += group_rows
    numbered = [(split, split.corpus) for split in splits if split.corpus]
    for split, corpus in numbered:
        rows[split] = [_look_up_page(*row, rows[corpus]) for row in _iter_numbered_rows(split)]
    for split, _ in numbered:
        if not split.files:
            _draw_dev_rows([other for other, _ in numbered if other.name == split.name], rows)
    return rows


def select_dev_pages(keys: Iterable[str]) -> set[str]:
    """Return the pages whose rows are the dev set of a data set that has none: at least one.

    They are the first by their hashes, so the choice depends on nothing but the pages.
    """
    ranked = sorted(set(keys))
    return set(ranked[: max(1, len(ranked) // DEV_FRACTION)])


def valid_rows(rows: ScannedRows) -> Iterator[IndexRow]:
    """Yield the rows of the training sets that can be used, and such pages of a corpus, for the index."""
    for split, found in rows.items():
        for row in found if split.split != "test" else ():
            if not row.error:
                file, _, number = row.where.rpartition(":")
                yield IndexRow(split.name, split.split, file, int(number), row.key, row.query)


def read_beir_table(split: DatasetSplit, table: str, columns: list[str]) -> list[dict[str, Any]]:
    """Read the rows of a table (corpus, queries or qrels) of an evaluation set.

    Raises:
        UserError: a file is not a parquet file, lacks a column, has one of a wrong type, or cannot be read.
    """
    files = list_files(split.folder / table, TRAIN_SUFFIXES, recursive=False).files
    return [row for path in files for row in _read_file(path, columns)]


def _draw_dev_rows(splits: Sequence[DatasetSplit], rows: ScannedRows) -> None:
    """Distribute the rows of a set that has no files for its dev set to its splits."""
    all_rows = [row for split in splits for row in rows[split]]
    dev = select_dev_pages(row.key for row in all_rows if not row.error)
    for split in splits:
        rows[split] = [row for row in all_rows if (row.key in dev) == (split.split == "dev")]


def _iter_numbered_rows(split: DatasetSplit) -> Iterator[tuple[str, object, object]]:
    """Yield (place, query, numbers of its pages) of each row."""
    for name in split.files:
        for number, row in enumerate(_read_file(split.folder / name, ["query", POSITIVES])):
            yield f"{name}:{number}", row["query"], row[POSITIVES]


def _look_up_page(where: str, query: object, numbers: object, pages: Sequence[RowInfo]) -> RowInfo:
    number = numbers[0] if isinstance(numbers, list) and numbers else numbers
    if not isinstance(number, int) or not 0 <= number < len(pages):
        error = f"{POSITIVES}: {numbers!r:.80} is no row of the corpus"
        return _build_row(where, "", None, query, find_query_error(query) or error)
    page = pages[number]
    error = page.error and f"its page, row {number}: {page.error}"
    return _build_row(where, page.key, page.size, query, find_query_error(query) or error)


def _build_row(where: str, key: str, size: tuple[int, int] | None, query: object, error: str) -> RowInfo:
    text = query if isinstance(query, str) else ""
    return RowInfo(where, key, size, text[:MAX_QUERY_CHARACTERS], error, len(text) > MAX_QUERY_CHARACTERS)


def _list_row_groups(split: DatasetSplit, name: str) -> Iterator[tuple[int, int]]:
    """Yield (row group, number of its first row) of a file."""
    file = _open(split.folder / name, _list_columns(split))
    first = 0
    for group in range(file.num_row_groups):
        yield group, first
        first += file.metadata.row_group(group).num_rows


def _list_columns(split: DatasetSplit) -> list[str]:
    return ["image"] if split.split in ("test", "corpus") else ["image", "query"]


def _open(path: Path, columns: Sequence[str]) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: is not a parquet file: {error}") from error
    if missing := sorted({*columns} - {*schema.names}):
        raise UserError(f"{path}: has no column {' and '.join(missing)}; it has {schema.names}")
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        types, content = COLUMN_TYPES.get(field.name, ID_TYPES)
        if field.name in columns and not re.fullmatch(types, str(kind), re.DOTALL):
            raise UserError(f"{path}: column {field.name} is of the type {field.type}; it must hold {content}")
    return file


@contextmanager
def _name_damaged_file(path: Path) -> Iterator[None]:
    """Name the file whose rows cannot be read, where pyarrow names none."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: its rows cannot be read, it is damaged: {error}; fetch or write it again") from error


def _read_file(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    file = _open(path, columns)
    with _name_damaged_file(path):
        return file.read(columns=columns).to_pylist()


@lru_cache(maxsize=1)
def _open_once(path: Path, changed: int) -> pq.ParquetFile:
    """Open a file once for all its row groups: each time, the list of all of them is read."""
    return pq.ParquetFile(path)


def _scan_row_group(task: tuple[DatasetSplit, str, tuple[int, int]]) -> list[RowInfo]:
    split, name, (group, first) = task
    path = split.folder / name
    pages: dict[str, tuple[tuple[int, int] | None, str]] = {}  # key -> size, error
    data, key = b"", ""
    rows = []
    with _name_damaged_file(path):
        # A few rows at a time: as Python objects, pages of several queries take memory several times.
        batches = _open_once(path, path.stat().st_mtime_ns).iter_batches(8, [group], _list_columns(split))
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=first):
            previous, (data, error) = data, _get_image_bytes(row["image"])
            if data != previous:  # comparing takes a tenth of the time, and rows of a page stand next to each other
                key = hashlib.sha256(data).hexdigest() if data else ""
            size = None
            if not error:
                if key not in pages:
                    pages[key] = _decode_size(data)
                size, error = pages[key]
            query = row.get("query", "")
            error = error or (find_query_error(query) if "query" in row else "")
            rows.append(_build_row(f"{name}:{number}", key, size, query, error))
    return rows


def _get_image_bytes(image: object) -> tuple[bytes, str]:
    """Return the bytes of a row's image, or why it has none. What a row only points at is never fetched."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(data, bytes):
        return data, "" if data else "image: empty: 0 bytes"
    target = image.get("path") if isinstance(image, dict) else image
    return b"", f"image: refused: the row holds no bytes, only {target!r:.80}" if target else "image: missing"


def _decode_size(data: bytes) -> tuple[tuple[int, int] | None, str]:
    try:
        return decode_image(data).size, ""
    except InvalidImageError as error:
        return None, f"image: {error}"
