"""Every row of the data, looked at once before anything is trained on it.

Each page is decoded and each query read, on all cores. A training row that cannot be used is quarantined: it costs one
row. An evaluation set has to be whole, or its numbers would be another set's; and no page may be in two splits.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from tqdm.auto import tqdm

from colintern.collected import query_fault
from colintern.images import BadImage, decode
from colintern.own import Own
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
    workers = min(len(tasks), os.cpu_count() or 1) or 1
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,  # a fork would copy pyarrow's threads
        tqdm(total=len(tasks) or None, desc="checking pages", unit="block", disable=None) as bar,
    ):
        for (part, _, _), rows in zip(tasks, pool.map(_look, tasks), strict=True):
            seen[part] += rows
            bar.update()
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
    table = pq.ParquetFile(part.folder / name).read_row_group(group, columns=columns)
    known: dict[str, tuple[tuple[int, int] | None, str]] = {}
    rows = []
    for number, row in enumerate(table.to_pylist(), start=first):
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


def quarantine(seen: dict[Part, list[Seen]], own: dict[str, Own]) -> tuple[list[dict[str, str]], dict[str, int]]:
    """The rows that are left out, {source, row, reason} each, and how many rows each source has.

    `own`: the folders of documents, whose bad rows were found when they were made.
    """
    rows = Counter({name: folder.summary["rows"] for name, folder in own.items()})
    bad = [
        {"source": name, "row": row["where"], "reason": row["reason"]}
        for name, folder in own.items()
        for row in folder.summary["bad"]
    ]
    for part, found in seen.items():
        if part.name not in own:
            rows[part.name] += len(found)
        bad += [{"source": part.name, "row": row.where, "reason": row.fault} for row in found if row.fault]
    return bad, dict(rows)


def check(seen: dict[Part, list[Seen]], bad: Sequence[dict[str, str]], rows: dict[str, int], most: float) -> None:
    """Refuse data that shall not be trained on or measured with; see the functions it calls.

    Raises:
        UserError: the first fault found.
    """
    check_share(bad, rows, most)
    for part, found in seen.items():
        if part.split == "test":
            check_whole(part, found)
            check_judgements(part)
    check_leaks(seen)


def check_whole(part: Part, found: Sequence[Seen]) -> None:
    """Raises UserError where an evaluation set has a page that cannot be read: without it, it is another set."""
    if bad := [row for row in found if row.fault]:
        raise UserError(
            f"benchmarks: {part.name}: {bad[0].where}: {bad[0].fault} ({len(bad)} such pages); an evaluation set must "
            f"be whole"
        )


def check_judgements(part: Part) -> None:
    """Hold the queries and qrels of a local evaluation set against each other and its pages.

    Raises:
        UserError: an empty query, a query that no qrel names, or a qrel whose query or page is missing.
    """
    pages, queries, judged = (
        [row for path in sorted(part.folder.glob(f"{table}/*.parquet")) for row in _rows(path, columns)]
        for table, columns in (
            ("corpus", ["corpus-id"]),
            ("queries", ["query-id", "query"]),
            ("qrels", ["query-id", "corpus-id"]),
        )
    )
    page_ids, query_ids = {row["corpus-id"] for row in pages}, {row["query-id"] for row in queries}
    asked = {row["query-id"] for row in judged}
    faults = [f"query {row['query-id']}: {fault}" for row in queries if (fault := query_fault(row["query"]))]
    faults += [
        f"query {row['query-id']}: no qrel names a page for it" for row in queries if row["query-id"] not in asked
    ]
    for row in judged:
        if row["query-id"] not in query_ids:
            faults.append(f"qrels: query {row['query-id']} is not among the queries")
        if row["corpus-id"] not in page_ids:
            faults.append(f"qrels: the page {row['corpus-id']} of query {row['query-id']} is not in the corpus")
    if faults:
        raise UserError(
            f"benchmarks: {part.name}: {faults[0]} ({len(faults)} such rows); an evaluation set must be whole"
        )


def _rows(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    file = pq.ParquetFile(path)
    if lacking := set(columns) - set(file.schema_arrow.names):
        raise UserError(f"{path}: has no column {' and '.join(sorted(lacking))}; it has {file.schema_arrow.names}")
    return file.read(columns=columns).to_pylist()


def check_share(bad: Sequence[dict[str, str]], rows: dict[str, int], most: float) -> None:
    """Stop where more than the share `most` of a source's rows is bad; `rows`: how many each source has.

    Raises:
        UserError: with the source, the numbers and the first rows.
    """
    for source, count in Counter(entry["source"] for entry in bad).items():
        if count > most * rows[source]:
            first = "".join(f"\n  {e['row']}: {e['reason']}" for e in bad if e["source"] == source)
            shown = "\n".join(first.split("\n")[:6])
            raise UserError(
                f"{source}: {count} of {rows[source]} rows cannot be used, more than max_bad_fraction: {most}; all are "
                f"named in data/quarantine.json; the first:{shown}"
            )


def check_leaks(seen: dict[Part, list[Seen]]) -> None:
    """No page, by its bytes, in two of train, dev and an evaluation set.

    A hub data set's own train and dev split are left as they are published.

    Raises:
        UserError: names both rows.
    """
    for left, right in _pairs(seen):
        first = {row.key: row for row in seen[left] if not row.fault}
        both = [(first[row.key], row) for row in seen[right] if not row.fault and row.key in first]
        if both:
            mine, other = both[0]
            raise UserError(
                f"the same page is in {left}, {mine.where}, and in {right}, {other.where} "
                f"({len({row.key for _, row in both})} such pages); take them out of one of the two"
            )


def _pairs(parts: Iterable[Part]) -> Iterator[tuple[Part, Part]]:
    order = {"train": 0, "dev": 1, "test": 2}
    ranked = sorted(parts, key=lambda part: order[part.split])
    for left in ranked:
        for right in ranked:
            same_hub = left.fixed and left.name == right.name
            if order[left.split] < order[right.split] and not same_hub:
                yield left, right
