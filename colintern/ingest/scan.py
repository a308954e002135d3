"""Every row of the data, looked at once before anything is trained on it: each page is decoded, on all cores."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from colintern.core.errors import UserError
from colintern.data.images import BadImage, decode
from colintern.data.index import Row
from colintern.data.trainset import POSITIVES
from colintern.ingest.collected import MAX_QUERY_CHARACTERS, query_fault
from colintern.storage.files import list_files
from colintern.storage.manifest import TRAIN_SUFFIXES
from colintern.storage.parallel import parallel_map


class Part(NamedTuple):
    """Parquet files of one split of one data set; `name` is what params call it, `fixed` if it is the hub's own.

    `corpus`: where rows find the pages they name by number. Such a set may lack files for the dev set, which is then
    drawn from its training rows.
    """

    name: str
    split: str  # train, dev, test, or corpus
    folder: Path
    files: Sequence[str]
    fixed: bool = False
    corpus: "Part | None" = None

    def __str__(self) -> str:
        return f"{self.name} ({self.split})"


class Seen(NamedTuple):
    """One row. `where` is its file and number, `key` the sha256 of its page's bytes, `fault` why it cannot be used.

    `is_cut`: the query was longer than `MAX_QUERY_CHARACTERS`.
    """

    where: str
    key: str
    size: tuple[int, int] | None
    query: str
    fault: str
    is_cut: bool = False


def look(parts: Sequence[Part]) -> dict[Part, list[Seen]]:
    """Every row of every part; of an evaluation set the pages, which have no query.

    Raises:
        UserError: a file is no parquet file, lacks a column, has one of a wrong type, or cannot be read.
    """
    whole = [part for part in parts if part.corpus is None]
    tasks = [(part, name, group) for part in whole for name in part.files for group in _groups(part, name)]
    seen: dict[Part, list[Seen]] = {part: [] for part in parts}
    blocks = parallel_map(_look, tasks, "checking pages", "block")
    for (part, _, _), rows in zip(tasks, blocks, strict=True):
        seen[part] += rows
    numbered = [(part, part.corpus) for part in parts if part.corpus]
    for part, corpus in numbered:
        seen[part] = [_named_page(row, seen[corpus]) for row in _queries(part)]
    for part, _ in numbered:
        if not part.files:
            _draw_dev([other for other, _ in numbered if other.name == part.name], seen)
    return seen


def _draw_dev(parts: Sequence[Part], seen: dict[Part, list[Seen]]) -> None:
    """Share the rows of a set that has no files for its dev set out among its splits."""
    rows = [row for part in parts for row in seen[part]]
    dev = held_out(row.key for row in rows if not row.fault)
    for part in parts:
        seen[part] = [row for row in rows if (row.key in dev) == (part.split == "dev")]


def held_out(keys: Iterable[str]) -> set[str]:
    """The pages whose rows are the dev set of a data set that has none: a fiftieth of them, at least one.

    A page's place among all of them is that of its hash, so the choice depends on nothing but the pages.
    """
    ranked = sorted(set(keys))
    return set(ranked[: max(1, len(ranked) // 50)])


def _queries(part: Part) -> Iterator[tuple[str, Any, Any]]:
    """(place, query, numbers of its pages) of each row."""
    for name in part.files:
        for number, row in enumerate(_read_rows(part.folder / name, ["query", POSITIVES])):
            yield f"{name}:{number}", row["query"], row[POSITIVES]


def _named_page(row: tuple[str, Any, Any], pages: Sequence[Seen]) -> Seen:
    where, query, numbers = row
    text, fault = query if isinstance(query, str) else "", query_fault(query)
    is_cut, text = len(text) > MAX_QUERY_CHARACTERS, text[:MAX_QUERY_CHARACTERS]
    number = numbers[0] if isinstance(numbers, list) and numbers else numbers
    if not isinstance(number, int) or not 0 <= number < len(pages):
        return Seen(where, "", None, text, fault or f"{POSITIVES}: {numbers!r:.80} is no row of the corpus")
    page = pages[number]
    fault = fault or (page.fault and f"its page, row {number}: {page.fault}")
    return Seen(where, page.key, page.size, text, fault, is_cut)


def _groups(part: Part, name: str) -> Iterator[tuple[int, int]]:
    """(row group, number of its first row) of a file."""
    file = _open(part.folder / name, _columns(part))
    first = 0
    for group in range(file.num_row_groups):
        yield group, first
        first += file.metadata.row_group(group).num_rows


def _columns(part: Part) -> list[str]:
    return ["image"] if part.split in ("test", "corpus") else ["image", "query"]


def _open(path: Path, columns: Sequence[str]) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: is not a parquet file: {error}") from error
    if lacking := sorted({*columns} - {*names}):
        raise UserError(f"{path}: has no column {' and '.join(lacking)}; it has {names}")
    for field in file.schema_arrow:
        if field.name in columns and (wanted := _type_fault(field)):
            raise UserError(f"{path}: column {field.name} is of the type {field.type}; it must hold {wanted}")
    return file


def _type_fault(field: pa.Field) -> str:
    """Say what a column must hold whose values cannot be read as that; "" if they can."""
    types = pa.types
    kind = field.type.value_type if types.is_dictionary(field.type) else field.type
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)
    if is_text or field.name == POSITIVES:
        return ""
    if field.name == "query":
        return "text"
    if field.name == "image":
        is_image = types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind)
        return "" if is_image else "the bytes of images"
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_boolean(kind)
    return "" if is_number else "numbers or text"


@contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    """Name the file whose rows cannot be read, where pyarrow names none."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: its rows cannot be read, it is damaged: {error}; fetch or write it again") from error


def _read_rows(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    file = _open(path, columns)
    with _named_in_errors(path):
        return file.read(columns=columns).to_pylist()


@lru_cache(maxsize=1)
def _opened(path: Path, changed: int) -> pq.ParquetFile:
    """The file, opened once for its row groups: each time, its list of all of them is read."""
    return pq.ParquetFile(path)


def _look(task: tuple[Part, str, tuple[int, int]]) -> list[Seen]:
    part, name, (group, first) = task
    path = part.folder / name
    known: dict[str, tuple[tuple[int, int] | None, str]] = {}
    data, key = b"", ""
    rows = []
    with _named_in_errors(path):
        # A few rows at a time: as Python objects, pages asked for by several queries take memory several times.
        batches = _opened(path, path.stat().st_mtime_ns).iter_batches(8, [group], _columns(part))
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=first):
            last, (data, fault) = data, _bytes(row["image"])
            if data != last:  # to compare takes a tenth of the time, and most rows of a page stand next to each other
                key = hashlib.sha256(data).hexdigest() if data else ""
            if key not in known:
                known[key] = (None, fault) if fault else _size(data)
            size, fault = known[key] if data else (None, fault)
            query = row.get("query", "")
            if "query" in row:
                fault = fault or query_fault(query)
            text = query if isinstance(query, str) else ""
            is_cut, text = len(text) > MAX_QUERY_CHARACTERS, text[:MAX_QUERY_CHARACTERS]
            rows.append(Seen(f"{name}:{number}", key, size, text, fault, is_cut))
    return rows


def _bytes(image: Any) -> tuple[bytes, str]:
    """The bytes of a row's image, or why it has none. What a row only points at is never fetched."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(data, bytes):
        return data, "" if data else "image: empty: 0 bytes"
    place = image.get("path") if isinstance(image, dict) else image
    return b"", f"image: refused: the row holds no bytes, only {place!r:.80}" if place else "image: missing"


def _size(data: bytes) -> tuple[tuple[int, int] | None, str]:
    try:
        return decode(data).size, ""
    except BadImage as error:
        return None, f"image: {error}"


def usable(seen: dict[Part, list[Seen]]) -> Iterator[Row]:
    """The rows without a fault of the training sets, and the pages of a corpus, for the index."""
    for part, found in seen.items():
        for row in found if part.split != "test" else ():
            if not row.fault:
                file, _, number = row.where.rpartition(":")
                yield Row(part.name, part.split, file, int(number), row.key, row.query)


def rows_of(part: Part, table: str, columns: list[str]) -> list[dict[str, Any]]:
    """The rows of a table (corpus, queries or qrels) of an evaluation set.

    Raises:
        UserError: a file is no parquet file, lacks a column, has one of a wrong type, or cannot be read.
    """
    files = list_files(part.folder / table, TRAIN_SUFFIXES, recursive=False).files
    return [row for path in files for row in _read_rows(path, columns)]
