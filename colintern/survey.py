"""Every row of the data, looked at once before anything is trained on it: each page is decoded, on all cores."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from tokenizers import Tokenizer

from colintern.collected import query_fault
from colintern.images import BadImage, decode
from colintern.index import Row
from colintern.language import languages
from colintern.parallel import spread
from colintern.params import UserError

SPLITS = {"train": "train", "dev": "test"}  # how the hub's training sets call them


class Part(NamedTuple):
    """Parquet files of one split of one data set; `name` is what params call it, `fixed` if it is the hub's own."""

    name: str
    split: str  # train, dev or test
    folder: Path
    files: Sequence[str]
    fixed: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.split})"


class Seen(NamedTuple):
    """One row. `where` is its file and number, `key` the sha256 of its page's bytes, `fault` why it cannot be used."""

    where: str
    key: str
    size: tuple[int, int] | None
    query: str
    fault: str


def look(parts: Sequence[Part]) -> dict[Part, list[Seen]]:
    """Every row of every part; of an evaluation set the pages, which have no query.

    Raises:
        UserError: a file is no parquet file, or lacks a column.
    """
    tasks = [(part, name, group) for part in parts for name in part.files for group in _groups(part, name)]
    seen: dict[Part, list[Seen]] = {part: [] for part in parts}
    blocks = spread(_look, tasks, "checking pages", "block")
    for (part, _, _), rows in zip(tasks, blocks, strict=True):
        seen[part] += rows
    return seen


def _groups(part: Part, name: str) -> Iterator[tuple[int, int]]:
    """(row group, number of its first row) of a file."""
    path = part.folder / name
    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not a parquet file: {error}") from error
    if lacking := {"image", "query"} - {"query" if part.split == "test" else ""} - set(file.schema_arrow.names):
        raise UserError(f"{path}: has no column {' and '.join(sorted(lacking))}; it has {file.schema_arrow.names}")
    first = 0
    for group in range(file.num_row_groups):
        yield group, first
        first += file.metadata.row_group(group).num_rows


def _look(task: tuple[Part, str, tuple[int, int]]) -> list[Seen]:
    part, name, (group, first) = task
    columns = ["image"] if part.split == "test" else ["image", "query"]
    # A few rows at a time: as Python objects, pages asked for by several queries take memory several times.
    batches = pq.ParquetFile(part.folder / name).iter_batches(8, [group], columns)
    known: dict[str, tuple[tuple[int, int] | None, str]] = {}
    rows = []
    for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=first):
        data, fault = _bytes(row["image"])
        key = hashlib.sha256(data).hexdigest() if data else ""
        if key not in known:
            known[key] = (None, fault) if fault else _size(data)
        size, fault = known[key] if data else (None, fault)
        query = row.get("query", "")
        if part.split != "test":
            fault = fault or query_fault(query)
        rows.append(Seen(f"{name}:{number}", key, size, query if isinstance(query, str) else "", fault))
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
    """The rows without a fault of the training sets, for the index."""
    for part, found in seen.items():
        for row in found if part.split != "test" else ():
            if not row.fault:
                file, _, number = row.where.rpartition(":")
                yield Row(part.name, part.split, file, int(number), row.key, row.query)


def rows_of(part: Part, table: str, columns: list[str]) -> list[dict[str, Any]]:
    """The rows of a table (corpus, queries or qrels) of an evaluation set.

    Raises:
        UserError: a file lacks a column.
    """
    rows = []
    for path in sorted(part.folder.glob(f"{table}/*.parquet")):
        file = pq.ParquetFile(path)
        if lacking := set(columns) - set(file.schema_arrow.names):
            raise UserError(f"{path}: has no column {' and '.join(sorted(lacking))}; it has {file.schema_arrow.names}")
        rows += file.read(columns=columns).to_pylist()
    return rows


def survey(seen: dict[Part, list[Seen]], tokenizer: Path) -> dict[str, dict[str, Any]]:
    """{"name (split)": counts and histograms}, all that is known without params. A query's tokens are its text's."""
    words = Tokenizer.from_file(str(tokenizer))
    found = {}
    for part, rows in seen.items():
        good = [row for row in rows if not row.fault]
        sizes = {row.key: row.size for row in good if row.size}
        if part.split == "test":
            queries = [row["query"] for row in rows_of(part, "queries", ["query"])]
            asked = Counter(row["corpus-id"] for row in rows_of(part, "qrels", ["corpus-id"]))
            copies = len(good) - len(sizes)
        else:
            queries = [row.query for row in good]
            asked = Counter(row.key for row in good)
            copies = len(good) - len({(row.key, row.query) for row in good})
        tokens = (
            len(each.ids)
            for start in range(0, len(queries), 1000)  # an encoding takes kilobytes
            for each in words.encode_batch(queries[start : start + 1000], add_special_tokens=False)
        )
        found[str(part)] = {
            "rows": len(rows),
            "pages": len(sizes),
            "queries": len(queries),
            "duplicates": copies,
            "quarantined": len(rows) - len(good),
            "bytes": sum((part.folder / name).stat().st_size for name in part.files),
            "page sizes": _histogram(f"{width}x{height}" for width, height in sizes.values()),
            "queries of a page": _histogram(asked.values()),
            "tokens of a query": _histogram(tokens),
            "languages, guessed": languages(queries),
        }
    return found


def _histogram(values: Any) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}
